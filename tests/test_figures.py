"""Figures: what stands in them, that their maps are honest, that no text is cut off, and a sentence for bad input."""

import inspect
import os
from dataclasses import dataclass, replace
from itertools import combinations
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from atoplib.drawing import DPI, RIGHT, WRONG
from atoplib.figures import (
    PurificationStages,
    accuracy_against,
    accuracy_bars,
    certified_and_attacked,
    format_table,
    masks_and_inputs,
    purification_rows,
    save_figure,
    training_curves,
)

COLUMNS = ("clean", "adversarial", "perturbation", "transformed", "purified", "residual")
IMAGENETTE = (
    "tench,English springer,cassette player,chain saw,church,French horn,garbage truck,gas pump,golf ball,parachute,"
    "a class whose name is much too long for any column"
).split(",")


def make_stages(batch: int = 3, size: int = 32, *, eps: float = 8 / 255) -> PurificationStages:
    generator = torch.Generator().manual_seed(batch * size)
    clean = 0.2 + 0.6 * torch.rand(batch, 3, size, size, generator=generator)
    sign = torch.sign(torch.randn(clean.shape, generator=generator))
    adversarial = clean + eps * sign
    return PurificationStages(clean, adversarial, (adversarial * 0.5 + 0.25).clamp(0, 1), (clean + 0.1).clamp(0, 1))


def one_hot(predicted: list[int], probability: float, classes: int) -> torch.Tensor:
    rest = (1 - probability) / (classes - 1)
    probabilities = torch.full((len(predicted), classes), rest)
    probabilities[torch.arange(len(predicted)), torch.tensor(predicted)] = probability
    return probabilities


def image_axes(figure: Figure) -> list:
    """The axes that show an image, row by row; a colour bar shows none."""
    return [axes for axes in figure.axes if axes.images]


def texts(figure: Figure) -> list[Text]:
    """Every text that is really drawn: matplotlib also keeps tick labels beyond the limits of the axes."""
    drawn, draw = [], Text.draw

    def note(text: Text, renderer) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, renderer)

    with mock.patch.object(Text, "draw", note):
        figure.canvas.draw()
    return drawn


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


def assert_nothing_is_cut_or_overlaps(figure: Figure) -> None:
    shown = texts(figure)
    # The box of an annotation's text alone; its own extent would take in the point that it annotates.
    boxes = {text: Text.get_window_extent(text) for text in shown}
    for text, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0, f"{text.get_text()!r} is cut off: {box}"
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, f"{text.get_text()!r} is cut off: {box}"
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        apart = first.x1 <= second.x0 or second.x1 <= first.x0 or first.y1 <= second.y0 or second.y1 <= first.y0
        assert apart, f"{one.get_text()!r} and {other.get_text()!r} overlap"
    for axes in image_axes(figure):
        place = axes.get_window_extent().padded(-2)
        for text, box in boxes.items():
            assert not place.overlaps(box), f"{text.get_text()!r} covers an image"


# purification_rows


def test_a_row_shows_the_six_images_in_order_with_the_pixels_given():
    stages = make_stages(batch=2)
    figure = purification_rows(stages)
    axes = image_axes(figure)
    assert len(axes) == 2 * len(COLUMNS)
    for row in range(2):
        for column, name in enumerate(COLUMNS):
            shown = axes[row * len(COLUMNS) + column].images[0].get_array()
            if name in ("perturbation", "residual"):
                assert shown.shape == (32, 32)
            else:
                np.testing.assert_allclose(shown, getattr(stages, name)[row].permute(1, 2, 0), atol=1e-6)
    headings = [axes[column].texts[0].get_text() for column in range(len(COLUMNS))]
    assert headings == list(COLUMNS)


