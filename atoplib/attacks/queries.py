"""What black-box attacks share: the value of a point, seen through logits alone."""

from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atoplib.attacks.losses import margin
from atoplib.verdicts import Model, Verdict, judge


@torch.no_grad()
def mean_margin(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    eot_samples: int = 1,
    max_batch: int = 512,
    seed: int | None = None,
) -> Float[Tensor, " batch"]:
    """Margin of each image (above 0: misread), averaged over ``eot_samples`` draws of the model, without any gradient.

    Draws and images stand in one batch, at most ``max_batch`` of them at once.

    Args:
        seed: of draws that are held: two calls with one seed meet the same, so that the difference of two points is seen
            through the noise. For models with ``fixed_draws``, as ``can_hold`` tells; None throws new dice.
    """
    total = torch.zeros(len(images), device=images.device)
    index = torch.arange(eot_samples * len(images), device=images.device) % max(1, len(images))
    for number, part in enumerate(index.split(max_batch)):
        # another seed for each part: one seed gives batches of one shape the same draws
        with nullcontext() if seed is None else model.fixed_draws(seed + number):
            total.index_add_(0, part, margin(model(images[part]), labels[part]))
    return total / eot_samples


def can_hold(model: Model) -> bool:
    """Whether a model's dice can be held, as those of an ``AToPPipeline``."""
    return hasattr(model, "fixed_draws")


def new_seed(generator: torch.Generator | None, device: torch.device) -> int:
    """For ``mean_margin``."""
    return int(torch.randint(2**31, (), generator=generator, device=device))


def still_standing(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    suspects: Bool[Tensor, " batch"],
    verdict: Verdict,
    *,
    max_batch: int = 512,
) -> Bool[Tensor, " batch"]:
    """Which images are not broken: those that are no suspects, and the suspects whom ``verdict`` calls right all the same.

    Only suspects cost forward passes.
    """
    standing = ~suspects
    if suspects.any():
        standing[suspects] = judge(model, images[suspects], labels[suspects], verdict, max_batch=max_batch)
    return standing
