"""What all pictures share: colours, legends, how a frame is read, and how a figure is made and written.

A figure is one of its own: pyplot does not know it and no global setting is changed, so a widget's thread may
draw.
"""

import re
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atoplib import files, parameters
from atoplib.evaluation.results import NORMS, eps_text

RIGHT, WRONG = ("\N{CHECK MARK}", "#2a86c8"), ("\N{BALLOT X}", "#d95f02")  # mark and colour of a decision
MINUS = "\N{MINUS SIGN}"
DIVERGING = "RdBu_r"  # white at 0, blue below, red above: apart for colour-blind eyes, too
SEQUENTIAL = "cividis"  # which eyes of every kind see as one ramp of lightness
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito
DEFENCE_COLOURS = {"undefended": "#7a7a7a", "AT": "#e69f00", "AP": "#56b4e9", "AToP": "#0072b2"}
WIDEST = 8.8  # inches: a page of JupyterLab, where a figure is shown in its own size (96 pixels an inch)
ACCURACY = "accuracy (%), 95 % interval"


def colours_of(defences: Sequence[str]) -> dict[str, str]:
    """A colour for each defence: the kit's have the same one in every figure, others take what is left in
    their order."""
    unused = (colour for name, colour in DEFENCE_COLOURS.items() if name not in defences)
    left = cycle(["#009e73", "#cc79a7", "#882255", "#999933", "#332288", *unused])
    return {name: DEFENCE_COLOURS.get(name) or next(left) for name in defences}


def plain(text: object) -> str:
    """A text for matplotlib, in which a dollar sign is a dollar sign, and norms stand as they are written."""
    return re.sub(r"\w+", lambda word: NORMS.get(word[0], word[0]), str(text)).replace("$", r"\$")


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty white figure of ``width`` x ``height`` inches (a title adds to it) that lays itself out."""
    lines = textwrap.wrap(title, max(20, int(10 * width)))
    figure = Figure((width, height + 0.25 * len(lines)), dpi=96, facecolor="white", layout="constrained")
    figure.suptitle(plain("\n".join(lines)), fontsize=12)
    return figure


def panels(
    count: int, width: float, height: float, title: str, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in rows of at most ``columns``, each ``width`` x ``height`` inches."""
    columns = max(1, min(columns, count, int(WIDEST // width)))
    rows = -(-count // columns)
    figure = new_figure(max(4.5, columns * width), rows * height, title)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, list(axes[:count])


def style_axes(axes: Axes, grid: str = "both", **settings: Any) -> None:
    """Two spines, faint lines behind what is shown, and labels, limits, ... as ``Axes.set`` takes them."""
    sns.despine(ax=axes)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color="#e0e0e0", linewidth=0.7)
    axes.set(**settings)


def legend_below(figure: Figure) -> None:
    """One legend for all axes of a figure, below them."""
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    fitting = max(1, int(13 * figure.get_figwidth() / (6 + max(map(len, entries), default=0))))
    figure.legend(
        entries.values(),
        entries,
        loc="outside lower center",
        ncols=min(fitting, 5),
        frameon=False,
        fontsize=9,
    )


def read_frame(frame: pd.DataFrame, *columns: str | None, rule: str | None = None) -> pd.DataFrame:
    """A copy of the rows of one decision rule (None: the first in the frame), in order.

    Args:
        columns: that are looked at; for ``threat`` a column of that name is added: the attack's, with norm
            and eps where one name has several of them.

    Raises:
        ValueError: for no row (of the rule).
    """
    if "rule" in frame and len(frame):
        frame = frame[frame["rule"] == (frame["rule"].iloc[0] if rule is None else rule)]
    if not len(frame):
        raise ValueError(f"the frame has no row (rule {rule or 'any'!r}): give at least one")
    frame = frame.reset_index(drop=True)
    if "threat" in columns:
        frame["threat"] = frame["attack"].astype(str)
        if {"norm", "eps"} <= set(frame):
            several = frame.groupby("attack")[["norm", "eps"]].transform("nunique").max(axis=1) > 1
            for place, row in frame[several & frame["eps"].notna()].iterrows():
                frame.loc[place, "threat"] += f", {eps_text(row['eps'], row['norm'])}"
    return frame


def error_bars(frame: pd.DataFrame, value: str = "accuracy") -> list[pd.Series] | None:
    """Lengths of the bars of 95 % intervals, below and above; None for a value without an interval."""
    low, high = interval_of(value)
    if low not in frame:
        return None
    return [(frame[value] - frame[low]).clip(lower=0), (frame[high] - frame[value]).clip(lower=0)]


def interval_of(value: str) -> tuple[str, str]:
    """The columns of the ends of a value's interval."""
    return ("low", "high") if value == "accuracy" else (f"{value}_low", f"{value}_high")


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write a figure as PNG (192 pixels an inch) or PDF, by the path's suffix, atomically: an earlier file
    survives a failure.

    The file holds no date and no version, so that equal figures give equal files. Its folder is made.
    Returns the figure, to be shown.

    Raises:
        ValueError: for another suffix.
        OSError: if it cannot be written; the message says what to do.
    """
    path, left_out = Path(path), {"png": ["Software"], "pdf": ["CreationDate", "Creator", "Producer"]}
    kind = path.suffix[1:].lower()
    parameters.check_settings(suffix=(kind, parameters.one_of(*left_out)))
    files.write_atomically(
        path, lambda part: figure.savefig(part, format=kind, dpi=192, metadata=dict.fromkeys(left_out[kind]))
    )
    return figure
