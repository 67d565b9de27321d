"""Images from files of any common format to 8-bit RGB squares, and caches of many of them.

A cache is a .npy file (n, 3, h, w) of uint8, named by a hash of all that decides on its pixels, decoded by a
pool of threads and written under another name first: a file with its name is whole, and a damaged one is made
again.
"""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from atoplib.contract import first_line
from atoplib.files import write_atomically
from atoplib.progress import Report

JPEG_QUALITY = 75
CACHE_VERSION = 2  # raise it when the pixels that one and the same file gives change


def read_image(path: str | os.PathLike[str], image_size: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file to 8-bit RGB (`data.load` says how); with image_size, the central square at that
    size.

    Raises ValueError, naming the file, if it is damaged, too large (PIL's MAX_IMAGE_PIXELS) or of unknown
    value range.
    """
    try:
        with Image.open(path) as image:
            _widen_transparency(image)
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:  # PIL itself only warns up to twice as many
                raise ValueError(f"it has {pixels} pixels, more than {limit}, so it is not decoded")
            rgb = _to_rgb(_upright(image))
            return np.array(rgb if image_size is None else fit_square(rgb, image_size))
    except MemoryError:
        raise
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


def through_jpeg(image: Image.Image) -> Image.Image:
    """Encode at JPEG_QUALITY with halved colour planes (4:2:0) and decode again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return Image.open(buffer).convert("RGB")


def open_cache(path: Path, count: int) -> np.ndarray | None:
    """Map a cache of `count` images; None for a file that is missing or cannot be one."""
    try:
        # not copy-on-write ("c"), which Linux refuses for a file larger than the machine's memory
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[:2] == (count, 3)
    return np.asarray(pixels) if good else None


def cached(
    path: Path,
    shape: tuple[int, ...],
    load: Callable[[int], np.ndarray],
    *,
    unit: str,
    progress: Report | None,
) -> np.ndarray:
    """Open the cache at `path`, made of load(0), load(1), ... (h, w, 3) if it is not there.

    Raises OSError where it cannot be written, and whatever `load` raises.
    """
    pixels = open_cache(path, shape[0])
    if pixels is not None:
        return pixels

    def write(part: Path) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(int(n) for n in shape)}
        with part.open("wb") as file, ThreadPoolExecutor() as pool:
            np.lib.format.write_array_header_1_0(file, header)
            for done, image in enumerate(pool.map(load, range(shape[0])), 1):
                file.write(np.ascontiguousarray(image.transpose(2, 0, 1)))
                if progress and (done % 256 == 0 or done == shape[0]):
                    progress(done, shape[0], unit)

    write_atomically(path, write)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def cache_path(data_dir: Path, label: str, *parts: object) -> Path:
    """The file of a cache: a label, and a hash of all that decides on its pixels."""
    digest = hashlib.sha256(repr((CACHE_VERSION, *parts)).encode("utf-8", "surrogateescape")).hexdigest()
    return data_dir / "cache" / f"{label}-{digest[:16]}.npy"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(0x0112, 1) != 1
    except Exception:  # a damaged EXIF block is common and says nothing about the pixels
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _widen_transparency(image: Image.Image) -> None:
    """Grey PNGs of 2 or 4 bits: PIL widens their pixels to 8 bits, but not the colour that is transparent."""
    factor = {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]) if image.tile else "")
    if factor and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= factor


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        known = values.dtype.kind == "i" and image.format in ("PNG", "PPM")
        if not (known or image.mode.startswith("I;16")):
            raise ValueError(f"{values.dtype} pixels of unknown range; save it with 8 or 16 bits a channel")
        # 65535 / 257 = 255; PIL's own conversion would clip instead of scale
        scaled = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        clear = image.info.get("transparency")  # one value of 16 bits; compared before it is rounded away
        if isinstance(clear, int):
            scaled[values == clear] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
