"""What a norm means to an attack: the ball around an image, its random start, steepest step, projection and
size."""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from atoplib.parameters import above, check_settings, one_of

NORMS = ("linf", "l2", "l1")
FINITE = 1e9  # no radius or step is larger
ROUNDING = 3e-8  # of one value of an image in [0, 1] in float32, in the root mean square
L1_SHARE = 0.005  # of the values of an image that one l1 step changes
# So near its bound no value is pushed on: the projection draws all back a little, and the first would be
# pushed again and again.
NEAR = 0.05
# Of a run that begins outside: (radius in units of eps, up to which share of the steps). So do Croce & Hein
# 2021, "Mind the box", section 4.3, for l1. By these, of a dozen, AT and AToP on MNIST kept least; linf gains
# nothing.
STAGES = {"l1": ((5, 0.2), (3, 0.4), (2, 0.55), (1.5, 0.7), (1, 1.0)), "l2": ((2, 0.3), (1.5, 0.6), (1, 1.0))}


class Ball:
    """The images in [0, 1] at most ``eps`` away from given ones.

    Args:
        images: (B, C, H, W) in [0, 1].
        eps: radius in units of the image: 8/255 for linf, 0.5 for l2, 12 for l1; or one radius an image,
            (B,).
        norm: ``linf``, ``l2`` or ``l1``.

    Raises:
        ValueError: for an unknown norm, or a radius that is none.
    """

    def __init__(
        self,
        images: Float[Tensor, "batch channels height width"],
        eps: float | Float[Tensor, " batch"],
        norm: str,
    ) -> None:
        check_settings(norm=(norm, one_of(*NORMS)))
        eps = float(eps) if isinstance(eps, Tensor) and eps.ndim == 0 else eps
        if not isinstance(eps, Tensor):
            check_settings(eps=(eps, above(0, FINITE)))
            if norm == "linf" and eps > 1:
                raise ValueError(
                    f"eps of the linf norm must be at most 1 (images lie in [0, 1]), got {eps}; 8/255?"
                )
        self.images, self.norm = images.detach(), norm
        self.eps = eps.view(-1, 1, 1, 1) if isinstance(eps, Tensor) else float(eps)
        if norm == "linf":
            self._low, self._high = (self.images - self.eps).clamp(0, 1), (self.images + self.eps).clamp(0, 1)

    def rows(self, index: Tensor | slice, times: float = 1) -> Self:
        """The ball of some of the images, with ``times`` its radius."""
        eps = self.eps[index].flatten() if isinstance(self.eps, Tensor) else self.eps
        return type(self)(self.images[index], times * eps, self.norm)

    def start(self, generator: torch.Generator | None = None) -> Float[Tensor, "batch channels height width"]:
        """A point for each image: uniform in the ball, clipped to [0, 1]; for l1 the projection of one of the
        images, drawn at random, with noise of standard deviation 1: it differs in few values, as what l1
        attacks find."""
        shape, kind = self.images.shape, {"device": self.images.device, "dtype": self.images.dtype}
        if self.norm == "linf":
            noise = torch.rand(shape, generator=generator, **kind) * 2 - 1
            return (self.images + self.eps * noise).clamp(0, 1)
        noise = torch.randn(shape, generator=generator, **kind)
        if self.norm == "l1":
            others = torch.randint(len(noise), (len(noise),), generator=generator, device=noise.device)
            return self.project(self.images[others] + noise)
        radius = torch.rand((len(noise), 1, 1, 1), generator=generator, **kind)
        return self.project(self.images + self.eps * radius ** (1 / self.images[0].numel()) * _unit(noise))

    def still(self) -> Tensor:
        """The points that are the images themselves."""
        return self.images

    def searched(self, share: float) -> Self:
        """What a run that begins outside moves in once so large a share of its steps is done: a ball that
        shrinks to this one (``STAGES``)."""
        times = next(times for times, end in STAGES.get(self.norm, ((1, 1.0),)) if share <= end)
        return self if times == 1 else self.rows(slice(None), times)

    def images_at(self, points: Tensor) -> Float[Tensor, "batch channels height width"]:
        """What points of the ball look like: here they are images themselves."""
        return points

    def gradient_at(self, points: Tensor, gradient: Float[Tensor, "batch channels height width"]) -> Tensor:
        """The gradient with respect to points, from that with respect to ``images_at`` them."""
        return gradient

    def direction(
        self,
        gradient: Float[Tensor, "batch channels height width"],
        points: Float[Tensor, "batch channels height width"] | None = None,
        density: float | Float[Tensor, " batch"] = L1_SHARE,
    ) -> Float[Tensor, "batch channels height width"]:
        """The step of norm 1 that raises the loss most; a zero gradient gives a zero step.

        linf: the sign; l2: the gradient over its norm (Madry et al. 2018, section 2.1); l1: the signs of the
        largest entries, a share ``density`` of all, among those that can still move at ``points`` (Tramer &
        Boneh 2019, section 4).
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l2":
            return _unit(gradient)
        if points is not None:
            gradient = gradient.masked_fill(torch.where(gradient < 0, points, 1 - points) <= NEAR, 0)
        sizes = gradient.abs().flatten(1)
        place = ((1 - torch.as_tensor(density)) * sizes.shape[1]).long().clamp(0, sizes.shape[1] - 1)
        least = sizes.sort(dim=1).values.gather(1, place.to(sizes.device).expand(len(sizes))[:, None])
        return of_l1_norm_1(torch.where(sizes >= least, gradient.flatten(1).sign(), 0)).view_as(gradient)

    def project(
        self, points: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Points within the ball and [0, 1]: the nearest ones (linf, l1); for l2 clipped first and shortened
        then, so that what is clipped takes no share of the radius."""
        if self.norm == "linf":
            return points.clamp(self._low, self._high)
        moved = (points.clamp(0, 1) if self.norm == "l2" else points) - self.images
        # the sum is rounded value by value, by some 1e-7 of an image's: a margin of that size keeps it in the
        # ball
        count = moved[0].numel()
        margin = ROUNDING * (count**0.5 if self.norm == "l2" else count)
        eps = torch.as_tensor(self.eps, device=moved.device, dtype=torch.float64)
        eps = torch.maximum(eps - margin, 0.5 * eps)
        if self.norm == "l2":
            size = moved.flatten(1).norm(dim=1, dtype=torch.float64).clamp_min(1e-30).view(-1, 1, 1, 1)
            return (self.images + moved * (eps / size).clamp_max(1).to(moved.dtype)).clamp(0, 1)
        headroom = torch.where(moved > 0, 1 - self.images, self.images).double().flatten(1)
        change = moved.double().abs().flatten(1)
        shrink = _l1_shrinkage(change, headroom, eps.expand(len(moved), 1, 1, 1).reshape(-1, 1))
        change = torch.minimum((change - shrink).clamp_min(0), headroom)
        return (self.images + (moved.sign() * change.view_as(moved)).to(moved.dtype)).clamp(0, 1)

    def size(self, points: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        """The norm of what separates each point from its image, added up in float64."""
        return norm_of(points - self.images, self.norm)

    def check(
        self, points: Float[Tensor, "batch channels height width"], tolerance: float = 1e-6
    ) -> Float[Tensor, "batch channels height width"]:
        """The points themselves; AssertionError if they leave [0, 1] or the ball, or hold NaN: a bug of the
        attack, never a number.

        Args:
            tolerance: what is forgiven, in units of the image; for a radius above 1 in units of the radius.
        """
        eps = torch.as_tensor(self.eps, device=points.device, dtype=torch.float64).flatten()
        over = ((self.size(points).double() - eps) / eps.clamp_min(1)).max()
        low, high, over = torch.stack([points.min().double(), points.max().double(), over]).tolist()
        if not (low >= 0 and high <= 1 and over <= tolerance):
            raise AssertionError(
                f"the attack left [0, 1] or its ball (or is not finite): values from {low} to {high}, "
                f"{self.norm} norm {over:.3g} above eps {eps.max():.6g}"
            )
        return points


def norm_of(perturbation: Float[Tensor, "batch channels height width"], norm: str) -> Float[Tensor, " batch"]:
    """The norm of each perturbation, in units of the image; l2 and l1 are added up in float64."""
    flat = perturbation.flatten(1)
    if norm == "linf":
        return flat.abs().amax(dim=1)
    # in float64: the squares of a large image add up to more than float32 can tell apart
    return flat.norm(p=2 if norm == "l2" else 1, dim=1, dtype=torch.float64).to(flat.dtype)


def of_l1_norm_1(values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Each image's values (a gradient, eq. 6 of Dong et al. 2018) over their l1 norm; zero stays zero."""
    sums = values.abs().flatten(1).sum(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    return values / sums.view(-1, *[1] * (values.ndim - 1))


def _unit(gradient: Tensor) -> Tensor:
    tiny = torch.finfo(gradient.dtype).tiny
    # first by the largest entry: the squares of a saturated model's gradients underflow
    gradient = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(tiny).view(-1, 1, 1, 1)


def _l1_shrinkage(change: Tensor, headroom: Tensor, eps: Tensor) -> Tensor:
    """The smallest t >= 0 with sum(min(max(change - t, 0), headroom)) <= eps: that sum is linear between
    sorted breakpoints.

    Source: Croce & Hein 2021, "Mind the box", proposition 2.1.
    """
    breaks, order = torch.cat([change, change - headroom], dim=1).sort(dim=1, descending=True)
    # of the sum, below each breakpoint
    slope = torch.where(order < change.shape[1], 1.0, -1.0).double().cumsum(dim=1)
    growth = slope[:, :-1] * -breaks.diff(dim=1)
    total = torch.cat([torch.zeros_like(eps), growth.cumsum(dim=1)], dim=1)  # the sum at each breakpoint
    # the first one where the sum is eps or more
    after = (total < eps).sum(dim=1, keepdim=True).clamp(1, total.shape[1] - 1)
    below = total.gather(1, after) - eps
    shrink = breaks.gather(1, after) + below / slope.gather(1, after - 1).clamp_min(1)
    return torch.where(
        torch.minimum(change, headroom).sum(dim=1, keepdim=True) <= eps, 0.0, shrink.clamp_min(0)
    )
