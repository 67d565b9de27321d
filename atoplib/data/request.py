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
    max_test: int | None
    progress: Progress | None


class Source(NamedTuple):
    """The images and labels of one split, before they become tensors."""

    pixels: np.ndarray  # (n, 3, h, w) uint8, in memory or mapped
    labels: np.ndarray  # (n,) int64


def subset(count: int, limit: int | None) -> np.ndarray:
    """Return the indices of a fixed subset, classes mixed; a smaller subset is the beginning of a larger one."""
    if limit is None or limit >= count:
        return np.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SUBSET_SEED)).numpy()[:limit]
