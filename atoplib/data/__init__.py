"""Image data sets as uint8 tensors: embedded, downloaded, or read from a folder of images.

A small set (at most SMALL_SET_BYTES decoded) is in memory; a large one is decoded once into a file under
DATA_DIR/cache and memory-mapped from it. That folder can be deleted; what is missing is made again.
"""

from atoplib.data.images import read_image
from atoplib.data.sources import DATASETS, Facts, download_of, facts_of, load, load_images
from atoplib.data.splits import (
    Dataset,
    Split,
    augment,
    channel_statistics,
    epoch_batches,
    fingerprint,
    mixed_seed,
    to_float,
)

__all__ = [
    "DATASETS",
    "Dataset",
    "Facts",
    "Split",
    "augment",
    "channel_statistics",
    "download_of",
    "epoch_batches",
    "facts_of",
    "fingerprint",
    "load",
    "load_images",
    "mixed_seed",
    "read_image",
    "to_float",
]
