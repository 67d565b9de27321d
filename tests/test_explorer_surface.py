"""The surface of an ablation: menus and cells say the numbers, by mouse and by keys; a still is left where nobody looks."""

import base64
import io
import re

import ipywidgets as widgets
import pytest
from PIL import Image

from atoplib.explorer import SurfaceExplorer, explore_surface
from atoplib.heatmaps import METRICS, colour_of, ink_on
from tests.test_heatmaps import cell, cells

RT3 = "RT3, 1 / masks"


def text_of(html: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_it_opens_with_the_robust_accuracy_of_the_first_defence():
    explorer = SurfaceExplorer(cells())
    assert (explorer.metric.value, explorer.defence.value) == ("robust", "AP")
    assert {place: button.description for place, button in explorer.buttons.items()} == dict.fromkeys(
        [("RT2, 10 %", "1"), ("RT2, 10 %", "4"), ("RT2, 50 %", "1"), ("RT2, 50 %", "4")], "25.0"
    )
    assert "atop-chosen" in explorer.buttons[explorer.chosen]._dom_classes


def test_a_metric_changes_number_and_colour_of_every_cell():
    explorer = SurfaceExplorer(cells())
    explorer.metric.value = "clean"
    for button in explorer.buttons.values():
        assert button.description == "90.0"
        assert button.style.button_color == colour_of(0.9) and button.style.text_color == ink_on(colour_of(0.9))
    assert "%" in explorer.legend.value and "100" in explorer.legend.value


def test_a_click_shows_the_numbers_of_the_cell_and_marks_it():
    explorer = SurfaceExplorer(cells())
    explorer.defence.value = "AToP"
    explorer.buttons[RT3, "2"].click()
    shown = text_of(explorer.numbers.value)
    assert "AToP setting RT3" in shown and "2 disjoint masks" in shown
    assert "robust accuracy, white-box 50.0 % [25.0, 75.0]" in shown and "12.5/255" in shown
    marked = [place for place, button in explorer.buttons.items() if "atop-chosen" in button._dom_classes]
    assert marked == [(RT3, "2")]


def test_the_choice_stays_where_the_other_defence_has_such_a_cell():
    explorer = SurfaceExplorer(cells())
    explorer.choose("RT2, 50 %", "4")
    explorer.defence.value = "AToP"
    assert explorer.chosen == ("RT2, 50 %", "4")
    explorer.choose(RT3, "2")
    explorer.defence.value = "AP"
    assert explorer.chosen in explorer.buttons


def test_every_control_has_a_name_and_every_cell_is_a_button_that_tells_its_numbers():
    explorer = SurfaceExplorer(cells())
    assert explorer.metric.description and explorer.defence.description
    for button in explorer.buttons.values():
        assert isinstance(button, widgets.Button) and not button.disabled
        for metric in METRICS.values():
            assert metric.title in button.tooltip
    assert 'aria-live="polite"' in explorer.numbers.value


def test_names_cannot_break_the_page():
    explorer = SurfaceExplorer({"<script>": [cell()]})
    assert "<script>" not in explorer.numbers.value and "&lt;script&gt;" in explorer.numbers.value


def test_without_anyone_watching_a_figure_is_left(monkeypatch):
    shown = []
    monkeypatch.setattr("atoplib.explorer.surface.display", lambda what, raw=False: shown.append(what))
    explore_surface(cells(), title="masks < all")
    panel, bundle = shown
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 1200
    assert 'alt="masks &lt; all"' in bundle["text/html"]
    name = re.search(r"atop-still-(\w+)", bundle["text/html"])[1]
    assert f".atop-still-{name} {{ display: none }}" in panel.children[0].value


def test_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="nothing to show"):
        SurfaceExplorer({})
    with pytest.raises(ValueError, match="no cell to show"):
        SurfaceExplorer({"AP": []})
