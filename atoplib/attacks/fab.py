"""FAB-T: the nearest wrongly read image, by steps on the linearised boundary between the true class and a target."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.attempts import Attempt, StepCallback, strongest_attempt
from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.eot import input_gradient
from atoplib.attacks.losses import likely_targets, target_margin
from atoplib.attacks.norms import check_ball, perturbation_size, project
from atoplib.verdicts import Model, Verdict, draw_logits, full_float32, is_random


@dataclass(frozen=True)
class FABSettings:
    """Targeted fast adaptive boundary attack (Croce & Hein 2020, "Minimally distorted adversarial examples").

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]); an image leaves once it is broken within.
        norm: ``linf`` or ``l2``: what is minimised.
        steps: iterations for each target, at least 1.
        num_targets: so many of the likeliest other classes are targets, or all of them if they are fewer.
        alpha_max: largest share of the way back towards the image in one step.
        eta: overshoot beyond the linearised boundary, at least 1.
        beta: share of the perturbation that is kept once a point is read wrongly.
    """

    eps: float
    norm: str = "linf"
    steps: int = 100
    num_targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_ball(self.eps, self.norm)
        for name in ("steps", "num_targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha_max", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 1 <= self.eta < float("inf"):
            raise ValueError(f"eta must be at least 1, got {self.eta}")


def fab(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: FABSettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by FAB with targets, of a deterministic model.

    Args:
        model: in eval mode, images in [0, 1] -> logits; deterministic.
        images: in [0, 1].
        labels: true classes.
        generator: not used; every run starts from the image itself.
        max_batch: images that are in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step; the loss is the target's margin.

    Returns:
        adversarial images in [0, 1], within eps of ``images``; where the nearest wrongly read point lies farther away, its
        projection onto the ball.

    Raises:
        ValueError: as ``check_attack``; for a random model, whose boundary moves with every draw.

    Source: Croce & Hein 2020 (arXiv 1907.02044), algorithm 1; targets as in Croce & Hein 2020 (AutoAttack), section 5.
    """
    model, images, labels = check_attack(model, images, labels)
    if is_random(model, images, max_batch=max_batch):
        raise ValueError(
            "FAB needs a deterministic model, but this one is random: its boundary moves with every draw; use apgd"
        )
    targets = likely_targets(draw_logits(model, images, max_batch=max_batch)[0], labels, settings.num_targets)

    def attempt(column: Tensor) -> Attempt:
        def run(positions: Tensor, report: StepCallback | None) -> Tensor:
            chosen = (images[positions], labels[positions], column[positions])
            # at the boundary itself half of the digits say nothing: in float32 whatever other attacks compute in
            with full_float32(images.device):
                return _approach(model, *chosen, settings, max_batch=max_batch, callback=report)

        return Attempt(settings.steps, run)

    attempts = [attempt(column) for column in targets.unbind(dim=1)]
    adversarial = strongest_attempt(model, images, labels, attempts, Verdict(), max_batch=max_batch, callback=callback)
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial


def _approach(
    model: Model,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    settings: FABSettings,
    *,
    max_batch: int,
    callback: StepCallback | None,
) -> Tensor:
    """One run of algorithm 1: the nearest wrongly read point of each image, projected onto the ball."""
    points, nearest = images.clone(), images.clone()
    distance = torch.full((len(images),), torch.inf, device=images.device)
    losses = torch.zeros(len(images), device=images.device)
    rows = torch.arange(len(images), device=images.device)
    for step in range(1, settings.steps + 1):
        origin, truth, at = images[rows], labels[rows], points[rows]
        found = input_gradient(model, at, truth, loss=target_margin, targets=targets[rows], max_batch=max_batch)
        at = _step(at, origin, found.gradient, found.loss, settings)
        wrong = draw_logits(model, at, max_batch=max_batch)[0].argmax(dim=1) != truth
        size = perturbation_size(at - origin, settings.norm)
        nearer = wrong & (size < distance[rows])
        nearest[rows] = torch.where(nearer.view(-1, 1, 1, 1), at, nearest[rows])
        distance[rows] = torch.where(nearer, size, distance[rows])
        points[rows] = torch.where(wrong.view(-1, 1, 1, 1), origin + settings.beta * (at - origin), at)
        losses[rows] = found.loss
        if callback is not None:
            callback(step, settings.steps, project(nearest, images, settings.eps, settings.norm), losses.clone())
        rows = rows[distance[rows] > settings.eps]
        if len(rows) == 0:
            break
    return project(nearest, images, settings.eps, settings.norm)


def _step(points: Tensor, images: Tensor, gradient: Tensor, value: Tensor, settings: FABSettings) -> Tensor:
    """To the plane where the linearised margin is 0, from the point and from the image, weighed by the distances (eq. 9)."""
    ahead = towards_plane(points, gradient, -value, settings.norm)
    gap = ((points - images) * gradient).flatten(1).sum(dim=1) - value
    back = towards_plane(images, gradient, gap, settings.norm)
    near, far = (perturbation_size(move, settings.norm).clamp_min(1e-8) for move in (ahead, back))
    alpha = (near / (near + far)).clamp_max(settings.alpha_max).view(-1, 1, 1, 1)
    moved = (1 - alpha) * (points + settings.eta * ahead) + alpha * (images + settings.eta * back)
    return moved.clamp(0, 1)


def towards_plane(
    points: Float[Tensor, "batch 3 height width"],
    normal: Float[Tensor, "batch 3 height width"],
    gap: Float[Tensor, " batch"],
    norm: str,
) -> Float[Tensor, "batch 3 height width"]:
    """The smallest move d with <normal, d> = gap that keeps ``points`` + d in [0, 1]; as far as that goes, if none does.

    Each pixel moves in proportion to its rate (1 for linf, the size of its weight for l2) until it meets the wall of the
    box. The gap that is closed grows with the common factor, piecewise linearly, with a corner where a pixel meets its wall:
    the corners are sorted and the right piece is solved.

    Args:
        points: in [0, 1].
        normal: a zero moves nothing.

    Source: Croce & Hein 2020 (arXiv 1907.02044), section 2.2, eq. 6.
    """
    weight = normal.flatten(1).abs()
    wanted = gap.abs().unsqueeze(1)
    direction = normal.flatten(1).sign() * gap.sign().unsqueeze(1)
    start = points.flatten(1)
    room = torch.where(direction > 0, 1 - start, start) * (direction != 0)
    rate = (weight > 0).to(weight.dtype) if norm == "linf" else weight
    tiny = torch.finfo(weight.dtype).tiny
    corner, order = (room / rate.clamp_min(tiny)).sort(dim=1)
    filled, slope = (weight * room).gather(1, order), (weight * rate).gather(1, order)
    at_walls = filled.cumsum(dim=1) - filled  # closed, before each corner, by the pixels that have met their walls
    moving = slope.flip(1).cumsum(dim=1).flip(1)  # and the slope of all others
    piece = torch.searchsorted(at_walls + corner * moving, wanted).clamp_max(corner.shape[1] - 1)
    factor = (wanted - at_walls.gather(1, piece)) / moving.gather(1, piece).clamp_min(tiny)
    return (direction * torch.minimum(factor * rate, room)).view_as(points)
