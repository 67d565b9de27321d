"""StAdv: pixels move instead of changing their values."""

from dataclasses import dataclass
from math import cos, pi

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack
from atoplib.attacks.eot import input_gradient
from atoplib.attacks.losses import likely_targets, margin, target_margin
from atoplib.attacks.pgd import LAST_STEP, StepCallback
from atoplib.verdicts import draw_logits, is_random

MOMENTUM = 0.75


@dataclass(frozen=True)
class StAdvSettings:
    """Spatially transformed adversarial examples (Xiao et al. 2018) under a bound, as Laidlaw et al. 2021 set it.

    How smooth a flow must be is part of the threat, not of the loss: weighed against logits, it would make a classifier whose
    logits are larger seem less robust.

    Attributes:
        bound: largest displacement of a pixel along either axis, in units of the sampling grid, in which the image is 2
            wide and 2 high: 0.05 is 0.8 px at 32 px. Above 0, at most 2.
        steps: of each run, at least 1.
        eot_samples: draws of the model that each gradient is averaged over, at least 1.
        restarts: runs, at least 1: the margin from rest, the margin from a random flow, then the margins of the most likely
            other classes, from random flows. Images that a deterministic model misclassifies take part in no further run.
        control: None moves each pixel by itself; a number moves a grid of so many control points along each edge, and the
            pixels between them follow bilinearly: another, smoother threat. At least 2.
    """

    bound: float = 0.05
    steps: int = 100
    eot_samples: int = 20
    restarts: int = 1
    control: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bound <= 2:
            raise ValueError(f"bound must lie in (0, 2], in units of a grid on which the image is 2 wide, got {self.bound}")
        if self.steps < 1 or self.eot_samples < 1 or self.restarts < 1:
            raise ValueError(
                f"steps, eot_samples and restarts must be at least 1, got {self.steps}, {self.eot_samples}, {self.restarts}"
            )
        if self.control is not None and self.control < 2:
            raise ValueError(f"control must be at least 2 points along each edge (or None: every pixel), got {self.control}")


