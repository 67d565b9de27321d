"""What all pictures have in common: letters, colours, marks, and how a figure is made and written.

A figure is one of its own: pyplot does not know it and no global setting is changed, so that a widget's thread may draw.
Sizes and colours are explicit: a figure looks the same whatever style a notebook has set.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import LoadFlags

from atoplib.checkpoints import write_atomically

DPI = 160
FONT = "DejaVu Sans"  # comes with matplotlib and has the marks
TITLE, TEXT, SMALL = 12.0, 10.0, 9.0  # points
INK, FAINT, FRAME, GRID = "#1a1a1a", "#595959", "#8c8c8c", "#e0e0e0"
RIGHT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"
MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
DIVERGING = "RdBu_r"  # white at 0, blue below, red above: apart for colour-blind eyes, too
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito
RIGHT_COLOUR, WRONG_COLOUR, OTHER_COLOUR = "#2a86c8", "#d95f02", "#999999"  # read right, read wrong; on white and on black
DEFENCE_COLOURS = {"undefended": "#666666", "AT": "#d55e00", "AP": "#56b4e9", "AToP": "#0072b2"}
GUEST_COLOURS = ("#e69f00", "#009e73", "#cc79a7")  # of other defences


def colours_of(defences: Sequence[str]) -> dict[str, str]:
    """A colour for each defence: ours have the same one in every figure, others take what is left in their order."""
    left = [*GUEST_COLOURS, *(colour for name, colour in DEFENCE_COLOURS.items() if name not in defences)]
    guests = [name for name in defences if name not in DEFENCE_COLOURS]
    theirs = {name: left[number % len(left)] for number, name in enumerate(guests)}
    return {name: DEFENCE_COLOURS.get(name) or theirs[name] for name in defences}


def words(size: float = SMALL, colour: str = INK) -> dict[str, Any]:
    """The options of a text."""
    return {"fontsize": size, "color": colour, "family": FONT}


def text_width(text: str, size: float) -> float:
    """In points, with some reserve: on screen the letters stand on whole pixels and the line gets longer."""
    return 1.04 * size * sum(map(_advance, text))


def fit(text: str, room: float, size: float) -> str:
    """The text, its end replaced by an ellipsis where it is wider than ``room`` points."""
    if text_width(text, size) <= room:
        return text
    kept = text
    while len(kept) > 1 and text_width(kept + "…", size) > room:
        kept = kept[:-1].rstrip()
    return kept + "…"


def wrap(text: str, room: float, size: float) -> str:
    """The text in lines of at most ``room`` points; a word that is wider is broken."""
    width = text_width(text, size)
    if width <= room or not text:
        return text
    for characters in range(min(len(text), ceil(1.2 * len(text) * room / width)), 1, -1):
        lines = textwrap.wrap(text, characters)
        if all(text_width(line, size) <= room for line in lines):
            return "\n".join(lines)
    return text


def bare_figure(width: float, height: float) -> Figure:
    """An empty white figure, its width and height in inches; nothing is laid out by itself."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="none")
    FigureCanvasAgg(figure)
    return figure


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A figure with a title, whose axes and legends find their places themselves; in inches, the title not counted."""
    figure = bare_figure(width, height + (0.4 if title else 0.0))
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.09, wspace=0.03, hspace=0.03)  # the first two in inches
    if title:
        figure.suptitle(wrap(title, 72 * width - 16, TITLE), fontweight="normal", **words(TITLE))
    return figure


def style_axes(axes: Axes, *, grid: Literal["both", "y", ""] = "both") -> None:
    """A white ground, two spines, ticks in our letters, and faint lines behind what is shown."""
    axes.set_facecolor("white")
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=SMALL, labelfontfamily=FONT, bottom=True, left=True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
        spine.set_linewidth(0.8)
    axes.set_axisbelow(True)
    axes.grid(False)
    if grid:
        axes.grid(True, axis=grid, color=GRID, linewidth=0.7)


def legend_of(figure: Figure) -> dict[str, Any]:
    """By its label, everything in the figure's axes that has one."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    return entries


def legend_below(figure: Figure, entries: Mapping[str, Any], columns: int) -> None:
    """One legend for all axes of a figure, below them."""
    figure.legend(
        handles=list(entries.values()),
        labels=list(entries),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        prop=FontProperties(family=FONT, size=SMALL),
        labelcolor=INK,
    )


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """Write a figure as PNG or PDF, by the path's suffix, atomically: an earlier file survives a failure.

    The file holds no date and no version, so that equal figures give equal files. Returns the path; its folder is made.

    Raises:
        ValueError: for another suffix.
        OSError: if it cannot be written; the message says what to do.
    """
    path = Path(path)
    without = {".png": ("Software",), ".pdf": ("CreationDate", "Creator", "Producer")}
    kind = path.suffix.lower()
    if kind not in without:
        raise ValueError(f"cannot write a figure as {path.suffix!r} ({path}): the name must end in .png or .pdf")
    options = {"format": kind[1:], "metadata": dict.fromkeys(without[kind]), "dpi": "figure"}
    options |= {"facecolor": "white", "bbox_inches": None, "transparent": False}
    write_atomically(path, lambda part: figure.savefig(part, **options))
    return path


@cache
def _advance(character: str) -> float:
    """Width of a character of the font at 1 point."""
    font = get_font(findfont(FontProperties(family=FONT)))
    font.set_size(100, 72)
    return font.load_char(ord(character), LoadFlags.NO_HINTING).linearHoriAdvance / 65536 / 100