def test_maps_hold_the_signed_mean_over_channels_in_units_of_1_255():
    clean = torch.full((1, 3, 8, 8), 0.5)
    adversarial = clean.clone()
    adversarial[0, 0, 2, 3] += 6 / 255
    adversarial[0, 1, 2, 3] -= 3 / 255
    purified = clean.clone()
    purified[0, :, 5, 1] -= 20 / 255
    axes = image_axes(purification_rows(PurificationStages(clean, adversarial, clean, purified)))
    expected = np.zeros((8, 8))
    expected[2, 3] = 1
    np.testing.assert_allclose(axes[2].images[0].get_array(), expected, atol=1e-4)
    expected = np.zeros((8, 8))
    expected[5, 1] = -20
    np.testing.assert_allclose(axes[5].images[0].get_array(), expected, atol=1e-4)


def test_maps_have_one_symmetric_scale_for_all_rows():
    stages = make_stages()
    axes = image_axes(purification_rows(stages))
    for column, after in ((2, stages.adversarial), (5, stages.purified)):
        limits = {one.images[0].get_clim() for one in axes[column :: len(COLUMNS)]}
        assert len(limits) == 1
        low, high = limits.pop()
        assert low == -high
        assert high == pytest.approx(255 * float((after - stages.clean).mean(dim=1).abs().max()), rel=1e-4)


def test_the_scale_of_the_perturbation_is_eps_where_it_is_given():
    axes = image_axes(purification_rows(make_stages(), eps=16 / 255))
    assert axes[2].images[0].get_clim() == pytest.approx((-16, 16))


@pytest.mark.parametrize(("eps", "printed", "tick"), [(8 / 255, "±8/255", "8"), (0.3, "±76.5/255", "76.5")])
def test_the_scale_is_printed_below_its_column(eps, printed, tick):
    figure = purification_rows(make_stages(eps=min(eps, 0.1)), eps=eps)
    assert printed in words(figure)
    bars = [axes for axes in figure.axes if not axes.images]
    assert len(bars) == 2
    assert [label.get_text() for label in bars[0].get_xticklabels()] == [f"\N{MINUS SIGN}{tick}", "0", tick]
    centre = bars[0].get_position().x0 + bars[0].get_position().width / 2
    place = image_axes(figure)[2].get_position()
    assert centre == pytest.approx(place.x0 + place.width / 2, abs=1e-6)


def test_the_largest_change_of_one_channel_is_printed_as_the_mean_may_hide_it():
    clean = torch.full((1, 3, 8, 8), 0.5)
    adversarial = clean.clone()
    adversarial[0, 0] += 12 / 255
    adversarial[0, 1] -= 12 / 255
    figure = purification_rows(PurificationStages(clean, adversarial, clean, clean), eps=8 / 255)
    assert float(np.abs(image_axes(figure)[2].images[0].get_array()).max()) < 1e-3
    assert "≤ 12/255" in words(figure)


def test_an_arrow_on_the_colour_bar_says_that_a_change_lies_beyond_eps():
    stages = make_stages()
    stages = replace(stages, adversarial=stages.clean + 16 / 255)
    for eps, extend in ((8 / 255, "both"), (16 / 255, "neither")):
        figure = purification_rows(stages, eps=eps)
        last_row = image_axes(figure)[-len(COLUMNS) :]
        assert last_row[2].images[0].colorbar.extend == extend


def test_images_that_do_not_change_give_a_white_map_and_a_scale():
    clean = make_stages().clean
    axes = image_axes(purification_rows(PurificationStages(clean, clean, clean, clean)))
    assert axes[2].images[0].get_clim() == (-1, 1)
    assert float(np.abs(axes[2].images[0].get_array()).max()) == 0


def test_predictions_show_class_probability_and_a_mark_that_needs_no_colour():
    classes = ("airplane", "automobile", "bird")
    figure = purification_rows(
        make_stages(batch=2),
        labels=torch.tensor([1, 2]),
        classes=classes,
        predictions={"clean": one_hot([1, 2], 0.972, 3), "adversarial": one_hot([0, 2], 0.5, 3)},
    )
    axes = image_axes(figure)

    def below(row: int, column: int) -> list[str]:
        return [text.get_text() for text in axes[6 * row + column].texts if "%" in text.get_text()]

    assert below(0, 0) == [f"{RIGHT} automobile\n97.2 %"]
    assert below(0, 1) == [f"{WRONG} airplane\n50.0 %"]
    assert below(1, 1) == [f"{RIGHT} bird\n50.0 %"]
    assert below(0, 4) == below(1, 4) == []
    rotated = [text.get_text() for text in texts(figure) if text.get_rotation() == 90]
    assert rotated == ["automobile", "bird"]


