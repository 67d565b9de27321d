"""Networks of one's own, in place of those that a notebook's parameters describe."""

import hashlib
import inspect

from torch import nn

from atoplib.checkpoints import OF_ONES_OWN
from atoplib.fingerprints import model_fingerprint


def architecture_of(network: nn.Module) -> str:
    """What its checkpoint says in place of a name that can be built."""
    return f"{OF_ONES_OWN}{type(network).__qualname__}"


def fingerprint_of(network: nn.Module) -> str:
    """16 hex digits of a network as it was given: its structure, its weights, and the code of its classes where that is at
    hand. One that has the weights with which an earlier call left it (``remember``) is still the one that was given then.
    """
    given, left = getattr(network, "_given_and_left", ("", ""))
    now = present(network)
    return given if now == left else now


def remember(network: nn.Module, given: str) -> None:
    """Note on a network that was trained, or whose training was cut off, by which fingerprint it was given."""
    network._given_and_left = given, present(network)


def present(network: nn.Module) -> str:
    """The fingerprint of a network as it is."""
    classes = {type(part) for part in network.modules()} - {nn.Module}
    codes = sorted(code_of(kind) for kind in classes if not kind.__module__.startswith(("torch.", "torchvision.")))
    return hashlib.sha256("\n".join([model_fingerprint(network), *codes]).encode()).hexdigest()[:16]


def code_of(kind: type) -> str:
    """The source of a class, or only its name where there is none to be found."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__
