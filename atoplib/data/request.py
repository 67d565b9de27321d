"""What load_dataset asks of a source of images and what it is given: a Request goes down, a Source for each split comes
back, in numpy, before anything is moved to a device.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from atoplib.data.cache import Progress

_SUBSET_SEED = 2024  # of the fixed subsets that max_train and max_test take


class Request(NamedTuple):
    """The arguments of load_dataset that its sources need."""

    name: str
    data_dir: Path
    image_size: int | None
    max_train: int | None
    max_test: int | tuple[int, ...] | None
    progress: Progress | None


class Source(NamedTuple):
    """The images and labels of one split, before they become tensors."""

    pixels: np.ndarray  # (n, 3, h, w) uint8, in memory or mapped
    labels: np.ndarray  # (n,) int64
    indices: np.ndarray  # (n,) int64, where each image stands in the whole split


def subset(count: int, limit: int | tuple[int, ...] | None) -> np.ndarray:
    """Return the indices of a fixed subset, classes mixed; a smaller subset is the beginning of a larger one.

    With a tuple, the images at these positions. Raises ValueError for a position that does not exist.
    """
    if isinstance(limit, tuple):
        wrong = next((index for index in limit if not 0 <= index < count), None)
        if wrong is not None:
            raise ValueError(f"max_test asks for image {wrong}, but the test images are numbered 0 to {count - 1}")
        return np.asarray(limit, dtype=np.int64)
    if limit is None or limit >= count:
        return np.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SUBSET_SEED)).numpy()[:limit]