def test_without_labels_a_prediction_has_no_mark_and_without_classes_its_number():
    figure = purification_rows(make_stages(batch=1), predictions={"purified": one_hot([4], 0.9, 10)})
    assert "4\n90.0 %" in words(figure)
    assert RIGHT not in words(figure) and WRONG not in words(figure)


def test_a_mapping_of_tensors_is_as_good_as_the_dataclass():
    stages = make_stages()
    first = purification_rows(stages)
    second = purification_rows({name: getattr(stages, name) for name in COLUMNS if hasattr(stages, name)})
    for one, other in zip(image_axes(first), image_axes(second), strict=True):
        np.testing.assert_array_equal(one.images[0].get_array(), other.images[0].get_array())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (96, 96), (256, 256), (48, 16)])
def test_every_pixel_of_an_image_is_a_whole_square_of_the_figure(tmp_path, height, width):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, 3, height, width), generator=generator) / 255
    figure = purification_rows(PurificationStages(images, images, images, images))
    with Image.open(save_figure(figure, tmp_path / "rows.png")) as file:
        drawn = np.asarray(file.convert("RGB"))
    box = image_axes(figure)[0].get_window_extent()
    left, top = round(box.x0), drawn.shape[0] - round(box.y1)
    zoom = round(box.width / width)
    assert zoom >= 1 and box.width == pytest.approx(zoom * width, abs=0.05)
    assert box.height == pytest.approx(zoom * height, abs=0.05)
    patch = drawn[top : top + zoom * height, left : left + zoom * width]
    expected = (images[0] * 255).round().byte().permute(1, 2, 0).numpy().repeat(zoom, axis=0).repeat(zoom, axis=1)
    inner = np.s_[3:-3, 3:-3]  # the frame covers the rim
    np.testing.assert_allclose(patch[inner].astype(int), expected[inner].astype(int), atol=1)


@pytest.mark.parametrize("title", ["", "AToP, RT2, PGD-40 + EOT-10 through the pipeline, l_inf 8/255 " * 3])
@pytest.mark.parametrize(("batch", "size"), [(1, 32), (8, 32), (2, 256)])
def test_no_text_of_the_rows_is_cut_off_or_overlaps(batch, size, title):
    labels = torch.arange(batch) % len(IMAGENETTE)
    predicted = [(int(label) + row) % len(IMAGENETTE) for row, label in enumerate(labels)]
    predicted[-1] = len(IMAGENETTE) - 1
    shown = one_hot(predicted, 1.0, len(IMAGENETTE))
    figure = purification_rows(
        make_stages(batch, size, eps=0.15),
        labels=labels,
        classes=IMAGENETTE,
        predictions={name: shown for name in ("clean", "adversarial", "purified")},
        eps=0.15,
        title=title.strip(),
    )
    assert_nothing_is_cut_or_overlaps(figure)
    assert "a class whose" in words(figure) and "…" in words(figure)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": torch.rand(3, 3, 8, 8)}, "adversarial has the shape"),
        ({"purified": torch.rand(3, 3, 32, 16)}, "purified has the shape"),
        ({"transformed": torch.rand(12, 3, 32, 32)}, "transformed has the shape"),
        ({"transformed": torch.rand(3, 5, 32, 32)}, r"transformed must be a tensor \(batch, 3"),
        ({"adversarial": torch.rand(3, 32, 32)}, r"adversarial must be a tensor \(batch, 3"),
        ({"adversarial": torch.full((3, 3, 32, 32), 1.5)}, r"adversarial must lie in \[0, 1\]"),
        ({"purified": torch.full((3, 3, 32, 32), float("nan"))}, r"purified must lie in \[0, 1\]"),
        ({"clean": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, "clean must hold floating-point"),
        ({name: torch.rand(0, 3, 32, 32) for name in ("clean", "adversarial", "transformed", "purified")}, "no image"),
    ],
)
def test_stages_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make_stages(), **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, "labels must have the shape"),
        ({"labels": torch.tensor([0, 1, 2]), "classes": ("a", "b")}, r"labels must lie in 0\.\.1"),
        ({"labels": torch.tensor([0, -1, 2])}, "labels must lie"),
        ({"predictions": {"transformed": one_hot([0, 1, 2], 0.9, 3)}}, "allowed: clean, adversarial, purified"),
        ({"predictions": {"clean": one_hot([0, 1], 0.9, 3)}}, "batch 3"),
        ({"predictions": {"clean": torch.randn(3, 4)}}, "logits.softmax"),
        ({"predictions": {"clean": torch.full((3, 4), float("nan"))}}, "logits.softmax"),
        ({"predictions": {"clean": one_hot([0, 1, 2], 0.9, 3)}, "classes": ("a", "b")}, "holds 3 classes"),
        ({"eps": 8.0}, r"eps must lie in \(0, 1\]"),
        ({"eps": 0.0}, r"eps must lie in \(0, 1\]"),
    ],
)
def test_labels_predictions_and_eps_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(purification_rows)(make_stages(), **options)


