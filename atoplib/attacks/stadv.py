"""StAdv: pixels move instead of changing their values."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack
from atoplib.attacks.eot import input_gradient
from atoplib.attacks.losses import margin
from atoplib.attacks.pgd import StepCallback

ROUNDED = 1e-4
"""Below this difference between neighbours, in units of the grid (0.0016 px at 32 px), the flow loss is quadratic."""


@dataclass(frozen=True)
class StAdvSettings:
    """Spatially transformed adversarial examples (Xiao et al. 2018) under a bound, as Laidlaw et al. 2021 set it.

    Attributes:
        bound: largest displacement of a pixel along either axis, in units of the sampling grid, in which the image is 2
            wide and 2 high: 0.05 is 0.8 px at 32 px. Above 0, at most 2.
        steps: iterations of Adam, at least 1.
        learning_rate: of Adam, in the same units.
        eot_samples: draws of the model that each gradient is averaged over, at least 1.
        smoothness: weight of the flow loss; None: 0.0025 / bound.
        confidence: a draw whose margin exceeds it pulls no further, in logits, at least 0 (0 as published); None: all draws
            do, which breaks far more images of a random model.
    """

    bound: float = 0.05
    steps: int = 100
    learning_rate: float = 0.01
    eot_samples: int = 20
    smoothness: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bound <= 2:
            raise ValueError(f"bound must lie in (0, 2], in units of a grid on which the image is 2 wide, got {self.bound}")
        if self.steps < 1 or self.eot_samples < 1:
            raise ValueError(f"steps and eot_samples must be at least 1, got {self.steps} and {self.eot_samples}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.smoothness is not None and not 0 <= self.smoothness < float("inf"):
            raise ValueError(f"smoothness must be at least 0 (or None), got {self.smoothness}")
        if self.confidence is not None and not self.confidence >= 0:
            raise ValueError(f"confidence must be at least 0 (or None), got {self.confidence}")

    @property
    def flow_weight(self) -> float:
        """smoothness, or its default."""
        return 0.0025 / self.bound if self.smoothness is None else self.smoothness


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


def flow_loss(flow: Float[Tensor, "batch 2 height width"]) -> Float[Tensor, " batch"]:
    """How unsmooth each flow is: the distances between the displacements of neighbours, summed over all pairs, each counted
    from both sides as the paper does.

    Source: Xiao et al. 2018, equation 4.
    """
    across, down = flow.diff(dim=3), flow.diff(dim=2)
    # rounded off at the bottom: a bare root has no slope at 0, and close to it only rounding errors decide on its sign
    lengths = [((step.square().sum(dim=1) + ROUNDED**2).sqrt() - ROUNDED).sum(dim=(1, 2)) for step in (across, down)]
    return 2 * (lengths[0] + lengths[1])


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
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 2 height width"]:
    """The flow of each image by Adam on margin loss and smoothness, from rest; arguments and errors as ``stadv``.

    Of all flows on the way an image gets the one with the largest mean margin, so that smoothness never undoes a break.
    """
    check_attack(model, images, labels)
    flow = images.new_zeros(len(images), 2, *images.shape[2:])
    best = flow.clone()
    best_margin = torch.full((len(images),), -torch.inf, device=images.device)
    first, second = torch.zeros_like(flow), torch.zeros_like(flow)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return margin(logits, targets).clamp_max(torch.inf if settings.confidence is None else settings.confidence)

    for step in range(1, settings.steps + 2):
        last = step > settings.steps  # looks at what the last step has found
        with torch.enable_grad():
            flow.requires_grad_()
            warped = warp(images, flow)
            found = input_gradient(model, warped, labels, loss=loss, eot_samples=settings.eot_samples, max_batch=max_batch)
            goal = (warped * found.gradient).sum() - settings.flow_weight * flow_loss(flow).sum()
            gradient = None if last else torch.autograd.grad(goal, flow)[0]
        flow = flow.detach()
        better = found.loss > best_margin
        best_margin = torch.where(better, found.loss, best_margin)
        best = torch.where(better.view(-1, 1, 1, 1), flow, best)
        if callback is not None and step > 1:
            callback(step - 1, settings.steps, warped.detach(), found.loss)
        if last:
            break
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        ascent = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        flow = (flow + settings.learning_rate * ascent).clamp(-settings.bound, settings.bound)
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
        generator: not used; the attack starts from rest.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (step, steps, warped images, mean margin of each image, cut off at ``confidence``) after every step.

    Returns:
        images in [0, 1]; they are no lp-ball's: ``check_flow`` has their budget.

    Raises:
        ValueError: as ``pgd``.

    Source: Xiao et al. 2018, section 3; the bound and its weights: Laidlaw et al. 2021, appendix.
    """
    flow = find_flow(model, images, labels, settings, max_batch=max_batch, callback=callback)
    adversarial = warp(images, flow)
    check_flow(adversarial, images, flow, settings.bound)
    return adversarial
