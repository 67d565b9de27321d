"""What a training is made of beside its loop: optimizer, schedule of the learning rate, moving average,
precision; what a network is worth on clean images, and what computing it costs."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from atoplib.data import Split, to_float
from atoplib.decisions import forked_rng, reseed, sample_logits

SCHEDULES = ("one_cycle", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16")
GUESSING = 1.2  # times the accuracy of guessing: a training that ends below has collapsed
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


class MovingAverage(AveragedModel):
    """Exponential moving average of weights and buffers, its decay growing from 0 so that early weights are
    forgotten.

    The count of updates stays with the host, so that none of them waits for the device, as those of its
    base class do.
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


def accuracy(
    model: nn.Module, split: Split, *, num_samples: int = 1, seed: int = 0, max_batch: int | None = None
) -> float:
    """Share of a split's images that a model classifies correctly, in [0, 1]: in float32, one forward pass
    a sample.

    Args:
        model: in eval mode, images in [0, 1] -> logits.
        num_samples: forward passes an image whose share of correct ones counts, for a random model.
        seed: of its random numbers, also those from torch's generators, which are put back afterwards; a
            model's own start anew from the seed that it had.
        max_batch: images at once; None chooses by their size.
    """
    max_batch = max_batch or max(1, min(500, PIXELS_AT_ONCE // split.images[0, 0].numel()))
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), split.labels.device)
    correct = torch.zeros((), device=device)
    seeds = [(part, part.seed) for part in model.modules() if {"reseed", "seed"} <= {*dir(part)}]
    try:
        with forked_rng(device):
            torch.manual_seed(seed)
            reseed(model, seed)
            for images, labels in zip(
                split.images.split(max_batch), split.labels.split(max_batch), strict=True
            ):
                x = to_float(images.to(device))
                logits = sample_logits(model, x, num_samples=num_samples, max_batch=max_batch)
                correct += (logits.argmax(dim=2) == labels.to(device)).float().mean(dim=0).sum()
    finally:
        for part, before in seeds:
            part.reseed(before)
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
