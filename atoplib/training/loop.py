"""The training loop: data on the device, schedule, mixed precision, averaging, saving and resuming.

Every random number of a step is a function of (seed, step) alone, and every learning rate one of the step,
so that a training that was interrupted goes on exactly as if it had not been.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.checkpoints import check_saveable, load_weights
from atoplib.contract import to_channels_last
from atoplib.data import Split, augment, epoch_batches, to_float
from atoplib.progress import Report
from atoplib.runs import Run
from atoplib.training.measures import FlopCounter, collapse_warning
from atoplib.training.optimizers import (
    DTYPES,
    OPTIMIZERS,
    SCHEDULES,
    MovingAverage,
    compute_dtype,
    learning_rate_at,
    make_optimizer,
)
from atoplib.training.resume import Interruption, Record

CHECK_EVERY = 10  # steps between two looks at the loss: each look waits for the device
ON_DEVICE_BYTES = 2**30  # of training images that live where they are used; more stay where they are

Images = Float[Tensor, "batch channels height width"]
Step = Callable[[Images, Int[Tensor, " batch"], float], Tensor | Mapping[str, Tensor]]


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; the last good state is kept."""


def fit(
    step: Step,
    networks: nn.Module | Mapping[str, nn.Module],
    data: Split,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    optimizer: str = "adam",
    schedule: str = "one_cycle",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    grad_clip: float = 0.0,
    ema_decay: float = 0.0,
    dtype: str = "auto",
    padding: int = 0,
    flip: bool = False,
    max_steps: int | None = None,
    seed: int = 0,
    run: Run | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    save: Callable[..., None] | None = None,
    keep_every: int = 0,
    save_every: float = 60.0,
    progress: Report | None = None,
    notify: Callable[[str], None] | None = None,
) -> list[dict[str, float]]:
    """Train networks in place by the gradient of what ``step`` returns; they end in eval mode.

    Ctrl-C and SIGTERM take effect after the step that is running, when the state is saved; they raise
    KeyboardInterrupt. A second Ctrl-C does not wait for that.

    Args:
        step: ``step(x, y, epoch)`` on images x (B, 3, H, W) in [0, 1], labels y (B,) and the epochs done so
            far (a float). It returns the loss of the first network; or a dict with it under ``loss``, the
            own loss of each further network under that network's name, and whatever else is worth
            reporting. torch's global generators are seeded anew before every step; under ``dtype`` it runs
            in autocast.
        networks: one, or several by name, on their device: the first is the result, and with ``ema_decay``
            ends as its average.
        data: training images; the last ones of an epoch that make no whole batch are left out.
        epochs, batch_size: passes over the images, images a step.
        learning_rate: its peak; ``schedule`` is ``one_cycle`` (linear up over the first fifth, then linear
            down to 0), ``cosine`` (down to 0) or ``constant``.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adam`` (with ``betas``); ``weight_decay`` is of
            matrices and kernels.
        grad_clip: largest gradient norm of a network; 0 clips nothing.
        ema_decay: of the exponential moving average of the weights that is kept as the result; 0 keeps the
            weights.
        dtype: ``bfloat16``, ``float32``, or ``auto``: bfloat16 where the machine computes it natively.
        padding, flip: augmentation, a random crop after padding by so many pixels, and a horizontal flip.
        max_steps: stop after so many steps; the schedule is shortened with it.
        seed: of the order of the data, augmentation, and all that is random in ``step``.
        run: where the state is saved every ``save_every`` seconds, at the end, and when interrupted. A
            training that was begun there goes on, one that is finished is only loaded, if all that it
            depends on is the same: the step with everything that it refers to, these arguments, the
            networks as they were given, the data, torch and the kind of device. If not, what is there is
            moved into ``superseded-N/``, and ``notify`` gets a sentence that says what changed.
        validate: called with the first network (averaged, in eval mode) after every epoch; its numbers join
            the history.
        save: ``save(network, path, epoch=n)`` is called after every ``keep_every`` epochs, with the first
            network.
        progress: called as ``progress(images done, images in all, "images", numbers)`` at the start and
            every few steps.

    Returns:
        one dict of means an epoch: ``epoch``, ``loss``, ..., ``seconds``.

    Raises:
        TrainingDiverged: when the loss or a weight is no longer finite; the last good state is kept.
        ValueError: for an argument that is not allowed, fewer images than one batch, or a step without a
            loss.
        CheckpointError: for a network that could not be saved.
    """
    settings = dict(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, optimizer=optimizer)
    settings |= dict(schedule=schedule, weight_decay=weight_decay, betas=betas, grad_clip=grad_clip)
    settings |= dict(ema_decay=ema_decay, dtype=dtype, padding=padding, flip=flip, seed=seed)
    settings["max_steps"] = max_steps
    _check(settings, len(data.labels))
    say = notify or (lambda sentence: None)
    networks = dict(networks) if isinstance(networks, Mapping) else {"network": networks}
    record = None if run is None else Record(run, (step, validate), settings, networks, data, say)
    training = _Training(step, networks, data, settings, None if run is None else run.state_path)
    state = None if record is None else record.begin()
    training.begin(state)
    if state is not None:
        loaded = f"Loaded, not trained again: all that it depends on is as it was; trained {run.age()} ago."
        goes_on = f"Goes on after step {training.step} of {training.total}."
        say(loaded if training.step == training.total else goes_on)
    begun, last_saved = (training.step, len(training.history)), time.monotonic()

    def keep_state() -> None:
        training.check_weights()
        if record is not None:
            record.save(training.state())

    def report(**numbers: float) -> None:
        if progress is not None and training.total > begun[0]:
            progress(training.step * batch_size, training.total * batch_size, "images", numbers)

    def keep_checkpoint(network: nn.Module, epoch: int) -> None:
        if run is not None and save is not None and keep_every and epoch % keep_every == 0:
            save(network, run.path / f"{next(iter(networks))}-epoch{epoch:04d}.safetensors", epoch=epoch)

    try:
        with torch.random.fork_rng(training.gpus), Interruption() as interruption:
            report()
            while True:
                # Here, not after the step: a training that was interrupted before this is done does it first.
                training.close_epoch(validate, keep_checkpoint)
                if training.step == training.total:
                    break
                for x, y in training.rest_of_epoch():
                    training.advance(x, y)
                    if training.step % CHECK_EVERY == 0 or training.epoch_is_over:
                        report(loss=training.checked_loss())
                        if time.monotonic() - last_saved > save_every:
                            keep_state()
                            last_saved = time.monotonic()
                    interruption.check()
            if begun != (training.step, len(training.history)):
                keep_state()
            interruption.check()
        training.finish()
    except KeyboardInterrupt:
        if training.between_steps:  # half a step cannot be resumed exactly: then the last regular save stands
            keep_state()
        raise
    finally:
        for network in networks.values():
            network.eval()
        if record is not None:
            record.leave()
    history = training.history
    if run is not None:
        run.record(history=history, train_seconds=history[-1]["seconds"], train_flops=training.flops)
        warning = collapse_warning(history, int(data.labels.max()) + 1)
        if warning:
            run.record(warning=warning)
            say(warning)
    return history


