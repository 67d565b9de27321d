"""Pictures of two settings crossed: heat maps with a number in each cell, and lines along one setting.

Figures of their own, see ``drawing``. The colours are those of cividis, which eyes of every kind see as one ramp of
lightness; the number in the cell says it again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atoplib.drawing import (
    FAINT,
    FONT,
    INK,
    MISSING,
    SERIES,
    SMALL,
    TEXT,
    colours_of,
    legend_below,
    legend_of,
    new_figure,
    style_axes,
    words,
)

SEQUENTIAL = "cividis"
NO_VALUE = "#ececec"
DARKEST_FOR_DARK_TEXT = 0.18  # relative luminance: there, black and white text have the same contrast
TRANSFORM_NAMES = {"none": "no transform", "rt1": "RT1", "rt2": "RT2", "rt3": "RT3"}


@dataclass(frozen=True)
class Metric:
    """One number of a cell.

    Attributes:
        name: of the cell's entry; ``NAME_low`` and ``NAME_high`` are its interval, if it is a share.
        title, unit: of the panel and its scale.
        share: in [0, 1], shown in % with its interval; else a value of 0 or more in ``unit``.
    """

    name: str
    title: str
    unit: str
    share: bool = True

    def value(self, cell: Mapping[str, Any]) -> float:
        """As it is shown."""
        return (100 if self.share else 1) * float(cell[self.name])

    def text(self, cell: Mapping[str, Any]) -> str:
        """The number."""
        return f"{self.value(cell):.1f}"

    def interval(self, cell: Mapping[str, Any]) -> str:
        """``[12.0, 27.3]``; empty if it has none."""
        return f"[{100 * cell[f'{self.name}_low']:.1f}, {100 * cell[f'{self.name}_high']:.1f}]" if self.share else ""

    def top(self, cells: Iterable[Mapping[str, Any]]) -> float:
        """The upper end of the scale."""
        return 100.0 if self.share else max((self.value(cell) for cell in cells), default=0.0) or 1.0


METRICS: dict[str, Metric] = {
    item.name: item
    for item in (
        Metric("robust", "robust accuracy, white-box", "%"),
        Metric("clean", "clean accuracy", "%"),
        Metric("distance", "distance of purified images", "mean absolute difference, 1/255", share=False),
    )
}


@dataclass(frozen=True)
class Surface:
    """Cells in rows and columns, by the names of both; a combination may be missing."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Mapping[str, Any]]


def mask_surface_of(cells: Iterable[Mapping[str, Any]]) -> Surface:
    """Missing rate x number of masks, of the cells of one defence; rows and columns in rising order, RT3 last.

    Raises:
        ValueError: without a cell, or if two of them have one place.
    """
    placed: dict[tuple[str, str], Mapping[str, Any]] = {}
    order: dict[str, tuple] = {}
    for cell in cells:
        transform, rate = cell["transform"], cell["missing_rate"]
        row = "RT3, 1 / masks" if transform == "rt3" else f"{TRANSFORM_NAMES[transform]}, {100 * rate:.3g} %"
        key = row, str(cell["num_masks"])
        if key in placed:
            raise ValueError(f"two cells stand at {row}, {key[1]} masks: give those of one defence and one noise level")
        placed[key] = cell
        order[row] = (transform, 0 if transform == "rt3" else rate)
    if not placed:
        raise ValueError("there is no cell to show: give at least one")
    columns = sorted({column for _, column in placed}, key=int)
    return Surface(tuple(sorted(order, key=order.__getitem__)), tuple(columns), placed)


def colour_of(share: float) -> str:
    """The colour of a place on the scale, 0 to 1, as ``#rrggbb``."""
    return to_hex(matplotlib.colormaps[SEQUENTIAL](min(1.0, max(0.0, share))))


@cache
def ink_on(colour: str) -> str:
    """Black or white, whichever has the larger contrast to a colour (WCAG 2, relative luminance)."""
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > DARKEST_FOR_DARK_TEXT else "#ffffff"


