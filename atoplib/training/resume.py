"""How a training is found again: what it depends on, its state in the run's directory; signals to end it."""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

from torch import nn

from atoplib import hashing
from atoplib.checkpoints import load_state
from atoplib.data import Split, fingerprint
from atoplib.files import read_json, write_json
from atoplib.runs import Run

IDENTITY = "training.json"
RESULTS = ("state.pt*", "*.safetensors", "metrics.json", "figures", "pictures", IDENTITY)


def begin(
    run: Run,
    functions: Sequence[Callable[..., Any] | None],
    settings: Mapping[str, Any],
    networks: Mapping[str, nn.Module],
    data: Split,
    notify: Callable[[str], None],
) -> dict[str, Any] | None:
    """The state in a run's directory to go on from, None at the start; arguments as ``fit``. What a training
    that depended on something else left there is moved aside, and said.

    A cell that is executed again means the networks as they were given, not what the training made of them
    meanwhile: so each of them keeps, by run, the weights with which it was given, and its hash as it was left
    (``hashing.GIVEN``).
    """
    for network in networks.values():
        by_run = vars(network).setdefault(hashing.GIVEN, {})
        given, left = by_run.get(run.path, ({}, ""))
        if left and hashing.model_hash(network) == left:
            network.load_state_dict(given)
        else:
            by_run[run.path] = deepcopy(network.state_dict()), ""
        network.train()  # as it will be, so that the modes of whatever else a step refers to can count
    device = next(next(iter(networks.values())).parameters()).device
    identity = {
        **{f"the {name} that was given": hashing.model_hash(each) for name, each in networks.items()},
        "the step, or what it refers to": hashing.json_hash(
            [f and hashing.function_hash(f) for f in functions]
        ),
        "settings of the training": hashing.json_hash(dict(settings)),
        "which weights are trained": hashing.json_hash(
            [weight.requires_grad for each in networks.values() for weight in each.parameters()]
        ),
        "the training images": fingerprint(data),
        "the training loop of atoplib": hashing.code_hash("atoplib.training.loop"),
        "torch, Python or the kind of device": hashing.json_hash(hashing.environment(device)),
    }
    before = read_json(run.path / IDENTITY) or {}
    changed = [name for name in before | identity if before.get(name) != identity.get(name)]
    if changed and any(run.path.glob("state.pt*")):
        folder = run.supersede(RESULTS)
        # A step refers to its networks: another network is not another step.
        reasons = [name for name in changed if name.endswith("given")] or changed
        reason = f"changed: {', '.join(reasons)}" if before else "it is not noted on what it depended"
        notify(f"Trained anew, not loaded ({reason}). What was there is kept in {folder}.")
    write_json(run.path / IDENTITY, identity)
    state, note = load_state(run.state_path)
    if note:
        notify(note)
    return state


def leave(run: Run, networks: Mapping[str, nn.Module]) -> None:
    """Remember how the networks are left."""
    for network in networks.values():
        given, _ = vars(network)[hashing.GIVEN][run.path]
        vars(network)[hashing.GIVEN][run.path] = given, hashing.model_hash(network)


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
            signal.signal(number, handler or signal.SIG_DFL)

    def _ask(self, number: int, *_: object) -> None:
        if number == signal.SIGINT and self.pressed:
            raise KeyboardInterrupt
        self.asked, self.pressed = True, self.pressed or number == signal.SIGINT

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there was one."""
        if self.asked:
            raise KeyboardInterrupt