def test_a_mapping_that_lacks_a_stage_is_refused():
    with pytest.raises(ValueError, match="clean, adversarial, transformed, purified, got clean"):
        purification_rows({"clean": make_stages().clean})


# masks_and_inputs


def test_every_transform_gets_a_column_beside_the_input():
    images = make_stages(batch=2).clean
    names = ["RT1", "RT2", *(f"RT3, mask {number} of 4" for number in (1, 2, 3, 4))]
    shown = {name: images * (0.9 - 0.1 * position) for position, name in enumerate(names)}
    figure = masks_and_inputs(images, shown)
    axes = image_axes(figure)
    assert [axes[column].texts[0].get_text() for column in range(7)] == ["input", *names]
    assert len(axes) == 2 * 7
    for column, expected in enumerate([images, *shown.values()]):
        np.testing.assert_allclose(axes[7 + column].images[0].get_array(), expected[1].permute(1, 2, 0), atol=1e-6)
    assert_nothing_is_cut_or_overlaps(figure)


def test_a_long_name_of_a_transform_is_wrapped():
    images = make_stages(batch=1).clean
    name = "RT2, a quarter of the patches missing, " * 3
    figure = masks_and_inputs(images, {name: images}, title="What g reads " * 9)
    assert_nothing_is_cut_or_overlaps(figure)


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({}, "transformed_by_name is empty"),
        ({"RT1": torch.rand(2, 3, 16, 16)}, "RT1 has the shape"),
        ({"RT1": torch.rand(1, 3, 32, 32) * 2 - 1}, r"RT1 must lie in \[0, 1\]"),
    ],
)
def test_transformed_images_that_do_not_fit_are_refused(shown, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(masks_and_inputs)(make_stages(batch=1).clean, shown)


# training_curves

HISTORY = [
    {
        "epoch": epoch,
        "loss": 2 / epoch,
        **({"classification": 1 / epoch} if epoch > 3 else {}),
        "test_accuracy": 1 - 0.6 / epoch,
        "psnr": 20.0 + epoch,
        "seconds": 12.5 * epoch,
    }
    for epoch in range(1, 7)
]


def panels(figure: Figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_every_quantity_gets_a_panel_with_its_unit_and_the_values_given():
    figure = training_curves(HISTORY, title="Fine-tuning")
    shown = panels(figure)
    assert list(shown) == ["loss", "test accuracy", "psnr", "seconds", "classification"]
    assert {name: axes.get_ylabel() for name, axes in shown.items()} == {
        "loss": "loss",
        "test accuracy": "accuracy (%)",
        "psnr": "PSNR (dB)",
        "seconds": "seconds since the start",
        "classification": "cross-entropy (nats)",
    }
    np.testing.assert_array_equal(shown["loss"].lines[0].get_xdata(), range(1, 7))
    np.testing.assert_allclose(shown["loss"].lines[0].get_ydata(), [entry["loss"] for entry in HISTORY])
    assert shown["test accuracy"].lines[0].get_ydata()[-1] == pytest.approx(90.0)
    assert shown["test accuracy"].get_title(loc="right") == "90.0 %"
    assert {axes.get_xlabel() for axes in shown.values()} == {"epoch"}
    assert len({axes.get_xlim() for axes in shown.values()}) == 1
    assert_nothing_is_cut_or_overlaps(figure)


def test_a_quantity_that_begins_late_has_a_gap_and_not_a_zero():
    values = np.asarray(panels(training_curves(HISTORY))["classification"].lines[0].get_ydata())
    assert np.isnan(values[:3]).all() and np.isfinite(values[3:]).all()


@pytest.mark.parametrize("epoch", [1, 0.05, 0])
def test_a_single_epoch_is_a_visible_point(epoch):
    figure = training_curves([{"epoch": epoch, "loss": 1.25}])
    line = panels(figure)["loss"].lines[0]
    assert line.get_marker() == "o" and line.get_xydata().tolist() == [[epoch, 1.25]]
    low, high = panels(figure)["loss"].get_xlim()
    assert low < epoch < high
    assert f"{epoch}" in words(figure).splitlines()
    assert_nothing_is_cut_or_overlaps(figure)


def test_epochs_are_counted_where_the_history_does_not_name_them():
    line = panels(training_curves([{"loss": 2.0}, {"loss": 1.0}]))["loss"].lines[0]
    assert list(line.get_xdata()) == [1, 2]


@pytest.mark.parametrize("history", [[], [{"epoch": 1}], [{"epoch": 1, "loss": float("nan"), "note": "text"}]])
def test_a_history_without_a_number_is_refused(history):
    with pytest.raises(ValueError, match="history"):
        training_curves(history)


# the table


@dataclass(frozen=True)
class Row:
    defence: str
    attack: str
    accuracy: float
    low: float
    high: float


TABLE = [
    Row("undefended", "clean", 0.972, 0.951, 0.984),
    Row("undefended", "white-box", 0.0, 0.0, 0.019),
    Row("AP (pre-trained purifier)", "clean", 0.965, 0.93, 0.983),
    Row("AToP", "clean", 1.0, 0.981, 0.9999999),
    Row("AToP", "white-box", 0.6, 0.531, 0.665),
]


def test_the_table_is_aligned_markdown_in_per_cent():
    assert format_table(TABLE).splitlines() == [
        "| % [95 % interval]         |               clean |         white-box |",
        "| ------------------------- | ------------------: | ----------------: |",
        "| undefended                |   97.2 [95.1, 98.4] |    0.0 [0.0, 1.9] |",
        "| AP (pre-trained purifier) |   96.5 [93.0, 98.3] |                 – |",
        "| AToP                      | 100.0 [98.1, 100.0] | 60.0 [53.1, 66.5] |",
    ]


def test_the_table_takes_mappings_and_keeps_a_bar_in_a_name_from_ending_its_cell():
    row = {"defence": "a|b", "attack": "clean", "accuracy": 0.5, "low": 0.4, "high": 0.6}
    assert "| a\\|b" in format_table([row])
    assert "50.0 [40.0, 60.0]" in format_table([row])


def test_bars_show_each_accuracy_with_its_interval_in_per_cent():
    figure = accuracy_bars(TABLE, title="MNIST, 200 digits")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "white-box"]
    bars = {bar.get_label(): bar for bar in axes.containers if hasattr(bar, "errorbar")}
    heights = [patch.get_height() for bar in bars.values() for patch in bar.patches]
    assert heights == pytest.approx([97.2, 0.0, 96.5, 100.0, 60.0])
    segments = [
        segment[:, 1].tolist()
        for bar in axes.containers
        if hasattr(bar, "errorbar") and bar.errorbar is not None
        for lines in bar.errorbar.lines[2]
        for segment in lines.get_segments()
    ]
    expected = [(95.1, 98.4), (0.0, 1.9), (93.0, 98.3), (98.1, 100.0), (53.1, 66.5)]
    np.testing.assert_allclose(segments, expected, atol=1e-4)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["undefended", "AP (pre-trained purifier)", "AToP"]
    assert {"97.2", "0.0", "96.5", "100.0", "60.0"} <= {text.get_text() for text in axes.texts}
    assert_nothing_is_cut_or_overlaps(figure)


def test_chance_is_a_broken_line_that_the_legend_names():
    figure = accuracy_bars(TABLE, chance=0.1)
    (line,) = (line for line in figure.axes[0].lines if list(line.get_ydata()) == [10, 10])
    assert line.get_linestyle() == "--"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["undefended", "AP (pre-trained purifier)", "AToP", "chance, 10 %"]
    assert_nothing_is_cut_or_overlaps(figure)
    with pytest.raises(ValueError, match="chance must lie in .0, 1. .a share, not per cent., got 10"):
        accuracy_bars(TABLE, chance=10)


@pytest.mark.parametrize(("defences", "attacks"), [(1, 1), (2, 9), (6, 7)])
def test_no_text_of_a_small_or_large_table_is_cut_off_or_overlaps(defences, attacks):
    table = [
        Row(f"defence with a long name {defence}", f"AutoAttack {attack}, l_inf 8/255", 1.0, 0.98, 1.0)
        for defence in range(defences)
        for attack in range(attacks)
    ]
    figure = accuracy_bars(table, title="CIFAR-10 (JPEG), 512 images, every attack through the whole pipeline")
    assert sum(len(axes.texts) for axes in figure.axes) == defences * attacks
    assert figure.get_figwidth() < 12
    assert_nothing_is_cut_or_overlaps(figure)


@pytest.mark.parametrize("function", [accuracy_bars, format_table])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "the table is empty"),
        ([Row("AToP", "clean", 97.2, 95.1, 98.4)], "not per cent"),
        ([Row("AToP", "clean", 0.5, 0.6, 0.7)], "low <= accuracy"),
        ([Row("AToP", "clean", float("nan"), 0.6, 0.7)], "low <= accuracy"),
        ([TABLE[0], TABLE[0]], "twice"),
        ([{"defence": "AToP", "attack": "clean", "accuracy": 0.5, "low": 0.4}], "lacks 'high'"),
    ],
)
def test_a_table_that_cannot_be_shown_is_refused(function, table, message):
    with pytest.raises(ValueError, match=message):
        function(table)


