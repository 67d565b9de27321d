"""What a training costs: one step is counted and taken as often as the training takes it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.data import Split, to_float
from atoplib.flops import count_flops
from atoplib.training.loop import Batch, Step, TrainingSettings, Updater, autocast, compute_dtype, number_of_steps


class _Backward(Updater):
    """Goes backward as an update does, and changes no weight."""

    def update(self, name: str, loss: Float[Tensor, ""]) -> None:
        torch.autograd.grad(loss, list(self.optimized(name)), allow_unused=True)


@contextmanager
def _left_alone(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block networks are in train mode; afterwards mode, running statistics and torch's dice are as before."""
    modes = [(module, module.training) for network in networks.values() for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for network in networks.values() for buffer in network.buffers()]
    devices = {tensor.device for network in networks.values() for tensor in chain(network.parameters(), network.buffers())}
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            for network in networks.values():
                network.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def training_flops(
    step_function: Step,
    networks: dict[str, nn.Module],
    split: Split,
    settings: TrainingSettings,
    *,
    warmup_epochs: float = 0.0,
) -> int:
    """FLOPs that ``fit`` with these arguments spends on its steps, attacks included, 2 a multiply-add: convolutions and
    matrix products alone. Validation is none of the training.

    One step is made on the first images, and another after the warm-up if there is one; no weight, running statistic or
    random number of the training changes, so it may be called before ``fit`` or after it. The dice of a pipeline in the
    step are thrown, as they are by every step: reseed it before you measure anything with it.

    Args:
        step_function, networks, split, settings: as for ``fit``.
        warmup_epochs: epochs until every term of the loss applies (``Objective.warmup_epochs``).

    Raises:
        ValueError: if there are fewer images than one batch.
    """
    total, an_epoch = number_of_steps(settings, len(split.labels))
    device = next(next(iter(networks.values())).parameters()).device
    images = to_float(split.images[: settings.batch_size].to(device)).contiguous(memory_format=torch.channels_last)
    labels = split.labels[: settings.batch_size].to(device)
    updater = _Backward(networks, settings)

    def step_at(epoch: float) -> int:
        batch = Batch(images, labels, torch.Generator(device).manual_seed(settings.seed), epoch)
        with autocast(compute_dtype(settings.dtype, device), device):
            return count_flops(lambda: step_function(batch, updater))

    warm = sum(step / an_epoch < warmup_epochs for step in range(total))
    with _left_alone(networks):
        return sum(count * step_at(epoch) for count, epoch in ((warm, 0.0), (total - warm, warmup_epochs)) if count)
