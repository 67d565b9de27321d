"""What a norm means to an attack: a step, a projection, a random start, a size."""

import torch
from jaxtyping import Float
from torch import Tensor

from atoplib.shares import WHOLE, Share

NORMS = ("linf", "l2")
ROUNDING = 3e-8  # of one value of an image in [0, 1] in float32, in the root mean square


def _check(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; allowed: {', '.join(NORMS)}")


def check_ball(eps: float, norm: str) -> None:
    """Raise ValueError unless ``eps`` is a radius of the norm in units of the image ([0, 1])."""
    _check(norm)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be above 0, got {eps}")
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps of the linf norm must be at most 1 (images lie in [0, 1]), got {eps}; 8/255?")


def perturbation_size(perturbation: Float[Tensor, "batch 3 height width"], norm: str) -> Float[Tensor, " batch"]:
    """The norm of each image's perturbation, in units of the image ([0, 1])."""
    _check(norm)
    flat = perturbation.flatten(1)
    # in float64: the squares of a large image add up to more than float32 can tell apart
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1, dtype=torch.float64).to(flat.dtype)


def steepest_step(gradient: Float[Tensor, "batch 3 height width"], norm: str) -> Float[Tensor, "batch 3 height width"]:
    """The step of norm 1 that raises the loss most: the sign (linf), the gradient over its own norm (l2).

    A zero gradient gives a zero step. Source: Madry et al. 2018, section 2.1.
    """
    _check(norm)
    if norm == "linf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    # first by the largest entry: the squares of a saturated model's gradients underflow
    gradient = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(tiny).view(-1, 1, 1, 1)


def project(
    images: Float[Tensor, "batch 3 height width"],
    origin: Float[Tensor, "batch 3 height width"],
    eps: float,
    norm: str,
) -> Float[Tensor, "batch 3 height width"]:
    """The nearest point to ``images`` within ``eps`` of ``origin``, then clipped to [0, 1] (which never leaves the ball)."""
    _check(norm)
    if norm == "linf":
        return torch.minimum(torch.maximum(images, origin - eps), origin + eps).clamp(0, 1)
    perturbation = images - origin
    size = perturbation.flatten(1).norm(dim=1, dtype=torch.float64).clamp_min(1e-30).view(-1, 1, 1, 1)
    # the sum is rounded value by value, by some 1e-7 of an image's: a margin of that size in every value keeps it in the ball
    margin = ROUNDING * perturbation[0].numel() ** 0.5
    scale = ((eps - margin).clamp_min(0.5 * eps) if isinstance(eps, Tensor) else max(eps - margin, 0.5 * eps)) / size
    return (origin + perturbation * scale.clamp_max(1).to(perturbation.dtype)).clamp(0, 1)


def random_start(
    images: Float[Tensor, "batch 3 height width"],
    eps: float,
    norm: str,
    generator: torch.Generator | None,
    share: Share = WHOLE,
) -> Float[Tensor, "batch 3 height width"]:
    """A point within ``eps`` of each image: uniform in the cube (linf), uniform in the ball (l2); clipped to [0, 1]."""
    _check(norm)
    shape, device = images.shape, images.device
    if norm == "linf":
        noise = share.throw(torch.rand, shape, generator=generator, device=device) * 2 - 1
        return (images + eps * noise).clamp(0, 1)
    direction = steepest_step(share.throw(torch.randn, shape, generator=generator, device=device), "l2")
    dimensions = images[0].numel()
    radius = share.throw(torch.rand, (len(images), 1, 1, 1), generator=generator, device=device) ** (1 / dimensions)
    return (images + eps * radius * direction).clamp(0, 1)
