"""Random transforms RT1, RT2, RT3: destroy the perturbation before the purifier rebuilds the image.

A transform has two halves, so that an attack and a loss can share one draw (Lin et al. 2024, section 3.1):
``sample_draw`` throws the dice, ``corrupt`` applies them to images, and ``assemble`` puts together what the purifier
made of them. All of it is differentiable in the images, lives on their device and loops over nothing.
"""

from dataclasses import dataclass
from math import floor
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atoplib.shares import WHOLE, Share

TRANSFORMS = ("none", "rt1", "rt2", "rt3")


@dataclass(frozen=True)
class TransformSettings:
    """What destroys the perturbation.

    Attributes:
        name: ``none`` hands the image on as it is, ``rt1`` drops patches, ``rt2`` adds noise and drops patches, ``rt3``
            adds noise and rebuilds every patch from the others.
        missing_rate: share r of the patches that RT1 and RT2 drop: exactly floor(r * grid_size**2) of them, in [0, 1).
        noise_std: sigma of the normal noise of RT2 and RT3 a pixel and channel, images in [0, 1].
        num_masks: RT3's number N of disjoint masks; each misses 1/N of the patches.
        grid_size: the image is cut into grid_size x grid_size patches.
    """

    name: str = "rt2"
    missing_rate: float = 0.25
    noise_std: float = 0.25
    num_masks: int = 4
    grid_size: int = 8

    def __post_init__(self) -> None:
        if self.name not in TRANSFORMS:
            raise ValueError(f"unknown transform {self.name!r}; allowed: {', '.join(TRANSFORMS)}")
        if not 0 <= self.missing_rate < 1:
            raise ValueError(f"missing_rate must lie in [0, 1), got {self.missing_rate}")
        if not 0 <= self.noise_std <= 10:
            raise ValueError(f"noise_std must lie in [0, 10] (images lie in [0, 1]), got {self.noise_std}")
        if self.grid_size < 1:
            raise ValueError(f"grid_size must be at least 1, got {self.grid_size}")
        if not 2 <= self.num_masks <= max(2, self.grid_size**2):
            raise ValueError(f"num_masks must lie in [2, {self.grid_size**2}] for this grid, got {self.num_masks}")


class Draw(NamedTuple):
    """One throw of the dice for a batch of images.

    Attributes:
        noise: added to the images, in their units ([0, 1]), or None.
        masks: 1 where a pixel is missing; RT3 has several masks, the others one.
        composite: keep only what the purifier filled in (RT3), instead of its whole output.
        inner: standard normal planes of a purifier that throws dice of its own (``DiffusionPurifier``), or None.
    """

    noise: Float[Tensor, "batch 3 height width"] | None
    masks: Float[Tensor, "masks batch 1 height width"]
    composite: bool
    inner: Float[Tensor, "masks batch planes height width"] | None = None

    def of(self, rows: slice) -> "Draw":
        """The draw of some of the batch's images."""
        noise = None if self.noise is None else self.noise[rows]
        return Draw(noise, self.masks[:, rows], self.composite, None if self.inner is None else self.inner[:, rows])

    def repeated(self, count: int) -> "Draw":
        """The draw of a single image, for ``count`` images alike."""
        noise = None if self.noise is None else self.noise.expand(count, -1, -1, -1)
        inner = None if self.inner is None else self.inner.expand(-1, count, -1, -1, -1)
        return Draw(noise, self.masks.expand(-1, count, -1, -1, -1), self.composite, inner)


def patch_size(height: int, width: int, grid_size: int) -> tuple[int, int]:
    """Height and width of one patch in pixels; raises ValueError where the grid does not divide the image."""
    if height % grid_size or width % grid_size:
        raise ValueError(
            f"an image of {height} x {width} px cannot be cut into {grid_size} x {grid_size} equal patches: "
            f"give an image_size that grid_size divides, or another grid_size"
        )
    return height // grid_size, width // grid_size


def _ranks(batch: int, patches: int, generator: torch.Generator | None, device: torch.device, share: Share) -> Tensor:
    """A random order of the patches for each image: (batch, patches), every row a permutation."""
    scores = share.throw(torch.rand, (batch, patches), generator=generator, device=device)
    return scores.argsort(dim=1).argsort(dim=1)


def _to_pixels(patch_mask: Tensor, height: int, width: int, grid_size: int) -> Tensor:
    """Spread a mask over patches, (..., patches), to one over pixels, (..., 1, height, width)."""
    rows, columns = patch_size(height, width, grid_size)
    cells = patch_mask.reshape(*patch_mask.shape[:-1], 1, grid_size, 1, grid_size, 1)
    cells = cells.expand(*cells.shape[:-3], rows, grid_size, columns)
    return cells.reshape(*patch_mask.shape[:-1], 1, height, width)


