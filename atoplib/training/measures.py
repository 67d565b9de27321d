"""What a network is worth on clean images, and what computing it costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atoplib.data import Split, to_float
from atoplib.decisions import reseed, sample_logits

GUESSING = 1.2  # times the accuracy of guessing: a training that ends below has collapsed
PIXELS_AT_ONCE = 2**22  # a GPU of 24 GB holds a DeepFillV2 at 256 px on so many


def accuracy(
    model: nn.Module,
    split: Split,
    *,
    num_samples: int = 1,
    seed: int | None = 0,
    max_batch: int | None = None,
) -> float:
    """Share of a split's images that a model classifies correctly, in [0, 1]: in float32, one forward pass
    a sample.

    Args:
        model: in eval mode, images in [0, 1] -> logits.
        num_samples: forward passes an image whose share of correct ones counts, for a random model.
        seed: of its random numbers, which are put back afterwards; None goes on with those that it has.
        max_batch: images at once; None chooses by their size.
    """
    height, width = split.images.shape[2:]
    max_batch = max_batch or max(1, min(500, PIXELS_AT_ONCE // (height * width)))
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), split.labels.device)
    correct = torch.zeros((), device=device)
    with _seeded(model, seed, device):
        for images, labels in zip(split.images.split(max_batch), split.labels.split(max_batch), strict=True):
            x = to_float(images.to(device))
            logits = sample_logits(model, x, num_samples=num_samples, max_batch=max_batch)
            correct += (logits.argmax(dim=2) == labels.to(device)).float().mean(dim=0).sum()
    return float(correct) / len(split.labels)


@contextmanager
def _seeded(model: nn.Module, seed: int | None, device: torch.device) -> Iterator[None]:
    """Within the block the random numbers of a model follow from ``seed``, also those that it takes from
    torch's generators."""
    if seed is None:
        yield
        return
    seeds = [(part, part.seed) for part in model.modules() if hasattr(part, "reseed")]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            reseed(model, seed)
            yield
    finally:
        for part, before in seeds:
            part.reseed(before)


class _NoModules(nullcontext):
    """Tells a FlopCounterMode that everything happens in one place, so that it keeps the total only."""

    parents = frozenset({"Global"})


class FlopCounter(FlopCounterMode):
    """Counts FLOPs of the convolutions and matrix products within its block, 2 a multiply-add."""

    def __init__(self) -> None:
        super().__init__(display=False)
        # Its own hooks every module, which an attack's gradient at the input does not bear.
        self.mod_tracker = _NoModules()


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
