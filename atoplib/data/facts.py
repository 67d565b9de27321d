"""What is known of a data set before it is loaded: nothing is downloaded, and of a folder one image a split is decoded."""

from pathlib import Path
from typing import NamedTuple

from atoplib.data.folder import folder_listings
from atoplib.data.images import read_image
from atoplib.data.sources import IMAGENETTE_IMAGES, unknown_name

_TEN = tuple("0123456789")


class Facts(NamedTuple):
    """The classes, the numbers of images, and the height and width in pixels that they have by themselves."""

    classes: tuple[str, ...]
    train: int
    test: int
    size: tuple[int, int]


_KNOWN = {
    "mnist5k": Facts(_TEN, 4000, 1000, (32, 32)),
    "mnist": Facts(_TEN, 60000, 10000, (32, 32)),
    "fashion_mnist": Facts(_TEN, 60000, 10000, (32, 32)),
    "cifar10": Facts(_TEN, 50000, 10000, (32, 32)),
    "cifar10_jpeg": Facts(_TEN, 50000, 10000, (32, 32)),
    "cifar100": Facts(tuple(map(str, range(100))), 50000, 10000, (32, 32)),
    "imagenette": Facts(_TEN, IMAGENETTE_IMAGES["train"], IMAGENETTE_IMAGES["val"], (256, 256)),
}
"""Of those that have names; their classes are numbered here."""


def facts_of(name: str) -> Facts:
    """The facts of a data set by its name in ``load_dataset``; of a folder, the size is that of its first training image.

    Raises ValueError and FileNotFoundError as ``load_dataset`` does.
    """
    if not name.startswith("folder:"):
        if name not in _KNOWN:
            raise ValueError(unknown_name(name))
        return _KNOWN[name]
    train, test = folder_listings(name)
    for listing in (test, train):
        image = read_image(Path(listing.path(0)))
    return Facts(train.classes, len(train.files), len(test.files), image.shape[:2])
