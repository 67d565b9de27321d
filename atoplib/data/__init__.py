"""Image data sets as uint8 tensors: embedded, downloaded, or read from a folder of images. A small set (at most
SMALL_SET_BYTES decoded) is one uint8 tensor a split on the device, batched and augmented there; a large one is decoded
once into a file under DATA_DIR/cache and memory-mapped from it, its tensors stay on the CPU. The folder DATA_DIR/cache
can be deleted at any time; what is missing in it is made again. `sources` (the names) stands on `folder` and
`downloads`, these on `request`, `images`, `cache` and `checks`; `batches` stands alone.
"""

from atoplib.data.batches import Dataset, Split, augment, channel_statistics, epoch_batches, fingerprint, to_float
from atoplib.data.cache import Progress
from atoplib.data.facts import Facts, facts_of
from atoplib.data.folder import IMAGE_SUFFIXES, count_test_images
from atoplib.data.images import JPEG_QUALITY, read_image
from atoplib.data.sources import DATASETS, IMAGENETTE_IMAGES, SMALL_SET_BYTES, load_dataset

__all__ = [
    "DATASETS",
    "IMAGENETTE_IMAGES",
    "IMAGE_SUFFIXES",
    "JPEG_QUALITY",
    "SMALL_SET_BYTES",
    "Dataset",
    "Facts",
    "Progress",
    "Split",
    "augment",
    "channel_statistics",
    "count_test_images",
    "epoch_batches",
    "facts_of",
    "fingerprint",
    "load_dataset",
    "read_image",
    "to_float",
]
