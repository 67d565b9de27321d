"""Folders of images, one folder a class: listed, checked, decoded into a cache. A listing is sorted and stays within
its folder; the cache is keyed by the names, sizes and times of the files, so that a changed image is decoded again.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from atoplib.data.cache import BrokenCache, cache_key, cached, decoding_threads, open_cache
from atoplib.data.images import read_image
from atoplib.data.request import Request, Source, subset

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"))
NOT_OF_THE_DATA = frozenset(("@eadir", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin", "thumbs.db"))
"""What network drives, archives and file systems put into folders, in lower case; thumbnails are in some of them."""
OTHER_IMAGES = frozenset((".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg"))  # that are not read


class Listing(NamedTuple):
    """The image files of one split of a folder, sorted, with their labels."""

    root: Path
    split: str
    classes: tuple[str, ...]
    files: tuple[str, ...]  # below root/split, as CLASS/NAME
    stamps: tuple[tuple[int, int], ...]  # size in bytes, time of the last change in ns
    labels: np.ndarray

    def choose(self, chosen: np.ndarray) -> Self:
        files, stamps = (tuple(values[i] for i in chosen) for values in (self.files, self.stamps))
        return self._replace(files=files, stamps=stamps, labels=self.labels[chosen])

    def path(self, index: int) -> Path:
        return self.root / self.split / self.files[index]


def folder_sources(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    """Return the training and the test images of folder:PATH and the classes. Raises as load_dataset does."""
    listings = folder_listings(request.name)
    return listing_sources(request, listings), listings[0].classes


def folder_listings(name: str) -> list[Listing]:
    """List the training and the test images of folder:PATH, labels by the classes of both; nothing is decoded.

    Raises as load_dataset does.
    """
    given = name.removeprefix("folder:")
    root = Path(given).expanduser()
    layout = "a folder holds train/CLASS/IMAGE and test/CLASS/IMAGE (or val/ in place of test/)"
    if not given.strip() or not root.is_dir():
        raise FileNotFoundError(f"{name!r} names no folder that exists: write folder:PATH, where {layout}")
    test = next((split for split in ("test", "val") if (root / split).is_dir()), None)
    missing = [text for text, found in (("train/", (root / "train").is_dir()), ("test/ or val/", test)) if not found]
    if missing:
        raise FileNotFoundError(f"{root} has no {' and no '.join(missing)}: {layout}")
    train_listing, test_listing = scan_split(root, "train"), scan_split(root, test)
    classes = train_listing.classes
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'} holds one class only ({classes[0]!r}): a classifier needs at least two")
    unknown = sorted(set(test_listing.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{root / test} holds the class {unknown[0]!r}, which train/ does not know (it has {_shortened(classes)}): "
            f"add it to train/ or remove it from {test}/"
        )
    renumber = np.asarray([classes.index(name) for name in test_listing.classes], dtype=np.int64)
    test_listing = test_listing._replace(classes=classes, labels=renumber[test_listing.labels])
    return [train_listing, test_listing]


def count_test_images(name: str) -> int:
    """How many test images there are in ``folder:PATH``; nothing is decoded. Raises as ``scan_split``."""
    root = Path(name.removeprefix("folder:")).expanduser()
    return len(scan_split(root, "test" if (root / "test").is_dir() else "val").files)


def scan_split(root: Path, split: str) -> Listing:
    """List the images of root/split in the order of their names; each folder in it is a class.

    Raises ValueError for a split or a class without images and for links that lead out of root or to a folder,
    FileNotFoundError for a folder that is not there and for links to nothing. Warns of images of a format that is not read.
    """
    folder = root / split
    inside = os.path.realpath(root)
    if folder.is_symlink():
        _check_link(str(folder), inside)
    classes, files, stamps, labels, passed_over = [], [], [], [], []
    for entry in _entries(folder, inside):
        if not entry.is_dir():
            continue
        found = list(_image_files(folder / entry.name, entry.name, inside, passed_over))
        if not found:
            raise ValueError(
                f"{folder / entry.name} holds no image: fill it with files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}, or delete it"
            )
        labels += [len(classes)] * len(found)
        classes.append(entry.name)
        files += [name for name, _ in found]
        stamps += [stamp for _, stamp in found]
    if not classes:
        raise ValueError(f"{folder} holds no class: make one folder of images for each class in it")
    if passed_over:
        warnings.warn(
            f"{len(passed_over)} files of {folder} are left out, {passed_over[0]} for one: images are read from "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}",
            stacklevel=2,
        )
    return Listing(root, split, tuple(classes), tuple(files), tuple(stamps), np.asarray(labels, dtype=np.int64))


def listing_sources(request: Request, listings: Sequence[Listing]) -> list[Source]:
    """Decode the images of both listings, or open their caches. Raises ValueError if they differ in size."""
    limits = (request.max_train, request.max_test)
    sources = [_listing_source(request, listing, limit) for listing, limit in zip(listings, limits, strict=True)]
    shapes = [source.pixels.shape[2:] for source in sources]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"images of {listings[0].root} differ in size: {_size_text(shapes[0])} in {listings[0].split}/, "
            f"{_size_text(shapes[1])} in {listings[1].split}/: give image_size, for example {min(shapes[0])}"
        )
    return sources


def _listing_source(request: Request, listing: Listing, limit: int | tuple[int, ...] | None) -> Source:
    chosen = subset(len(listing.files), limit)
    whole = _cache_path(request, listing)
    if not np.array_equal(chosen, np.arange(len(listing.files))):
        if whole.exists():
            with contextlib.suppress(BrokenCache):
                return Source(open_cache(whole, len(listing.files))[chosen], listing.labels[chosen], chosen)
        listing = listing.choose(chosen)
    path = _cache_path(request, listing)
    if path.exists():
        with contextlib.suppress(BrokenCache):
            return Source(open_cache(path, len(listing.files)), listing.labels, chosen)
    first = read_image(listing.path(0), request.image_size)
    expected = first.shape

    def load(index: int) -> np.ndarray:
        image = read_image(listing.path(index), request.image_size)
        if image.shape != expected:
            raise ValueError(
                f"images of {listing.root} differ in size: {listing.path(0)} is {_size_text(expected)}, "
                f"{listing.path(index)} is {_size_text(image.shape)}: give image_size, for example {min(expected[:2])}"
            )
        return image

    images = cached(
        path,
        (len(listing.files), 3, *expected[:2]),
        load,
        workers=decoding_threads(sum(size for size, _ in listing.stamps) / len(listing.stamps)),
        unit=f"{listing.split} images",
        progress=request.progress,
    )
    return Source(images, listing.labels, chosen)


def _cache_path(request: Request, listing: Listing) -> Path:
    key = cache_key(os.path.realpath(listing.root), listing.files, listing.stamps, request.image_size)
    label = "imagenette" if request.name == "imagenette" else "folder"
    return request.data_dir / "cache" / f"{label}-{listing.split}-{request.image_size or 'own'}px-{key}.npy"


def _image_files(folder: Path, prefix: str, inside: str, passed_over: list[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    for entry in _entries(folder, inside):
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _image_files(folder / entry.name, name, inside, passed_over)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in OTHER_IMAGES:
            passed_over.append(name)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            stat = entry.stat()
            yield name, (stat.st_size, stat.st_mtime_ns)


def _entries(folder: Path, inside: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if _of_the_data(entry.name)), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink():
            _check_link(entry.path, inside)
            if entry.is_dir():  # could lead round in a circle, or hold training images a second time
                raise ValueError(f"{entry.path} is a link to a folder: copy the folder, or remove the link")
    return entries


def _of_the_data(name: str) -> bool:
    # names that begin with a dot are notes of file managers and notebooks
    return not name.startswith(".") and name.lower() not in NOT_OF_THE_DATA


def _check_link(path: str, inside: str) -> None:
    target = os.path.realpath(path)
    if os.path.commonpath([target, inside]) != inside:
        raise ValueError(f"{path} is a link to {target}, outside of {inside}: copy what it points to, or remove it")
    if not os.path.exists(target):
        raise FileNotFoundError(f"{path} is a link to {target}, which does not exist: remove the link")


def _size_text(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
