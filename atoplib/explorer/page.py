"""A ``View`` as it is looked at: HTML for the live page and the still, one bitmap for files and animations.

What a row holds is said once, in ``pictures``; both renderings read it.
"""

import base64
import io
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from atoplib.decisions import vote, wilson_interval
from atoplib.explorer.attack import NO_ATTACK, Curve, is_attacking
from atoplib.explorer.compute import Row, View, shown_place
from atoplib.explorer.controls import SETTINGS_OF, TRANSFORM_NAMES
from atoplib.figures.style import (
    DIVERGING,
    MINUS,
    RIGHT,
    RIGHT_COLOUR,
    WRONG,
    WRONG_COLOUR,
    colours_of,
    eps_text,
)

SHOWN_BARS = 3
CRISP_BELOW = 128  # pixels: a larger image is shrunk on screen, and looks better smoothed
COLUMNS = ("adversarial", "perturbation", "transformed", "purified")
CELL, MARGIN, TEXT = 132, 10, 12  # pixels of the bitmap


class Picture(NamedTuple):
    """One image of a row: its column, its pixels, and a line below it; ``more`` are others that may take its
    place."""

    column: str
    pixels: UInt8[np.ndarray, "height width 3"]
    caption: str
    more: dict[str, np.ndarray] = {}


class Decision(NamedTuple):
    """What a defence decides on the image shown; bars are (class, share)."""

    text: str
    correct: bool
    bars: list[tuple[int, float]]
    lines: list[str]


