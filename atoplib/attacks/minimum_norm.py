"""Minimum-norm attacks on deterministic models: the nearest misclassified point, and with it the accuracy at
every radius."""

from collections.abc import Callable
from math import cos, inf, pi

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.eot import EOTGradient, StepCallback, eot_gradient, make_generator
from atoplib.attacks.losses import TINY, Loss, cross_entropy, margin
from atoplib.attacks.norms import Ball, check_counts, check_settings, norm_of
from atoplib.attacks.queries import broken, broken_samples, prepare_attack
from atoplib.contract import prepare
from atoplib.decisions import Model, is_random
from atoplib.parameters import one_of

DUAL = {"linf": 1, "l2": 2, "l1": inf}
"""Norms, and the exponent of the norm of a gradient that turns a margin into a distance."""


def ddn(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = inf,
    norm: str = "l2",
    steps: int = 100,
    gamma: float = 0.05,
    first_norm: float = 1.0,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The nearest misclassified points in l2, by decoupled direction and norm: a step along the gradient,
    then the norm of the perturbation shrinks where the point is misclassified and grows elsewhere.

    Args:
        model: deterministic, in eval mode, images in [0, 1] -> logits.
        images: in [0, 1].
        labels: true classes.
        eps: a point farther away is pulled back to this distance (and then mostly classified correctly); inf:
            never.
        norm: ``l2``.
        steps: at least 1.
        gamma: share by which the norm shrinks or grows.
        first_norm: of the perturbation, in units of the image.
        targets: class that each image is driven to; None: any other.
        seed: of the direction where the gradient is zero; None: torch's global generator.
        callback: (step, steps, best points so far, their distances) after every step.

    Returns:
        images in [0, 1]; where no misclassified point was found, the image itself (see ``minimum_norms``).

    Raises:
        ValueError: as ``contract.prepare``; for another norm, or a random model.

    Source: Rony et al. 2019, algorithm 1.
    """
    model, images, labels = _prepare(model, images, labels, targets, norm, ("l2",), steps)
    generator, worst = make_generator(seed, images.device), _worst_norm(images, "l2")
    radius = torch.full_like(worst, first_norm)

    def advance(step: int, points: Tensor, found: EOTGradient, hit: Tensor, _best: Tensor) -> Tensor:
        nonlocal radius
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        length = found.gradient.flatten(1).norm(dim=1)
        unit = found.gradient / _wide(length.clamp_min(TINY))
        direction = torch.where(_wide(length < TINY), noise, unit)
        moved = points - images + (0.01 + 0.99 * _falling(step, steps)) * direction
        radius = torch.minimum(torch.where(hit, 1 - gamma, 1 + gamma) * radius, worst)
        return images + moved * _wide(radius / moved.flatten(1).norm(dim=1).clamp_min(TINY))

    return _nearest(
        model, images, labels, advance, loss=cross_entropy, eps=eps, norm=norm, steps=steps, targets=targets,
        max_batch=max_batch, callback=callback,
    )  # fmt: skip


def fmn(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = inf,
    norm: str = "linf",
    steps: int = 100,
    alpha: float | None = None,
    gamma: float = 0.05,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The nearest misclassified points in linf, l2 or l1, by fast minimum norm: steps along the gradient of
    the margin, projected onto a ball that shrinks where the point is misclassified and grows elsewhere.

    Args:
        alpha: first step size, the l2 norm of a step; it falls to a hundredth along half a cosine. None: 10
            for linf, else 1.
        gamma: share by which the radius shrinks or grows, at first; it falls to a fiftieth.
        seed: not used, there is no random number.
        other arguments, result and errors: as ``ddn``.

    Source: Pintor et al. 2021, algorithm 1.
    """
    model, images, labels = _prepare(model, images, labels, targets, norm, tuple(DUAL), steps)
    alpha, worst = alpha or (10.0 if norm == "linf" else 1.0), _worst_norm(images, norm)
    radius, ever = torch.full_like(worst, inf), torch.zeros_like(labels, dtype=torch.bool)

    def advance(step: int, points: Tensor, found: EOTGradient, hit: Tensor, best: Tensor) -> Tensor:
        nonlocal radius, ever
        falling, flat, ever = _falling(step, steps), found.gradient.flatten(1), ever | hit
        to_boundary = found.loss.abs() / flat.norm(p=DUAL[norm], dim=1).clamp_min(TINY)
        change = gamma * (0.02 + 0.98 * falling)
        # a hair beyond: a point on the boundary itself is still classified correctly
        beyond = (norm_of(points - images, norm) + to_boundary) * (1 + change / 10)
        grown = torch.where(ever, radius * (1 + change), beyond)
        radius = torch.where(hit, torch.minimum(radius * (1 - change), best), grown)
        radius = torch.minimum(radius, worst).to(images.dtype)
        step_size = alpha * (0.01 + 0.99 * falling)
        moved = points + step_size * found.gradient / _wide(flat.norm(dim=1).clamp_min(TINY))
        if norm == "l2":  # onto the sphere, from inside, too, as adv-lib does: nearer points are found so
            return images + (moved - images) * _wide(radius / norm_of(moved - images, "l2").clamp_min(TINY))
        return Ball(images, radius, norm).project(moved)

    return _nearest(
        model, images, labels, advance, loss=margin, eps=eps, norm=norm, steps=steps, targets=targets,
        max_batch=max_batch, callback=callback,
    )  # fmt: skip


def _nearest(
    model: Model,
    images: Tensor,
    labels: Tensor,
    advance: Callable[[int, Tensor, EOTGradient, Tensor, Tensor], Tensor],
    *,
    loss: Loss,
    eps: float,
    norm: str,
    steps: int,
    targets: Tensor | None,
    max_batch: int,
    callback: StepCallback | None,
) -> Tensor:
    """The nearest misclassified points on a way: (step, points, their gradient, whether each is
    misclassified, smallest norms so far) -> next points."""
    sign, goals = (1, labels) if targets is None else (-1, targets)
    points, best, best_size = images.clone(), images.clone(), _worst_norm(images, norm)
    for step in range(steps):
        found = eot_gradient(
            model, points, goals, loss=lambda *given: sign * loss(*given), max_batch=max_batch
        )
        hit, size = broken_samples(found.logits, labels, targets)[0], norm_of(points - images, norm)
        nearer = hit & (size < best_size)
        best, best_size = torch.where(_wide(nearer), points, best), torch.where(nearer, size, best_size)
        points = advance(step, points, found, hit, best_size).clamp(0, 1)
        if callback is not None:
            callback(step + 1, steps, best.clone(), best_size.clone())
    return best if eps == inf else Ball(images, eps, norm).project(best)


def minimum_norms(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    adversarial: Float[Tensor, "batch channels height width"],
    norm: str = "l2",
    *,
    max_batch: int = 256,
) -> Float[Tensor, " batch"]:
    """How far each adversarial image lies from its image: inf where it is classified correctly, 0 where the
    image itself is misclassified. The accuracy at a radius is the share of images above it."""
    model, images, labels = prepare(model, images, labels)
    sizes = norm_of(adversarial - images, norm)
    sizes = torch.where(broken(model, adversarial, labels, max_batch=max_batch), sizes, torch.inf)
    return torch.where(broken(model, images, labels, max_batch=max_batch), 0.0, sizes)


def _prepare(
    model: Model,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    norm: str,
    norms: tuple[str, ...],
    steps: int,
) -> tuple[Model, Tensor, Tensor]:
    check_settings(norm=(norm, one_of(*norms)))
    check_counts(steps=steps)
    model, images, labels = prepare_attack(model, images, labels, targets)
    if is_random(model, images):
        raise ValueError(
            "minimum-norm attacks follow one boundary, but the model is random; use pgd at several eps"
        )
    return model, images, labels


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _falling(step: int, steps: int) -> float:
    return (1 + cos(pi * step / steps)) / 2


def _worst_norm(images: Tensor, norm: str) -> Tensor:
    """The largest norm that a perturbation within [0, 1] can have."""
    return norm_of(torch.maximum(images, 1 - images), norm)
