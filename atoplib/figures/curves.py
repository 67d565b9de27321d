"""How a training went, epoch by epoch."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite, nan
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atoplib.drawing import FAINT, MINUS, SERIES, SMALL, TEXT, fit, new_figure, style_axes, text_width, words
from atoplib.figures.tables import is_number

MOST_MARKED_POINTS = 40  # a longer curve is a line without markers
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
    names = dict.fromkeys(name for entry in history for name in entry if name != "epoch" and is_number(entry[name]))
    if not names:
        raise ValueError("history holds no number beside 'epoch': give entries such as {'epoch': 1, 'loss': 0.5}")
    span = max(epochs) - min(epochs)
    margin = 0.05 * span or 0.5 * max(epochs) or 0.5
    columns = min(3, len(names))
    rows = ceil(len(names) / columns)
    figure = new_figure(max(3.4 * columns, 4.2), 2.6 * rows, title)
    whole = all(epoch.is_integer() for epoch in epochs)
    for position, name in enumerate(names, start=1):
        factor = 100 if "accuracy" in name else 1
        values = [factor * float(entry[name]) if is_number(entry.get(name)) else nan for entry in history]
        points = sum(isfinite(value) for value in values)
        axes = figure.add_subplot(rows, columns, position)
        axes.plot(
            epochs,
            values,
            color=SERIES[0],
            linewidth=1.8,
            linestyle="-",
            marker="o" if points <= MOST_MARKED_POINTS else "",
            markersize=4.5,
        )
        style_axes(axes)
        axes.set_xlim(min(epochs) - margin, max(epochs) + margin)  # one axis for all, whenever a quantity begins
        if span:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
        else:
            axes.set_xticks(epochs[:1], [f"{epochs[0]:.4g}"])
        axes.set_xlabel("epoch", **words())
        axes.set_ylabel(_quantity_label(name), **words())
        last = [value for value in values if isfinite(value)][-1]
        value = f"{last:.1f} %" if factor == 100 else f"{last:.4g}".replace("-", MINUS)
        room = 2.1 * 72 - text_width(value, SMALL)
        axes.set_title(fit(name.replace("_", " "), room, TEXT), loc="left", **words(TEXT))
        axes.set_title(value, loc="right", **words(SMALL, FAINT))
    return figure


def _quantity_label(name: str) -> str:
    if "accuracy" in name:
        return "accuracy (%)"
    return QUANTITIES.get(name, QUANTITIES.get(name.removeprefix("test_"), name.replace("_", " ")))
