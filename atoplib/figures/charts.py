"""Charts: accuracies of defences as bars, heat maps and lines over a parameter, the course of a training, and
certificates beside attacks."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from atoplib.evaluation.results import NORMS
from atoplib.figures.style import (
    ACCURACY,
    MINUS,
    SEQUENTIAL,
    SERIES,
    WIDEST,
    colours_of,
    error_bars,
    interval_of,
    legend_below,
    new_figure,
    panels,
    plain,
    read_frame,
    style_axes,
)

MARKERS = "osD^vP"  # of a series: points on one another are told apart
QUANTITIES = {  # label of a panel's axis; other names stand as they are
    "loss": "loss",
    "eps": "ε, images in [0, 1]",
    "reconstruction": "mean absolute difference",
    "classification": "cross-entropy (nats)",
    "gan": "generator's GAN loss",
    "discriminator": "discriminator's GAN loss",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "learning_rate": "learning rate",
}


def accuracy_bars(
    frame: pd.DataFrame, title: str = "", *, rule: str | None = None, chance: float | None = None
) -> Figure:
    """Accuracy in percent with its 95 % interval: a group of bars an attack, a colour a defence.

    Args:
        frame: of an ``Evaluation``: columns ``defence``, ``attack``, ``accuracy``, ``low``, ``high``
            (percent), and ``norm``, ``eps``, ``rule`` where they differ. A combination may be missing.
        rule: which decision rule is drawn; None: the first in the frame.
        chance: accuracy of a guess in percent: a broken line across the bars.

    Raises:
        ValueError: for an empty frame, or a doubled combination. KeyError: for a missing column.
    """
    frame = read_frame(frame, "threat", rule=rule)
    if frame.duplicated(["defence", "threat"]).any():
        raise ValueError("a defence and an attack are there twice: draw one evaluation, or choose a rule")
    defences, threats = (list(dict.fromkeys(frame[name])) for name in ("defence", "threat"))
    a_row = ceil(len(threats) / ceil(len(threats) * (len(defences) + 1) / 20))  # rows alike
    rows = [threats[start : start + a_row] for start in range(0, len(threats), a_row)]
    figure = new_figure(max(5.0, 1.2 + 0.34 * a_row * (len(defences) + 1)), 3.2 * len(rows) + 0.4, title)
    width, outline = 0.8 / len(defences), [withStroke(linewidth=4, foreground="white")]
    for axes, shown in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows, strict=True):
        for number, (defence, colour) in enumerate(colours_of(defences).items()):
            part = frame[frame["threat"].isin(shown) & (frame["defence"] == defence)]
            bars = axes.bar(
                part["threat"].map(shown.index) + width * (number - (len(defences) - 1) / 2),
                part["accuracy"],
                width,
                yerr=error_bars(part),
                color=colour,
                label=plain(defence),
                capsize=3,
            )
            # the line of chance may pass behind a number
            axes.bar_label(bars, fmt="%.1f", padding=1, fontsize=8, path_effects=outline)
        if chance is not None:
            axes.axhline(
                chance,
                label=f"chance, {chance:.3g} %",
                color="#595959",
                linewidth=1,
                linestyle="--",
                zorder=0.9,
            )
        style_axes(
            axes, "y", ylabel=ACCURACY, ylim=(0, 112), yticks=range(0, 101, 20), xlim=(-0.5, a_row - 0.5)
        )
        axes.set_xticks(range(len(shown)), _in_lines(shown, 0.34 * (len(defences) + 1)), fontsize=9)
    legend_below(figure)
    return figure


def attack_heatmap(
    frame: pd.DataFrame,
    title: str = "",
    *,
    rows: str = "defence",
    columns: str = "threat",
    panel: str | None = None,
    values: Mapping[str, str] | None = None,
    rule: str | None = None,
) -> Figure:
    """Heat maps with the number and its 95 % interval in each cell: a row a defence, a column an attack.

    Args:
        frame: of an ``Evaluation`` or an ablation; a combination may be missing.
        rows, columns: its columns that are crossed; ``threat`` is the attack, with norm and eps where they
            differ.
        panel: its column of whose values each gets a row of maps (such as ``attack`` or ``defence``); None:
            one row.
        values: its columns that are shown, a map each, with their label (``accuracy`` if None). Those whose
            label ends in ``(%)`` run from 0 to 100, others from 0 to their largest. ``NAME_low``,
            ``NAME_high`` (``low``, ``high`` of ``accuracy``) are their intervals.
        rule: which decision rule is drawn; None: the first in the frame.

    Raises:
        ValueError: for an empty frame, or a doubled combination. KeyError: for a missing column.
    """
    values = {"accuracy": "accuracy (%)"} if values is None else dict(values)
    frame = read_frame(frame, rows, columns, panel, rule=rule)
    down, across, shown = _ordered(frame[rows]), _ordered(frame[columns]), _parts(frame, panel, values)
    several = len(values) > 1  # their headings name them, and the cells have the numbers
    width = min(WIDEST, 1.1 + 0.6 * len(across) if several else 2.0 + 0.85 * len(across))
    figure, axes = panels(
        len(shown), width, 1.2 + 0.5 * len(down), title, columns=len(values) if several else 3
    )
    for one, (heading, part, value) in zip(axes, shown, strict=True):
        part = part.assign(text=part.apply(_cell_text, axis=1, value=value)).set_index([rows, columns])
        table, text = (part[name].unstack().reindex(index=down, columns=across) for name in (value, "text"))
        largest = 100.0 if values[value].endswith("(%)") else float(frame[value].max()) or 1.0
        sns.heatmap(
            table.astype(float),
            annot=text.fillna("–"),
            fmt="",
            ax=one,
            cmap=SEQUENTIAL,
            linewidths=1,
            annot_kws={"fontsize": 8},
            vmin=0,
            vmax=largest,
            cbar=not several,
            cbar_kws={"label": values[value]},
        )
        one.tick_params(length=0, labelsize=8)
        one.set_title(plain(": ".join(filter(None, [str(heading), values[value] * several]))), fontsize=9)
        one.set(
            xlabel="" if columns == "threat" else plain(columns.replace("_", " ")),
            ylabel="",
            facecolor="#ececec",  # of cells without a value
        )
        one.set_yticklabels(map(plain, down), rotation=0)
        one.set_xticklabels(_in_lines(across, (width - 2) / len(across)), rotation=0)
    return figure


def parameter_lines(
    frame: pd.DataFrame,
    parameter: str,
    title: str = "",
    *,
    label: str | None = None,
    series: str = "defence",
    panel: str | None = "threat",
    values: Mapping[str, str] | None = None,
    rule: str | None = None,
    log: bool = False,
) -> Figure:
    """Lines over a parameter with their 95 % intervals: a panel an attack, a colour and a marker a
    defence.

    Args:
        frame: of an ``Evaluation`` or an ablation, with a column ``parameter``: numbers, or names (in their
            order). Rows that share a value are points of their own; the line joins their means.
        label: of the horizontal axis, with its unit.
        series, panel: the columns that are told apart by colour and by panel; None: one panel.
        values: columns that are shown, a panel each, with their label, as in ``attack_heatmap``.
        rule: which decision rule is drawn; None: the first in the frame.
        log: a logarithmic horizontal axis.

    Raises:
        ValueError: for an empty frame. KeyError: for a missing column.
    """
    values = {"accuracy": ACCURACY} if values is None else dict(values)
    frame = read_frame(frame, panel, rule=rule)
    names = list(dict.fromkeys(frame[series]))
    colours = colours_of(names) if series == "defence" else dict(zip(names, cycle(SERIES), strict=False))
    shown = _parts(frame, panel, values)
    figure, axes = panels(len(shown), 2.9, 2.8, title)
    for one, (heading, part, value) in zip(axes, shown, strict=True):
        for name, points in part.groupby(series, sort=False):
            # the first is the largest, unless its points are so many that they would cover each other
            above = (1 - names.index(name) / len(names)) * min(1, 4 / len(points))
            one.errorbar(
                points[parameter],
                points[value],
                error_bars(points, value),
                fmt=MARKERS[names.index(name) % len(MARKERS)],
                color=colours[name],
                label=plain(name),
                markersize=4 + 6 * above,
                markerfacecolor="none",
                markeredgewidth=1.5,
                elinewidth=1 + above,
                capsize=1 + 4 * above,
            )
            sort = pd.api.types.is_numeric_dtype(points[parameter])
            means = points.groupby(parameter, sort=sort)[value].mean()
            one.plot(means.index, means, color=colours[name])
        style_axes(
            one,
            xlabel=plain(label or parameter.replace("_", " ")),
            ylabel=values[value],
            ylim=(-3, 103) if "(%)" in values[value] else (0, None),
        )
        one.set_title(plain(heading), loc="left", fontsize=10)
        if log:
            one.set_xscale("log")
            ticks = sorted(set(part[parameter]))
            one.set_xticks(ticks, map("{:g}".format, ticks))
            one.minorticks_off()
    legend_below(figure)
    return figure


def accuracy_over_eps(frame: pd.DataFrame, title: str = "", *, rule: str | None = None) -> Figure:
    """Accuracy in percent over the radius eps, a panel an attack and norm, a colour a defence; eps 0 is
    ``clean``.

    Args:
        frame: of an ``Evaluation`` with several eps: columns ``defence``, ``attack``, ``norm``, ``eps``,
            ``accuracy``, ``low``, ``high`` (percent).

    Raises:
        ValueError: as ``parameter_lines``.
    """
    frame = read_frame(frame, rule=rule)
    attacked = frame[frame["attack"] != "clean"].assign(norm=lambda rows: rows["norm"].replace(NORMS))
    parts = []
    for (attack, norm), part in attacked.groupby(["attack", "norm"], sort=False):
        clean = frame[(frame["attack"] == "clean") & frame["defence"].isin(part["defence"])].assign(eps=0.0)
        parts.append(pd.concat([clean, part]).assign(curve=f"{attack}, {norm}"))
    return parameter_lines(pd.concat(parts), "eps", title, label="ε, images in [0, 1]", panel="curve")


def training_curves(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """One panel a quantity over the epochs, its last value at the top right.

    Args:
        history: one mapping an epoch, as ``training.fit`` returns it. ``epoch`` is the horizontal axis (1, 2,
            ... without it); every other number gets a panel, but ``seconds``, which tell of the machine. A
            quantity may be missing in some epochs (a term in its warm-up). Names with ``accuracy`` are shares
            in [0, 1], shown in percent.
    """
    frame = pd.DataFrame(list(history))
    curves = (
        frame.drop(columns=["epoch", "seconds"], errors="ignore")
        .select_dtypes("number")
        .dropna(axis=1, how="all")
    )
    epochs = frame.get("epoch", frame.index + 1)
    figure, axes = panels(curves.shape[1], 2.9, 2.3, title)
    for one, name in zip(axes, curves, strict=True):
        percent, words = "accuracy" in name, name.replace("_", " ")
        values = 100 * curves[name] if percent else curves[name]
        one.plot(epochs, values, color=SERIES[0], marker="o" if len(epochs) <= 40 else "", markersize=4)
        one.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        unit = "accuracy (%)" if percent else QUANTITIES.get(name.removeprefix("test_"), words)
        style_axes(one, xlabel="epoch", ylabel=plain(unit), xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
        one.set_title(plain(words), loc="left", fontsize=10)
        last = values.dropna().iloc[-1]
        one.set_title(
            f"{last:.1f} %" if percent else f"{last:.4g}".replace("-", MINUS), loc="right", fontsize=9
        )
    return figure


def _parts(
    frame: pd.DataFrame, panel: str | None, values: Mapping[str, str]
) -> list[tuple[str, pd.DataFrame, str]]:
    """What each axes shows: the value of ``panel``, its rows, and the column whose numbers are drawn."""
    return [
        (heading, part, value)
        for heading, part in (frame.groupby(panel, sort=False) if panel else [("", frame)])
        for value in values
    ]


def _in_lines(names: Sequence, inches: float) -> list[str]:
    """Labels broken between words, so that they fit beside each other."""
    return [textwrap.fill(plain(name), max(8, int(15 * inches)), break_long_words=False) for name in names]


def _ordered(values: pd.Series) -> list:
    """Each value once: numbers ascending, others in the order in which they come."""
    return list(pd.unique(values.sort_values() if pd.api.types.is_numeric_dtype(values) else values))


def _cell_text(row: pd.Series, value: str) -> str:
    low, high = interval_of(value)
    number = f"{row[value]:.1f}".replace("nan", "–")
    return f"{number}\n[{row[low]:.0f}, {row[high]:.0f}]" if pd.notna(row.get(low)) else number
