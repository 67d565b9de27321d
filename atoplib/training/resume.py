"""How a training is found again: what it depends on, its state in the run's directory; signals to end it."""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from atoplib.checkpoints import load_state, save_state
from atoplib.data import Split, fingerprint
from atoplib.files import read_json, write_json
from atoplib.hashing import environment, function_hash, json_hash, model_hash
from atoplib.runs import Run

IDENTITY = "training.json"
RESULTS = ("state.pt*", "*.safetensors", "metrics.json", "figures", "pictures", IDENTITY)
_GIVEN: WeakKeyDictionary[nn.Module, dict[Path, tuple[dict[str, Any], str]]] = WeakKeyDictionary()
"""The weights with which this process gave a network to the training of a run, and the hash of the network
as it was left: a cell that is executed again means the network as it was given, not what the training made
of it meanwhile."""


class Record:
    """What a training depends on, and its state, in a run's directory. See ``fit`` for the arguments."""

    def __init__(
        self,
        run: Run,
        functions: Sequence[Callable[..., Any] | None],
        settings: Mapping[str, Any],
        networks: Mapping[str, nn.Module],
        data: Split,
        notify: Callable[[str], None],
    ) -> None:
        self.run, self.networks, self.notify = run, networks, notify
        for network in networks.values():
            given, left = _GIVEN.setdefault(network, {}).get(run.path, ({}, ""))
            if left and model_hash(network) == left:
                network.load_state_dict(given)
            else:
                _GIVEN[network][run.path] = deepcopy(network.state_dict()), ""
        device = next(next(iter(networks.values())).parameters()).device
        given = {f"the {name} that was given": model_hash(network) for name, network in networks.items()}
        self.identity = given | {
            "the step, or what it refers to": json_hash([each and function_hash(each) for each in functions]),
            "settings of the training": json_hash(dict(settings)),
            "the training images": fingerprint(data),
            "torch, Python or the kind of device": json_hash(environment(device)),
        }

    def begin(self) -> dict[str, Any] | None:
        """The state to go on from, None at the start. What another training left here is moved aside, and
        said."""
        path = self.run.path / IDENTITY
        before = read_json(path) or {}
        changed = [name for name in before | self.identity if before.get(name) != self.identity.get(name)]
        if changed and any(self.run.path.glob("state.pt*")):
            folder = self.run.supersede(RESULTS)
            # A step refers to its networks: another network is not another step.
            reasons = [name for name in changed if name.endswith("given")] or changed
            reason = f"changed: {', '.join(reasons)}" if before else "it is not noted on what it depended"
            self.notify(f"Trained anew, not loaded ({reason}). What was there is kept in {folder}.")
        write_json(path, self.identity)
        state, note = load_state(self.run.state_path)
        if note:
            self.notify(note)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, the one before as ``state.pt.previous``."""
        save_state(self.run.state_path, state)

    def leave(self) -> None:
        """Remember how the networks are left."""
        for network in self.networks.values():
            _GIVEN[network][self.run.path] = _GIVEN[network][self.run.path][0], model_hash(network)


class Interruption:
    """Holds a first Ctrl-C back until ``check`` is called, so that no step is cut in half; a second one
    comes at once.

    A scheduler's SIGTERM counts as a Ctrl-C, but never comes at once: it may be sent to a whole group of
    processes that pass it on to each other. Outside the main thread, where Python allows no handler (and
    delivers no signal), it does nothing.
    """

    def __enter__(self) -> "Interruption":
        self.asked, self.pressed, self.before = False, False, {}
        with suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            if handler is not None:
                signal.signal(number, handler)

    def _ask(self, number: int, *_: object) -> None:
        if number == signal.SIGINT and self.pressed:
            raise KeyboardInterrupt
        self.asked, self.pressed = True, self.pressed or number == signal.SIGINT

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there was one."""
        if self.asked:
            raise KeyboardInterrupt
