"""Pictures of what attack and purifier do to images, training curves, accuracies, and certificates beside attacks.

Every function returns a ``matplotlib.figure.Figure`` of its own: pyplot does not know it and no global setting is
changed, so that a widget's thread may draw. Sizes and colours are explicit arguments: a figure looks the same whatever
style a notebook has set. A notebook shows it once ``%matplotlib inline`` was run; ``save_figure`` writes it.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import ceil, isfinite, nan
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import LoadFlags
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from atoplib.checkpoints import write_atomically

DPI = 160
IMAGE_PIXELS = 256  # of the figure, for the longer side of an image: a whole multiple of the image's own pixels near it
FONT = "DejaVu Sans"  # comes with matplotlib and has the marks
TITLE, TEXT, SMALL = 12.0, 10.0, 9.0  # points
INK, FAINT = "#1a1a1a", "#595959"
RIGHT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"
MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
DIVERGING = "RdBu_r"  # white at 0, blue below, red above: apart for colour-blind eyes, too
MOST_MARKED_POINTS = 40  # a longer curve is a line without markers
PROBABILITY_COLUMNS = ("clean", "adversarial", "purified")
QUANTITIES = {  # label of a panel's axis; other names stand as they are
    "reconstruction": "mean absolute difference",
    "classification": "cross-entropy (nats)",
    "gan": "generator's GAN loss",
    "discriminator": "discriminator's GAN loss",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "seconds": "seconds since the start",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True)
class PurificationStages:
    """The same images on their way through the defence, each (batch, 3, height, width) with values in [0, 1].

    Attributes:
        clean, adversarial: before and after the attack.
        transformed: what the purifier reads of the attacked images, RGB mapped to [0, 1] (of RT3, one of its copies).
        purified: what the purifier makes of the attacked images.

    Raises:
        ValueError: for an empty batch, another shape, values outside [0, 1] or NaN.
    """

    clean: Tensor  # hinted without shapes: __post_init__ checks them, with a sentence
    adversarial: Tensor
    transformed: Tensor
    purified: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_images(field.name, getattr(self, field.name), like=self.clean)


def purification_rows(
    stages: PurificationStages | Mapping[str, Tensor],
    *,
    labels: Int[Tensor, " batch"] | None = None,
    predictions: Mapping[str, Float[Tensor, "batch classes"]] | None = None,
    classes: Sequence[str] | None = None,
    eps: float | None = None,
    title: str = "",
) -> Figure:
    """One row an image: clean, adversarial, perturbation, transformed, purified, residual.

    Perturbation (adversarial - clean) and residual (purified - clean) show, at each pixel, the signed mean over the
    channels: brighter is red, darker is blue. (The channel that changed most would be a matter of rounding where an
    l_inf attack moves all three by eps.) Both maps are symmetric about 0 (white), with one scale for all rows, printed
    below the column with a colour bar in units of 1/255. Opposite changes cancel in the mean, so the largest change of
    a single channel is printed, too. Arrows at the ends of a bar say that some pixels lie beyond its scale.

    Args:
        stages: images in [0, 1]; a mapping holds the four names of ``PurificationStages``.
        labels: true classes: named at the left, and the predictions get a mark.
        predictions: class probabilities of some of the columns ``clean``, ``adversarial`` and ``purified``.
        classes: name of each class; its number if None.
        eps: of an l_inf attack, images in [0, 1]: the scale of the perturbation. If None, the largest value of the map,
            as it always is for the residual.
        title: above the figure.

    Raises:
        ValueError: for images, labels, predictions, classes or eps that do not fit each other or their ranges.
    """
    if not isinstance(stages, PurificationStages):
        stages = _stages_from(stages)
    batch, _, height, width = stages.clean.shape
    predictions = predictions or {}
    _check_predictions(predictions, labels, classes, batch)
    if eps is not None and not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], images lie in [0, 1], got {eps}: give None for the largest change")
    changes = {
        "perturbation": 255 * (stages.adversarial.detach().float() - stages.clean.detach().float()),
        "residual": 255 * (stages.purified.detach().float() - stages.clean.detach().float()),
    }
    shown_changes = {name: change.mean(dim=1) for name, change in changes.items()}
    scales = {name: _scale(change) for name, change in shown_changes.items()}
    if eps is not None:
        scales["perturbation"] = 255 * eps
    headings = {
        "clean": "",
        "adversarial": "",
        "perturbation": f"adversarial {MINUS} clean",
        "transformed": "what the purifier reads",
        "purified": "of the adversarial image",
        "residual": f"purified {MINUS} clean",
    }
    grid = _Grid(
        rows=batch,
        columns=len(headings),
        height=height,
        width=width,
        left=40 if labels is not None else 14,
        below=68 if predictions else 8,
        bottom=134,
        head=58,
    )
    figure, axes = _image_grid(grid, title)
    maps = {}
    for column, (name, explanation) in enumerate(headings.items()):
        _heading(axes[0][column], grid, name, explanation)
        for row in range(batch):
            if name in changes:
                maps[name] = _show_change(axes[row][column], shown_changes[name][row], scales[name])
            else:
                _show_image(axes[row][column], getattr(stages, name)[row])
            if name in predictions:
                truth = None if labels is None else int(labels[row])
                _write_prediction(axes[row][column], grid, predictions[name][row], truth, classes)
        if name in changes:
            beyond = float(shown_changes[name].abs().max()) > scales[name] * (1 + 1e-3)
            _colour_bar(figure, grid, column, maps[name], scales[name], float(changes[name].abs().max()), beyond)
    if labels is not None:
        for row in range(batch):
            _row_name(axes[row][0], grid, _class_name(int(labels[row]), classes))
    return figure


def masks_and_inputs(
    images: Float[Tensor, "batch 3 height width"],
    transformed_by_name: Mapping[str, Float[Tensor, "batch 3 height width"]],
    *,
    title: str = "",
) -> Figure:
    """What each random transform hands on to the purifier: one row an image, the input first, then a column a name.

    Args:
        images: in [0, 1].
        transformed_by_name: by the column's heading, in [0, 1] (a missing pixel is 0.5); RT3's N masked copies are N
            entries.
        title: above the figure.

    Raises:
        ValueError: without an entry, for an empty batch, for shapes that differ, values outside [0, 1] or NaN.
    """
    _check_images("images", images, like=images)
    if not transformed_by_name:
        raise ValueError("transformed_by_name is empty: give at least one entry, such as {'RT1': images}")
    for name, transformed in transformed_by_name.items():
        _check_images(name, transformed, like=images)
    columns = {"input": images, **{str(name): shown for name, shown in transformed_by_name.items()}}
    batch, _, height, width = images.shape
    grid = _Grid(rows=batch, columns=len(columns), height=height, width=width, left=14, below=8, bottom=6, head=58)
    figure, axes = _image_grid(grid, title)
    for column, (name, shown) in enumerate(columns.items()):
        _heading(axes[0][column], grid, name)
        for row in range(batch):
            _show_image(axes[row][column], shown[row])
    return figure


def training_curves(history: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """One panel a quantity over the epochs, its last value at the top right.

    Args:
        history: one mapping an epoch, as ``training`` returns it. ``epoch`` is the horizontal axis (1, 2, ... without
            it); every other number gets a panel. A quantity may be missing in some epochs (a term in its warm-up).
            Names with ``accuracy`` are shares in [0, 1], shown in %.
        title: above the figure.

    Raises:
        ValueError: if there is no epoch, or no number beside ``epoch``.
    """
    if not history:
        raise ValueError("history is empty: train at least one epoch, then draw its curves")
    epochs = [float(entry.get("epoch", position)) for position, entry in enumerate(history, start=1)]
    names = dict.fromkeys(name for entry in history for name in entry if name != "epoch" and _is_number(entry[name]))
    if not names:
        raise ValueError("history holds no number beside 'epoch': give entries such as {'epoch': 1, 'loss': 0.5}")
    span = max(epochs) - min(epochs)
    margin = 0.05 * span or 0.5 * max(epochs) or 0.5
    columns = min(3, len(names))
    rows = ceil(len(names) / columns)
    figure = _figure(max(3.4 * columns, 4.2), 2.6 * rows + (0.4 if title else 0.0), layout="constrained")
    colour = _palette()[0]
    whole = all(epoch.is_integer() for epoch in epochs)
    for position, name in enumerate(names, start=1):
        factor = 100 if "accuracy" in name else 1
        values = [factor * float(entry[name]) if _is_number(entry.get(name)) else nan for entry in history]
        points = sum(isfinite(value) for value in values)
        axes = figure.add_subplot(rows, columns, position, facecolor="white")
        axes.plot(
            epochs,
            values,
            color=colour,
            linewidth=1.8,
            linestyle="-",
            marker="o" if points <= MOST_MARKED_POINTS else "",
            markersize=4.5,
        )
        _style_axes(axes)
        axes.grid(True, color="#e0e0e0", linewidth=0.7)
        axes.set_xlim(min(epochs) - margin, max(epochs) + margin)  # one axis for all, whenever a quantity begins
        if span:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
        else:
            axes.set_xticks(epochs[:1], [f"{epochs[0]:.4g}"])
        axes.set_xlabel("epoch", fontsize=SMALL, color=INK, family=FONT)
        axes.set_ylabel(_quantity_label(name), fontsize=SMALL, color=INK, family=FONT)
        last = [value for value in values if isfinite(value)][-1]
        value = f"{last:.1f} %" if factor == 100 else f"{last:.4g}".replace("-", MINUS)
        room = 2.1 * 72 - _text_width(value, SMALL)
        axes.set_title(_fit(name.replace("_", " "), room, TEXT), loc="left", fontsize=TEXT, color=INK, family=FONT)
        axes.set_title(value, loc="right", fontsize=SMALL, color=FAINT, family=FONT)
    if title:
        _write_suptitle(figure, title)
    return figure


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
    content = _read_table(table)
    defences, attacks = content.defences, content.attacks
    group = 0.46 * len(defences) + 0.4  # inches
    a_row = min(len(attacks), max(1, int(10 / group)))
    rows = ceil(len(attacks) / a_row)
    width = max(4.5, 1.0 + group * a_row)
    figure = _figure(width, 3.4 * rows + 0.5 + (0.4 if title else 0.0), layout="constrained")
    colours = _colours_of(defences)
    bar = 0.46 / group  # share of a group, whose place is 1 wide
    handles = {}
    for row in range(rows):
        axes = figure.add_subplot(rows, 1, row + 1, facecolor="white")
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
                    fontsize=SMALL,
                    color=INK,
                    family=FONT,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],  # the line of chance may pass behind it
                )
        if chance is not None:
            handles[f"chance, {100 * chance:.3g} %"] = axes.axhline(
                100 * chance, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.9
            )
        _style_axes(axes)
        axes.set_axisbelow(True)
        axes.yaxis.grid(True, color="#e0e0e0", linewidth=0.7)
        half = (width - 1.0) / group / 2  # the same width of bars in every figure, however few there are
        axes.set_xlim((a_row - 1) / 2 - half, (a_row - 1) / 2 + half)
        axes.set_ylim(0, 112)  # room for the number above a bar of 100 %
        axes.set_yticks(range(0, 101, 20))
        axes.set_xticks(range(len(shown)), [_wrap(attack, 72 * group, TEXT) for attack in shown])
        axes.tick_params(axis="x", length=0, labelsize=TEXT)
        axes.set_ylabel("accuracy (%), 95 % interval", fontsize=SMALL, color=INK, family=FONT)
    widest = max(_text_width(name, SMALL) for name in handles) + 40  # points, with its colour patch
    lines = ceil(len(handles) / max(1, int(72 * width / widest)))
    figure.legend(
        handles=list(handles.values()),
        labels=[_wrap(name, 72 * width - 50, SMALL) for name in handles],
        loc="outside lower center",
        ncols=ceil(len(handles) / lines),
        frameon=False,
        prop=FontProperties(family=FONT, size=SMALL),
        labelcolor=INK,
    )
    if title:
        _write_suptitle(figure, title)
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
    numeric = all(_is_number(point["value"]) for point in points)
    names = list(dict.fromkeys(str(point["value"]) for point in points))
    columns = min(3, len(attacks))
    figure = _figure(max(4.2, 3.4 * columns), 3.0 * ceil(len(attacks) / columns) + 0.8, layout="constrained")
    colours = _colours_of(defences)
    values = [point["value"] for point in points] if numeric else [0, 10]
    beside = 0.012 * ((max(values) - min(values)) or 1)  # so that defences of equal accuracy do not hide each other
    for position, attack in enumerate(attacks, start=1):
        axes = figure.add_subplot(ceil(len(attacks) / columns), columns, position, facecolor="white")
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
        _style_axes(axes)
        axes.set_ylim(-3, 103)
        axes.grid(True, color="#e0e0e0", linewidth=0.7)
        if not numeric:
            slanted = {} if len(names) <= 3 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(range(len(names)), [_fit(text, 90, SMALL) for text in names], **slanted)
            axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(_fit(name, 220, SMALL), fontsize=SMALL, color=INK, family=FONT)
        axes.set_ylabel("accuracy (%), 95 % interval", fontsize=SMALL, color=INK, family=FONT)
        axes.set_title(attack, loc="left", fontsize=TEXT, color=INK, family=FONT)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles=handles,
        labels=labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        prop=FontProperties(family=FONT, size=SMALL),
        labelcolor=INK,
    )
    if title:
        _write_suptitle(figure, title)
    return figure


def certified_and_attacked(
    certified: Iterable[Any],
    attacked: Iterable[Any],
    *,
    clean: Any | None = None,
    title: str = "",
) -> Figure:
    """What is proved and what is broken: certified accuracy below, accuracy under attack above, the gap between shaded.

    The accuracy against every perturbation of an l2 norm lies in the shaded gap: no lower than certified, no higher than
    the strongest attack leaves it. Both bounds are steps, drawn no better than they are known: a certificate holds for all
    smaller radii, an attack for all larger ones. Both belong to the same images and to the same verdict, the majority vote.

    Args:
        certified: mappings or objects (such as ``certification.CertifiedPoint``) with ``radius`` (l2, in units of images
            in [0, 1], at least 0), ``accuracy``, ``low`` and ``high`` (shares in [0, 1]).
        attacked: the same with ``eps`` instead of ``radius``, above 0, and ``attack``, its name.
        clean: one with ``accuracy``, ``low`` and ``high``: the upper bound at radius 0.
        title: above the figure.

    Raises:
        ValueError: without a point in either, for a missing entry, a radius below 0, numbers that violate
            0 <= low <= accuracy <= high <= 1, or a certified interval above an attacked one, which no noise explains.
    """
    lower = sorted(_read_points(certified, "radius"), key=lambda point: point.radius)
    upper = _read_points(attacked, "eps")
    start = [] if clean is None else _read_points([clean], None)
    _check_bounds(lower, start + upper)
    end = max(point.radius for point in lower + upper) * 1.04 or 1.0
    figure = _figure(6.4, 4.2 + (0.4 if title else 0.0), layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    palette = _palette()
    radii = [point.radius for point in lower]
    columns = [[100 * getattr(point, name) for point in lower] for name in _Cell._fields]
    known = sorted({0.0, end, *radii, *(point.radius for point in upper)})
    certified_at = [_bound_at(radius, lower, below=True) for radius in known]
    attacked_at = [_bound_at(radius, start + upper, below=False) for radius in known]
    # between two known radii: what is certified at the right end, what an attack broke at the left end
    axes.fill_between(
        [radius for pair in zip(known, known[1:], strict=False) for radius in pair],
        [value for value in certified_at[1:] for _ in range(2)],
        [value for value in attacked_at[:-1] for _ in range(2)],
        color="#bdbdbd",
        alpha=0.4,
        linewidth=0,
        label="not known: neither proved nor broken",
    )
    accuracy, low, high = columns
    axes.fill_between(radii, low, high, step="pre", color=palette[0], alpha=0.25, linewidth=0)
    axes.plot(
        [0.0, *radii],
        [accuracy[0], *accuracy],
        drawstyle="steps-pre",
        color=palette[0],
        linewidth=1.8,
        label="certified: lower bound",
    )
    axes.plot(
        known, attacked_at, drawstyle="steps-post", color=palette[2], linewidth=1.8, label="strongest attack: upper bound"
    )
    names = dict.fromkeys(point.name for point in upper)
    series = [("clean", start, "D"), *((name, [p for p in upper if p.name == name], None) for name in names)]
    for number, (name, points, marker) in enumerate(series):
        if not points:
            continue
        axes.errorbar(
            [point.radius for point in points],
            [100 * point.accuracy for point in points],
            yerr=[
                [100 * max(0.0, point.accuracy - point.low) for point in points],
                [100 * max(0.0, point.high - point.accuracy) for point in points],
            ],
            fmt=marker or "os^vP*X<>"[(number - 1) % 9],
            color=INK if name == "clean" else palette[2],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            ecolor=INK,
            elinewidth=1.0,
            capsize=3.0,
            label=name,
            zorder=3,
            clip_on=False,
        )
    _style_axes(axes)
    axes.set_axisbelow(True)
    axes.grid(True, color="#e0e0e0", linewidth=0.7)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.set_xlabel("l2 norm of the perturbation, images in [0, 1]", fontsize=SMALL, color=INK, family=FONT)
    axes.set_ylabel("accuracy of the majority vote (%), 95 % interval", fontsize=SMALL, color=INK, family=FONT)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles=handles,
        labels=[_wrap(label, 72 * 6.4 / 2 - 50, SMALL) for label in labels],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        prop=FontProperties(family=FONT, size=SMALL),
        labelcolor=INK,
    )
    if title:
        _write_suptitle(figure, title)
    return figure


def format_table(table: Iterable[Any]) -> str:
    """A Markdown table, readable as plain text: rows defences, columns attacks, cells ``97.2 [95.1, 98.4]`` in %.

    ``table`` and errors are those of ``accuracy_bars``; a missing combination is a dash.
    """
    content = _read_table(table)
    lines = [["% [95 % interval]", *content.attacks]]
    for defence in content.defences:
        cells = [content.cells.get((defence, attack)) for attack in content.attacks]
        lines.append([defence, *(MISSING if cell is None else cell.text() for cell in cells)])
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


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


class _Cell(NamedTuple):
    """An accuracy and its interval, shares in [0, 1]."""

    accuracy: float
    low: float
    high: float

    def text(self) -> str:
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class _Table(NamedTuple):
    """Names in their order of appearance, cells by (defence, attack)."""

    defences: list[str]
    attacks: list[str]
    cells: dict[tuple[str, str], _Cell]


def _read_table(table: Iterable[Any]) -> _Table:
    cells: dict[tuple[str, str], _Cell] = {}
    for entry in table:
        defence, attack = str(_entry_value(entry, "defence")), str(_entry_value(entry, "attack"))
        cell = _Cell(*(float(_entry_value(entry, name)) for name in _Cell._fields))
        _check_cell(cell, f"{defence!r} under {attack!r}")
        if (defence, attack) in cells:
            raise ValueError(f"the table holds {defence!r} under {attack!r} twice: give each combination once")
        cells[defence, attack] = cell
    if not cells:
        raise ValueError("the table is empty: give at least one entry with defence, attack, accuracy, low and high")
    defences, attacks = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    return _Table(defences, attacks, cells)


def _check_cell(cell: _Cell, where: str) -> None:
    slack = 1e-6  # an interval computed in floating point may miss its own end by a rounding error
    if not -slack <= cell.low <= cell.accuracy + slack <= cell.high + 2 * slack <= 1 + 3 * slack:
        raise ValueError(
            f"{where} has low {cell.low}, accuracy {cell.accuracy}, high {cell.high}: "
            f"0 <= low <= accuracy <= high <= 1 must hold (shares, not per cent)"
        )


def _entry_value(entry: Any, name: str, needed: Sequence[str] = ("defence", "attack", *_Cell._fields)) -> Any:
    if isinstance(entry, Mapping) and name in entry:
        return entry[name]
    if not isinstance(entry, Mapping) and hasattr(entry, name):
        return getattr(entry, name)
    raise ValueError(f"a table entry lacks {name!r}: each needs {', '.join(needed)}, got {entry!r}")


class _Point(NamedTuple):
    """An accuracy and its interval, shares in [0, 1], at an l2 radius."""

    radius: float
    name: str
    accuracy: float
    low: float
    high: float


def _read_points(entries: Iterable[Any], size: str | None) -> list[_Point]:
    """Points of a curve; ``size`` names the entry that holds the radius, None: they stand at 0."""
    points = []
    for entry in entries:
        radius = 0.0 if size is None else float(_entry_value(entry, size, (size, *_Cell._fields)))
        name = str(_entry_value(entry, "attack", ("eps", "attack", *_Cell._fields))) if size == "eps" else ""
        cell = _Cell(*(float(_entry_value(entry, field, _Cell._fields)) for field in _Cell._fields))
        if not 0 <= radius < float("inf") or (size == "eps" and radius == 0):
            raise ValueError(f"{size} must be {'above' if size == 'eps' else 'at least'} 0 (an l2 norm), got {radius}")
        _check_cell(cell, f"{name or 'a point'!r} at radius {radius:g}")
        points.append(_Point(radius, name, *cell))
    if not points:
        raise ValueError(f"no {'certified' if size == 'radius' else 'attacked'} point is given: give at least one")
    return points


def _check_bounds(lower: Sequence[_Point], upper: Sequence[_Point]) -> None:
    for proved in lower:
        for broken in upper:
            if broken.radius <= proved.radius and proved.low > broken.high:
                raise ValueError(
                    f"certified are {100 * proved.accuracy:.1f} % at radius {proved.radius:g}, yet "
                    f"{broken.name or 'the clean accuracy'} leaves {100 * broken.accuracy:.1f} % at {broken.radius:g}: "
                    f"both must be of the same model, images and verdict"
                )


def _bound_at(radius: float, points: Sequence[_Point], *, below: bool) -> float:
    """In %: the best that is certified at ``radius`` or beyond, or the least that an attack left up to ``radius``."""
    if below:
        return max((100 * point.accuracy for point in points if point.radius >= radius), default=0.0)
    return min((100 * point.accuracy for point in points if point.radius <= radius), default=100.0)


def _stages_from(images: Mapping[str, Tensor]) -> PurificationStages:
    names = [field.name for field in fields(PurificationStages)]
    if set(images) != set(names):
        raise ValueError(f"stages must hold exactly {', '.join(names)}, got {', '.join(map(str, images)) or 'nothing'}")
    return PurificationStages(**images)


def _check_images(name: str, images: Any, *, like: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must be a tensor (batch, 3, height, width), got {shape}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must hold floating-point values in [0, 1], got {images.dtype}: use data.to_float")
    if images.numel() == 0:
        raise ValueError(f"{name} holds no image, its shape is {tuple(images.shape)}: give at least one")
    if images.shape != like.shape:
        raise ValueError(
            f"{name} has the shape {tuple(images.shape)}, the first images have {tuple(like.shape)}: "
            f"give the same images, in the same size, for every column"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails, too
        raise ValueError(f"{name} must lie in [0, 1], its values lie in [{low:g}, {high:g}]: map it there first")


def _check_predictions(
    predictions: Mapping[str, Tensor], labels: Tensor | None, classes: Sequence[str] | None, batch: int
) -> None:
    for name, probabilities in predictions.items():
        if name not in PROBABILITY_COLUMNS:
            raise ValueError(f"predictions has the key {name!r}; allowed: {', '.join(PROBABILITY_COLUMNS)}")
        if probabilities.ndim != 2 or probabilities.shape[0] != batch or probabilities.shape[1] == 0:
            raise ValueError(
                f"predictions[{name!r}] must have the shape (batch, classes) with batch {batch}, "
                f"got {tuple(probabilities.shape)}"
            )
        sums = probabilities.detach().float().sum(dim=1)
        if not (float(probabilities.min()) >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=0.02)):
            raise ValueError(f"predictions[{name!r}] must hold probabilities that sum to 1: give logits.softmax(dim=1)")
        if classes is not None and probabilities.shape[1] != len(classes):
            raise ValueError(
                f"predictions[{name!r}] holds {probabilities.shape[1]} classes, but classes names {len(classes)}"
            )
    if labels is None:
        return
    if labels.shape != (batch,):
        raise ValueError(f"labels must have the shape ({batch},), one for each image, got {tuple(labels.shape)}")
    counts = [probabilities.shape[1] for probabilities in predictions.values()]
    count = min(counts if classes is None else [len(classes), *counts], default=None)
    if int(labels.min()) < 0 or (count is not None and int(labels.max()) >= count):
        limit = "0 or more" if count is None else f"in 0..{count - 1}"
        raise ValueError(f"labels must lie {limit}, got {sorted(set(labels.tolist()))}")


def _palette() -> list[str]:
    """seaborn's colour-blind palette as matplotlib ships it: without seaborn's three seconds of import."""
    return [entry["color"] for entry in style.library["seaborn-v0_8-colorblind"]["axes.prop_cycle"]]


def _colours_of(defences: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A colour for each defence, the same in every figure that shows them in this order."""
    import seaborn  # here, because no other figure needs its three seconds

    return dict(zip(defences, seaborn.color_palette("colorblind", len(defences)), strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _class_name(index: int, classes: Sequence[str] | None) -> str:
    return str(index) if classes is None else str(classes[index])


def _quantity_label(name: str) -> str:
    if "accuracy" in name:
        return "accuracy (%)"
    return QUANTITIES.get(name, QUANTITIES.get(name.removeprefix("test_"), name.replace("_", " ")))


def _scale(change: Tensor) -> float:
    """The largest magnitude in units of 1/255; 1 where nothing changed, as a map needs a range."""
    largest = float(change.abs().max())
    return largest if largest > 1e-3 else 1.0


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value >= 1 else f"{value:.2g}"


def _text_width(text: str, size: float) -> float:
    """In points, with some reserve: on screen the letters stand on whole pixels and the line gets longer."""
    return 1.04 * size * sum(map(_advance, text))


@cache
def _advance(character: str) -> float:
    """Width of a character of the font at 1 point."""
    font = get_font(findfont(FontProperties(family=FONT)))
    font.set_size(100, 72)
    return font.load_char(ord(character), LoadFlags.NO_HINTING).linearHoriAdvance / 65536 / 100


def _fit(text: str, room: float, size: float) -> str:
    """The text, its end replaced by an ellipsis where it is wider than ``room`` points."""
    if _text_width(text, size) <= room:
        return text
    kept = text
    while len(kept) > 1 and _text_width(kept + "…", size) > room:
        kept = kept[:-1].rstrip()
    return kept + "…"


def _wrap(text: str, room: float, size: float) -> str:
    """The text in lines of at most ``room`` points; a word that is wider is broken."""
    width = _text_width(text, size)
    if width <= room or not text:
        return text
    for characters in range(min(len(text), ceil(1.2 * len(text) * room / width)), 1, -1):
        lines = textwrap.wrap(text, characters)
        if all(_text_width(line, size) <= room for line in lines):
            return "\n".join(lines)
    return text


def _figure(width: float, height: float, *, layout: str) -> Figure:
    """Width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09, wspace=0.03, hspace=0.03)  # the first two in inches
    return figure


def _write_suptitle(figure: Figure, title: str) -> None:
    text = _wrap(title, 72 * figure.get_figwidth() - 16, TITLE)
    figure.suptitle(text, fontsize=TITLE, fontweight="normal", color=INK, family=FONT)


def _style_axes(axes: Axes) -> None:
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=SMALL, labelfontfamily=FONT, bottom=True, left=True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
        spine.set_linewidth(0.8)


@dataclass(frozen=True)
class _Grid:
    """A grid of images of (height, width) px, laid out in the figure's pixels: an image's pixel is a square of them.

    Attributes:
        left, bottom: margins beside and below the images.
        below: room under each image, for its text.
        head: room above the first row, for the headings.
    """

    rows: int
    columns: int
    height: int
    width: int
    left: int
    below: int
    bottom: int
    head: int
    gap: int = 14
    margin: int = 12

    @property
    def zoom(self) -> int:
        """The figure's pixels for one of an image (both ways)."""
        return max(1, round(IMAGE_PIXELS / max(self.height, self.width)))

    @property
    def cell_width(self) -> int:
        """Of a column: the image's, or what the text below a narrow image needs."""
        return max(self.zoom * self.width, IMAGE_PIXELS - 40)

    @property
    def room(self) -> float:
        """For a line of text in a column, in points."""
        return 72 * (self.cell_width + self.gap - 6) / DPI

    @property
    def figure_width(self) -> int:
        return self.left + self.columns * (self.cell_width + self.gap) + self.margin - self.gap + 8

    @property
    def content_height(self) -> int:
        """Without the title."""
        return self.head + self.rows * (self.zoom * self.height + self.below) + self.bottom

    def x(self, column: int) -> int:
        """Left edge of an image, from the left."""
        indent = (self.cell_width - self.zoom * self.width) // 2
        return self.left + column * (self.cell_width + self.gap) + indent

    def y(self, row: int) -> int:
        """Lower edge of an image, from the bottom."""
        return self.bottom + (self.rows - 1 - row) * (self.zoom * self.height + self.below) + self.below


def _image_grid(grid: _Grid, title: str) -> tuple[Figure, list[list[Axes]]]:
    lines = _wrap(title, 72 * (grid.figure_width - 2 * grid.margin) / DPI, TITLE)
    width = grid.figure_width
    height = grid.content_height + ((lines.count("\n") + 1) * 34 + 12 if title else 0)
    # A hair more than whole pixels: matplotlib cuts the fraction off, and width / DPI * DPI may fall short of width.
    figure = _figure((width + 0.01) / DPI, (height + 0.01) / DPI, layout="none")
    if title:
        figure.text(
            0.5, 1 - 10 / height, lines, ha="center", va="top", fontsize=TITLE, color=INK, family=FONT, linespacing=1.25
        )
    axes = [
        [
            figure.add_axes(
                (
                    grid.x(column) / width,
                    grid.y(row) / height,
                    grid.zoom * grid.width / width,
                    grid.zoom * grid.height / height,
                ),
                facecolor="white",
            )
            for column in range(grid.columns)
        ]
        for row in range(grid.rows)
    ]
    for one in (one for line in axes for one in line):
        one.set_xticks([])
        one.set_yticks([])
        for spine in one.spines.values():
            spine.set_visible(True)
            spine.set_color("#8c8c8c")
            spine.set_linewidth(0.6)
    return figure, axes


def _show_image(axes: Axes, image: Tensor) -> None:
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axes.imshow(pixels, interpolation="nearest", origin="upper", aspect="auto")


def _show_change(axes: Axes, change: Tensor, scale: float) -> AxesImage:
    pixels = change.cpu().numpy()
    return axes.imshow(
        pixels, cmap=DIVERGING, vmin=-scale, vmax=scale, interpolation="nearest", origin="upper", aspect="auto"
    )


def _heading(axes: Axes, grid: _Grid, name: str, explanation: str = "") -> None:
    """A name above the first image of a column, and a fainter line below the name."""
    faint = _fit(explanation, grid.room, SMALL)
    lines = 1 if explanation else 2
    wrapped = _wrap(name, grid.room, TEXT).split("\n")
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], _fit(" ".join(wrapped[lines - 1 :]), grid.room, TEXT)]
    common = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "bottom"}
    common |= {"family": FONT, "parse_math": False}
    axes.annotate("\n".join(wrapped), (0.5, 1), xytext=(0, 14 if faint else 3), fontsize=TEXT, color=INK, **common)
    if faint:
        axes.annotate(faint, (0.5, 1), xytext=(0, 3), fontsize=SMALL, color=FAINT, **common)


