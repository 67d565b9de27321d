"""A ``View`` as it is looked at: data that ``explorer.js`` draws, and one bitmap for files and animations.

What a row holds is said once, in ``pictures`` and ``decision``; both renderings read them.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw, ImageFont

from atoplib import decisions
from atoplib.attacks import ATTACKS
from atoplib.explorer.attack import CURVE_IMAGES, EACH, EFFORT, Values, is_attacking
from atoplib.explorer.compute import Row, View
from atoplib.explorer.controls import CONTROLS, TRANSFORMS
from atoplib.figures import style

SHOWN_BARS = 3
CRISP_BELOW = 128  # pixels: a larger image is shrunk on screen, and looks better smoothed
CELL, MARGIN, TEXT = 132, 10, 12  # pixels of the bitmap


def to_pixels(image: Float[torch.Tensor, "channels height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """An image in [0, 1], of one or three channels, as bytes; values beyond are clipped."""
    image = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return np.ascontiguousarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def to_map(change: Float[torch.Tensor, "height width"], scale: float) -> UInt8[np.ndarray, "height width 3"]:
    """A signed map: white at 0, red at ``scale`` (brighter), blue at ``-scale`` (darker)."""
    shares = (change / max(scale, 1e-6)).clamp(-1, 1) / 2 + 0.5
    colours = colormaps[style.DIVERGING].resampled(255)  # odd, so that 0 is white
    return np.ascontiguousarray(colours(shares.numpy(), bytes=True)[..., :3])


def pictures(view: View, row: Row) -> dict[str, tuple[UInt8[np.ndarray, "height width 3"], str]]:
    """The images of a row with a line below each, by column from left to right; a defence without a purifier
    has two."""
    place = row.place(view.values)
    change = row.images[place] - view.clean
    linf = view.values["norm"] == "linf" and is_attacking(view.values)
    scale = view.values["eps"] if linf else float(change.mean(dim=0).abs().max())
    sizes = f"max {float(change.abs().max()):.2g}, \N{SCRIPT SMALL L}2 {float(change.norm()):.2g}"
    step = f"step {row.steps[place]} of {row.last}" if row.last else ""
    columns = {
        "adversarial": (to_pixels(row.images[place]), step),
        "perturbation": (to_map(change.mean(dim=0), scale), sizes),
    }
    if row.purified is None:
        return columns
    distance = float((row.purified[place] - view.clean).abs().mean())
    mask = f"mask 1 of {view.values['num_masks']}" if view.values["transform"] == "rt3" else ""
    return columns | {
        "transformed": (to_pixels(row.transformed[place]), mask),
        "purified": (to_pixels(row.purified[place]), f"error {distance:.2g}"),
    }


def decision(view: View, row: Row) -> dict[str, Any]:
    """The decision of a row, of the vote where the defence is random, else of its only pass: its class
    (``text``), whether it is ``correct``, ``bars`` [class, share, right | wrong | other], and further
    ``lines``."""
    place, names = row.place(view.values), view.classes
    logits = row.logits[:, place]
    counts = logits.argmax(dim=1).bincount(minlength=len(names))
    decided = int(decisions.vote(logits[:, None])[0])
    shares = counts / len(logits) if len(logits) > 1 else logits[0].softmax(dim=0)
    best = shares.argsort(descending=True, stable=True)[:SHOWN_BARS].tolist()
    if view.label not in best:
        best[-1] = view.label
    kinds, lines = {decided: "wrong", view.label: "right"}, []
    if is_attacking(view.values) and not view.preview:
        source = view.values["attacked"]
        whose = "attack made on this defence" if source in (EACH, row.name) else f"attack made on {source}"
        lines.append(f"{whose}, on f alone" if view.values["threat_model"] == "transfer" else whose)
    tied = [name for name, count in zip(names, counts, strict=True) if count == counts.max()]
    if len(tied) > 1:
        lines.append(f"tie of {' and '.join(tied)}: counted as {names[decided]}")
    if len(logits) > 1:
        lines.append(f"{counts[view.label]} of {len(logits)} votes correct")
    if row.unpurified is not None:
        alone = int(row.unpurified[place])
        lines.append(
            f"not purified: {names[alone]} {(style.RIGHT if alone == view.label else style.WRONG)[0]}"
        )
    return {
        "text": names[decided],
        "correct": decided == view.label,
        "bars": [[names[number], float(shares[number]), kinds.get(number, "other")] for number in best],
        "lines": lines,
    }


def caption(view: View) -> str:
    """Attack, radius, effort, what it sees, and the transform with those of its settings that apply, in a
    line."""
    values, attack = view.values, ATTACKS.get(view.values["attack"])
    made = ["no attack"] if attack is None else [attack.title, style.eps_text(values["eps"], values["norm"])]
    if attack is not None and is_attacking(values):
        made += [f"{CONTROLS[name].label} {values[name]}" for name in EFFORT if name in attack.options]
        if attack.targeted and values["target"] >= 0:
            made.append(f"target {view.classes[values['target']]}")
        made.append(values["threat_model"])
    title, settings = TRANSFORMS[values["transform"]]
    settings = [f"{CONTROLS[name].label} {values[name]:.3g}" for name in settings]
    return f"{', '.join(made)}; {', '.join([title.split(':')[0], *settings])}"


def content(view: View, curves: list[list]) -> dict[str, Any]:
    """Everything that the page draws of a view; ``curves`` as ``curve_chart`` takes them."""
    rows = zip(view.values["rows"], view.rows, strict=True)
    return {
        "clean": source(to_pixels(view.clean)),
        "label": view.classes[view.label],
        "crisp": view.clean.shape[-1] < CRISP_BELOW,
        "preview": not view.done,
        "steps": sorted({step for row in view.rows if row is not None for step in row.steps}),
        "rows": [{"name": name} if row is None else _row(view, row) for name, row in rows],
        "path": path_chart(view),
        "curve": curve_chart(curves, view.values),
    }


def _row(view: View, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "cells": [[column, source(pixels), text] for column, (pixels, text) in pictures(view, row).items()],
        "tenfold": source(to_pixels(view.clean + 10 * (row.images[row.place(view.values)] - view.clean))),
        **decision(view, row),
    }


def source(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """An image as the address of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(encoded([Image.fromarray(pixels)], 'png')).decode()}"