def sample_draw(
    settings: TransformSettings,
    shape: tuple[int, ...] | torch.Size,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    share: Share = WHOLE,
) -> Draw:
    """Throw the dice of a transform: a mask and noise of its own for each image.

    Args:
        settings: which transform.
        shape: of the images, (batch, 3, height, width).
        generator: on ``device``; the global one if None.
        dtype: of noise and masks; the dice are thrown in float32 whatever it is, so it does not change the draw.
        share: of the batch that the images are, where several processes train together.

    Returns:
        noise and masks, on ``device``.

    Raises:
        ValueError: where the grid does not divide the image.

    Source: Lin et al. 2024, section 3.1 (RT1, RT2, RT3).
    """
    batch, channels, height, width = shape
    device = torch.device(device)
    grid = settings.grid_size
    patch_size(height, width, grid)
    patches = grid * grid
    noise = None
    if settings.name in ("rt2", "rt3") and settings.noise_std > 0:
        noise = share.throw(torch.randn, (batch, channels, height, width), generator=generator, device=device)
        noise = (noise * settings.noise_std).to(dtype)
    if settings.name == "none":
        missing = torch.zeros(1, batch, patches, device=device)
    elif settings.name == "rt3":
        group = _ranks(batch, patches, generator, device, share) % settings.num_masks
        numbers = torch.arange(settings.num_masks, device=device).view(-1, 1, 1)
        missing = (group == numbers).float()
    else:
        count = floor(settings.missing_rate * patches)
        missing = (_ranks(batch, patches, generator, device, share) < count).float().unsqueeze(0)
    return Draw(noise, _to_pixels(missing.to(dtype), height, width, grid), settings.name == "rt3")


def add_noise(images: Float[Tensor, "batch 3 height width"], draw: Draw) -> Float[Tensor, "batch 3 height width"]:
    """clip(x + n, 0, 1), images in [0, 1]; the images themselves where the draw has no noise."""
    return images if draw.noise is None else (images + draw.noise).clamp(0, 1)


def visible_part(images: Float[Tensor, "batch 3 height width"], draw: Draw) -> Float[Tensor, "copies 3 height width"]:
    """The first three planes of ``corrupt``: noisy RGB on the [-1, 1] scale, a missing pixel 0. Arguments as there."""
    if images.shape[0] != draw.masks.shape[1] or images.shape[2:] != draw.masks.shape[3:]:
        raise ValueError(f"the draw was thrown for {tuple(draw.masks.shape[1:])}, the images are {tuple(images.shape)}")
    noisy = add_noise(images, draw)
    copies = noisy.repeat(len(draw.masks), 1, 1, 1) if len(draw.masks) > 1 else noisy
    twice_seen = torch.empty_like(copies, requires_grad=False).copy_(2 - 2 * draw.masks.flatten(0, 1))  # 2 or 0, exactly
    return (copies * twice_seen).sub_(twice_seen, alpha=0.5)  # (2 * noisy - 1) * seen in fewer passes over memory


def corrupt(images: Float[Tensor, "batch 3 height width"], draw: Draw) -> Float[Tensor, "copies 5 height width"]:
    """t(x): what the purifier is given, one copy of the batch a mask, mask by mask (copies = masks * batch).

    Args:
        images: in [0, 1].
        draw: of the same batch, size and device.

    Returns:
        masked RGB on the [-1, 1] scale, where a missing pixel is 0 (mid-grey); a plane of ones; the mask.

    Source: Lin et al. 2024, section 3.1; five planes as in Yu et al. 2019.
    """
    masks = draw.masks.flatten(0, 1)
    return torch.cat([visible_part(images, draw), torch.ones_like(masks), masks], dim=1)


def assemble(outputs: Float[Tensor, "copies 3 height width"], draw: Draw) -> Float[Tensor, "batch 3 height width"]:
    """x_hat from the purifier's outputs: the whole output for RT1 and RT2, sum_i m_i * g(t_i(x), m_i) for RT3.

    Range and units are those of ``outputs``. Source: Lin et al. 2024, section 3.1, equation of RT3.
    """
    if not draw.composite and len(draw.masks) == 1:
        return outputs
    outputs = outputs.unflatten(0, draw.masks.shape[:2])
    return (outputs * draw.masks).sum(dim=0) if draw.composite else outputs[0]