def _row_name(axes: Axes, grid: _Grid, name: str) -> None:
    """The true class, upwards along the left of a row."""
    axes.annotate(
        _fit(name, 72 * (grid.zoom * grid.height + grid.below - 6) / DPI, TEXT),
        (0, 0.5),
        xytext=(-4, 0),
        xycoords="axes fraction",
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="center",
        fontsize=TEXT,
        color=INK,
        family=FONT,
        parse_math=False,
    )


def _write_prediction(
    axes: Axes, grid: _Grid, probabilities: Tensor, truth: int | None, classes: Sequence[str] | None
) -> None:
    """Mark and predicted class, its probability below; the mark tells right from wrong without colour."""
    predicted = int(probabilities.argmax())
    palette = _palette()
    right = truth == predicted
    mark = "" if truth is None else f"{RIGHT if right else WRONG} "
    colour = INK if truth is None else palette[2] if right else palette[3]
    name = _fit(mark + _class_name(predicted, classes), grid.room, TEXT)
    axes.annotate(
        f"{name}\n{100 * float(probabilities[predicted]):.1f} %",
        (0.5, 0),
        xytext=(0, -3),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=TEXT,
        color=colour,
        family=FONT,
        linespacing=1.1,
        parse_math=False,
    )


def _colour_bar(
    figure: Figure, grid: _Grid, column: int, image: AxesImage, scale: float, largest: float, beyond: bool
) -> None:
    """Under the last image of a column: the scale of a map of changes, in units of 1/255."""
    width, height = round(figure.bbox.width), round(figure.bbox.height)
    place = (grid.x(column) / width, (grid.bottom - 22) / height, grid.zoom * grid.width / width, 13 / height)
    axes = figure.add_axes(place, facecolor="white")
    bar = figure.colorbar(
        image, cax=axes, orientation="horizontal", ticks=[-scale, 0, scale], extend="both" if beyond else "neither"
    )
    number = _short(scale)
    left, _, right = bar.ax.set_xticklabels([f"{MINUS}{number}", "0", number])
    left.set_horizontalalignment("left")  # so that neither stands out of the column
    right.set_horizontalalignment("right")
    axes.tick_params(axis="x", labelsize=SMALL, labelcolor=INK, color=INK, labelfontfamily=FONT, length=3, pad=2)
    axes.grid(False)
    bar.outline.set_linewidth(0.6)
    bar.outline.set_edgecolor("#8c8c8c")
    text = f"scale ±{number}/255,\nmean over channels;\none channel: ≤ {_short(largest)}/255"
    bar.set_label(text, fontsize=SMALL, color=INK, family=FONT, labelpad=2, linespacing=1.1)
