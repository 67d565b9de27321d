"""Threats of which training has seen nothing: occlusion, rotation and translation, common corruptions; the
worst of all candidates, without a gradient.

The corruptions are the kinds of CIFAR-10-C that torch, torchvision and Pillow can make, with its strengths,
but not its images: noise has seeds of our own, blurs are torch's, and their radii, made for 32 px, grow with
the image. Figures on them are named as ours.
"""

from collections.abc import Callable
from itertools import combinations, product
from math import ceil

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from atoplib.attacks.eot import StepCallback, make_generator
from atoplib.attacks.queries import Search
from atoplib.decisions import Model, full_float32
from atoplib.parameters import above, between, check_counts, check_settings, one_of

SIDE = 32  # px, that the strengths of corruptions were made for


def occlusion(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = 1,
    norm: str = "occlusion",
    grid_size: int = 8,
    patch: str = "grey",
    eot_samples: int = 1,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The worst of all images in which at most ``eps`` patches of a grid are covered; every position is
    tried.

    Args:
        eps: number of patches, 1 or 2.
        grid_size: the image is cut into grid_size x grid_size patches, which differ by a pixel where the grid
            does not divide it.
        patch: what covers: ``grey``, or ``random``, uniform noise of each image's own, the same at every
            position.
        eot_samples: samples of a random model that each value is averaged over; the same ones at every
            position.
        rule, votes: when an image counts as broken and is searched no further, see ``decisions.correct``.
        targets: the class that each image is driven to; None: any other.
        seed: of the random patches, and of the model's samples.

    Returns:
        images in [0, 1]: the first position that breaks an image, else that of the largest margin.

    Raises:
        ValueError: as ``contract.prepare``; for other numbers or kinds of patches, or a grid that is finer
            than the pixels.

    Source: perceptual-advex and Fawzi & Frossard 2016 for the threat; the search is exhaustive.
    """
    search = Search(
        model, images, labels, targets=targets, eot_samples=eot_samples, rule=rule, votes=votes, seed=seed,
        max_batch=max_batch,
    )  # fmt: skip
    height, width = search.images.shape[2:]
    check_counts(grid_size=grid_size)
    check_settings(
        norm=(norm, one_of("occlusion")), eps=(eps, one_of(1, 2)), patch=(patch, one_of("grey", "random")),
        grid_size=(grid_size, between(1, min(height, width))),
    )  # fmt: skip
    cover, generator = torch.full_like(search.images, 0.5), make_generator(seed, images.device)
    cover = cover if patch == "grey" else cover.uniform_(generator=generator)
    rows, columns = (torch.arange(side) * grid_size // side for side in (height, width))
    patches = (rows[:, None] * grid_size + columns).to(search.images.device)  # of each pixel its number
    places = [()] + [place for k in range(1, int(eps) + 1) for place in combinations(range(grid_size**2), k)]

    def candidate(number: int, rows: Tensor) -> Tensor:
        hidden = torch.isin(patches, torch.tensor(places[number], dtype=torch.int64, device=patches.device))
        return torch.where(hidden, cover[rows], search.images[rows])

    return search.try_all(candidate, len(places), callback)


def rotation_translation(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = 30,
    norm: str = "rotation",
    translation: float = 0.1,
    angles: int = 31,
    shifts: int = 5,
    eot_samples: int = 1,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The worst of a grid of rotations and translations, of which the image itself is one.

    Args:
        eps: largest angle in degrees, in (0, 180].
        translation: largest shift along each axis, as a share of the image's side, in [0, 1].
        angles, shifts: values tried between -largest and +largest, for the angle and for each axis; odd
            numbers have 0.
        eot_samples, rule, votes, targets: as ``occlusion``.

    Returns:
        images in [0, 1], black where they came from outside.

    Raises:
        ValueError: as ``contract.prepare``; for angles, shifts or a grid that do not exist.

    Source: Engstrom et al. 2019, section 3 (30 degrees, 10 %, 31 x 5 x 5 poses, bilinear).
    """
    check_counts(angles=angles, shifts=shifts)
    check_settings(
        norm=(norm, one_of("rotation")), eps=(eps, above(0, 180)), translation=(translation, between(0, 1))
    )
    search = Search(
        model, images, labels, targets=targets, eot_samples=eot_samples, rule=rule, votes=votes, seed=seed,
        max_batch=max_batch,
    )  # fmt: skip
    poses = pose_grid(eps, translation, angles, shifts)

    def candidate(number: int, rows: Tensor) -> Tensor:
        return search.images[rows] if number == 0 else move(search.images[rows], *poses[number])

    return search.try_all(candidate, len(poses), callback)


def pose_grid(eps: float, translation: float, angles: int, shifts: int) -> list[tuple[float, float, float]]:
    """(degrees, share to the right, share down): none first, then from the largest move on, which breaks
    most."""

    def values(largest: float, count: int) -> list[float]:
        return np.linspace(-largest, largest, count).tolist() if count > 1 and largest else [0.0]

    still, shares = (0.0, 0.0, 0.0), values(translation, shifts)
    poses = set(product(values(eps, angles), shares, shares)) - {still}
    size = {pose: abs(pose[0]) / eps + abs(pose[1]) + abs(pose[2]) for pose in poses}
    return [still, *sorted(poses, key=lambda pose: (-size[pose], pose))]


def move(
    images: Float[Tensor, "batch channels height width"], degrees: float, right: float, down: float
) -> Float[Tensor, "batch channels height width"]:
    """Images turned counterclockwise about their centre, then shifted by shares of their sides; black from
    outside."""
    with full_float32(images.device):  # an attack's bfloat16 would round where pixels come from
        return v2.functional.affine(
            images, -degrees, [right * images.shape[3], down * images.shape[2]], 1.0, [0.0, 0.0],
            interpolation=v2.InterpolationMode.BILINEAR,
        ).clamp(0, 1)  # fmt: skip


def corruption(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = 3,
    norm: str = "corruption",
    kind: str = "all",
    eot_samples: int = 1,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Corrupted images; of several kinds the worst for each image.

    Args:
        eps: severity, 1 to 5.
        kind: a name of ``CORRUPTIONS``, or ``all``.
        eot_samples: samples of a random model that each margin is averaged over; the same ones for every
            kind.
        rule, votes: when an image counts as broken and further kinds are not tried (``decisions.correct``).
        targets: the class that each image is driven to; None: any other.
        seed: of noises and directions; a number is the same for every kind.

    Returns:
        images in [0, 1].

    Raises:
        ValueError: as ``contract.prepare``; for an unknown kind or severity, or images of neither 1 nor 3
            channels.
    """
    check_settings(norm=(norm, one_of("corruption")), kind=(kind, one_of("all", *CORRUPTIONS)))
    search = Search(
        model, images, labels, targets=targets, eot_samples=eot_samples, rule=rule, votes=votes, seed=seed,
        max_batch=max_batch,
    )  # fmt: skip
    made = [
        corrupt(search.images, name, eps, seed=seed) for name in (CORRUPTIONS if kind == "all" else [kind])
    ]
    return search.try_all(lambda number, rows: made[number][rows], len(made), callback)


def corrupt(
    images: Float[Tensor, "batch channels height width"],
    kind: str,
    severity: float,
    *,
    seed: int | torch.Generator | None = 0,
) -> Float[Tensor, "batch channels height width"]:
    """Images with one corruption of ``CORRUPTIONS``, of severity 1 to 5, in [0, 1].

    Raises:
        ValueError: for an unknown kind or severity, or images of neither 1 nor 3 channels.
    """
    check_settings(
        kind=(kind, one_of(*CORRUPTIONS)), severity=(severity, one_of(1, 2, 3, 4, 5)),
        channels=(images.shape[1], one_of(1, 3)),
    )  # fmt: skip
    function, strengths = CORRUPTIONS[kind]
    with full_float32(images.device):
        return function(images, strengths[int(severity) - 1], make_generator(seed, images.device)).clamp(0, 1)


def _impulse_noise(images: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(uniform < share, (uniform < share / 2).to(images.dtype), images)


def _filtered(images: Tensor, kernel: Tensor, mode: str) -> Tensor:
    """Each channel convolved with one kernel."""
    channels, (height, width) = images.shape[1], kernel.shape
    padded = F.pad(images, (width // 2, width // 2, height // 2, height // 2), mode=mode)
    return F.conv2d(padded, kernel.to(images).expand(channels, 1, -1, -1), groups=channels)


def _bell(std: float, first: int, last: int) -> Tensor:
    values = torch.exp(-(torch.arange(first, last + 1) ** 2) / (2 * std**2))
    return values / values.sum()


def _gaussian_blur(images: Tensor, std: float, _generator: torch.Generator | None) -> Tensor:
    std = std * images.shape[-1] / SIDE
    reach = int(4 * std + 0.5)
    bell = _bell(std, -reach, reach)
    return _filtered(_filtered(images, bell[None], "replicate"), bell[:, None], "replicate")


def _defocus_blur(
    images: Tensor, strength: tuple[float, float], _generator: torch.Generator | None
) -> Tensor:
    """A disk of a radius, its edge smoothed by a bell of 3 x 3."""
    radius, smoothing = strength[0] * images.shape[-1] / SIDE, strength[1]
    place = torch.arange(-ceil(radius) - 1, ceil(radius) + 2)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).float()[None, None]
    bell = _bell(smoothing, -1, 1)
    kernel = F.conv2d(disk / disk.sum(), (bell[:, None] * bell)[None, None], padding=1)
    return _filtered(images, kernel[0, 0], "reflect")


def _moved(images: Tensor, zoom: float, shift: Tensor) -> Tensor:
    """Images enlarged about their centre, then read at places shifted by (right, down) pixels; borders
    repeated."""
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = shift * 2 / torch.tensor([images.shape[3], images.shape[2]], device=images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _motion_blur(images: Tensor, strength: tuple[int, float], generator: torch.Generator | None) -> Tensor:
    """One side of a bell along a line of a direction of each image's own, within 45 degrees of the
    horizontal."""
    radius, std = (value * images.shape[-1] / SIDE for value in strength)
    angle = (torch.rand(len(images), generator=generator, device=images.device) - 0.5) * torch.pi / 2
    line = torch.stack([angle.cos(), angle.sin()], dim=1).to(images.dtype)
    weights = _bell(std, 0, 2 * ceil(radius)).tolist()
    return sum(
        weight * _moved(images, 1, step * line) for step, weight in enumerate(weights) if weight > 1e-6
    )


def _zoom_blur(images: Tensor, largest: float, _generator: torch.Generator | None) -> Tensor:
    """The mean of the image and of its enlargements by 1.00, 1.01, ... up to the largest."""
    still = images.new_zeros(len(images), 2)
    zooms = [1 + step / 100 for step in range(round(100 * (largest - 1)) + 1)]
    return (images + sum(_moved(images, zoom, still) for zoom in zooms)) / (len(zooms) + 1)


def _brightness(images: Tensor, more: float, _generator: torch.Generator | None) -> Tensor:
    """The value of HSV, the largest channel, raised; hue and saturation stay."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + more).clamp_max(1)
    return torch.where(value > 0, images / value.clamp_min(1e-6) * raised, raised)


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8).cpu()


def _pixelate(images: Tensor, share: float, _generator: torch.Generator | None) -> Tensor:
    pixels, box = _bytes(images).permute(0, 2, 3, 1), Image.Resampling.BOX
    pictures = [Image.fromarray(each.squeeze(2).numpy()) for each in pixels]
    small = [
        picture.resize([max(1, int(side * share)) for side in picture.size], box) for picture in pictures
    ]
    coarse = np.stack([picture.resize(pictures[0].size, box) for picture in small])
    return torch.from_numpy(coarse).view_as(pixels).permute(0, 3, 1, 2).to(images) / 255


# Name: its function, and its strength at severities 1 to 5, those of CIFAR-10-C (Hendrycks & Dietterich
# 2019).
CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], tuple]] = {
    "gaussian_noise": (
        lambda x, std, seed: torch.normal(x, std, generator=seed),
        (0.04, 0.06, 0.08, 0.09, 0.10),
    ),
    "shot_noise": (
        lambda x, photons, seed: torch.poisson(x * photons, seed) / photons,
        (500, 250, 100, 75, 50),
    ),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (
        lambda x, std, seed: torch.normal(x, x * std, generator=seed),
        (0.06, 0.1, 0.12, 0.16, 0.2),
    ),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.05, 1.1, 1.15, 1.2, 1.25)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (
        lambda x, share, _: x.mean(dim=(2, 3), keepdim=True).lerp(x, share),
        (0.75, 0.5, 0.4, 0.3, 0.15),
    ),
    "jpeg": (lambda x, quality, _: v2.functional.jpeg(_bytes(x), quality).to(x) / 255, (80, 65, 58, 50, 40)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