def to_pixels(image: Float[Tensor, "channels height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """An image in [0, 1], of one or three channels, as bytes; values beyond are clipped."""
    image = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return np.ascontiguousarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def to_map(change: Float[Tensor, "height width"], scale: float) -> UInt8[np.ndarray, "height width 3"]:
    """A signed map: white at 0, red at ``scale`` (brighter), blue at ``-scale`` (darker)."""
    shares = (change / max(scale, 1e-6)).clamp(-1, 1) / 2 + 0.5
    return _diverging()[(shares * 254).round().to(torch.int64).numpy()]


@cache
def _diverging() -> UInt8[np.ndarray, "255 3"]:
    colours = matplotlib.colormaps[DIVERGING](np.linspace(0, 1, 255))[:, :3]  # odd, so that 0 is white
    return (255 * colours).round().astype(np.uint8)


def name_of(view: View, number: int) -> str:
    """The name of a class."""
    return view.classes[number] if number < len(view.classes) else str(number)


def pictures(view: View, row: Row) -> list[Picture]:
    """The images of a row, from left to right; a defence without a purifier has two."""
    shown = row.at(view.values)
    change = shown.adversarial - view.clean
    linf = view.values["norm"] == "linf" and is_attacking(view.values)
    scale = view.values["eps"] if linf else float(change.mean(dim=0).abs().max())
    sizes = f"max {_number(float(change.abs().max()))}, \N{SCRIPT SMALL L}2 {_number(float(change.norm()))}"
    ten = {"clean": to_pixels(view.clean), "ten": to_pixels(view.clean + 10 * change)}
    step = (
        f"step {row.path.steps[shown_place(row.path, view.values)]} of {row.path.steps[-1]}"
        if len(row.path.steps) > 1
        else ""
    )
    found = [
        Picture("adversarial", to_pixels(shown.adversarial), step, ten),
        Picture("perturbation", to_map(change.mean(dim=0), scale), sizes),
    ]
    if shown.transformed is None:
        return found
    distance = float((shown.purified - view.clean).abs().mean())
    copies = len(shown.transformed)
    return found + [
        Picture("transformed", to_pixels(shown.transformed[0]), f"mask 1 of {copies}" if copies > 1 else ""),
        Picture("purified", to_pixels(shown.purified), f"mean off {_number(distance)}"),
    ]


def decision(view: View, row: Row) -> Decision:
    """The decision of a row: of the vote where the defence is random, else of its only pass."""
    shown = row.at(view.values)
    classes = shown.logits.argmax(dim=1)
    counts = classes.bincount(minlength=shown.logits.shape[1])
    decided = int(vote(shown.logits[:, None])[0])
    votes, right = len(classes), int((classes == view.label).sum())
    shares = counts / votes if votes > 1 else shown.logits[0].softmax(dim=0)
    best = shares.argsort(descending=True, stable=True)[:SHOWN_BARS].tolist()
    if view.label not in best:
        best[-1] = view.label
    text, lines = name_of(view, decided), []
    tied = (counts == counts.max()).nonzero()[:, 0].tolist()
    if len(tied) > 1:
        lines.append(f"tie of {' and '.join(name_of(view, number) for number in tied)}: counted as {text}")
    if votes > 1:
        lines.append(f"{right} of {votes} votes correct")
    if shown.unpurified is not None:
        mark = RIGHT if shown.unpurified == view.label else WRONG
        lines.append(f"not purified: {name_of(view, shown.unpurified)} {mark}")
    return Decision(text, decided == view.label, [(number, float(shares[number])) for number in best], lines)


def attack_text(view: View, titles: dict[str, str]) -> str:
    """The attack, its radius and what it sees, in a line."""
    values = view.values
    if not is_attacking(values):
        return "no attack" if values["attack"] == NO_ATTACK else f"{eps_text(0.0, values['norm'])}: no attack"
    name = titles.get(values["attack"], values["attack"])
    return f"{name}, {eps_text(values['eps'], values['norm'])}, {values['threat_model']}"


def transform_text(view: View) -> str:
    """The transform with those of its settings that apply, in a line."""
    name, values = view.values["transform"], view.values
    texts = {
        "missing_rate": f"{100 * values['missing_rate']:.3g} % missing",
        "noise_std": f"noise {values['noise_std']:.3g}",
        "num_masks": f"{values['num_masks']} masks",
    }
    return ", ".join([TRANSFORM_NAMES[name].split(":")[0], *(texts[key] for key in SETTINGS_OF[name])])


def clean(view: View) -> str:
    """The clean image and its class."""
    image = _img(view, to_pixels(view.clean), "clean image")
    return f"{image}<p>clean, true class <b>{escape(name_of(view, view.label))}</b></p>"


def grid(view: View) -> str:
    """One row a defence: its pictures, and its decision."""
    purifies = any(row is not None and row.sample is not None for row in view.rows)
    columns = COLUMNS if purifies or None in view.rows else COLUMNS[:2]
    head = "".join(f'<div class="atop-head">{name}</div>' for name in ("", *columns, "decision"))
    rows = [
        f'<div class="atop-row"><div class="atop-name">{escape(name)}</div>{_row(view, row, columns)}</div>'
        for name, row in zip(view.values["rows"], view.rows, strict=True)
    ]
    style = f"--rows:{len(rows)};--columns:{len(columns)}"
    return f'<div class="atop-grid" style="{style}">{head}{"".join(rows)}</div>'


def _row(view: View, row: Row | None, columns: Sequence[str]) -> str:
    if row is None:
        return '<div class="atop-wait">attacking \N{HORIZONTAL ELLIPSIS}</div>'
    cells, found = [], {picture.column: picture for picture in pictures(view, row)}
    for column in columns:
        picture = found.get(column)
        if picture is None:
            cells.append('<div class="atop-void">no purifier</div>')
            continue
        more = "".join(_img(view, pixels, "", kind) for kind, pixels in picture.more.items())
        image = _img(view, picture.pixels, f"{row.name}: {column} image", column)
        cells.append(f"<figure>{image}{more}<figcaption>{escape(picture.caption)}</figcaption></figure>")
    made = decision(view, row)
    source = "attacked itself" if row.attacked else f"attack made on {view.values['attacked']}"
    lines = ([source] if is_attacking(view.values) and not view.preview else []) + made.lines
    bars = "".join(_bar(view, number, share, made) for number, share in made.bars)
    below = "".join(f"<p>{escape(line)}</p>" for line in lines)
    decided = f'{_marked(made)}<div class="atop-bars">{bars}</div>{below}'
    return f'{"".join(cells)}<div class="atop-decision">{decided}</div>'


def _bar(view: View, number: int, share: float, made: Decision) -> str:
    name = escape(name_of(view, number))
    kind = "right" if number == view.label else "wrong" if name_of(view, number) == made.text else "other"
    return (
        f'<span title="{name}">{name}</span>'
        f'<div><div class="atop-of-{kind}" style="width:{100 * share:.1f}%"></div></div>'
        f"<span>{100 * share:.0f} %</span>"
    )


def _marked(made: Decision) -> str:
    kind, mark = ("right", RIGHT) if made.correct else ("wrong", WRONG)
    word = "correct" if made.correct else "misclassified"
    marked = f'{escape(made.text)} <span role="img" aria-label="{word}">{mark}</span>'
    return f'<p class="atop-{kind}" title="{word}">{marked}</p>'


def _img(view: View, pixels: np.ndarray, alt: str, kind: str = "clean") -> str:
    crisp = " atop-crisp" if view.clean.shape[-1] < CRISP_BELOW else ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="atop-{kind}{crisp}" src="{source}" alt="{escape(alt)}" draggable="false">'


def path_chart(view: View) -> str:
    """The share of correct samples at each step of the attack, a line a defence; a point can be chosen."""
    title = "correct samples (%) at each step of the attack"
    rows = [row for row in view.rows if row is not None and row.complete and len(row.path.steps) > 1]
    if not rows or view.preview:
        text = "no attack" if not is_attacking(view.values) else "\N{HORIZONTAL ELLIPSIS}"
        return _panel(title, f'<p class="atop-faint">{text}</p>')
    lines = []
    for row in rows:
        right = (row.logits.argmax(dim=2) == view.label).float()
        losses = -row.logits.softmax(dim=2)[:, :, view.label].mean(dim=0).clamp(min=1e-30).log()
        notes = [
            f"{row.name}, step {step}: {int(n)} of {len(right)} correct, loss {float(loss):.3g}"
            for step, n, loss in zip(row.path.steps, right.sum(dim=0), losses, strict=True)
        ]
        wishes = [{"shown_step": step} for step in row.path.steps]
        lines.append(Line(row.name, row.path.steps, (100 * right.mean(dim=0)).tolist(), notes, wishes))
    here = max(row.path.steps[shown_place(row.path, view.values)] for row in rows)
    return _panel(title, chart(lines, here=here, label="step"))


def curve_chart(curves: Sequence[Curve], norm: str, eps: float) -> str:
    """Robust accuracy over eps with 95 % intervals, a line a defence; a point can be chosen."""
    lines = []
    for curve in curves:
        shares = [100 * right / curve.images for right in curve.correct]
        bands = [tuple(100 * end for end in wilson_interval(right, curve.images)) for right in curve.correct]
        notes = [
            f"{curve.name}, {eps_text(at, norm)}: {share:.0f} % [{low:.0f}, {high:.0f}]"
            for at, share, (low, high) in zip(curve.eps, shares, bands, strict=True)
        ]
        lines.append(Line(curve.name, curve.eps, shares, notes, [{"eps": at} for at in curve.eps], bands))
    title = f"accuracy (%) over \N{GREEK SMALL LETTER EPSILON}, {curves[0].images} images, 95 % intervals"
    return _panel(title, chart(lines, here=eps, label=eps_text(eps, norm).split(" =")[0]))


class Line(NamedTuple):
    """A line of a chart: its name, its points, what each says and what choosing it asks for, and
    intervals."""

    name: str
    across: Sequence[float]
    up: Sequence[float]
    notes: Sequence[str]
    wishes: Sequence[dict[str, Any]]
    bands: Sequence[tuple[float, float]] = ()


def chart(lines: Sequence[Line], *, here: float, label: str, width: int = 330, height: int = 118) -> str:
    """Lines of percentages as SVG, in the colours of the page; a dashed line at ``here``."""
    left, top, base = 30, 6, height - 28
    last = max(max(line.across) for line in lines) or 1.0
    colours, xs, ys = (
        colours_of([line.name for line in lines]),
        (width - left - 90) / last,
        (base - top - 8) / 100,
    )
    zero = left + 8, base - 4
    parts = [f'<path class="atop-axis" d="M{left} {top}V{base}H{width - 74}"/>']
    for tick in (0, 50, 100):
        parts.append(
            f'<text x="{left - 5}" y="{zero[1] - ys * tick + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for tick in MaxNLocator(5, integer=isinstance(lines[0].across[0], int)).tick_values(0, last):
        if 0 <= tick <= last * 1.001:
            parts.append(
                f'<text x="{zero[0] + xs * tick:.1f}" y="{base + 12}" text-anchor="middle">'
                f"{_number(tick)}</text>"
            )
    parts.append(
        f'<text x="{(left + width - 74) / 2}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>'
    )
    parts.append(f'<path class="atop-here" d="M{zero[0] + xs * here:.1f} {top}V{base}"/>')
    for number, line in enumerate(lines):
        lift = 1.5 * (number - (len(lines) - 1) / 2)  # equal lines are beside each other
        colour = colours[line.name]
        points = [
            (zero[0] + xs * a, zero[1] - ys * b + lift) for a, b in zip(line.across, line.up, strict=True)
        ]
        parts.append(
            f'<path stroke="{colour}" fill="none" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in points)}"/>'
        )
        for (a, _), (low, high) in zip(points, line.bands, strict=False):
            parts.append(
                f'<path stroke="{colour}" opacity=".5" '
                f'd="M{a:.1f} {zero[1] - ys * low:.1f}V{zero[1] - ys * high:.1f}"/>'
            )
        for (a, b), note, wish in zip(points, line.notes, line.wishes, strict=True):
            data = f'data-wish="{escape(json.dumps(wish))}"'
            dot = f'<circle {data} fill="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">'
            parts.append(f"{dot}<title>{escape(note)}</title></circle>")
        parts.append(
            f'<text x="{width - 68}" y="{top + 12 + 15 * number}" class="atop-legend">'
            f'<tspan fill="{colour}">\N{BLACK CIRCLE}</tspan> {escape(line.name)}</text>'
        )
    text = "; ".join(f"{line.name} from {line.up[0]:.0f} to {line.up[-1]:.0f} %" for line in lines)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(text)}">'
    return f"{head}{''.join(parts)}</svg>"


def problem(sentence: str) -> str:
    """What is in the place of the pictures when they cannot be made."""
    return f'<div class="atop-problem" role="alert">{escape(sentence)}</div>'


def sentence_of(error: BaseException) -> str:
    """An error in one line, without a traceback; its type is named where its text alone would not be
    understood."""
    text = " ".join(str(error).split())
    explains = isinstance(error, ValueError | FileNotFoundError) and text
    return text if explains else f"{type(error).__name__}: {text}".rstrip(": ")


def _panel(title: str, content: str) -> str:
    return f'<p class="atop-title">{escape(title)}</p>{content}'


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-9 else value:.3g}".replace("-", MINUS)


def sheet(view: View, title: str = "") -> Image.Image:
    """The same pictures and decisions as one bitmap, dark on white."""
    rows = [row for row in view.rows if row is not None]
    fullest = max((pictures(view, row) for row in rows), key=len)
    columns = 1 + len(fullest)
    width = MARGIN + columns * (CELL + MARGIN) + 190
    image = Image.new("RGB", (width, 58 + len(rows) * (CELL + 34)), "white")
    pen = ImageDraw.Draw(image)

    _write(pen, MARGIN, 8, title, TEXT + 1)
    heads = [f"clean: {name_of(view, view.label)}", *(cell.column for cell in fullest)]
    for column, text in enumerate(heads):
        _write(pen, MARGIN + column * (CELL + MARGIN), 32, text)
    _paste(image, MARGIN, 50, to_pixels(view.clean))
    for place, row in enumerate(rows):
        y = 50 + place * (CELL + 34)
        cells = pictures(view, row)
        for column, cell in enumerate(cells, start=1):
            x = MARGIN + column * (CELL + MARGIN)
            _paste(image, x, y, cell.pixels)
            _write(pen, x, y + CELL + 2, cell.caption, TEXT - 2, "#595959")
        made, x = decision(view, row), MARGIN + columns * (CELL + MARGIN)
        _write(pen, x, y, row.name, TEXT + 2)
        colour = RIGHT_COLOUR if made.correct else WRONG_COLOUR
        _write(pen, x, y + 22, f"{made.text} {RIGHT if made.correct else WRONG}", TEXT + 6, colour)
        bars = [f"{name_of(view, number)}: {100 * share:.0f} %" for number, share in made.bars]
        for number, line in enumerate(bars + made.lines):
            _write(pen, x, y + 50 + 15 * number, line, TEXT - 1)
    return image


def _write(
    pen: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int = TEXT, colour: str = "#1a1a1a"
) -> None:
    pen.text((x, y), text, fill=colour, font=_font(size))


def _paste(image: Image.Image, x: int, y: int, pixels: np.ndarray) -> None:
    kind = Image.Resampling.NEAREST if pixels.shape[1] < CRISP_BELOW else Image.Resampling.LANCZOS
    size = CELL, round(CELL * pixels.shape[0] / pixels.shape[1])
    image.paste(Image.fromarray(pixels).resize(size, kind), (x, y))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def encoded(frames: Sequence[Image.Image], kind: str) -> bytes:
    """One bitmap as ``png`` or ``pdf``, several as an animated ``gif``, 0.4 s each and the last one
    longer."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"resolution": 160.0} if kind == "pdf" else {}
    if kind == "gif":
        durations = [400] * (len(frames) - 1) + [1600]
        options = {"save_all": True, "append_images": list(frames[1:]), "duration": durations, "loop": 0}
    frames[0].save(buffer, kind.upper(), **options)
    return buffer.getvalue()
