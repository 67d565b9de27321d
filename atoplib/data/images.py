"""Single images: from a file of any common format to 8-bit RGB, from there to a square of a given size, and through
JPEG. What is damaged, unsafe to decode or of unknown value range is refused with the name of its file.
"""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from atoplib.data.checks import one_line

JPEG_QUALITY = 75


def read_image(path: str | os.PathLike[str], image_size: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file to 8-bit RGB (load_dataset says how); with image_size, the central square at that size.

    Raises ValueError, naming the file, if it is damaged, too large (PIL's MAX_IMAGE_PIXELS) or of unknown value range.
    """
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {limit}")
            rgb = _to_rgb(_upright(image))
            return np.array(rgb if image_size is None else fit_square(rgb, image_size))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large to be decoded safely ({error}): shrink it or remove it") from error
    except _UnknownRange as error:
        raise ValueError(f"{path} {error}: save it with 8 or 16 bits a channel, or remove it") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image, or is damaged: replace it or remove it") from error
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        reason = one_line(error)
        raise ValueError(f"{path} is truncated or damaged ({reason}): replace it or remove it") from error


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the central square to size x size: as resizing the shorter side and cropping the centre, but cheaper."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def through_jpeg(image: Image.Image) -> Image.Image:
    """Encode at JPEG_QUALITY with halved colour planes (4:2:0) and decode again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return Image.open(buffer).convert("RGB")


class _UnknownRange(Exception):
    pass


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(0x0112, 1) != 1
    except Exception:  # a damaged EXIF block is common and says nothing about the pixels
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        sixteen_bit = image.mode.startswith("I;16") or (values.dtype.kind == "i" and image.format in ("PNG", "PPM"))
        if not sixteen_bit:
            raise _UnknownRange(f"has {values.dtype} pixels, whose range is not known")
        # 65535 / 257 = 255; PIL's own conversion would clip instead of scale.
        scaled = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        clear = image.info.get("transparency")  # one value of 16 bits; compared before it is rounded away
        if isinstance(clear, int):
            scaled[values == clear] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
