"""What a training is made of beside its loop: optimizer, schedule of the learning rate, moving average,
precision; what a network is worth on clean images, and what computing it costs; how a training is found
again, and ended by a signal."""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from atoplib import checkpoints, files, hashing, probing
from atoplib.data import Split, fingerprint, to_float
from atoplib.decisions import reseed, sample_logits
from atoplib.runs import Run

SCHEDULES = ("one_cycle", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16")
GUESSING = 1.2  # times the accuracy of guessing: a training that ends below has collapsed
IDENTITY = ".training.json"
RESULTS = (".state.pt*", "*.safetensors", "metrics.json", "figures", "pictures", IDENTITY)
PIXELS_AT_ONCE = 2**22  # a GPU of 24 GB holds a DeepFillV2 at 256 px on so many


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions compute in: ``auto`` takes bfloat16 where the processor has instructions
    for it.

    On a processor without them bfloat16 is emulated, ten times slower than float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = torch.cpu.get_capabilities()
        native = abilities.get("amx_bf16") or abilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def learning_rate_at(step: int, total: int, *, peak: float, schedule: str = "one_cycle") -> float:
    """The learning rate of step ``step`` (from 0) of ``total``: ``constant``, ``cosine`` (down to 0), or
    ``one_cycle`` (linear up over the first fifth, then linear down to 0)."""
    done = (step + 0.5) / total
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * (1 + cos(pi * done)) / 2
    return peak * (done / 0.2 if done < 0.2 else (1 - done) / 0.8)


def make_optimizer(
    module: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """``sgd`` (Nesterov momentum 0.9) or ``adam`` for one network; weight decay for tensors of two and more
    dimensions only. ``adam`` is AdamW: its weight decay shrinks the weights by themselves (Loshchilov &
    Hutter 2019); without any, it is Adam.

    Raises:
        ValueError: if nothing in the network is to be trained.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"no weight of this {type(module).__name__} requires a gradient: there is nothing to train in it"
        )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers, its decay growing from 0 so that early weights are
    forgotten."""

    def update(averaged: list[Tensor], current: list[Tensor], _count: Tensor) -> None:
        count = int(average.n_averaged)  # on the host, so that no update waits for the device
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averaged, current)

    try:
        average = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    except RuntimeError as error:  # weights that are computed from others, as torch's pruning makes them
        raise ValueError(
            f"the network cannot be copied for the average of its weights: make them plain (prune.remove, "
            f"remove_weight_norm), or leave the average out (ema_decay=0); {error}"
        ) from error
    return average


def accuracy(
    model: nn.Module, split: Split, *, num_samples: int = 1, seed: int = 0, max_batch: int | None = None
) -> float:
    """Share of a split's images that a model classifies correctly, in [0, 1]: in float32, one forward pass
    a sample.

    Args:
        model: in eval mode, images in [0, 1] -> logits.
        num_samples: forward passes an image whose share of correct ones counts, for a random model.
        seed: of its random numbers, also those from torch's generators; all are put back afterwards.
        max_batch: images at once; None chooses by their size.
    """
    max_batch = max_batch or max(1, min(500, PIXELS_AT_ONCE // split.images[0, 0].numel()))
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), split.labels.device)
    correct = torch.zeros((), device=device)
    with probing.undisturbed(model):
        torch.manual_seed(seed)
        reseed(model, seed)
        for images, labels in zip(split.images.split(max_batch), split.labels.split(max_batch), strict=True):
            logits = sample_logits(
                model, to_float(images.to(device)), num_samples=num_samples, max_batch=max_batch
            )
            correct += (logits.argmax(dim=2) == labels.to(device)).float().mean(dim=0).sum()
    return float(correct) / len(split.labels)


class FlopCounter(FlopCounterMode):
    """Counts FLOPs of the convolutions and matrix products within its block, 2 a multiply-add."""

    def __init__(self) -> None:
        super().__init__(display=False)
        # Its own hooks every module, which an attack's gradient at the input does not bear. This one says
        # that everything happens in one place, so that the total alone is kept.
        self.mod_tracker = nullcontext()
        self.mod_tracker.parents = frozenset({"Global"})


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the convolutions and matrix products in a call, backward passes included, 2 a multiply-add."""
    with FlopCounter() as counter:
        function(*arguments)
    return counter.get_total_flops()


def collapse_warning(history: list[dict[str, float]], classes: int) -> str:
    """A sentence if a training ended no better than guessing, which its loss alone does not tell; else
    nothing."""
    reached = history[-1].get("accuracy", 1.0)  # of training images, attacked ones if they were attacked
    if reached >= GUESSING / classes or history[-1]["epoch"] < 1:
        return ""
    best = max(range(len(history)), key=lambda epoch: history[epoch].get("accuracy", 0.0))
    return (
        f"This training has collapsed: in its last epoch it classified {100 * reached:.1f} % of its training "
        f"images correctly, and guessing does {100 / classes:.1f} % "
        f"({100 * history[best]['accuracy']:.1f} % in epoch {best + 1}). "
        f"Try a smaller learning_rate, eps or classification_weight, or a longer ramp_epochs."
    )


def begin_run(
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
    (``hashing.INITIAL``).
    """
    for network in networks.values():
        by_run = vars(network).setdefault(hashing.INITIAL, {})
        initial, left = by_run.get(run.path, ({}, ""))
        if left and hashing.model_hash(network) == left:
            network.load_state_dict(initial)
        else:
            given = network.state_dict()
            for name, value in given.items():  # on the CPU, where there is room for one a run
                given[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else deepcopy(value)
            by_run[run.path] = given, ""
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
    before = files.read_json(run.path / IDENTITY) or {}
    changed = [name for name in before | identity if before.get(name) != identity.get(name)]
    if changed and any(run.path.glob(".state.pt*")):
        earlier = [
            each for each in run.path.glob("superseded-*") if files.read_json(each / IDENTITY) == identity
        ]
        folder = run.supersede(RESULTS)
        # A step refers to its networks: another network is not another step.
        reasons = [name for name in changed if name.endswith("given")] or changed
        reason = f"changed: {', '.join(reasons)}" if before else "it is not noted on what it depended"
        what = f"What {earlier[-1]} kept comes back" if earlier else "Trained anew, not loaded"
        for path in earlier[-1].iterdir() if earlier else ():
            path.replace(run.path / path.name)
        notify(f"{what} ({reason}). What was there is kept in {folder}.")
    files.write_json(run.path / IDENTITY, identity)
    state, note = checkpoints.load_state(run.state_path)
    if note:
        notify(note)
    return state


def leave_run(run: Run, networks: Mapping[str, nn.Module]) -> None:
    """Remember how the networks are left."""
    for network in networks.values():
        initial, _ = vars(network)[hashing.INITIAL][run.path]
        vars(network)[hashing.INITIAL][run.path] = initial, hashing.model_hash(network)


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
