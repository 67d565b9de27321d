"""The training loop: data on the device, schedule, mixed precision, averaging, saving and resuming.

Every random number of a step is a function of (seed, step) alone, and every learning rate one of the step, so that a
training that was cut off goes on exactly as if it had not been.
"""

import hashlib
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from atoplib.checkpoints import load_state, load_weights, save_state
from atoplib.data import Split, augment, epoch_batches, to_float
from atoplib.progress import Report
from atoplib.shares import WHOLE, Share
from atoplib.training.processes import any_process, average_over_processes, begin_together, by_the_first

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("one_cycle", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16")
CHECK_EVERY = 10  # steps between two looks at the loss: each look waits for the device


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; the last good state is kept."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained; what it is trained for stands elsewhere.

    Attributes:
        epochs, batch_size: passes over the training images, images a step.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adam`` (betas as given).
        learning_rate: its peak.
        schedule: ``one_cycle`` (linear up over the first fifth, then linear down to 0), ``cosine`` (down to 0) or
            ``constant``.
        weight_decay: of matrices and convolution kernels, not of biases and norms.
        betas: Adam's.
        grad_clip: largest gradient norm; 0 clips nothing.
        ema_decay: of the exponential moving average of the weights that is kept as the result; 0 keeps the weights.
        dtype: ``bfloat16`` (autocast), ``float32``, or ``auto``: bfloat16 where the machine computes it natively.
        padding, flip: augmentation, a random crop after padding by so many pixels, and a horizontal flip.
        max_steps: stop earlier, after so many steps (the schedule is shortened with it).
        seed: of weights' order of data, augmentation, transforms and attacks.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "one_cycle"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    dtype: str = "auto"
    padding: int = 4
    flip: bool = True
    max_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}; allowed: {', '.join(allowed)}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        for name in ("weight_decay", "grad_clip", "padding"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, got {self.max_steps}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions compute in: ``auto`` takes bfloat16 where the processor has instructions for it.

    On a processor without them bfloat16 is emulated, ten times slower than float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        native = abilities.get("amx_bf16") or abilities.get("avx512_bf16")
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a step computes in a dtype."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def number_of_steps(settings: TrainingSettings, images: int) -> tuple[int, int]:
    """Steps of a training on so many images, and of each of its epochs, whose last images make no batch of their own.

    Raises:
        ValueError: if there are fewer images than one batch.
    """
    an_epoch = images // settings.batch_size
    if an_epoch == 0:
        raise ValueError(f"batch_size {settings.batch_size} is larger than the training set of {images} images")
    total = settings.epochs * an_epoch
    return (total if settings.max_steps is None else min(total, settings.max_steps)), an_epoch


def learning_rate_at(step: int, total: int, settings: TrainingSettings) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``."""
    done = (step + 0.5) / total
    if settings.schedule == "constant":
        factor = 1.0
    elif settings.schedule == "cosine":
        factor = (1 + cos(pi * done)) / 2
    else:
        factor = done / 0.2 if done < 0.2 else (1 - done) / 0.8
    return settings.learning_rate * factor


def make_optimizer(module: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer of one network; weight decay for tensors of two and more dimensions only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.Adam(groups, lr=settings.learning_rate, betas=settings.betas)


class MovingAverage(AveragedModel):
    """Exponential moving average of weights and buffers, its decay growing from 0 so that early weights are forgotten.

    The count of updates stays with the host, so that none of them waits for the device, as those of its base class do.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights that a model has now."""
        count = int(self.n_averaged)
        rate = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        pairs = list(zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model)), strict=True))
        floating = [(old, new) for old, new in pairs if old.is_floating_point()]
        torch._foreach_lerp_([old for old, _ in floating], [new for _, new in floating], 1 - rate)
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)
        self.n_averaged += 1


class Batch(NamedTuple):
    """What a step is given: images in [0, 1], labels, the generator of this step's dice, how many epochs are done, and which
    part of the whole batch the images are."""

    images: Float[Tensor, "batch 3 height width"]
    labels: Int[Tensor, " batch"]
    generator: torch.Generator
    epoch: float
    share: Share = WHOLE

    def seed(self) -> int:
        """Of a pipeline's dice in this step. On CUDA it is not drawn there: the host would wait for all that is queued."""
        if self.generator.device.type == "cpu":
            return int(torch.randint(2**62, (), generator=self.generator))
        text = f"dice of the step {self.generator.initial_seed()}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 2


class Updater:
    """The optimizers of the trained networks; a step calls ``update`` once for each of them."""

    def __init__(self, networks: Mapping[str, nn.Module], settings: TrainingSettings, share: Share = WHOLE) -> None:
        self.networks = networks
        self.settings = settings
        self.share = share
        self.optimizers = {name: make_optimizer(network, settings) for name, network in networks.items()}

    def set_learning_rate(self, value: float) -> None:
        """For every optimizer."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = value

    def optimized(self, name: str) -> list[nn.Parameter]:
        """The parameters of network ``name`` that are trained."""
        return [p for group in self.optimizers[name].param_groups for p in group["params"]]

    def update(self, name: str, loss: Float[Tensor, ""]) -> None:
        """One optimizer step of network ``name`` down the gradient of ``loss``; no other network gets a gradient.

        Where several processes train, it is the gradient of their mean loss.
        """
        optimizer, parameters = self.optimizers[name], self.optimized(name)
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        average_over_processes((p.grad for p in parameters if p.grad is not None), self.share)
        if self.settings.grad_clip:
            nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        optimizer.step()


class Interruption:
    """Holds a first Ctrl-C back until ``check`` is called, so that no step is cut in half; a second one comes at once.

    A scheduler's SIGTERM counts as a Ctrl-C, but never comes at once: it may be sent to a whole group of processes that
    pass it on to each other. Outside the main thread, where Python allows no handler (and delivers no signal), it does
    nothing. Where several processes train, no signal comes at once, and what one of them was told all of them do.
    """

    def __init__(self, share: Share = WHOLE) -> None:
        self.share = share

    def __enter__(self) -> "Interruption":
        self.asked, self.pressed, self.before = False, False, {}
        with suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            if handler is not None:
                signal.signal(number, handler)

    def ask(self, number: int, *_: object) -> None:
        """The handler of both signals."""
        if number == signal.SIGINT and self.pressed and self.share.processes == 1:
            raise KeyboardInterrupt
        self.asked, self.pressed = True, self.pressed or number == signal.SIGINT

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there was one."""
        if any_process(self.asked, self.share):
            raise KeyboardInterrupt


Step = Callable[[Batch, Updater], dict[str, Tensor]]


def fit(
    step_function: Step,
    networks: dict[str, nn.Module],
    split: Split,
    settings: TrainingSettings,
    *,
    state_path: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Report | None = None,
    notify: Callable[[str], None] | None = None,
    save_every: float = 60.0,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    keep: Callable[[nn.Module, int], None] | None = None,
    share: Share = WHOLE,
) -> list[dict[str, float]]:
    """Train ``networks`` in place; the first one is the result and, with ``ema_decay``, ends as its average.

    Ctrl-C and SIGTERM take effect after the step that is running, when the state is saved; they raise KeyboardInterrupt. A
    second Ctrl-C does not wait for that.

    Args:
        step_function: computes losses and calls ``Updater.update``; returns the means to report, ``loss`` among them.
        networks: by name, on their device; they are put into train mode.
        split: training images.
        state_path: where the state is saved every ``save_every`` seconds, at the end, and when interrupted; a state that
            is there already is resumed, a finished one just loaded.
        identity: what makes this training this one; a state that was saved under another identity is refused.
        progress: called at the start, every few steps and at the end of an epoch, with images done and in all by this call.
        notify: called with a sentence when something a person should know happens (a damaged state was passed over).
        validate: called with the first network (averaged, in eval mode) after every epoch; its numbers join the history.
        keep: called as ``validate`` is, and with the number of whole epochs that are done, to save what should stay; of
            several processes by the first one alone.
        share: of every batch that this process computes, where several train together (``processes.joined``); each of them
            calls this with the same arguments, and the first one alone reads and writes the state.

    Returns:
        one dict of means an epoch: ``epoch``, ``loss``, ..., ``seconds``.

    Raises:
        TrainingDiverged: when the loss or a weight is no longer finite; the last good state is kept.
        ValueError: if there are fewer images than one batch, or the state belongs to another training, or the share is none
            of a batch.
    """
    device = next(next(iter(networks.values())).parameters()).device
    total, steps_per_epoch = number_of_steps(settings, len(split.labels))
    if share.processes > 1 and share.processes * share.images != settings.batch_size:
        raise ValueError(
            f"{share.processes} processes with {share.images} images each do not share a batch of {settings.batch_size}"
        )
    begin_together(networks.values(), share)
    result_name = next(iter(networks))
    result = networks[result_name]
    updater = Updater(networks, settings, share)
    averaged = MovingAverage(result, settings.ema_decay) if settings.ema_decay else None
    dtype = compute_dtype(settings.dtype, device)
    fingerprint = {**asdict(settings), "betas": list(settings.betas), **(identity or {})}
    step, history, sums, seconds_before = 0, [], {}, 0.0

    if state_path is not None:
        state, note = by_the_first(lambda: load_state(state_path), share)
        if note and notify:
            notify(note)
        if state is not None:
            if state.get("identity") != fingerprint:
                raise ValueError(
                    f"{state_path} was saved by another training (other settings, data or inputs); choose another run "
                    f"directory, or delete that file to start anew"
                )
            for name, network in networks.items():
                load_weights(network, state["networks"][name], state_path)
                updater.optimizers[name].load_state_dict(state["optimizers"][name])
            if averaged is not None:
                averaged.load_state_dict(state["averaged"])
            step, history, sums, seconds_before = state["step"], state["history"], state["sums"], state["seconds"]
            sums = {name: value.to(device) for name, value in sums.items()}
    for network in networks.values():
        network.train()
    started = time.monotonic()
    last_saved = started

    def save() -> None:
        tensors = (t for network in networks.values() for t in chain(network.parameters(), network.buffers()))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise diverged()
        if state_path is None or share.rank:
            return
        save_state(
            state_path,
            {
                "identity": fingerprint,
                "networks": {name: network.state_dict() for name, network in networks.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in updater.optimizers.items()},
                "averaged": None if averaged is None else averaged.state_dict(),
                "step": step,
                "history": history,
                "sums": sums,
                "seconds": seconds_before + time.monotonic() - started,
            },
        )

    def diverged() -> TrainingDiverged:
        kept = "nothing was saved yet" if state_path is None or not state_path.exists() else f"kept in {state_path}"
        return TrainingDiverged(
            f"the training diverged near step {step} of {total}: a loss or weight is no longer finite. The last good "
            f"state is {kept}. Try a lower learning_rate (now {settings.learning_rate}) or dtype='float32'"
        )

    def report(numbers: dict[str, float]) -> None:
        if progress is not None and total > resumed_at:
            size = settings.batch_size
            progress((step - resumed_at) * size, (total - resumed_at) * size, "images", numbers)

    resumed_at, epochs_before, between_steps = step, len(history), True
    try:
        with Interruption(share) as interruption:
            report({})
            while True:
                # Here, not after the step: a training that was cut off before this was done does it when it goes on.
                if sums and (step == total or step % steps_per_epoch == 0):
                    count = (step - 1) % steps_per_epoch + 1
                    means = {name: float(value) / count for name, value in sums.items()}
                    shown = (averaged.module if averaged else result).eval()
                    numbers = validate(shown) if validate else {}
                    if keep and share.rank == 0 and step % steps_per_epoch == 0:
                        keep(shown, step // steps_per_epoch)
                    result.train()
                    means |= {**numbers, "seconds": seconds_before + time.monotonic() - started}
                    history, sums = [*history, {"epoch": step / steps_per_epoch, **means}], {}
                if step == total:
                    break
                epoch = step // steps_per_epoch
                batches = epoch_batches(
                    split, settings.batch_size, seed=settings.seed, epoch=epoch, start=step % steps_per_epoch
                )
                for images, labels in batches:
                    generator = torch.Generator(device).manual_seed((settings.seed << 32) + step)
                    images, labels = images.to(device), labels.to(device)
                    images = augment(images, generator=generator, padding=settings.padding, flip=settings.flip)
                    images = to_float(share.own(images)).contiguous(memory_format=torch.channels_last)
                    batch = Batch(images, share.own(labels), generator, step / steps_per_epoch, share)
                    updater.set_learning_rate(learning_rate_at(step, total, settings))
                    between_steps = False
                    with autocast(dtype, device):
                        losses = step_function(batch, updater)
                    if averaged is not None:
                        averaged.update_parameters(result)
                    means = {name: value.detach().float() for name, value in losses.items()}
                    average_over_processes(means.values(), share)
                    for name, value in means.items():
                        sums[name] = sums.get(name, 0) + value
                    step += 1
                    between_steps = True
                    if step % CHECK_EVERY == 0 or step == total or step % steps_per_epoch == 0:
                        loss = means["loss"].item()
                        if not isfinite(loss):
                            raise diverged()
                        report({"loss": loss})
                        if time.monotonic() - last_saved > save_every:
                            save()
                            last_saved = time.monotonic()
                    interruption.check()
                    if step == total:
                        break
    except KeyboardInterrupt:
        if between_steps:  # half a step cannot be resumed exactly: then the last regular save stands
            save()
        raise
    if step > resumed_at or len(history) > epochs_before:
        save()
    interruption.check()
    if averaged is not None:
        result.load_state_dict(averaged.module.state_dict())
    return history
