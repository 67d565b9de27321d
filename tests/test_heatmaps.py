"""Heat maps and lines: every number stands in its cell, readable, and what is missing is a dash."""

import io
from itertools import product

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from atoplib import heatmaps
from atoplib.heatmaps import METRICS, Surface, colour_of, ink_on, mask_surface_of


def cell(transform: str = "rt2", rate: float = 0.1, masks: int = 1, *, robust: float = 0.25, **changes) -> dict:
    shares = {"clean": 0.9, "clean_low": 0.8, "clean_high": 0.95}
    shares |= {"robust": robust, "robust_low": robust / 2, "robust_high": (1 + robust) / 2}
    setting = {"transform": transform, "missing_rate": rate, "num_masks": masks, "noise_std": 0.1, "average": "images"}
    numbers = {"distance": 12.5, "input_distance": 40.0, "images": 100, "eot_samples": 4, "seconds": 3.0}
    return {**setting, **shares, **numbers, **changes}


def cells() -> dict[str, list[dict]]:
    grid = [cell("rt2", rate, masks) for rate, masks in product((0.5, 0.1), (4, 1))]
    return {"AP": grid, "AToP": [*grid, cell("rt3", 0.5, 2, robust=0.5)]}


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_rows_and_columns_rise_and_rt3_comes_last():
    surface = mask_surface_of(cells()["AToP"])
    assert surface.rows == ("RT2, 10 %", "RT2, 50 %", "RT3, 1 / masks")
    assert surface.columns == ("1", "2", "4")
    assert len(surface.cells) == 5 and ("RT3, 1 / masks", "1") not in surface.cells


def test_two_cells_in_one_place_and_none_at_all_are_refused():
    with pytest.raises(ValueError, match="two cells stand at RT2, 10 %, 1 masks"):
        mask_surface_of([cell(), cell(noise_std=0.3)])
    with pytest.raises(ValueError, match="no cell to show"):
        mask_surface_of([])


def test_text_can_be_read_on_every_colour():
    for share in np.linspace(0, 1, 101):
        colour = colour_of(share)
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in to_rgb(colour)]
        luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
        contrast = 1.05 / (luminance + 0.05) if ink_on(colour) == "#ffffff" else (luminance + 0.05) / 0.05
        assert contrast >= 4.5, colour
    assert colour_of(-1) == colour_of(0) and colour_of(2) == colour_of(1)


def test_every_number_stands_in_its_cell_with_its_interval():
    figure = heatmaps.mask_maps(cells(), title="masks")
    written = words(figure)
    assert written.count("25.0") == 8 and written.count("[12.5, 62.5]") == 8
    assert written.count("50.0") == 1 and written.count("12.5") == 9
    assert written.count("\N{EN DASH}") == 3 * 4
    headings = {axes.get_title(loc="left") for axes in figure.axes}
    assert {f"{name}: {metric.title}" for name in ("AP", "AToP") for metric in METRICS.values()} <= headings
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units.count("%") == 4 and units.count("mean absolute difference, 1/255") == 2


def test_one_scale_holds_for_both_defences():
    figure = heatmaps.mask_maps({"AP": [cell(distance=5.0)], "AToP": [cell(distance=20.0)]})
    limits = [axes.images[0].get_clim() for axes in figure.axes if axes.images]
    assert limits == [(0, 100), (0, 100), (0, 20)] * 2


def test_lines_have_a_panel_a_metric_and_bars_where_there_is_an_interval():
    points = {"AP": [cell(noise_std=0.2), cell(noise_std=0.0)], "AToP": [cell(noise_std=0.1)]}
    figure = heatmaps.metric_lines(points, value="noise_std", label="sigma")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [metric.title for metric in METRICS.values()]
    line = figure.axes[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [0.0, 0.2] and line.get_ydata().tolist() == [25.0, 25.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["AP", "AToP"]


def test_votes_have_a_panel_a_defence_and_a_line_an_attack_and_verdict():
    votes = [
        {"verdict": verdict, "attack": attack, "draws": draws, "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for verdict, attack, draws in product(("majority", "worst_of_n"), ("clean", "white-box"), (1, 10))
    ]
    figure = heatmaps.vote_lines({"AP": votes, "AToP": votes})
    assert len(figure.axes) == 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["clean, majority", "white-box, majority", "clean, worst of N", "white-box, worst of N"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "10"]


def test_crossed_parameters_have_a_map_an_attack():
    numbers = {"accuracy": 0.3, "accuracy_low": 0.2, "accuracy_high": 0.4}
    surface = Surface(("none", "rt1"), ("none (AP)", "ft_adv"), {("none", "ft_adv"): numbers, ("rt1", "ft_adv"): numbers})
    figure = heatmaps.crossed_maps({"clean": surface, "white-box": surface}, down="transform", across="variant")
    assert words(figure).count("30.0") == 4 and words(figure).count("[20.0, 40.0]") == 4
    assert figure.axes[0].get_xlabel() == "variant" and figure.axes[0].get_ylabel() == "transform"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: heatmaps.mask_maps({}),
        lambda: heatmaps.metric_lines({"AP": []}, value="noise_std", label="sigma"),
        lambda: heatmaps.vote_lines({"AP": []}),
        lambda: heatmaps.crossed_maps({}, down="transform", across="variant"),
    ],
)
def test_a_picture_of_nothing_is_refused(draw):
    with pytest.raises(ValueError, match="to show: give at least one"):
        draw()


def test_a_figure_is_white_and_no_text_leaves_it():
    figure = heatmaps.mask_maps(cells(), title="RT2 and RT3, not trained anew: PGD-20 + EOT-8, linf eps 0.3, 100 images")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pixels = np.asarray(Image.open(buffer).convert("RGB"))
    rim = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((line == 255).all() for line in rim)
