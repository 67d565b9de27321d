"""What attacks leave of defences: bars side by side, and against a parameter."""

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from atoplib.drawing import (
    FAINT,
    INK,
    SMALL,
    TEXT,
    colours_of,
    fit,
    legend_below,
    legend_of,
    new_figure,
    style_axes,
    text_width,
    words,
    wrap,
)
from atoplib.figures.tables import is_number, read_table


def accuracy_bars(table: Iterable[Any], *, chance: float | None = None, title: str = "") -> Figure:
    """Accuracy in % with its 95 % interval: a group of bars an attack, a colour a defence.

    Args:
        table: mappings or objects (such as ``evaluation.Score``) with ``defence``, ``attack`` (names), ``accuracy``,
            ``low`` and ``high`` (shares in [0, 1]). A combination may be missing.
        chance: accuracy of a guess, a share in [0, 1]: a broken line across the bars; None: no line.
        title: above the figure.

    Raises:
        ValueError: for an empty table, a missing entry, a doubled combination, numbers that violate
            0 <= low <= accuracy <= high <= 1, or a chance outside [0, 1].
    """
    if chance is not None and not 0 <= chance <= 1:
        raise ValueError(f"chance must lie in [0, 1] (a share, not per cent), got {chance}")
    content = read_table(table)
    defences, attacks = content.defences, content.attacks
    group = 0.46 * len(defences) + 0.4  # inches
    a_row = min(len(attacks), max(1, int(10 / group)))
    rows = ceil(len(attacks) / a_row)
    width = max(4.5, 1.0 + group * a_row)
    figure = new_figure(width, 3.4 * rows + 0.5, title)
    colours = colours_of(defences)
    bar = 0.46 / group  # share of a group, whose place is 1 wide
    handles = {}
    for row in range(rows):
        axes = figure.add_subplot(rows, 1, row + 1)
        shown = attacks[row * a_row : (row + 1) * a_row]
        for number, defence in enumerate(defences):
            places, cells = [], []
            for place, attack in enumerate(shown):
                if (defence, attack) in content.cells:
                    places.append(place + (number - (len(defences) - 1) / 2) * bar)
                    cells.append(content.cells[defence, attack])
            if not cells:
                continue
            heights = [100 * cell.accuracy for cell in cells]
            below = [100 * max(0.0, cell.accuracy - cell.low) for cell in cells]
            above = [100 * max(0.0, cell.high - cell.accuracy) for cell in cells]
            handles[defence] = axes.bar(
                places,
                heights,
                width=0.92 * bar,
                color=colours[defence],
                edgecolor="white",
                linewidth=0.5,
                yerr=[below, above],
                error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3.0, "capthick": 1.2},
            )
            for place, cell in zip(places, cells, strict=True):
                axes.annotate(
                    f"{100 * cell.accuracy:.1f}",
                    (place, 100 * cell.high),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    **words(),
                    path_effects=[withStroke(linewidth=5, foreground="white")],  # the line of chance may pass behind it
                )
        if chance is not None:
            handles[f"chance, {100 * chance:.3g} %"] = axes.axhline(
                100 * chance, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.9
            )
        style_axes(axes, grid="y")
        half = (width - 1.0) / group / 2  # the same width of bars in every figure, however few there are
        axes.set_xlim((a_row - 1) / 2 - half, (a_row - 1) / 2 + half)
        axes.set_ylim(0, 112)  # room for the number above a bar of 100 %
        axes.set_yticks(range(0, 101, 20))
        axes.set_xticks(range(len(shown)), [wrap(attack, 72 * group, TEXT) for attack in shown])
        axes.tick_params(axis="x", length=0, labelsize=TEXT)
        axes.set_ylabel("accuracy (%), 95 % interval", **words())
    widest = max(text_width(name, SMALL) for name in handles) + 40  # points, with its colour patch
    lines = ceil(len(handles) / max(1, int(72 * width / widest)))
    entries = {wrap(name, 72 * width - 50, SMALL): handle for name, handle in handles.items()}
    legend_below(figure, entries, ceil(len(handles) / lines))
    return figure


def accuracy_against(points: Iterable[Mapping[str, Any]], *, name: str, title: str = "") -> Figure:
    """Accuracy in % against a parameter: a panel an attack, a colour a defence.

    A point is a run, with its 95 % interval; the line joins the means of the runs that share a value.

    Args:
        points: mappings with ``defence``, ``attack``, ``accuracy``, ``low``, ``high`` (shares in [0, 1]) and ``value`` (the
            parameter's: all numbers, or names, which stand in the order in which they come).
        name: the parameter's name.
        title: above the figure.

    Raises:
        ValueError: if there is no point, or a share lies outside [0, 1].
    """
    points = list(points)
    if not points:
        raise ValueError("there is no point to show: give rows with defence, attack, value, accuracy, low and high")
    for point in points:
        if not 0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1:
            raise ValueError(f"0 <= low <= accuracy <= high <= 1 must hold, got {dict(point)}")
    attacks = list(dict.fromkeys(point["attack"] for point in points))
    defences = list(dict.fromkeys(point["defence"] for point in points))
    numeric = all(is_number(point["value"]) for point in points)
    names = list(dict.fromkeys(str(point["value"]) for point in points))
    columns = min(3, len(attacks))
    figure = new_figure(max(4.2, 3.4 * columns), 3.0 * ceil(len(attacks) / columns) + 0.4, title)
    colours = colours_of(defences)
    values = [point["value"] for point in points] if numeric else [0, 10]
    beside = 0.012 * ((max(values) - min(values)) or 1)  # so that defences of equal accuracy do not hide each other
    for position, attack in enumerate(attacks, start=1):
        axes = figure.add_subplot(ceil(len(attacks) / columns), columns, position)
        for number, defence in enumerate(defences):
            aside = beside * (number - (len(defences) - 1) / 2)
            chosen = [point for point in points if (point["attack"], point["defence"]) == (attack, defence)]
            places = [aside + (point["value"] if numeric else names.index(str(point["value"]))) for point in chosen]
            heights = [100 * point["accuracy"] for point in chosen]
            spans = [[100 * (p["accuracy"] - p["low"]) for p in chosen], [100 * (p["high"] - p["accuracy"]) for p in chosen]]
            axes.errorbar(places, heights, spans, fmt="o", color=colours[defence], markersize=4, linewidth=1, capsize=2)
            means = {place: [h for p, h in zip(places, heights, strict=True) if p == place] for place in sorted(set(places))}
            line = [sum(of_place) / len(of_place) for of_place in means.values()]
            axes.plot(list(means), line, color=colours[defence], linewidth=1.6, label=defence)
        style_axes(axes)
        axes.set_ylim(-3, 103)
        if not numeric:
            slanted = {} if len(names) <= 3 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(range(len(names)), [fit(text, 90, SMALL) for text in names], **slanted)
            axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(fit(name, 220, SMALL), **words())
        axes.set_ylabel("accuracy (%), 95 % interval", **words())
        axes.set_title(attack, loc="left", **words(TEXT))
    legend_below(figure, legend_of(figure), min(4, len(defences)))
    return figure
