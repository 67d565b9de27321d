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
    hand. One that was trained since, by an earlier call on the same object, is still the one that was given.
    """
    found = getattr(network, "_given_as", None)
    if found is None:
        classes = {type(part) for part in network.modules()} - {nn.Module}
        codes = sorted(code_of(kind) for kind in classes if not kind.__module__.startswith(("torch.", "torchvision.")))
        found = hashlib.sha256("\n".join([model_fingerprint(network), *codes]).encode()).hexdigest()[:16]
        network._given_as = found
    return found


def code_of(kind: type) -> str:
    """The source of a class, or only its name where there is none to be found."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__
