"""What attack, transform and purifier do to images: the pictures themselves, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from atoplib.drawing import FONT, INK, MINUS, RIGHT, RIGHT_COLOUR, TEXT, WRONG, WRONG_COLOUR, fit
from atoplib.figures.image_grid import Grid, colour_bar, heading, image_grid, row_name, show_change, show_image

PROBABILITY_COLUMNS = ("clean", "adversarial", "purified")


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
    grid = Grid(
        rows=batch,
        columns=len(headings),
        height=height,
        width=width,
        left=40 if labels is not None else 14,
        below=68 if predictions else 8,
        bottom=134,
        head=58,
    )
    figure, axes = image_grid(grid, title)
    maps = {}
    for column, (name, explanation) in enumerate(headings.items()):
        heading(axes[0][column], grid, name, explanation)
        for row in range(batch):
            if name in changes:
                maps[name] = show_change(axes[row][column], shown_changes[name][row], scales[name])
            else:
                show_image(axes[row][column], getattr(stages, name)[row])
            if name in predictions:
                truth = None if labels is None else int(labels[row])
                _write_prediction(axes[row][column], grid, predictions[name][row], truth, classes)
        if name in changes:
            beyond = float(shown_changes[name].abs().max()) > scales[name] * (1 + 1e-3)
            colour_bar(figure, grid, column, maps[name], scales[name], float(changes[name].abs().max()), beyond)
    if labels is not None:
        for row in range(batch):
            row_name(axes[row][0], grid, _class_name(int(labels[row]), classes))
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
    grid = Grid(rows=batch, columns=len(columns), height=height, width=width, left=14, below=8, bottom=6, head=58)
    figure, axes = image_grid(grid, title)
    for column, (name, shown) in enumerate(columns.items()):
        heading(axes[0][column], grid, name)
        for row in range(batch):
            show_image(axes[row][column], shown[row])
    return figure


def _write_prediction(
    axes: Axes, grid: Grid, probabilities: Tensor, truth: int | None, classes: Sequence[str] | None
) -> None:
    """Mark and predicted class, its probability below; the mark tells right from wrong without colour."""
    predicted = int(probabilities.argmax())
    right = truth == predicted
    mark = "" if truth is None else f"{RIGHT if right else WRONG} "
    colour = INK if truth is None else RIGHT_COLOUR if right else WRONG_COLOUR
    name = fit(mark + _class_name(predicted, classes), grid.room, TEXT)
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


def _class_name(index: int, classes: Sequence[str] | None) -> str:
    return str(index) if classes is None else str(classes[index])


def _scale(change: Tensor) -> float:
    """The largest magnitude in units of 1/255; 1 where nothing changed, as a map needs a range."""
    largest = float(change.abs().max())
    return largest if largest > 1e-3 else 1.0
