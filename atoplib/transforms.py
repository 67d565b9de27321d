"""Random transforms RT1, RT2, RT3: destroy the perturbation before the purifier rebuilds the image.

A transform has two halves, so that an attack and a loss can share one sample of it (Lin et al. 2024, section
3.1): ``sample_transform`` draws masks and noise, ``corrupt`` applies them to images, and ``assemble`` puts
together what the purifier made of them. All of it is differentiable in the images and lives on their device.
"""

from dataclasses import dataclass
from math import floor
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atoplib.parameters import at_least, between, check_settings, one_of

TRANSFORMS = ("none", "rt1", "rt2", "rt3")


@dataclass(frozen=True)
class Transform:
    """What destroys the perturbation.

    Attributes:
        name: ``none`` leaves the image as it is, ``rt1`` drops patches, ``rt2`` adds noise and drops patches,
            ``rt3`` adds noise and rebuilds every patch from the others.
        missing_rate: fraction r of the patches that RT1 and RT2 drop: exactly floor(r * grid_size**2), in [0,
            1).
        noise_std: sigma of the Gaussian noise of RT2 and RT3, for images in [0, 1].
        num_masks: RT3's number N of disjoint masks; each misses 1/N of the patches.
        grid_size: the image is cut into grid_size x grid_size patches.
    """

    name: str = "rt2"
    missing_rate: float = 0.25
    noise_std: float = 0.25
    num_masks: int = 4
    grid_size: int = 8

    def __post_init__(self) -> None:
        check_settings(
            name=(self.name, one_of(*TRANSFORMS)),
            missing_rate=(self.missing_rate, between(0, 1 - 1e-9)),
            noise_std=(self.noise_std, between(0, 10)),  # images lie in [0, 1]
            grid_size=(self.grid_size, at_least(1)),
            num_masks=(self.num_masks, between(2, max(2, self.grid_size**2))),
        )


class TransformSample(NamedTuple):
    """One sample of a transform for a batch of images: masks and noise of its own for each.

    Attributes:
        noise: added to the images, in their units ([0, 1]), or None.
        masks: 1 where a pixel is missing; RT3 has several masks, the others one.
        composite: keep only what the purifier filled in (RT3), instead of its whole output.
        purifier_noise: standard normal planes of a purifier that is random itself (``DiffusionPurifier``), or
            None.
    """

    noise: Float[Tensor, "rows 3 height width"] | None
    masks: Float[Tensor, "masks rows 1 height width"]
    composite: bool
    purifier_noise: Float[Tensor, "masks rows planes height width"] | None = None

    def rows(self, rows: slice) -> "TransformSample":
        """The sample of some of the batch's images."""
        noise = None if self.noise is None else self.noise[rows]
        planes = None if self.purifier_noise is None else self.purifier_noise[:, rows]
        return TransformSample(noise, self.masks[:, rows], self.composite, planes)


def patch_size(height: int, width: int, grid_size: int) -> tuple[int, int]:
    """Height and width of one patch in pixels; raises ValueError where the grid does not divide the image."""
    if height % grid_size or width % grid_size:
        raise ValueError(
            f"an image of {height} x {width} px cannot be cut into {grid_size} x {grid_size} equal patches: "
            f"give an image_size that grid_size divides, or another grid_size"
        )
    return height // grid_size, width // grid_size


def sample_transform(
    transform: Transform,
    shape: tuple[int, ...] | torch.Size,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    noise_planes: int = 0,
) -> TransformSample:
    """Draw one sample of a transform: a mask and noise of its own for each image.

    Args:
        shape: of the images, (batch, 3, height, width).
        generator: on ``device``; torch's global one if None.
        dtype: of noise and masks; drawn in float32 whatever it is, so it does not change the sample.
        noise_planes: standard normal planes a copy of each image that the purifier wants for itself.

    Raises:
        ValueError: where the grid does not divide the image.

    Source: Lin et al. 2024, section 3.1 (RT1, RT2, RT3).
    """
    batch, channels, height, width = shape
    grid, place = transform.grid_size, {"generator": generator, "device": torch.device(device)}
    patches, (rows, columns) = grid**2, patch_size(height, width, grid)
    noise = planes = None
    if transform.name in ("rt2", "rt3") and transform.noise_std > 0:
        noise = (torch.randn(batch, channels, height, width, **place) * transform.noise_std).to(dtype)
    if transform.name == "none":
        missing = torch.zeros(1, batch, patches, device=device)
    else:
        # Ranks of uniform scores: every row is a random permutation of the patches.
        ranks = torch.rand(batch, patches, **place).argsort(dim=1).argsort(dim=1)
        if transform.name == "rt3":
            numbers = torch.arange(transform.num_masks, device=device).view(-1, 1, 1)
            missing = (ranks % transform.num_masks == numbers).float()
        else:
            missing = (ranks < floor(transform.missing_rate * patches)).float().unsqueeze(0)
    cells = missing.to(dtype).unflatten(2, (1, grid, grid))  # (masks, batch, 1, grid, grid)
    masks = cells.repeat_interleave(rows, dim=3).repeat_interleave(columns, dim=4)
    if noise_planes:
        planes = torch.randn(len(masks), batch, noise_planes, height, width, **place).to(dtype)
    return TransformSample(noise, masks, transform.name == "rt3", planes)


def corrupt(
    images: Float[Tensor, "batch 3 height width"], sample: TransformSample
) -> Float[Tensor, "copies 5 height width"]:
    """t(x): what the purifier is given, one copy of the batch a mask, mask by mask (copies = masks * batch).

    Args:
        images: in [0, 1].
        sample: for the same batch, size and device; ValueError otherwise.

    Returns:
        masked RGB of clip(x + n, 0, 1) on the [-1, 1] scale, where a missing pixel is 0 (mid-grey); a plane
        of ones; the mask.

    Source: Lin et al. 2024, section 3.1; five planes as in Yu et al. 2019.
    """
    shape, masks = sample.masks.shape, sample.masks.flatten(0, 1)
    if images.shape[0] != shape[1] or images.shape[2:] != shape[3:]:
        raise ValueError(f"the sample is one for {tuple(shape[1:])}, the images are {tuple(images.shape)}")
    noisy = images if sample.noise is None else (images + sample.noise).clamp(0, 1)
    copies = noisy.repeat(len(sample.masks), 1, 1, 1) if len(sample.masks) > 1 else noisy
    # (2 * noisy - 1) * (1 - mask) in fewer passes over memory; the factor is 2 or 0, exactly.
    factor = torch.empty_like(copies, requires_grad=False).copy_(2 - 2 * masks)
    return torch.cat([(copies * factor).sub_(factor, alpha=0.5), torch.ones_like(masks), masks], dim=1)


def assemble(
    outputs: Float[Tensor, "copies 3 height width"], sample: TransformSample
) -> Float[Tensor, "batch 3 height width"]:
    """x_hat from the purifier's outputs: the whole output for RT1 and RT2, sum_i m_i * g(t_i(x), m_i) for
    RT3.

    Range and units are those of ``outputs``. Source: Lin et al. 2024, section 3.1, equation of RT3.
    """
    if not sample.composite:
        return outputs
    return (outputs.unflatten(0, sample.masks.shape[:2]) * sample.masks).sum(dim=0)