# certified and attacked


@dataclass(frozen=True)
class Certified:
    radius: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Attacked:
    attack: str
    eps: float
    accuracy: float
    low: float
    high: float


CERTIFIED = [Certified(0.0, 0.8, 0.7, 0.87), Certified(0.25, 0.5, 0.39, 0.61), Certified(0.5, 0.2, 0.12, 0.31)]
ATTACKED = [
    Attacked("PGD-40 + EOT-20, l2", 0.2, 0.7, 0.59, 0.79),
    Attacked("PGD-40 + EOT-20, l2", 0.4, 0.6, 0.49, 0.7),
    Attacked("Square, l2", 0.4, 0.75, 0.64, 0.83),
]
CLEAN = {"accuracy": 0.9, "low": 0.81, "high": 0.95}


def shaded_between(figure: Figure) -> np.ndarray:
    (gap,) = [shape for shape in figure.axes[0].collections if str(shape.get_label()).startswith("not known")]
    return gap.get_paths()[0].vertices


def test_bounds_are_steps_no_better_than_they_are_known():
    figure = certified_and_attacked(CERTIFIED, ATTACKED, clean=CLEAN)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    lower, upper = lines["certified: lower bound"], lines["strongest attack: upper bound"]
    assert lower.get_drawstyle() == "steps-pre" and upper.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(lower.get_xydata(), [(0, 80), (0, 80), (0.25, 50), (0.5, 20)])
    steps = dict(upper.get_xydata().round(6).tolist())
    assert [steps[radius] for radius in (0.0, 0.2, 0.25, 0.4, 0.5)] == pytest.approx([90, 70, 70, 60, 60])