def warp(
    images: Float[Tensor, "batch 3 height width"], flow: Float[Tensor, "batch 2 height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """The images with each pixel read from where the flow points, bilinearly; beyond the border the border goes on.

    Differentiable in the flow, and deterministic on every device, which the backward pass of ``grid_sample`` is not: a
    gather has an uncertain order of summation towards the images alone, and they need no gradient here.

    Args:
        images: any range; the result keeps it, for every value is a mean of four.
        flow: displacement (down, right) in units of the sampling grid: 2 is the image's height or width.

    Source: Xiao et al. 2018, equation 1.
    """
    height, width = images.shape[2:]
    sides = torch.tensor([height, width], device=images.device).view(2, 1, 1)
    grid = torch.meshgrid(
        torch.arange(height, device=images.device), torch.arange(width, device=images.device), indexing="ij"
    )
    points = torch.stack(grid) + flow * sides / 2
    # no clamp: its gradient is zero at the very border, where the outermost pixels rest, so they would never move
    points = torch.where(points < 0, 0.0, points)
    points = torch.where(points > sides - 1, (sides - 1).to(points.dtype), points)
    # the upper left of the four neighbours stays one short of the border, so that the lower right exists
    corner = torch.minimum(points.detach().floor().long(), (sides - 2).clamp_min(0))
    down, right = (points - corner).unbind(dim=1)
    row, column = corner.unbind(dim=1)
    pixels = images.detach().flatten(2)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = rows.clamp_max(height - 1) * width + columns.clamp_max(width - 1)
        return pixels.gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).unflatten(2, (height, width))

    down, right = down[:, None], right[:, None]
    above = torch.lerp(at(row, column), at(row, column + 1), right)
    below = torch.lerp(at(row + 1, column), at(row + 1, column + 1), right)
    return torch.lerp(above, below, down)


def spread(points: Float[Tensor, "batch 2 rows columns"], height: int, width: int) -> Float[Tensor, "batch 2 height width"]:
    """The flow of every pixel from that of control points, bilinearly, the outermost ones in the corners of the image.

    By two matrices, whose gradients are the same on every run of every device, as those of ``interpolate`` are not.
    """

    def weights(pixels: int, count: int) -> Tensor:
        place = torch.linspace(0, count - 1, pixels, device=points.device, dtype=points.dtype)
        return (1 - (place[:, None] - torch.arange(count, device=points.device)).abs()).clamp_min(0)

    return weights(height, points.shape[2]) @ points @ weights(width, points.shape[3]).T


def check_flow(
    adversarial: Float[Tensor, "batch 3 height width"],
    images: Float[Tensor, "batch 3 height width"],
    flow: Float[Tensor, "batch 2 height width"],
    bound: float,
    tolerance: float = 1e-6,
) -> None:
    """Raise AssertionError unless ``adversarial`` is in [0, 1] and is the image warped by a flow within its bound."""
    if not (torch.isfinite(adversarial).all() and torch.isfinite(flow).all()):
        raise AssertionError("StAdv returned values that are not finite")
    low, high = float(adversarial.min()), float(adversarial.max())
    if low < 0 or high > 1:
        raise AssertionError(f"StAdv left [0, 1]: {low} to {high}")
    largest = float(flow.abs().max())
    if largest > bound + tolerance:
        raise AssertionError(f"StAdv left its budget: a displacement of {largest}, allowed {bound}")
    off = float((adversarial - warp(images, flow)).abs().max())
    if off > tolerance:
        raise AssertionError(f"the result is not the warped image: it is off by {off}")


def find_flow(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: StAdvSettings = StAdvSettings(),
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 2 height width"]:
    """The flow of each image: ascent by the sign of the gradient, with momentum and a step that falls along a half cosine from
    ``bound`` to ``LAST_STEP`` of it. Multiplying the logits by a constant changes nothing. Arguments and errors as ``stadv``.

    Of all flows on the way an image gets the one with the largest mean margin.
    """
    model, images, labels = check_attack(model, images, labels)
    random = is_random(model, images, max_batch=max_batch)
    height, width = images.shape[2:]
    shape = (len(images), 2, *((height, width) if settings.control is None else (settings.control,) * 2))
    best = images.new_zeros(len(images), 2, height, width)
    best_margin = torch.full((len(images),), -torch.inf, device=images.device)
    warped, active = images.clone(), torch.arange(len(images), device=images.device)
    likely = ()
    if settings.restarts > 2:
        logits = draw_logits(model, images, num_draws=settings.eot_samples, max_batch=max_batch).mean(dim=0)
        likely = likely_targets(logits, labels, settings.restarts - 2).unbind(dim=1)
    for run in range(settings.restarts):
        targets = likely[(run - 2) % len(likely)] if run > 1 else None
        start = images.new_zeros(shape)
        if run:
            start = (torch.rand(shape, generator=generator, device=images.device) * 2 - 1) * settings.bound
        points, momentum = start[active], torch.zeros_like(start[active])
        for step in range(settings.steps + 1):  # the last one looks at what the last step has found
            with torch.enable_grad():
                points.requires_grad_()
                flow = points if settings.control is None else spread(points, height, width)
                moved = warp(images[active], flow)
                found = input_gradient(
                    model,
                    moved,
                    labels[active],
                    loss=margin if targets is None else target_margin,
                    targets=None if targets is None else targets[active],
                    eot_samples=settings.eot_samples,
                    max_batch=max_batch,
                )
                (gradient,) = torch.autograd.grad((moved * found.gradient).sum(), points)
            points, better = points.detach(), found.loss > best_margin[active]
            best_margin[active] = torch.where(better, found.loss, best_margin[active])
            best[active] = torch.where(better.view(-1, 1, 1, 1), flow.detach(), best[active])
            warped[active] = moved.detach()
            if callback is not None and step > 0:
                callback(run * settings.steps + step, settings.restarts * settings.steps, warped.clone(), best_margin.clone())
            if step == settings.steps:
                break
            tiny = torch.finfo(gradient.dtype).tiny
            momentum = MOMENTUM * momentum + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
            falling = (1 + cos(pi * step / max(1, settings.steps - 1))) / 2
            size = settings.bound * (LAST_STEP + (1 - LAST_STEP) * falling)
            points = (points + size * momentum.sign()).clamp(-settings.bound, settings.bound)
        if not random and run + 1 < settings.restarts:
            logits = draw_logits(model, warp(images, best), max_batch=max_batch)[0]
            active = (logits.argmax(dim=1) == labels).nonzero().squeeze(1)
            if len(active) == 0:
                break
    return best


def stadv(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: StAdvSettings = StAdvSettings(),
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images whose pixels moved by at most ``settings.bound``.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random.
        images: in [0, 1].
        labels: true classes.
        generator: of the random flows of all runs but the first, on the images' device.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (step, steps, warped images, the best mean margin of each image so far) after every step, all runs together.

    Returns:
        images in [0, 1]; they are no lp-ball's: ``check_flow`` has their budget.

    Raises:
        ValueError: as ``pgd``.

    Source: Xiao et al. 2018, section 3, without the flow loss; the bound: Laidlaw et al. 2021, appendix.
    """
    flow = find_flow(model, images, labels, settings, generator=generator, max_batch=max_batch, callback=callback)
    adversarial = warp(images, flow)
    check_flow(adversarial, images, flow, settings.bound)
    return adversarial
