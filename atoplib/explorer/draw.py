"""Arrays to pictures: PNG bytes of one picture pixel an image pixel (the page enlarges them, so that pixels stay crisp)."""

import base64
import io
from functools import cache

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from atoplib.drawing import DIVERGING

MAP_STEPS = 255  # odd, so that 0 has a colour of its own: white


def to_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """An RGB picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def picture(image: Float[Tensor, "3 height width"]) -> bytes:
    """An image in [0, 1] as PNG; values beyond are clipped."""
    return to_png(np.ascontiguousarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()))


def signed_change(after: Float[Tensor, "3 height width"], before: Float[Tensor, "3 height width"]) -> Tensor:
    """What ``figures.purification_rows`` shows of a change: the mean over the channels, in 1/255; (height, width)."""
    return 255 * (after - before).mean(dim=0)


def map_scale(change: Float[Tensor, "height width"]) -> float:
    """The largest magnitude of a change, in 1/255; 1 where nothing changed, as a map needs a range."""
    largest = float(change.abs().max())
    return largest if largest > 1e-3 else 1.0


def change_map(change: Float[Tensor, "height width"], scale: float) -> bytes:
    """A signed map as PNG: white at 0, red at ``scale`` (brighter), blue at ``-scale`` (darker); beyond it saturates."""
    shares = (change / max(scale, 1e-12)).clamp(-1, 1) / 2 + 0.5
    return to_png(_diverging()[(shares * (MAP_STEPS - 1)).round().to(torch.int64).numpy()])


def map_gradient() -> str:
    """The colours of ``change_map`` as a CSS gradient, from ``-scale`` to ``scale``."""
    colours = _diverging()[:: (MAP_STEPS - 1) // 8 or 1]
    return f"linear-gradient(to right, {', '.join('rgb({},{},{})'.format(*colour) for colour in colours)})"


def data_uri(png: bytes) -> str:
    """A PNG as the address of an ``img`` element."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


@cache
def _diverging() -> UInt8[np.ndarray, "colours 3"]:
    colours = matplotlib.colormaps[DIVERGING](np.linspace(0, 1, MAP_STEPS))[:, :3]
    return (255 * colours).round().astype(np.uint8)