def mask_maps(cells: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "") -> Figure:
    """A heat map for each defence (a row of them) and metric: missing rate x number of masks.

    Args:
        cells: by defence; mappings with ``transform``, ``missing_rate``, ``num_masks`` and the entries of ``METRICS``.
        title: above the figure.

    Raises:
        ValueError: without a cell, or if two have one place.
    """
    surfaces = {name: mask_surface_of(own) for name, own in cells.items()}
    if not surfaces:
        raise ValueError("there is no defence to show: give at least one with its cells")
    panels = [
        [(metric, surface, f"{name}: {metric.title}") for metric in METRICS.values()] for name, surface in surfaces.items()
    ]
    tops = {metric: metric.top(cell for own in cells.values() for cell in own) for metric in METRICS.values()}
    return _maps(panels, tops, across="masks an image", down="missing patches", title=title)


def crossed_maps(surfaces: Mapping[str, Surface], *, across: str, down: str, title: str = "") -> Figure:
    """Accuracy in % with its interval, of two parameters crossed: one heat map an attack.

    Args:
        surfaces: by attack; cells with ``accuracy``, ``accuracy_low`` and ``accuracy_high``, shares.
        across, down: names of the parameters.
        title: above the figure.

    Raises:
        ValueError: without an attack.
    """
    if not surfaces:
        raise ValueError("there is no attack to show: give at least one with its cells")
    metric = Metric("accuracy", "accuracy", "%")
    panels = [[(metric, surface, name) for name, surface in surfaces.items()]]
    return _maps(panels, {metric: 100.0}, across=across, down=down, title=title)


def metric_lines(
    cells: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    value: str,
    label: str,
    title: str = "",
) -> Figure:
    """Each metric along one setting: a panel a metric, a line a defence; the bars are 95 % intervals.

    Args:
        cells: by defence; mappings with ``value`` and the entries of ``METRICS``.
        value: the entry that is the horizontal axis, a number.
        label: of that axis, with its unit.
        title: above the figure.

    Raises:
        ValueError: without a cell.
    """
    if not any(cells.values()):
        raise ValueError("there is no cell to show: give at least one")
    metrics = list(METRICS.values())
    figure = new_figure(3.4 * len(metrics), 3.4, title)
    colours = colours_of(list(cells))
    for place, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(1, len(metrics), place)
        lines = {
            name: [(cell[value], metric.value(cell), *_bounds(metric, cell)) for cell in own] for name, own in cells.items()
        }
        _lines(axes, lines, colours, label, metric.unit if not metric.share else "accuracy (%), 95 % interval", metric.title)
        axes.set_ylim((-3, 103) if metric.share else (0, 1.08 * metric.top(cell for own in cells.values() for cell in own)))
    _legend(figure)
    return figure


