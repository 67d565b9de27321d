"""The training loop: data on the device, schedule, mixed precision, averaging, saving and resuming.

Every random number of a step is a function of (seed, step) alone, and every learning rate one of the step,
so that a training that was interrupted goes on exactly as if it had not been.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib import checkpoints, decisions, freezing
from atoplib.data import Split, augment, epoch_batches, mixed_seed, to_float
from atoplib.parameters import at_least, between, check_settings, one_of
from atoplib.progress import Report
from atoplib.runs import Run
from atoplib.training import parts

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
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adam`` (with ``betas``; AdamW, whose weight decay is
            decoupled from the gradient); ``weight_decay`` is of matrices and kernels.
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
            networks as they were given, the data, the code of this loop, torch and the kind of device. If
            not, what is there is moved into ``superseded-N/``, and ``notify`` gets a sentence that says what
            changed.
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
    settings = dict(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, optimizer=optimizer,
        schedule=schedule, weight_decay=weight_decay, betas=betas, grad_clip=grad_clip, ema_decay=ema_decay,
        dtype=dtype, padding=padding, flip=flip, max_steps=max_steps, seed=seed,
    )  # fmt: skip
    networks = dict(networks) if isinstance(networks, Mapping) else {"network": networks}
    check_settings(
        epochs=(epochs, at_least(1)),
        batch_size=(batch_size, between(1, len(data.labels))),
        max_steps=(1 if max_steps is None else max_steps, at_least(1)),
        optimizer=(optimizer, one_of("sgd", "adam")),
        schedule=(schedule, one_of(*parts.SCHEDULES)),
        dtype=(dtype, one_of(*parts.DTYPES)),
        ema_decay=(ema_decay, between(0, 1 - 1e-9)),
    )
    for network in networks.values():
        checkpoints.tensors_of(network)  # before an hour of training: can it be saved?
        if any(weight.dtype == torch.float16 for weight in network.parameters()):
            raise ValueError(
                "weights of float16 do not bear a training: give network.float(), for speed dtype='bfloat16'"
            )
    say = notify or (lambda sentence: None)
    state = None if run is None else parts.begin_run(run, (step, validate), settings, networks, data, say)
    training = _Training(step, networks, data, settings, run, state or {})
    if state is not None:
        loaded = f"Loaded, not trained again: all that it depends on is as it was; trained {run.age()} ago."
        goes_on = f"Goes on after step {training.step} of {training.total}."
        say(loaded if training.step == training.total else goes_on)
    begun, last_saved = (training.step, len(training.history)), time.monotonic()

    def report(**numbers: float) -> None:
        if progress is not None and training.total > begun[0]:
            progress(training.step * batch_size, training.total * batch_size, "images", numbers)

    try:
        with decisions.forked_rng(training.device), parts.Interruption() as interruption:
            report()
            training.close_epoch(validate, save, keep_every)  # one that was interrupted before it was closed
            for x, y in training.batches():
                training.advance(x, y)
                if training.step % CHECK_EVERY == 0 or training.epoch_is_over:
                    training.require_finite(training.last_loss)
                    report(loss=training.last_loss.item())
                    if time.monotonic() - last_saved > save_every:
                        training.save()
                        last_saved = time.monotonic()
                interruption.check()
                training.close_epoch(validate, save, keep_every)
            if begun != (training.step, len(training.history)):
                training.save()
            interruption.check()
        if training.average is not None:
            training.result.load_state_dict(training.average.module.state_dict())
    except KeyboardInterrupt:
        if training.between_steps:  # half a step cannot be resumed exactly: then the last regular save stands
            training.save()
        raise
    finally:
        for network in networks.values():
            network.eval()
        if run is not None:
            parts.leave_run(run, networks)
    history = training.history
    if run is not None:
        run.record(history=history, train_seconds=history[-1]["seconds"], train_flops=training.flops)
        if warning := parts.collapse_warning(history, int(data.labels.max()) + 1):
            run.record(warning=warning)
            say(warning)
    return history


class _Training:
    """Networks with their optimizers and average, and how far they are."""

    def __init__(
        self,
        step: Step,
        networks: dict[str, nn.Module],
        data: Split,
        settings: Mapping[str, Any],
        run: Run | None,
        state: Mapping[str, Any],
    ) -> None:
        """Begin, or go on from the state that a run kept."""
        self.step_function, self.settings, self.run = step, settings, run
        self.networks, self.name = networks, next(iter(networks))
        self.losses = ["loss", *list(networks)[1:]]  # of the networks, by these names in what a step returns
        for name, network in networks.items():
            freezing.to_channels_last(network).train()
            if state:
                checkpoints.load_weights(network, state["networks"][name], run.state_path)
        # an attention mask is a buffer of infinities, and stays one; NaN is nowhere right
        self.infinite = {
            place for place, each in self.tensors().items() if not each.requires_grad and each.isinf().any()
        }
        self.result, decay = networks[self.name], settings["ema_decay"]
        self.average = parts.moving_average(self.result, decay) if decay else None
        if self.average and state:
            self.average.load_state_dict(state["averaged"])
        self.device = next(self.result.parameters()).device
        place = self.device if data.images.nbytes <= ON_DEVICE_BYTES else data.images.device
        self.data = Split(data.images.to(place), data.labels.to(place))
        self.dtype = parts.compute_dtype(settings["dtype"], self.device)
        self.steps_per_epoch = len(data.labels) // settings["batch_size"]
        self.total = min(settings["epochs"] * self.steps_per_epoch, settings["max_steps"] or 2**62)
        self.step, self.flops, self.history = (
            state.get("step", 0),
            state.get("flops", 0),
            state.get("history", []),
        )
        # of what the steps of this epoch reported
        self.sums = {name: value.to(self.device) for name, value in state.get("sums", {}).items()}
        self.between_steps, self.last_loss = True, torch.zeros(())
        self.started = time.monotonic() - state.get("seconds", 0.0)
        self.optimizers: list[torch.optim.Optimizer] = []
        if self.step < self.total:  # a finished one is loaded without the seconds that torch takes for these
            options = {name: settings[name] for name in ("learning_rate", "weight_decay", "betas")}
            self.optimizers = [
                parts.make_optimizer(each, settings["optimizer"], **options) for each in networks.values()
            ]
            for optimizer, saved in zip(self.optimizers, state.get("optimizers", ()), strict=False):
                optimizer.load_state_dict(saved)

    @property
    def epoch_is_over(self) -> bool:
        """Whether the last step was the last one of an epoch, or of the training."""
        return self.step % self.steps_per_epoch == 0 or self.step == self.total

    @property
    def seconds(self) -> float:
        """That the training took so far, in all calls."""
        return time.monotonic() - self.started

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images in [0, 1] and labels of every batch that is left; each must be a step."""
        seed, batch_size = self.settings["seed"], self.settings["batch_size"]
        augmentation = {"padding": self.settings["padding"], "flip": self.settings["flip"]}
        for epoch in range(self.step // self.steps_per_epoch, ceil(self.total / self.steps_per_epoch)):
            for x, y in epoch_batches(
                self.data, batch_size, seed=seed, epoch=epoch, start=self.step % self.steps_per_epoch
            ):
                if self.step == self.total:
                    return
                generator = torch.Generator(self.device).manual_seed(
                    mixed_seed(seed, self.step, "augmentation")
                )
                yield (
                    to_float(augment(x.to(self.device), generator=generator, **augmentation)),
                    y.to(self.device),
                )

    def advance(self, x: Tensor, y: Tensor) -> None:
        """Make one step."""
        self.between_steps = False
        first = self.step % self.steps_per_epoch == 0
        torch.manual_seed(mixed_seed(self.settings["seed"], self.step, "step"))
        # What a step costs is counted in the first one of an epoch, which is made in any case.
        with parts.FlopCounter() if first else nullcontext() as counter:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                output = self.step_function(x, y, self.step / self.steps_per_epoch)
            reported = dict(output) if isinstance(output, Mapping) else {"loss": output}
            self._update([self._loss(reported.get(name), name) for name in self.losses])
        if first:
            self.flops += counter.get_total_flops() * min(self.steps_per_epoch, self.total - self.step)
        if self.average is not None:
            self.average.update_parameters(self.result)
        for name, value in reported.items():
            value = torch.as_tensor(value, device=self.device).detach().float()
            if value.ndim:
                raise ValueError(f"the step must report numbers; {name!r} has the shape {tuple(value.shape)}")
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value, torch.ones_like(value)])
        self.last_loss = reported["loss"].detach()
        self.step += 1
        self.between_steps = True

    def _loss(self, value: Any, name: str) -> Tensor:
        """One of the losses that a step returned. Raises ValueError where it is missing, or has no
        gradient."""
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise ValueError(
                f"the step must return the loss of {self.name!r}, or a dict with it under 'loss' and the "
                f"own losses of further networks under their names, each a number with a gradient; {name!r} "
                f"is {str(value)[:80]}"
            )
        return value

    def _update(self, losses: list[Tensor]) -> None:
        """Every network's gradient of its own loss alone, then a step of every optimizer."""
        rate = parts.learning_rate_at(
            self.step, self.total, peak=self.settings["learning_rate"], schedule=self.settings["schedule"]
        )
        for loss, optimizer in zip(losses, self.optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=_parameters(optimizer), retain_graph=len(losses) > 1)
        for optimizer in self.optimizers:
            if self.settings["grad_clip"]:
                nn.utils.clip_grad_norm_(_parameters(optimizer), self.settings["grad_clip"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def close_epoch(
        self,
        validate: Callable[[nn.Module], Mapping[str, float]] | None,
        save: Callable[..., None] | None,
        keep_every: int,
    ) -> None:
        """Add an entry to the history, if the steps of an epoch are done and have none yet."""
        if not (self.sums and self.epoch_is_over):
            return
        epoch, count = self.step // self.steps_per_epoch, (self.step - 1) % self.steps_per_epoch + 1
        means = {name: float(total / times) for name, (total, times) in self.sums.items()}
        shown = (self.average.module if self.average else self.result).eval()
        numbers = {**means, **(validate(shown) if validate else {}), "seconds": self.seconds}
        if self.run and save and keep_every and count == self.steps_per_epoch and epoch % keep_every == 0:
            save(shown, self.run.path / f"{self.name}-epoch{epoch:04d}.safetensors", epoch=epoch)
        self.result.train()
        self.history, self.sums = [*self.history, {"epoch": self.step / self.steps_per_epoch, **numbers}], {}

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """The weights and buffers of all networks by their places."""
        return {
            (name, key): each
            for name, network in self.networks.items()
            for key, each in (*network.named_parameters(), *network.named_buffers())
        }

    def require_finite(self, *tensors: Tensor) -> None:
        """Raise TrainingDiverged unless every number is finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            kept = "No state was saved yet."
            if self.run is not None and self.run.state_path.exists():
                kept = f"The last good state is kept in {self.run.state_path}."
            raise TrainingDiverged(
                f"the training diverged near step {self.step} of {self.total}: a loss or weight is no longer "
                f"finite. {kept} Try a lower learning_rate (now {self.settings['learning_rate']}) or "
                f"dtype='float32'"
            )

    def save(self) -> None:
        """Keep all that is needed to go on, if there is a run; TrainingDiverged unless every weight and
        statistic is finite."""
        self.require_finite(
            *(
                each[~each.isinf()] if place in self.infinite else each
                for place, each in self.tensors().items()
            )
        )
        if self.run is not None:
            state = {name: getattr(self, name) for name in ("step", "history", "flops", "sums", "seconds")}
            state["networks"] = {name: network.state_dict() for name, network in self.networks.items()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            state["averaged"] = self.average and self.average.state_dict()
            checkpoints.save_state(self.run.state_path, state)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