@pytest.mark.parametrize("radius, low, high", [(0.1, 50, 90), (0.22, 50, 70), (0.3, 20, 70), (0.45, 20, 60), (0.51, 0, 60)])
def test_the_gap_between_the_bounds_is_shaded_and_nothing_else(radius, low, high):
    figure = certified_and_attacked(CERTIFIED, ATTACKED, clean=CLEAN)
    path = matplotlib.path.Path(shaded_between(figure))
    for value, inside in ((low - 1, False), (low + 1, True), (high - 1, True), (high + 1, False)):
        assert path.contains_point((radius, value)) == inside, (radius, value)


def test_without_clean_images_nothing_is_known_above_the_first_attack():
    path = matplotlib.path.Path(shaded_between(certified_and_attacked(CERTIFIED, ATTACKED)))
    assert path.contains_point((0.1, 99)) and not path.contains_point((0.3, 71))


def test_bounds_have_their_intervals_units_and_names():
    figure = certified_and_attacked(CERTIFIED[::-1], ATTACKED, clean=CLEAN, title="AToP, 64 images, RT2 at sigma 0.25")
    (axes,) = figure.axes
    segments = [
        segment[:, 1].tolist() for bar in axes.containers for lines in bar.lines[2] for segment in lines.get_segments()
    ]
    np.testing.assert_allclose(segments, [(81, 95), (59, 79), (49, 70), (64, 83)])
    band = axes.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((12, 87))
    assert "l2" in axes.get_xlabel() and "%" in axes.get_ylabel() and "majority" in axes.get_ylabel()
    names = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    assert {"clean", "PGD-40 + EOT-20, l2", "Square, l2", "certified: lower bound"} <= set(names)
    assert_nothing_is_cut_or_overlaps(figure)