def vote_lines(votes: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "") -> Figure:
    """Accuracy against the number of draws of a decision: a panel a defence, a line an attack and verdict.

    Args:
        votes: by defence; mappings with ``verdict``, ``attack``, ``draws``, ``accuracy``, ``low`` and ``high`` (shares).
        title: above the figure.

    Raises:
        ValueError: without a vote.
    """
    if not any(votes.values()):
        raise ValueError("there is no vote to show: give at least one")
    columns = min(3, len(votes))
    rows = ceil(len(votes) / columns)
    figure = new_figure(max(5.0, 4.4 * columns), 3.4 * rows + 0.4, title)
    series = dict.fromkeys(_series_name(vote) for own in votes.values() for vote in own)
    colours = {name: SERIES[number % len(SERIES)] for number, name in enumerate(series)}
    for place, (name, own) in enumerate(votes.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        lines: dict[str, list[tuple[float, ...]]] = {}
        for vote in own:
            point = (vote["draws"], *(100 * vote[key] for key in ("accuracy", "low", "high")))
            lines.setdefault(_series_name(vote), []).append(point)
        _lines(axes, lines, colours, "draws of a decision (log scale)", "accuracy (%), 95 % interval", name)
        ticks = sorted({int(point[0]) for points in lines.values() for point in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
    _legend(figure)
    return figure


def _maps(
    panels: Sequence[Sequence[tuple[Metric, Surface, str]]],
    tops: Mapping[Metric, float],
    *,
    across: str,
    down: str,
    title: str,
) -> Figure:
    """Rows of panels, each (metric, surface, heading), the scale of each metric from 0 to its top."""
    wide = sum(max(len(row[place][1].columns) for row in panels if place < len(row)) for place in range(len(panels[0])))
    high = sum(len(row[0][1].rows) for row in panels)
    figure = new_figure(0.82 * wide + 1.5 * len(panels[0]), 0.52 * high + 1.1 * len(panels), title)
    for number, row in enumerate(panels):
        for place, (metric, surface, heading) in enumerate(row):
            axes = figure.add_subplot(len(panels), len(row), number * len(row) + place + 1)
            _map(figure, axes, metric, surface, tops[metric])
            axes.set_title(heading, loc="left", **words(TEXT))
            axes.set_xlabel(across, **words())
            axes.set_ylabel(down if place == 0 else "", **words())
            if place:
                axes.set_yticklabels([])
    return figure


def _map(figure: Figure, axes: Axes, metric: Metric, surface: Surface, top: float) -> None:
    values = [
        [metric.value(surface.cells[row, column]) if (row, column) in surface.cells else float("nan") for column in columns]
        for columns in [surface.columns]
        for row in surface.rows
    ]
    colours = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=NO_VALUE)
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for y, row in enumerate(surface.rows):
        for x, column in enumerate(surface.columns):
            cell = surface.cells.get((row, column))
            if cell is None:
                axes.text(x, y, MISSING, ha="center", va="center", **words(SMALL, FAINT))
                continue
            ink = ink_on(colour_of(metric.value(cell) / top))
            interval = metric.interval(cell)
            number = {"xytext": (0, 5 if interval else 0), "textcoords": "offset points", "ha": "center", "va": "center"}
            axes.annotate(metric.text(cell), (x, y), **number, **words(TEXT, ink))
            if interval:
                axes.annotate(interval, (x, y), **{**number, "xytext": (0, -7)}, **words(SMALL - 2, ink))
    axes.set_xticks(range(len(surface.columns)), surface.columns)
    axes.set_yticks(range(len(surface.rows)), surface.rows)
    axes.tick_params(colors=INK, labelsize=SMALL, labelfontfamily=FONT, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for axis, count in ((axes.axhline, len(surface.rows)), (axes.axvline, len(surface.columns))):
        for place in range(1, count):
            axis(place - 0.5, color="white", linewidth=1.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label(metric.unit, **words())
    bar.ax.tick_params(colors=INK, labelsize=SMALL, labelfontfamily=FONT)
    bar.outline.set_visible(False)


def _series_name(vote: Mapping[str, Any]) -> str:
    return f"{vote['attack']}, {vote['verdict'].replace('_', ' ').replace(' n', ' N')}"


def _lines(
    axes: Axes,
    lines: Mapping[str, Sequence[Sequence[float]]],
    colours: Mapping[str, str],
    label: str,
    unit: str,
    heading: str,
) -> None:
    """Lines by name, of points (value, height, low, high); a name has the same colour and marker in every panel."""
    markers = dict(zip(colours, cycle("osD^vP"), strict=False))
    for name, points in lines.items():
        values, heights, lows, highs = zip(*sorted(points), strict=True)
        spans = [
            [h - low for h, low in zip(heights, lows, strict=True)],
            [e - h for h, e in zip(heights, highs, strict=True)],
        ]
        look = {"color": colours[name], "marker": markers[name], "markersize": 5, "linewidth": 1.6, "capsize": 2}
        axes.errorbar(values, heights, spans, label=name, **look)
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label, **words())
    axes.set_ylabel(unit, **words())
    axes.set_title(heading, loc="left", **words(TEXT))


def _bounds(metric: Metric, cell: Mapping[str, Any]) -> tuple[float, float]:
    if not metric.share:
        return metric.value(cell), metric.value(cell)
    return 100 * cell[f"{metric.name}_low"], 100 * cell[f"{metric.name}_high"]


def _legend(figure: Figure) -> None:
    entries = legend_of(figure)
    legend_below(figure, entries, min(4, len(entries)))