def _check(settings: Mapping[str, Any], images: int) -> None:
    """Raise ValueError for a setting that is not allowed."""
    for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("dtype", DTYPES)):
        if settings[name] not in allowed:
            raise ValueError(f"unknown {name} {settings[name]!r}; allowed: {', '.join(allowed)}")
    for name in ("epochs", "batch_size", "max_steps"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    if not 0 <= settings["ema_decay"] < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {settings['ema_decay']}")
    batch_size = settings["batch_size"]
    if batch_size > images:
        raise ValueError(f"batch_size {batch_size} is larger than the training set of {images} images")


class _Training:
    """Networks with their optimizers and average, and how far they are."""

    def __init__(
        self,
        step: Step,
        networks: dict[str, nn.Module],
        data: Split,
        settings: Mapping[str, Any],
        state_path: Path | None = None,
    ) -> None:
        self.step_function, self.networks, self.settings = step, networks, settings
        self.state_path = state_path
        self.result = next(iter(networks.values()))
        for network in networks.values():
            check_saveable(network)
            to_channels_last(network).train()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.average = MovingAverage(self.result, settings["ema_decay"]) if settings["ema_decay"] else None
        self.device = next(self.result.parameters()).device
        self.gpus = [self.device] if self.device.type == "cuda" else []
        self.data = data.to(self.device) if data.images.nbytes <= ON_DEVICE_BYTES else data
        self.dtype = compute_dtype(settings["dtype"], self.device)
        self.steps_per_epoch = len(data.labels) // settings["batch_size"]
        self.total = min(settings["epochs"] * self.steps_per_epoch, settings["max_steps"] or 2**62)
        self.step, self.flops, self.history, self.between_steps = 0, 0, [], True
        self.sums: dict[str, Tensor] = {}  # of what the steps of this epoch reported
        self.last_loss = torch.zeros(())
        self.seconds_before, self.started = 0.0, time.monotonic()

    @property
    def epoch_is_over(self) -> bool:
        """Whether the last step was the last one of an epoch, or of the training."""
        return self.step % self.steps_per_epoch == 0 or self.step == self.total

    @property
    def seconds(self) -> float:
        """That the training took so far, in all calls."""
        return self.seconds_before + time.monotonic() - self.started

    def rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images in [0, 1] and labels of every batch that is left of this epoch."""
        seed, batch_size = self.settings["seed"], self.settings["batch_size"]
        epoch, start = divmod(self.step, self.steps_per_epoch)
        for x, y in epoch_batches(self.data, batch_size, seed=seed, epoch=epoch, start=start):
            if self.step == self.total:
                return
            generator = torch.Generator(self.device).manual_seed(_mixed(seed, self.step, "augmentation"))
            how = {"padding": self.settings["padding"], "flip": self.settings["flip"]}
            yield to_float(augment(x.to(self.device), generator=generator, **how)), y.to(self.device)

    def advance(self, x: Tensor, y: Tensor) -> None:
        """Make one step."""
        self.between_steps = False
        first = self.step % self.steps_per_epoch == 0
        torch.manual_seed(_mixed(self.settings["seed"], self.step, "step"))
        # What a step costs is counted in the first one of an epoch, which is made in any case.
        with FlopCounter() if first else nullcontext() as counter:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                output = self.step_function(x, y, self.step / self.steps_per_epoch)
            losses = _losses(output, list(self.networks))
            self._update(losses)
        if first:
            self.flops += counter.get_total_flops() * min(self.steps_per_epoch, self.total - self.step)
        if self.average is not None:
            self.average.update_parameters(self.result)
        for name, value in losses.items():
            value = torch.as_tensor(value, device=self.device).detach().float()
            self.sums[name] = self.sums.get(name, 0) + value
        self.last_loss = losses["loss"].detach()
        self.step += 1
        self.between_steps = True

    def _update(self, losses: Mapping[str, Tensor]) -> None:
        """Every network's gradient of its own loss alone, then a step of every optimizer."""
        peak, schedule = self.settings["learning_rate"], self.settings["schedule"]
        rate = learning_rate_at(self.step, self.total, peak=peak, schedule=schedule)
        own = {"loss": self.optimizers[next(iter(self.networks))]}
        own |= {name: self.optimizers[name] for name in list(self.networks)[1:]}
        for name, optimizer in own.items():
            optimizer.zero_grad(set_to_none=True)
            losses[name].backward(inputs=_parameters(optimizer), retain_graph=len(own) > 1)
        for optimizer in own.values():
            if self.settings["grad_clip"]:
                nn.utils.clip_grad_norm_(_parameters(optimizer), self.settings["grad_clip"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def close_epoch(
        self,
        validate: Callable[[nn.Module], Mapping[str, float]] | None,
        keep: Callable[[nn.Module, int], None],
    ) -> None:
        """Add an entry to the history, if the steps of an epoch are done and have none yet."""
        if not (self.sums and self.epoch_is_over):
            return
        count = (self.step - 1) % self.steps_per_epoch + 1
        means = {name: float(value) / count for name, value in self.sums.items()}
        shown = (self.average.module if self.average else self.result).eval()
        numbers = validate(shown) if validate else {}
        if self.step % self.steps_per_epoch == 0:
            keep(shown, self.step // self.steps_per_epoch)
        self.result.train()
        entry = {"epoch": self.step / self.steps_per_epoch, **means, **numbers, "seconds": self.seconds}
        self.history, self.sums = [*self.history, entry], {}

    def finish(self) -> None:
        """Put the averaged weights into the result."""
        if self.average is not None:
            self.result.load_state_dict(self.average.module.state_dict())

    def checked_loss(self) -> float:
        """The last loss, which raises TrainingDiverged if it is not finite."""
        loss = self.last_loss.item()
        if not isfinite(loss):
            raise self._diverged()
        return loss

    def check_weights(self) -> None:
        """Raise TrainingDiverged unless every weight and statistic is finite."""
        for network in self.networks.values():
            if not all(t.isfinite().all() for t in (*network.parameters(), *network.buffers())):
                raise self._diverged()

    def _diverged(self) -> TrainingDiverged:
        there = self.state_path is not None and self.state_path.exists()
        kept = f"The last good state is kept in {self.state_path}." if there else "No state was saved yet."
        return TrainingDiverged(
            f"the training diverged near step {self.step} of {self.total}: a loss or weight is no longer "
            f"finite. {kept} Try a lower learning_rate (now {self.settings['learning_rate']}) or "
            f"dtype='float32'"
        )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as tensors, numbers and lists."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "averaged": None if self.average is None else self.average.state_dict(),
            "sums": self.sums,
            "seconds": self.seconds,
            **{name: getattr(self, name) for name in ("step", "history", "flops")},
        }

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Make the optimizers, if there is anything to do; go on from a state that ``state`` returned."""
        if state is not None:
            self._load(state)
        if self.step < self.total:  # a finished one is loaded without the seconds that torch takes for these
            how = {name: self.settings[name] for name in ("learning_rate", "weight_decay", "betas")}
            for name, network in self.networks.items():
                self.optimizers[name] = make_optimizer(network, self.settings["optimizer"], **how)
                if state is not None:
                    self.optimizers[name].load_state_dict(state["optimizers"][name])

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, network in self.networks.items():
            load_weights(network, state["networks"][name], self.state_path)
        if self.average is not None:
            self.average.load_state_dict(state["averaged"])
        self.step, self.history, self.flops = state["step"], state["history"], state["flops"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.seconds_before = state["seconds"]


def _losses(output: Any, networks: list[str]) -> dict[str, Tensor]:
    """What a step returned, as a dict with a loss for every network.

    Raises:
        ValueError: for a loss that is missing, or has no gradient.
    """
    losses = dict(output) if isinstance(output, Mapping) else {"loss": output}
    for name in ("loss", *networks[1:]):
        value = losses.get(name)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise ValueError(
                f"the step must return the loss of {networks[0]!r}, or a dict with it under 'loss' and the "
                f"own losses of further networks under their names, each a number with a gradient; {name!r} "
                f"is {str(value)[:80]}"
            )
    return losses


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _mixed(seed: int, step: int, purpose: str) -> int:
    """A seed that no other step, seed or purpose has."""
    return int.from_bytes(blake2b(f"{seed}:{step}:{purpose}".encode(), digest_size=8).digest(), "big") >> 1
