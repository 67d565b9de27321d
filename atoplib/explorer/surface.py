"""The surface of an ablation to walk over: choose a metric and a defence, pick a cell, read its numbers.

Nothing is computed here: the cells were measured before. Every cell is a button, so that Tab reaches it, Enter or Space
picks it, and a pointer that rests on it shows its numbers, too.
"""

import uuid
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from atoplib.drawing import MISSING
from atoplib.explorer import page
from atoplib.explorer.still import figure_bundle
from atoplib.heatmaps import METRICS, TRANSFORM_NAMES, Metric, colour_of, ink_on, mask_maps, mask_surface_of

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""By defence: cells with the entries of ``evaluation.Cell``."""

SCALE_STEPS = 9
STYLE = """<style>
.atop-surface .widget-button { border: 2px solid transparent; box-sizing: border-box; padding: 0; height: 40px; margin: 0;
  font-size: 14px; font-variant-numeric: tabular-nums; }
.atop-surface .widget-button:focus-visible, .atop-surface .widget-button:hover { outline: none; box-shadow: none;
  border-color: var(--jp-ui-font-color1, #222); }
.atop-surface .atop-chosen { border: 4px solid var(--wrong) !important; font-weight: 700; }
.atop-scale-of { max-width: 340px; }
</style>"""


def numbers_of(cell: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a cell says: name and value of each number, the setting first."""
    rate = f"{100 * cell['missing_rate']:.3g} % of the patches"
    masks = "disjoint masks" if cell["transform"] == "rt3" else f"masks, {cell['average']} averaged"
    lines = [
        ("setting", f"{TRANSFORM_NAMES[cell['transform']]}, {page.SIGMA} {cell['noise_std']:.3g}"),
        ("missing", rate),
        ("masks", "1" if cell["num_masks"] == 1 else f"{cell['num_masks']} {masks}"),
    ]
    for metric in METRICS.values():
        unit = " %" if metric.share else "/255 a pixel and channel"
        lines.append((metric.title, f"{metric.text(cell)}{unit} {metric.interval(cell)}".rstrip()))
    lines.append(("before purification", f"{cell['input_distance']:.1f}/255 a pixel and channel"))
    lines.append(
        ("measured on", f"{cell['images']} images, {cell['eot_samples']} draws a gradient, {cell['seconds']:.0f} s")
    )
    return lines


def details(defence: str, cell: Mapping[str, Any]) -> str:
    """The numbers of one cell as HTML."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in numbers_of(cell))
    style = "text-align:left;font-weight:400;padding:1px 12px 1px 0"
    table = f'<table style="border-spacing:0">{rows}</table>'.replace("<th>", f'<th scope="row" style="{style}">')
    return (
        f'<div class="atop" role="status" aria-live="polite"><p class="atop-panel-title">{escape(defence)}</p>{table}</div>'
    )


def scale(metric: Metric, top: float) -> str:
    """The colours from 0 to ``top`` as HTML, with their ends and unit."""
    colours = ", ".join(colour_of(step / (SCALE_STEPS - 1)) for step in range(SCALE_STEPS))
    ends = f"<span>0</span><span>{escape(metric.unit)}</span><span>{top:.3g}</span>"
    bar = f'<div class="atop-scale" style="background: linear-gradient(to right, {colours})"></div>'
    return f'<div class="atop atop-scale-of">{bar}<div class="atop-ends">{ends}</div></div>'


class SurfaceExplorer:
    """Two menus, a grid of cells, and the numbers of the cell that is picked; a widget in ``panel``.

    Attributes:
        defence, metric: the menus.
        chosen: row and column of the cell that is picked; it stays where it is when a menu changes.
        buttons: by row and column.
        name: of this explorer, unique on the page.
    """

    def __init__(self, cells: Cells) -> None:
        if not cells:
            raise ValueError("there is nothing to show: give at least one defence with its cells")
        self.cells = cells
        self.surfaces = {name: mask_surface_of(own) for name, own in cells.items()}
        self.name = uuid.uuid4().hex[:8]
        layout, style = widgets.Layout(width="330px"), {"description_width": "70px"}
        metrics = [(metric.title, name) for name, metric in METRICS.items()]
        self.metric = widgets.Dropdown(
            options=metrics, description="metric", tooltip="what the colours show", layout=layout, style=style
        )
        self.defence = widgets.Dropdown(
            options=list(cells), description="defence", tooltip="what was measured", layout=layout, style=style
        )
        self.grid = widgets.GridBox()
        self.grid.add_class("atop-surface")
        self.legend, self.numbers = widgets.HTML(), widgets.HTML()
        self.buttons: dict[tuple[str, str], widgets.Button] = {}
        self.chosen = next(iter(next(iter(self.surfaces.values())).cells))
        self._fill()
        self.metric.observe(lambda _: self._paint(), "value")
        self.defence.observe(lambda _: self._fill(), "value")
        hidden = f"<style>.atop-still-{self.name} {{ display: none }}</style>"
        head = widgets.HBox([self.metric, self.defence], layout=widgets.Layout(flex_flow="row wrap"))
        left = widgets.VBox([self.grid, self.legend], layout=widgets.Layout(min_width="0"))
        body = widgets.HBox([left, self.numbers], layout=widgets.Layout(flex_flow="row wrap", grid_gap="12px 32px"))
        self.panel = widgets.VBox([widgets.HTML(page.STYLE + STYLE + hidden), head, body])

    def choose(self, row: str, column: str) -> None:
        """Pick a cell: its numbers stand beside the grid."""
        self.chosen = row, column
        self._paint()

    def _fill(self) -> None:
        """Lay out the grid of the defence that is picked."""
        surface = self.surfaces[self.defence.value]
        self.chosen = self.chosen if self.chosen in surface.cells else next(iter(surface.cells))
        self.buttons = {}
        parts: list[widgets.Widget] = [_heading("missing \\ masks"), *map(_heading, surface.columns)]
        for row in surface.rows:
            parts.append(_heading(row))
            for column in surface.columns:
                parts.append(self._button(row, column) if (row, column) in surface.cells else _heading(MISSING))
        self.grid.children = parts
        self.grid.layout = widgets.Layout(
            grid_template_columns=f"110px repeat({len(surface.columns)}, 76px)", grid_gap="3px", align_items="center"
        )
        self._paint()

    def _button(self, row: str, column: str) -> widgets.Button:
        button = widgets.Button(layout=widgets.Layout(width="76px"))
        button.on_click(lambda _: self.choose(row, column))
        self.buttons[row, column] = button
        return button

    def _paint(self) -> None:
        """Colour and label the cells by the metric, mark the one that is picked, and show its numbers."""
        metric, surface = METRICS[self.metric.value], self.surfaces[self.defence.value]
        top = metric.top(cell for own in self.cells.values() for cell in own)
        for place, button in self.buttons.items():
            cell = surface.cells[place]
            colour = colour_of(metric.value(cell) / top)
            button.description = metric.text(cell)
            button.tooltip = "\n".join(f"{name}: {value}" for name, value in numbers_of(cell))
            button.style.button_color, button.style.text_color = colour, ink_on(colour)
            if place == self.chosen:
                button.add_class("atop-chosen")
            else:
                button.remove_class("atop-chosen")
        self.legend.value = scale(metric, top)
        self.numbers.value = details(self.defence.value, surface.cells[self.chosen])


def explore_surface(cells: Cells, *, title: str = "") -> None:
    """Show the surface in a notebook, alive; where nobody watches it stays as a figure of every defence and metric.

    Args:
        cells: by defence, those of missing rate x number of masks at one noise level; mappings with the entries of
            ``evaluation.Cell``.
        title: above the figure.

    Raises:
        ValueError: without a cell, or if two have one place.
    """
    explorer = SurfaceExplorer(cells)
    display(explorer.panel)
    display(figure_bundle(mask_maps(cells, title=title), explorer.name, title), raw=True)


def _heading(text: str) -> widgets.HTML:
    return widgets.HTML(f'<div class="atop" style="text-align:center">{escape(text)}</div>')
