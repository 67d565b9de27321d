"""Minimum-norm attacks of foolbox on deterministic models: the nearest misclassified point, and by its
distance (``norms.norm_of``) the accuracy at every radius."""

from functools import partial
from math import inf
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.eot import StepCallback
from atoplib.attacks.norms import Ball, norm_of
from atoplib.attacks.queries import prepare_attack
from atoplib.attacks.third_party import without_a_trace
from atoplib.decisions import Model, is_random
from atoplib.parameters import check_counts, check_settings, one_of

FMN = {"linf": "LInfFMNAttack", "l2": "L2FMNAttack", "l1": "L1FMNAttack"}
BEYOND = 1 + 1e-3  # of a radius that ends on the boundary, where a point is still classified correctly


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
        max_batch: images that are attacked at a time.
        callback: (images done, images, best points, their distances) after every ``max_batch`` images.

    Returns:
        images in [0, 1]; where no misclassified point was found, the image itself.

    Raises:
        ValueError: as ``contract.prepare``; for another norm, or a random model.
        ImportError: without foolbox.

    Source: Rony et al. 2019, algorithm 1.
    """
    check_settings(norm=(norm, one_of("l2")))
    return _nearest(
        "DDNAttack", model, images, labels, eps=eps, norm=norm, targets=targets, seed=seed,
        max_batch=max_batch, callback=callback, steps=steps, gamma=gamma, init_epsilon=first_norm,
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
        gamma: share by which the radius shrinks or grows, at first; it falls to 0.001.
        seed: not used, there is no random number.
        other arguments, result and errors: as ``ddn``.

    Source: Pintor et al. 2021, algorithm 1.
    """
    check_settings(norm=(norm, one_of(*FMN)))
    return _nearest(
        FMN[norm], model, images, labels, eps=eps, norm=norm, targets=targets, seed=seed,
        max_batch=max_batch, callback=callback, steps=steps, gamma=gamma,
        max_stepsize=alpha or (10.0 if norm == "linf" else 1.0),
    )  # fmt: skip


def _nearest(
    name: str,
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str,
    steps: int,
    targets: Tensor | None,
    seed: int | torch.Generator | None,
    max_batch: int,
    callback: StepCallback | None,
    **options: Any,
) -> Tensor:
    """What foolbox's attack ``name`` finds, pulled back to ``eps``."""
    check_counts(steps=steps)
    model, images, labels = prepare_attack(model, images, labels, targets)
    if is_random(model, images, max_batch=max_batch):
        raise ValueError(
            "minimum-norm attacks follow one boundary, but the model is random; use pgd at several eps"
        )
    try:
        import foolbox
    except ImportError as error:
        raise ImportError("minimum-norm attacks are those of foolbox: pip install foolbox") from error
    attack = getattr(foolbox.attacks, name)(steps=steps, **options)
    attack.project = partial(_project, norm)
    wrapped, best = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device), images.clone()
    for rows in torch.arange(len(images), device=images.device).split(max_batch):
        if targets is None:
            criterion = foolbox.Misclassification(labels[rows])
        else:
            criterion = foolbox.TargetedMisclassification(targets[rows])
        with without_a_trace(model, seed, images.device):
            best[rows] = attack.run(wrapped, images[rows], criterion).clamp(0, 1)
        if callback is not None:
            callback(int(rows[-1]) + 1, len(images), best.clone(), norm_of(best - images, norm))
    return best if eps == inf else Ball(images, eps, norm).project(best)


def _project(norm: str, x: Any, x0: Any, epsilon: Any) -> Any:
    """Points of foolbox's own tensors into balls around x0. In l2 onto the sphere, from inside, too: nearer
    points are found so (foolbox 3.3.4 divides each norm by itself there, and moves no point)."""
    points, images, radius = x.raw, x0.raw, epsilon.raw * BEYOND
    if norm == "l2":
        factor = radius / norm_of(points - images, norm).clamp_min(1e-12)
        return type(x)(images + (points - images) * factor.view(-1, 1, 1, 1))
    return type(x)(Ball(images, radius, norm).project(points))