def path_chart(view: View) -> dict[str, Any] | None:
    """The share of correct samples at each step of the attack, a line a defence; None before it is known."""
    if not view.complete or not is_attacking(view.values):
        return None
    points = []
    for row in view.rows:
        shares = (row.logits.argmax(dim=2) == view.label).float().mean(dim=0).tolist()
        points += [[row.name, step, 100 * share] for step, share in zip(row.steps, shares, strict=True)]
    return _chart(
        "correct samples (%) at each step of the attack",
        points,
        sets="shown_step",
        label="step",
        here=max(row.steps[row.place(view.values)] for row in view.rows),
    )


def curve_chart(points: list[list], values: Values) -> dict[str, Any] | None:
    """Robust accuracy over eps with 95 % intervals, a line a defence; None where there are no points."""
    title = f"accuracy (%) over \N{GREEK SMALL LETTER EPSILON}, up to {CURVE_IMAGES} images, 95 % CI"
    label = style.eps_text(values["eps"], values["norm"]).split(" =")[0]
    return _chart(title, points, "eps", label, values["eps"]) if points else None


def _chart(title: str, points: list[list], sets: str, label: str, here: float) -> dict[str, Any]:
    """A chart of points [line, x, y in percent, maybe the ends of an interval]; choosing one sets a value to
    its x."""
    return {
        "title": title,
        "points": points,
        "colours": style.colours_of(list(dict.fromkeys(point[0] for point in points))),
        "sets": sets,
        "label": label,
        "here": here,
    }


def sentence_of(error: BaseException) -> str:
    """An error in one line, without a traceback; its type is named where its text alone would not be
    understood."""
    text = " ".join(str(error).split())
    explains = isinstance(error, ValueError | FileNotFoundError) and text
    return text if explains else f"{type(error).__name__}: {text}".rstrip(": ")


def sheet(view: View) -> Image.Image:
    """The same pictures and decisions as one bitmap, dark on white."""
    rows = [(row, pictures(view, row)) for row in view.rows if row is not None]
    columns = list(max((cells for _, cells in rows), key=len))
    right = MARGIN + (1 + len(columns)) * (CELL + MARGIN)
    image = Image.new("RGB", (right + 190, 58 + len(rows) * (CELL + 34)), "white")
    pen = ImageDraw.Draw(image)

    def write(x: int, y: int, text: str, size: int = TEXT, colour: str = "#1a1a1a") -> None:
        pen.text(
            (x, y), text, fill=colour, font=ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
        )

    def paste(column: int, y: int, pixels: np.ndarray, text: str = "") -> None:
        size, x = (CELL, round(CELL * pixels.shape[0] / pixels.shape[1])), MARGIN + column * (CELL + MARGIN)
        image.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BOX), (x, y))
        write(x, y + CELL + 2, text, TEXT - 2, "#595959")

    write(MARGIN, 8, caption(view), TEXT + 1)
    for column, text in enumerate([f"clean: {view.classes[view.label]}", *columns]):
        write(MARGIN + column * (CELL + MARGIN), 32, text)
    paste(0, 50, to_pixels(view.clean))
    for y, (row, cells) in zip(range(50, image.height, CELL + 34), rows, strict=False):
        for column, (pixels, text) in enumerate(cells.values(), start=1):
            paste(column, y, pixels, text)
        made = decision(view, row)
        mark, colour = style.RIGHT if made["correct"] else style.WRONG
        write(right, y, row.name, TEXT + 2)
        write(right, y + 22, f"{made['text']} {mark}", TEXT + 6, colour)
        bars = [f"{name}: {100 * share:.0f} %" for name, share, _ in made["bars"]]
        write(right, y + 50, "\n".join(bars + made["lines"]), TEXT - 1)
    return image


def encoded(frames: Sequence[Image.Image], kind: str) -> bytes:
    """One bitmap as ``png`` or ``pdf``, several as an animated ``gif``, 0.4 s each and the last one
    longer."""
    durations = [400] * (len(frames) - 1) + [1600]
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 1},
        "pdf": {"resolution": 160.0},
        "gif": {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0},
    }
    buffer = io.BytesIO()
    frames[0].save(buffer, kind.upper(), **options[kind])
    return buffer.getvalue()
