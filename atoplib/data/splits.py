"""Splits of images as uint8 tensors: their batches, augmentation, statistics and fingerprint. This knows
nothing of where images come from and works on the device on which they are, without a loop over images. Every
order and every random number is a function of a seed or a generator that is passed in.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from atoplib import contract, hashing
from atoplib.parameters import between, check_settings, each

SUBSET_SEED = 2024  # of the fixed subsets that max_train, max_test and load_images take


@dataclass(frozen=True)
class Split:
    """Images in [0, 255] and their class indices; `indices`, where known, tells where each image is in the
    whole split.

    The images of a large set are memory-mapped (CPU) and read-only: writing into them ends the process.
    """

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int64[Tensor, "n"]
    indices: Int64[Tensor, "n"] | None = None

    def __post_init__(self) -> None:
        contract.check_labels(self.labels, len(self.images))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split over the same classes; `classes[label]` is the name of a label, `name` that
    of the set, of a folder's without its path."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


def subset(count: int, limit: int | tuple[int, ...] | None, seed: int = 0) -> np.ndarray:
    """Indices of a fixed subset of `count` images, classes mixed; a smaller subset is the beginning of a
    larger one.

    With a tuple, the images at these positions. Raises ValueError for a position that does not exist.
    """
    if isinstance(limit, tuple):
        check_settings(max_test=(limit, each(between(0, count - 1))))
        return np.asarray(limit, dtype=np.int64)
    if limit is None:
        return np.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED + seed)).numpy()[:limit]


def mixed_seed(*parts: int | str) -> int:
    """A seed that no other parts have: hashed, not added, for with seed + epoch, epoch 1 of seed 0 would
    repeat epoch 0 of seed 1."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def epoch_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[UInt8[Tensor, "batch 3 h w"], Int64[Tensor, "batch"]]]:
    """Yield the whole batches of one epoch, images uint8 and labels int64 on the split's device.

    The order is a pure function of (seed, epoch), the same on every device. `start` batches are skipped, so
    that a training goes on in the middle of an epoch with the batches it would have seen.

    Arguments are checked at the call: raises ValueError for a batch_size that gives no batch.
    """
    count = len(split.labels)
    check_settings(batch_size=(batch_size, between(1, count)))
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order = torch.randperm(count, generator=generator).to(split.labels.device)
    chosen = (order[i * batch_size : (i + 1) * batch_size] for i in range(start, count // batch_size))
    # on the CPU ten times as fast as images[rows] at 32 px: whole images are copied, not single values
    return ((split.images.index_select(0, rows), split.labels.index_select(0, rows)) for rows in chosen)


def to_float(images: UInt8[Tensor, "*batch 3 h w"]) -> Float32[Tensor, "*batch 3 h w"]:
    """Map uint8 images in [0, 255] to float32 in [0, 1], on their device."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, but uint8 in [0, 255] is needed: the images of a Split")
    return images.to(torch.float32).div_(255)


def augment(
    images: UInt8[Tensor, "batch 3 h w"], *, generator: torch.Generator, padding: int = 4, flip: bool = True
) -> UInt8[Tensor, "batch 3 h w"]:
    """Shift each image by up to `padding` pixels (borders reflected) and mirror it with probability 1/2, on
    its device.

    This is the padded random crop of the CIFAR recipes (He et al. 2016, section 4.2), with reflected instead
    of black borders. The random numbers come from `generator` alone, on the generator's device. Digits want
    flip=False.

    Raises ValueError for a padding that the image is too small to reflect.
    """
    batch, channels, height, width = images.shape
    check_settings(padding=(padding, between(0, min(height, width) - 1)))
    shifts = torch.randint(-padding, padding + 1, (2, batch, 1), generator=generator, device=generator.device)
    mirrored = torch.randint(0, 2, (batch, 1), generator=generator, device=generator.device) == 1
    shifts, mirrored = shifts.to(images.device), mirrored.to(images.device)
    rows = _reflect(torch.arange(height, device=images.device) + shifts[0], height)  # (batch, h)
    columns = _reflect(torch.arange(width, device=images.device) + shifts[1], width)  # (batch, w)
    columns = torch.where(mirrored & flip, columns.flip(1), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
    return images.reshape(batch, channels, -1).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


def channel_statistics(
    images: UInt8[Tensor, "n 3 h w"],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and the standard deviation of each channel over all pixels, in units of [0, 1].

    Pixels are counted, so the result is the same on every device. Raises ValueError for a channel that is
    constant: a classifier that divides by its deviation would return NaN.
    """
    parts = images.split(max(1, 2**24 // images[0].numel()))
    counts = [torch.stack([part[:, c].flatten().bincount(minlength=256) for c in range(3)]) for part in parts]
    histogram = sum(counts).cpu()
    if bool((histogram.count_nonzero(dim=1) < 2).any()):
        raise ValueError(
            "a colour channel has one value in all images, so it cannot be normalised: check the images"
        )
    shares, values = histogram.double() / (images.numel() // 3), torch.arange(256, dtype=torch.float64) / 255
    means = (shares * values).sum(dim=1)
    deviations = (shares * (values - means[:, None]) ** 2).sum(dim=1).sqrt()
    return tuple(means.tolist()), tuple(deviations.tolist())


def fingerprint(split: Split) -> str:
    """16 hex digits of what a split holds."""
    return hashing.json_hash([hashing.tensor_hash(split.images), hashing.tensor_hash(split.labels)])


def _reflect(index: Tensor, size: int) -> Tensor:
    return (size - 1) - (size - 1 - index.abs()).abs()
