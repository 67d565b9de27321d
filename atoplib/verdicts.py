"""The decisions of a random model: several draws of it, the vote over them, and when an image counts as read correctly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.contract import adapt, check_labels

Model = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [0, 1] -> logits (B, classes); may be random."""

PROBES = 8  # a model of few possible draws often gives one image the same one twice

VERDICTS = ("one_shot", "majority", "mean_softmax", "worst_of_n")
"""By which accuracies are reported."""
STANDING = "best_of_n"
"""By which an attack goes on, whatever is reported: while any draw is right there is something left to break."""


@dataclass(frozen=True)
class Verdict:
    """When a random model has read an image correctly.

    Attributes:
        name: ``one_shot`` (the first draw is right: what a user of the model meets), ``majority`` or ``mean_softmax`` (a
            vote over the draws is), ``worst_of_n`` (every draw is: an attacker may try again), ``best_of_n`` (any draw is;
            for attacks, which stop too early by any other).
        num_draws: forward passes for one decision, at least 1.

    Source: the N-evaluation of DiffHammer (Wang et al. 2024) and DiffBreak (Kassis et al. 2025).
    """

    name: str = "one_shot"
    num_draws: int = 1

    def __post_init__(self) -> None:
        if self.name not in (*VERDICTS, STANDING):
            raise ValueError(f"unknown verdict {self.name!r}; allowed: {', '.join((*VERDICTS, STANDING))}")
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {self.num_draws}")


def right_by(
    logits: Float[Tensor, "draws batch classes"], labels: Int[Tensor, " batch"], name: str
) -> Bool[Tensor, " batch"]:
    """Which images the verdict ``name`` (see ``Verdict``) calls right. Ties of a vote go to the lower class.

    Raises:
        ValueError: for an unknown name, or labels that are not (batch,).
    """
    check_labels(labels, logits.shape[1])
    if name in ("worst_of_n", STANDING):
        right = logits.argmax(dim=2) == labels
        return right.any(dim=0) if name == STANDING else right.all(dim=0)
    return winners(logits, name) == labels


def winners(logits: Float[Tensor, "draws batch classes"], name: str) -> Int[Tensor, " batch"]:
    """The class that each image gets by ``one_shot``, ``majority`` or ``mean_softmax``."""
    if name == "one_shot":
        return logits[0].argmax(dim=1)
    if name == "majority":
        return F.one_hot(logits.argmax(dim=2), logits.shape[2]).sum(dim=0).argmax(dim=1)
    if name == "mean_softmax":
        return logits.softmax(dim=2).mean(dim=0).argmax(dim=1)
    raise ValueError(f"unknown vote {name!r}; allowed: one_shot, majority, mean_softmax")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within the block float32 is computed as float32: no autocast, and on CUDA no TF32, whose 10 bits of mantissa may flip
    a decision that hangs by a hair.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


@torch.no_grad()
def draw_logits(
    model: Model, images: Float[Tensor, "batch 3 height width"], *, num_draws: int = 1, max_batch: int = 512
) -> Float[Tensor, "draws batch classes"]:
    """Logits of ``num_draws`` forward passes an image, draws and images in one batch, in ``full_float32``: also where an
    attack computes in less (autocast), for what rests on them is a verdict.

    Args:
        model: any module, images in [0, 1] -> logits, that throws new dice for each image of its batch.
        max_batch: copies of images that are in memory at once.

    Raises:
        ValueError: for num_draws < 1, or logits that are not finite: they belong to no class.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    model = adapt(model)
    index = torch.arange(num_draws * len(images), device=images.device) % max(1, len(images))
    with full_float32(images.device):
        logits = torch.cat([model(images[part]).float() for part in index.split(max_batch)])
    logits = logits.unflatten(0, (num_draws, len(images)))
    finite = logits.isfinite().all(dim=2).all(dim=0)
    if not finite.all():
        wrong = (~finite).nonzero().squeeze(1).tolist()
        raise ValueError(
            f"the model returns logits that are not finite for {len(wrong)} of {len(images)} images (the first is number "
            f"{wrong[0]} of the batch); such an image has no class"
        )
    return logits


def predict(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    *,
    num_draws: int = 1,
    vote: str = "majority",
    max_batch: int = 512,
) -> Int[Tensor, " batch"]:
    """Classes after a vote over ``num_draws`` forward passes of any module, with a new draw in each.

    Args:
        vote: ``majority`` (most frequent class, ties to the lower index), ``mean_softmax``, or ``one_shot``.
        max_batch: copies of images that are in memory at once.

    Raises:
        ValueError: for an unknown vote or num_draws < 1.
    """
    return winners(draw_logits(model, images, num_draws=num_draws, max_batch=max_batch), vote)


def judge(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    verdict: Verdict = Verdict(),
    *,
    max_batch: int = 512,
) -> Bool[Tensor, " batch"]:
    """Which images the model reads correctly by ``verdict``, in float32, with the next of the model's own dice."""
    return right_by(draw_logits(model, images, num_draws=verdict.num_draws, max_batch=max_batch), labels, verdict.name)


@torch.no_grad()
def is_random(model: Model, images: Float[Tensor, "batch 3 height width"], *, max_batch: int = 512) -> bool:
    """Whether a model throws dice, so that an attack needs EOT and a verdict several draws.

    It does if two passes over ``PROBES`` images differ; fewer images are shown several times.
    """
    model = adapt(model)
    probes = images[torch.arange(PROBES, device=images.device) % len(images)].split(max_batch)
    return any(not torch.equal(model(part), model(part)) for part in probes)


def reseed(model: Model, seed: int) -> None:
    """Start the dice of a random model anew, where it or a part of it has any (a method ``reseed``, as ``AToPPipeline``)."""
    for part in model.modules() if isinstance(model, nn.Module) else (model,):
        if hasattr(part, "reseed"):
            part.reseed(seed)


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), within [0, 1]; ``successes`` may be a mean over repetitions.

    Raises:
        ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"successes must lie in 0..trials and trials be at least 1, got {successes} of {trials}")
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high