@pytest.mark.parametrize(
    ("certified", "attacked", "message"),
    [
        ([], ATTACKED, "no certified point"),
        (CERTIFIED, [], "no attacked point"),
        ([replace(CERTIFIED[0], accuracy=80.0)], ATTACKED, "not per cent"),
        ([replace(CERTIFIED[0], radius=-0.1)], ATTACKED, "at least 0"),
        (CERTIFIED, [replace(ATTACKED[0], eps=0.0)], "above 0"),
        (CERTIFIED, CERTIFIED, "lacks 'eps'"),
        ([replace(CERTIFIED[0], radius=0.5)], ATTACKED, "same model, images and verdict"),
    ],
)
def test_bounds_that_cannot_be_drawn_are_refused(certified, attacked, message):
    if message.startswith("same"):
        attacked = [replace(ATTACKED[0], accuracy=0.3, low=0.2, high=0.4)]
    with pytest.raises(ValueError, match=message):
        certified_and_attacked(certified, attacked)


# all of them


def all_figures() -> list[Figure]:
    stages = make_stages(batch=1)
    rows = purification_rows(stages, labels=torch.tensor([0]), predictions={"clean": one_hot([0], 0.9, 3)}, title="t")
    masks = masks_and_inputs(stages.clean, {"RT1": stages.clean}, title="t")
    bounds = certified_and_attacked(CERTIFIED, ATTACKED, clean=CLEAN, title="t")
    return [rows, masks, training_curves(HISTORY, title="t"), accuracy_bars(TABLE, title="t"), bounds]


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()


