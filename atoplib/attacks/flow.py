"""Flow attack (StAdv): pixels move instead of changing their values."""

from functools import partial
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.eot import StepCallback
from atoplib.attacks.norms import Ball
from atoplib.attacks.pgd import ENSEMBLE, pgd
from atoplib.decisions import Model, full_float32
from atoplib.parameters import above, at_least, check_settings, one_of

# The first step is in units of eps: in front of MNIST's AT half of it finds more than the whole or a quarter.
# BLURRED is the blurred gradient's share in a direction: three runs leave 6 % of AT's digits, without it 17.
MOMENTUM, FIRST_STEP, BLURRED = 0.6, 0.5, 0.7


def flow(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = 0.05,
    norm: str = "flow",
    steps: int = 30,
    eot_samples: int = 5,
    restarts: int = 10,
    control: int | None = None,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images whose pixels moved by at most ``eps``: ``pgd_ensemble`` in the space of flows.

    How smooth a flow must be is part of the threat (``control``), not of the loss: weighed against logits, it
    would make a classifier whose logits are larger seem less robust.

    Args:
        model, images, labels, rule, votes, targets, seed, max_batch, callback: as ``pgd``.
        eps: largest displacement of a pixel along either axis, in units of the sampling grid, in which the
            image is 2 wide and 2 high: 0.05 is 0.8 px at 32 px. Above 0, at most 2.
        steps, eot_samples: of each run; many short runs find more than few long ones.
        restarts: runs, on the images that are not yet misclassified, the first from a random flow, others
            from a mixture of the best so far and a random one: random ones alone leave three times as many.
        control: None moves each pixel by itself; a number moves a grid of so many control points along each
            edge, and the pixels between them follow bilinearly: another, smoother threat. At least 2.

    Returns:
        images in [0, 1].

    Raises:
        ValueError: as ``pgd``.

    Source: Xiao et al. 2018, section 3, without the flow loss; the bound: Laidlaw et al. 2021, appendix.
    """
    check_settings(
        norm=(norm, one_of("flow")), eps=(eps, above(0, 2)),
        control=(2 if control is None else control, at_least(2)),
    )  # fmt: skip
    return pgd(
        model, images, labels, eps=eps, norm=norm, steps=steps, alpha=FIRST_STEP * eps, cycles=1,
        momentum=MOMENTUM, loss="mean_softmax", early_stop=ENSEMBLE["early_stop"], eot_samples=eot_samples,
        restarts=restarts, recombine=True, rule=rule, votes=votes, targets=targets,
        ball=partial(FlowBall, control=control), seed=seed, max_batch=max_batch, callback=callback,
    )  # fmt: skip


class FlowBall(Ball):
    """The flows of at most ``eps``, (B, 2, H, W), or of control points in place of pixels, which ``pgd``
    searches as it does changes of values.

    Args:
        images, eps, control: as ``flow``.
    """

    def __init__(
        self,
        images: Float[Tensor, "batch channels height width"],
        eps: float,
        norm: str = "flow",
        control: int | None = None,
    ) -> None:
        self.images, self.eps, self.norm, self.control = images.detach(), eps, norm, control

    def rows(self, index: Tensor | slice) -> Self:
        """The flows of some of the images."""
        return type(self)(self.images[index], self.eps, self.norm, self.control)

    def start(self, generator: torch.Generator | None = None) -> Float[Tensor, "batch 2 rows columns"]:
        """A flow of each image, uniform in the ball."""
        return self.eps * self.still().uniform_(-1, 1, generator=generator)

    def still(self) -> Float[Tensor, "batch 2 rows columns"]:
        """The flows that move nothing."""
        sides = self.images.shape[2:] if self.control is None else (self.control, self.control)
        return self.images.new_zeros(len(self.images), 2, *sides)

    def direction(self, gradient: Tensor, points: Tensor | None = None) -> Tensor:
        """The signs, as the bound is along each axis by itself, of a gradient that is blurred over neighbours
        where pixels move by themselves: what moves together changes more than what moves alone."""
        if self.control is None:
            gradient = torch.lerp(
                gradient, nn.functional.avg_pool2d(gradient, 3, 1, 1, count_include_pad=False), BLURRED
            )
        return gradient.sign()

    def project(self, points: Float[Tensor, "batch 2 rows columns"]) -> Float[Tensor, "batch 2 rows columns"]:
        """The nearest flows within the bound."""
        return points.clamp(-self.eps, self.eps)

    def images_at(
        self, points: Float[Tensor, "batch 2 rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The images after these flows."""
        return warp(self.images, points if self.control is None else spread(points, *self.images.shape[2:]))

    def gradient_at(
        self, points: Float[Tensor, "batch 2 rows columns"], gradient: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch 2 rows columns"]:
        """The gradient with respect to flows."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            return torch.autograd.grad(self.images_at(points), points, gradient)[0]

    def check(
        self, points: Float[Tensor, "batch channels height width"], tolerance: float = 1e-6
    ) -> Float[Tensor, "batch channels height width"]:
        """The images in [0, 1]: whatever the flow, a mean of four leaves it by a rounding alone."""
        return points.clamp(0, 1)


def warp(
    images: Float[Tensor, "batch channels height width"], flow: Float[Tensor, "batch 2 height width"]
) -> Float[Tensor, "batch channels height width"]:
    """The images with each pixel read from where the flow points, bilinearly; beyond the border the border
    goes on.

    Differentiable in the flow, and deterministic on every device, which the backward pass of ``grid_sample``
    is not: a gather has an uncertain order of summation towards the images alone, and they need no gradient.

    Args:
        images: any range; the result keeps it, for every value is a mean of four.
        flow: displacement (down, right) in units of the sampling grid: 2 is the image's height or width.

    Source: Xiao et al. 2018, equation 1.
    """
    height, width = images.shape[2:]
    sides = torch.tensor([height, width], device=images.device).view(2, 1, 1)
    axes = (torch.arange(side, device=images.device) for side in (height, width))
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")) + flow * sides / 2
    # beyond the border the gradient is that at the border: of a clamp it would be zero, and what began there
    # would never come back
    inside = torch.minimum(points.detach().clamp_min(0), (sides - 1).to(points.dtype))
    # the upper left of the four neighbours stays one short of the border, so that the lower right exists
    corner = torch.minimum(inside.floor().long(), (sides - 2).clamp_min(0))
    points = inside + (points - points.detach())
    down, right = (points - corner).unsqueeze(2).unbind(dim=1)
    row, column = corner.unbind(dim=1)
    pixels = images.detach().flatten(2)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = (rows.clamp_max(height - 1) * width + columns.clamp_max(width - 1)).flatten(1)[:, None]
        return pixels.gather(2, index.expand(-1, pixels.shape[1], -1)).unflatten(2, (height, width))

    above = torch.lerp(at(row, column), at(row, column + 1), right)
    return torch.lerp(above, torch.lerp(at(row + 1, column), at(row + 1, column + 1), right), down)


def spread(
    points: Float[Tensor, "batch 2 rows columns"], height: int, width: int
) -> Float[Tensor, "batch 2 height width"]:
    """The flow of every pixel from that of control points, bilinearly, the outermost ones in the corners of
    the image.

    By two matrices, whose gradients are the same on every run of every device, as those of ``interpolate``
    are not.
    """

    def weights(pixels: int, count: int) -> Tensor:
        place = torch.linspace(0, count - 1, pixels, device=points.device, dtype=points.dtype)
        return (1 - (place[:, None] - torch.arange(count, device=points.device)).abs()).clamp_min(0)

    with full_float32(points.device):  # an attack's bfloat16 would round where pixels come from
        return weights(height, points.shape[2]) @ points @ weights(width, points.shape[3]).T
