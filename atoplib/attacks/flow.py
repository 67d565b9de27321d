"""Flow attack (StAdv): pixels move instead of changing their values."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.eot import StepCallback, eot_gradient, make_generator
from atoplib.attacks.losses import likely_targets, target_margin
from atoplib.attacks.norms import of_l1_norm_1
from atoplib.attacks.pgd import step_sizes
from atoplib.attacks.queries import at_rows, broken_samples, prepare_attack
from atoplib.decisions import Model, is_random, sample_logits
from atoplib.parameters import above, at_least, check_counts, check_settings, one_of

MOMENTUM = 0.6
FIRST_STEP = 0.5
"""Of eps. In front of MNIST's AT half of eps finds more than the whole or a quarter of it."""


def flow(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = 0.05,
    norm: str = "flow",
    steps: int = 100,
    eot_samples: int = 20,
    restarts: int = 1,
    control: int | None = None,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images whose pixels moved by at most ``eps``.

    How smooth a flow must be is part of the threat (``control``), not of the loss: weighed against logits, it
    would make a classifier whose logits are larger seem less robust.

    Args:
        model, images, labels, seed, max_batch, callback: as ``pgd``.
        eps: largest displacement of a pixel along either axis, in units of the sampling grid, in which the
            image is 2 wide and 2 high: 0.05 is 0.8 px at 32 px. Above 0, at most 2.
        steps, eot_samples: of each run.
        restarts: runs: the margin from rest, the margin from a random flow, then the margins of the most
            likely other classes, from random flows. Images that a deterministic model misclassifies take part
            in no further run.
        control: None moves each pixel by itself; a number moves a grid of so many control points along each
            edge, and the pixels between them follow bilinearly: another, smoother threat. At least 2.
        targets: class that each image is driven to in all runs.

    Returns:
        images in [0, 1]: of all flows on the way the one with the largest mean margin, for each image.

    Raises:
        ValueError: as ``pgd``.

    Source: Xiao et al. 2018, section 3, without the flow loss; the bound: Laidlaw et al. 2021, appendix.
    """
    return find_flow(
        model, images, labels, eps=eps, norm=norm, steps=steps, eot_samples=eot_samples, restarts=restarts,
        control=control, targets=targets, seed=seed, max_batch=max_batch, callback=callback,
    )[0]  # fmt: skip


def find_flow(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = 0.05,
    norm: str = "flow",
    steps: int = 100,
    eot_samples: int = 20,
    restarts: int = 1,
    control: int | None = None,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch 2 height width"]]:
    """What ``flow`` returns, and the flow: ascent by the sign of the gradient, with momentum and a step that
    falls along half a cosine from ``FIRST_STEP * eps`` to 0.06 of it. A scale of the logits changes
    nothing."""
    free = control is None
    check_settings(
        norm=(norm, one_of("flow")), eps=(eps, above(0, 2)), control=(2 if free else control, at_least(2))
    )
    check_counts(steps=steps, eot_samples=eot_samples, restarts=restarts)
    model, images, labels = prepare_attack(model, images, labels, targets)
    random, generator = is_random(model, images, max_batch=max_batch), make_generator(seed, images.device)
    eot_samples = eot_samples if random else 1
    kind, (height, width) = {"device": images.device, "dtype": images.dtype}, images.shape[2:]
    shape = (len(images), 2, *((height, width) if free else (control, control)))
    best = torch.zeros(len(images), 2, height, width, **kind)
    best_margin = torch.full((len(images),), -torch.inf, device=images.device)
    warped, rows = images.clone(), torch.arange(len(images), device=images.device)
    goals = [targets] * restarts
    if targets is None and restarts > 2:
        logits = sample_logits(model, images, num_samples=eot_samples, max_batch=max_batch).mean(dim=0)
        likely = likely_targets(logits, labels, restarts - 2)
        goals = [None, None, *(likely[run % len(likely)] for run in range(restarts - 2))]
    sizes = step_sizes(FIRST_STEP * eps, steps, cycles=1)
    for run, goal in enumerate(goals):
        points = torch.zeros(shape, **kind)
        if run:
            points = (torch.rand(shape, generator=generator, **kind) * 2 - 1) * eps
        points, past = points[rows], torch.zeros(shape, **kind)[rows]
        for step in range(steps + 1):  # the last one looks at what the last step has found
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                moves = points if free else spread(points, height, width)
                moved = warp(images[rows], moves)
                found = eot_gradient(
                    model, moved, labels[rows], loss="margin" if goal is None else target_margin,
                    targets=at_rows(goal, rows), eot_samples=eot_samples, max_batch=max_batch,
                )  # fmt: skip
                (gradient,) = torch.autograd.grad((moved * found.gradient).sum(), points)
            better = found.loss > best_margin[rows]
            best_margin[rows] = torch.where(better, found.loss, best_margin[rows])
            best[rows] = torch.where(better.view(-1, 1, 1, 1), moves.detach(), best[rows])
            warped[rows] = moved.detach()
            if callback is not None and step > 0:
                callback(run * steps + step, restarts * steps, warped.clone(), best_margin.clone())
            if step < steps:
                past = MOMENTUM * past + of_l1_norm_1(gradient)
                points = (points.detach() + sizes[step] * past.sign()).clamp(-eps, eps)
        if not random and run + 1 < restarts:
            logits = sample_logits(model, warp(images, best), max_batch=max_batch)
            rows = (~broken_samples(logits, labels, targets)[0]).nonzero().squeeze(1)
            if len(rows) == 0:
                break
    return warp(images, best).clamp(0, 1), best


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
    # no clamp: its gradient is zero at the very border, where the outermost pixels rest, so they would never
    # move
    points = torch.where(points < 0, 0.0, points)
    points = torch.where(points > sides - 1, (sides - 1).to(points.dtype), points)
    # the upper left of the four neighbours stays one short of the border, so that the lower right exists
    corner = torch.minimum(points.detach().floor().long(), (sides - 2).clamp_min(0))
    down, right = (points - corner).unbind(dim=1)
    row, column = corner.unbind(dim=1)
    pixels = images.detach().flatten(2)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = rows.clamp_max(height - 1) * width + columns.clamp_max(width - 1)
        index = index.flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
        return pixels.gather(2, index).unflatten(2, (height, width))

    down, right = down[:, None], right[:, None]
    above = torch.lerp(at(row, column), at(row, column + 1), right)
    below = torch.lerp(at(row + 1, column), at(row + 1, column + 1), right)
    return torch.lerp(above, below, down)


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

    return weights(height, points.shape[2]) @ points @ weights(width, points.shape[3]).T