def test_figures_leave_pyplot_and_the_settings_of_matplotlib_alone():
    before, numbers = dict(matplotlib.rcParams), plt.get_fignums()
    for figure in all_figures():
        pixels(figure)
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == numbers


def test_figures_look_the_same_under_the_style_of_someone_else():
    expected = [pixels(figure) for figure in all_figures()]
    with plt.style.context("dark_background"), matplotlib.rc_context({"axes.grid": True, "image.origin": "lower"}):
        styled = [pixels(figure) for figure in all_figures()]
    for one, other in zip(expected, styled, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_figure_is_saved_in_full_size_and_equal_figures_give_equal_files(tmp_path):
    paths = [save_figure(accuracy_bars(TABLE), tmp_path / "new" / "folder" / f"{name}.png") for name in "ab"]
    with Image.open(paths[0]) as file:
        assert file.size == tuple(int(side * DPI) for side in accuracy_bars(TABLE).get_size_inches())
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_figure_is_saved_as_pdf(tmp_path):
    path = save_figure(all_figures()[0], tmp_path / "rows.pdf")
    assert path.read_bytes().startswith(b"%PDF-")


def test_a_failed_save_keeps_the_earlier_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    figure = accuracy_bars(TABLE)
    path = save_figure(figure, tmp_path / "bars.png")
    before = path.read_bytes()

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["bars.png"]


@pytest.mark.parametrize("name", ["bars.jpg", "bars", "bars.svg"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.png or \.pdf"):
        save_figure(Figure(), tmp_path / name)


def points(values: list[object]) -> list[dict[str, object]]:
    """Two runs a value, of two defences under two attacks."""
    return [
        {"defence": defence, "attack": attack, "value": value, "accuracy": a, "low": a - 0.1, "high": a + 0.05}
        for attack, start in (("clean", 0.9), ("white-box", 0.2))
        for defence, less in (("AP", 0.1), ("AToP", 0.0))
        for number, value in enumerate(values)
        for a in (start - less, start - less + 0.01 * number)
    ]


def test_accuracy_stands_against_a_parameter_with_its_interval_and_the_mean_of_equal_values():
    figure = accuracy_against(points([1, 4.0, 16]), name="classification_weight", title="mnist")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["clean", "white-box"]
    axes = figure.axes[1]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    for line in lines.values():  # beside each other, by less than a hundredth of the axis
        assert line.get_xdata() == pytest.approx([1, 4, 16], abs=0.01 * 15)
    assert (np.asarray(lines["AP"].get_xdata()) < lines["AToP"].get_xdata()).all()
    assert lines["AToP"].get_ydata() == pytest.approx([20, 20.5, 21])
    assert lines["AP"].get_ydata() == pytest.approx([10, 10.5, 11])
    bars = axes.containers[1].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars[:1]] == [pytest.approx([10, 25])] and len(bars) == 6
    assert axes.get_xlabel() == "classification_weight"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["AP", "AToP"]


def test_a_defence_has_the_same_colour_in_bars_and_against_a_parameter():
    table = [Row(name, "clean", 0.5, 0.4, 0.6) for name in ("AP", "AToP")]
    bars = [bar.patches[0].get_facecolor() for bar in accuracy_bars(table).axes[0].containers if hasattr(bar, "patches")]
    lines = {line.get_label(): line for line in accuracy_against(points([1]), name="s").axes[0].lines}
    assert bars == [to_rgba(lines[name].get_color()) for name in ("AP", "AToP")]


def test_values_that_are_no_numbers_stand_in_their_order():
    figure = accuracy_against(points(["pipeline", None, "classifier"]), name="attack_sees")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["pipeline", "None", "classifier"]


@pytest.mark.parametrize(
    "wrong", [[], [{"defence": "a", "attack": "b", "value": 1, "accuracy": 0.5, "low": 0.6, "high": 1}]]
)
def test_points_that_cannot_be_shown_are_refused(wrong):
    with pytest.raises(ValueError, match="no point to show|low <= accuracy"):
        accuracy_against(wrong, name="eps")
