"""Folders of images, one folder a class: listed, checked, decoded into a cache. A listing is sorted and stays
within its folder; the cache is named by the names, sizes and times of the files, so that a changed image is
decoded again.
"""

import os
import warnings
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atoplib.data.images import cache_path, cached, open_cache, read_image
from atoplib.data.splits import subset
from atoplib.files import NOT_OF_THE_DATA
from atoplib.progress import Report

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
)
OTHER_IMAGES = frozenset((".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg"))  # that are not read
LAYOUT = "a folder holds train/CLASS/IMAGE and test/CLASS/IMAGE (or val/ in place of test/)"


class Listing(NamedTuple):
    """The image files of one split of a folder, sorted, and the class of each."""

    folder: Path
    classes: tuple[str, ...]
    files: list[Path]
    labels: np.ndarray


def folder_listings(name: str) -> list[Listing]:
    """List the training and the test images of folder:PATH, labels by the classes of train/; nothing is
    decoded.

    Raises ValueError and FileNotFoundError as `data.load`.
    """
    root = Path(name.removeprefix("folder:")).expanduser()
    split = next((split for split in ("test", "val") if (root / split).is_dir()), None)
    if not name.removeprefix("folder:").strip() or split is None or not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{name!r} lacks train/, or test/ and val/: write folder:PATH, where {LAYOUT}"
        )
    train, test = scan_split(root, "train"), scan_split(root, split)
    if len(train.classes) < 2:
        raise ValueError(
            f"{train.folder} holds one class only ({train.classes[0]!r}): a classifier needs at least two"
        )
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise ValueError(
            f"{test.folder} holds the class {unknown[0]!r}, which {train.folder} does not: add it there, or "
            "remove it here"
        )
    renumbered = np.asarray([train.classes.index(name) for name in test.classes])[test.labels]
    return [train, test._replace(classes=train.classes, labels=renumbered)]


def scan_split(root: Path, split: str) -> Listing:
    """List the images of root/split in the order of their names; each folder in it is a class.

    Raises ValueError for a split or a class without images and for links that lead out of root, to a folder
    or to nothing. Warns of images of a format that is not read.
    """
    folder, inside = root / split, os.path.realpath(root)
    _check_link(folder, inside)
    classes = [entry.name for entry in _entries(folder, inside) if entry.is_dir()]
    found = [_files_below(folder / name, inside) for name in classes]
    images = [[path for path in files if path.suffix.lower() in IMAGE_SUFFIXES] for files in found]
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    if not classes:
        raise ValueError(f"{folder} holds no class: make one folder of images for each class in it")
    if not all(images):
        empty = next(name for name, files in zip(classes, images, strict=True) if not files)
        raise ValueError(
            f"{folder / empty} holds no image: fill it with files ending in {suffixes}, or delete it"
        )
    others = [path for files in found for path in files if path.suffix.lower() in OTHER_IMAGES]
    if others:
        warnings.warn(
            f"{len(others)} files of {folder} are left out, {others[0].relative_to(folder)} for one: "
            f"images are read from {suffixes}",
            stacklevel=2,
        )
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in images])
    return Listing(folder, tuple(classes), [path for files in images for path in files], labels)


def _files_below(folder: Path, inside: str) -> list[Path]:
    """All files below a folder, in the order of their names."""
    files = []
    for entry in _entries(folder, inside):
        files += _files_below(folder / entry.name, inside) if entry.is_dir() else [folder / entry.name]
    return files


def _entries(folder: Path, inside: str) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without what is not of the data: notes of file managers begin with a
    dot."""
    with os.scandir(folder) as found:
        entries = [e for e in found if not e.name.startswith(".") and e.name.lower() not in NOT_OF_THE_DATA]
    for entry in entries:
        _check_link(Path(entry.path), inside)
    return sorted(entries, key=attrgetter("name"))


def _check_link(path: Path, inside: str) -> None:
    """Raise ValueError for a link elsewhere, or to a folder, which could lead round in a circle or hold
    training images a second time."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not (target.is_file() and target.is_relative_to(inside)):
        raise ValueError(
            f"{path} is a link to {target}, but only links to files in {inside} are followed: copy what it "
            "points to, or remove it"
        )


def decode(
    listings: list[Listing],
    limits: tuple[int | None, int | tuple[int, ...] | None],
    image_size: int | None,
    data_dir: Path,
    progress: Report | None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels (n, 3, h, w), labels and indices of both listings, from their caches. Raises ValueError if sizes
    differ."""
    pairs = zip(listings, limits, strict=True)
    parts = [_decode(listing, limit, image_size, data_dir, progress) for listing, limit in pairs]
    folders, shapes = [each.folder for each in listings], [pixels.shape[2:] for pixels, _, _ in parts]
    _check_same_size(folders, shapes)
    return parts


def _decode(
    listing: Listing,
    limit: int | tuple[int, ...] | None,
    image_size: int | None,
    data_dir: Path,
    progress: Report | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def place(files: list[Path]) -> Path:
        stats = [(str(path.relative_to(listing.folder)), path.stat()) for path in files]
        names = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        label = f"folder-{listing.folder.name}-{image_size or 'own'}px"
        return cache_path(data_dir, label, os.path.realpath(listing.folder), names, image_size)

    chosen = subset(len(listing.files), limit)
    whole = open_cache(place(listing.files), len(listing.files))
    if whole is not None:
        return whole if limit is None else whole[chosen], listing.labels[chosen], chosen
    files = [listing.files[index] for index in chosen]
    size = read_image(files[0], image_size).shape[:2]

    def load(index: int) -> np.ndarray:
        image = read_image(files[index], image_size)
        _check_same_size([files[0], files[index]], [size, image.shape[:2]])
        return image

    unit = f"{listing.folder.name} images"
    pixels = cached(place(files), (len(files), 3, *size), load, unit=unit, progress=progress)
    return pixels, listing.labels[chosen], chosen


def _check_same_size(paths: list[Path], sizes: list[tuple[int, ...]]) -> None:
    if sizes[0] != sizes[1]:
        (first, second), (this, other) = paths, (f"{height} x {width}" for height, width in sizes)
        raise ValueError(
            f"images differ in size: {first} is {this}, {second} is {other}: give image_size, for example "
            f"{min(sizes[0])}"
        )
