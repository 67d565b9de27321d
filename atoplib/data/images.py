"""Images from files of any common format to 8-bit RGB squares: folders of them, one a class, and caches.

A listing of a folder is sorted. A cache is a .npy file (n, 3, h, w) of uint8, named by a hash of all that
decides on its pixels (of files their names, sizes and times), decoded by a pool of threads and written under
another name first: a file with its name is whole, and a damaged one is made again.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from atoplib.contract import first_line
from atoplib.data.splits import subset
from atoplib.files import data_files, is_data, write_atomically
from atoplib.parameters import MissingFileError
from atoplib.progress import Report

CACHE_VERSION = 2  # raise it when the pixels that one and the same file gives change
IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
OTHER_IMAGES = (".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg")  # that are not read


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
        raise MissingFileError(
            f"{name!r} lacks train/, or test/ and val/: write folder:PATH, where a folder holds "
            "train/CLASS/IMAGE and test/CLASS/IMAGE (or val/ in place of test/)"
        )
    train, test = scan_split(root, "train"), scan_split(root, split)
    if len(train.classes) < 2:
        raise ValueError(
            f"{train.folder} holds one class only ({train.classes[0]!r}): a classifier needs at least two"
        )
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise ValueError(
            f"{test.folder} holds the class {unknown[0]!r}, which {train.folder} does not: add it there, or "
            "remove it here"
        )
    numbers = np.asarray([train.classes.index(name) for name in test.classes])
    return [train, test._replace(classes=train.classes, labels=numbers[test.labels])]


def scan_split(root: Path, split: str) -> Listing:
    """List the images of root/split in the order of their names; each folder in it is a class.

    Raises ValueError for a split or a class without images, and for a folder that is there twice, by links.
    Warns of images of a format that is not read.
    """
    folder, suffixes = root / split, ", ".join(IMAGE_SUFFIXES)
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_data(Path(path.name)))
    if not classes:
        raise ValueError(f"{folder} holds no class: make one folder of images for each class in it")
    inner = [path for path in data_files(folder) if path.parent != folder]
    images = [path for path in inner if path.suffix.lower() in IMAGE_SUFFIXES]
    named = [path.relative_to(folder).parts[0] for path in images]
    if empty := sorted(set(classes) - set(named)):
        raise ValueError(
            f"{folder / empty[0]} holds no image: fill it with files ending in {suffixes}, or delete it"
        )
    if others := [path for path in inner if path.suffix.lower() in OTHER_IMAGES]:
        warnings.warn(
            f"{len(others)} files of {folder} are left out, {others[0].relative_to(folder)} for one: "
            f"images are read from {suffixes}",
            stacklevel=2,
        )
    return Listing(folder, tuple(classes), images, np.unique(named, return_inverse=True)[1])


def read_image(path: str | os.PathLike[str], image_size: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file to 8-bit RGB (`data.load` says how); with image_size, the central square at that
    size.

    Raises ValueError, naming the file, if it is damaged, too large for PIL (twice its MAX_IMAGE_PIXELS) or of
    unknown value range.
    """
    try:
        with Image.open(path) as image:
            _widen_transparency(image)
            with suppress(Exception):  # a damaged EXIF block is common and says nothing about the pixels
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            return np.array(rgb if image_size is None else fit_square(rgb, image_size))
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        raise ValueError(
            f"{path} cannot be decoded ({first_line(error)}): replace it or remove it"
        ) from error


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the central square to size x size: as resizing the shorter side and cropping the centre, but
    cheaper."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def decode(
    listings: list[Listing],
    limits: tuple[int | None, int | tuple[int, ...] | None],
    image_size: int | None,
    data_dir: Path,
    progress: Report | None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels (n, 3, h, w), labels and indices of both listings, from their caches. Raises ValueError if sizes
    differ."""
    parts = []
    for listing, limit in zip(listings, limits, strict=True):
        folder, chosen = listing.folder, subset(len(listing.files), limit)
        files = [listing.files[index] for index in chosen]
        stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
        names = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
        label = f"folder-{folder.name}-{image_size or 'own'}px"
        path = cache_path(data_dir, label, os.path.realpath(folder), names, image_size)
        pixels = cached(
            path, files, partial(read_image, image_size=image_size), f"{folder.name} images", progress
        )
        parts.append((pixels, listing.labels[chosen], chosen))
    _check_same_size([each.folder for each in listings], [pixels.shape[2:] for pixels, _, _ in parts])
    return parts


def _check_same_size(paths: list[Any], sizes: list[tuple[int, ...]]) -> None:
    """Raise ValueError unless two images, or folders of images, have the same height and width."""
    if sizes[0] != sizes[1]:
        this, other = (f"{path} is {size[0]} x {size[1]}" for path, size in zip(paths, sizes, strict=True))
        raise ValueError(
            f"images differ in size: {this}, {other}: give image_size, for example {min(sizes[0])}"
        )


def cached(
    path: Path,
    items: Sequence[Any],
    load: Callable[[Any], UInt8[np.ndarray, "h w 3"]],
    unit: str,
    progress: Report | None,
) -> UInt8[np.ndarray, "n 3 h w"]:
    """Map the cache at `path`; where it is missing or cannot be one, it is made of the images of all items.

    Raises OSError where it cannot be written, ValueError for images of several sizes, and what `load` raises.
    """
    with suppress(OSError, ValueError, EOFError):
        # not copy-on-write ("c"), which Linux refuses for a file larger than the machine's memory
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        if pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[:2] == (len(items), 3):
            return np.asarray(pixels)

    def write(part: Path) -> None:
        size = load(items[0]).shape[:2]
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(items), 3, *size)}
        with part.open("wb") as file, ThreadPoolExecutor() as pool:
            np.lib.format.write_array_header_1_0(file, header)
            for done, image in enumerate(pool.map(load, items), 1):
                _check_same_size([items[0], items[done - 1]], [size, image.shape[:2]])
                file.write(np.ascontiguousarray(image.transpose(2, 0, 1)))
                if progress and (done % 256 == 0 or done == len(items)):
                    progress(done, len(items), unit)

    write_atomically(path, write)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def cache_path(data_dir: Path, label: str, *parts: object) -> Path:
    """The file of a cache: a label, and a hash of all that decides on its pixels."""
    digest = hashlib.sha256(repr((CACHE_VERSION, *parts)).encode("utf-8", "surrogateescape")).hexdigest()
    return data_dir / "cache" / f"{label}-{digest[:16]}.npy"


def _widen_transparency(image: Image.Image) -> None:
    """Grey PNGs of 2 or 4 bits: PIL widens their pixels to 8 bits, but not the colour that is transparent."""
    factor = {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]) if image.tile else "")
    if factor and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= factor


def _to_rgb(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode[:4] != "I;16" and (values.dtype.kind != "i" or image.format not in ("PNG", "PPM")):
            raise ValueError(f"{values.dtype} pixels of unknown range; save it with 8 or 16 bits a channel")
        # 65535 / 257 = 255; PIL's own conversion would clip instead of scale
        scaled = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if isinstance(clear, int):  # one value of 16 bits; compared before it is rounded away
            scaled[values == clear] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
