"""What is on screen as one matplotlib figure: for a paper, and for a notebook that nobody watches."""

import base64
import io
from html import escape
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atoplib.drawing import (
    DIVERGING,
    FAINT,
    FONT,
    INK,
    MINUS,
    OTHER_COLOUR,
    RIGHT,
    RIGHT_COLOUR,
    SMALL,
    TEXT,
    WRONG,
    WRONG_COLOUR,
    fit,
    new_figure,
    style_axes,
    text_width,
    words,
)
from atoplib.explorer import draw, page
from atoplib.explorer.compute import View

NAME_ROOM = 62  # points, for the name of a class beside its bar
TRUE = " (true)"


def still(view: View) -> Figure:
    """The pictures, the probabilities below those that are read, the vote, and the path of the attack.

    Returns a figure of its own; ``drawing.save_figure`` writes it.
    """
    true = page.name_of(view, view.label)
    picked = f"{view.knobs.dataset}, image {view.knobs.image} (true class {true})"
    figure = new_figure(12.4, 6.2, f"{picked}; {page.defence_text(view)}; {page.attack_text(view)}")
    columns = 6 if view.pictured is not None else 3
    grid = figure.add_gridspec(3, columns, height_ratios=(1.0, 1.0, 0.7))
    axes = [figure.add_subplot(grid[0, column]) for column in range(columns)]
    below = [figure.add_subplot(grid[1, column]) for column in range(columns)]
    for one in below:
        one.set_axis_off()
    _image(axes[0], "clean", view.clean)
    _image(axes[1], "adversarial", view.adversarial)
    perturbation = draw.signed_change(view.adversarial, view.clean)
    linf = view.knobs.norm == "linf" and view.knobs.attacks
    _change(figure, axes[2], below[2], "perturbation", perturbation, 255 * view.knobs.eps if linf else None)
    _probabilities(below[0], view, "clean")
    _probabilities(below[1], view, "adversarial")
    if view.pictured is not None:
        _image(axes[3], "transformed", view.pictured.transformed[0])
        _image(axes[4], "purified", view.pictured.purified)
        changed = draw.signed_change(view.pictured.purified, view.adversarial)
        _change(figure, axes[5], below[5], f"purified {MINUS} adversarial", changed, None)
        below[3].text(0.5, 0.98, page.transform_text(view).replace(", ", "\n"), ha="center", va="top", **words())
        _copies(below[3], view)
        _probabilities(below[4], view, "purified")
    last = grid[2, :].subgridspec(1, 2, width_ratios=(1, 2))
    _votes(figure.add_subplot(last[0]), view)
    _path(figure.add_subplot(last[1]), view)
    return figure


def figure_bundle(figure: Figure, name: str, alt: str) -> dict[str, str]:
    """A figure as HTML, hidden by the explorer of this name where that is alive, and as PNG for readers without HTML."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    png = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img src="data:image/png;base64,{png}" alt="{escape(alt)}" style="max-width: 100%">'
    return {"text/html": f'<div class="atop-still-{name}">{image}</div>', "image/png": png}


def _image(axes: Axes, title: str, image) -> None:
    crisp = image.shape[-1] < page.CRISP_BELOW
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest" if crisp else "antialiased")
    axes.set_title(title, **words(TEXT))
    axes.set_axis_off()


def _change(figure: Figure, axes: Axes, below: Axes, title: str, change, scale: float | None) -> None:
    scale = scale or draw.map_scale(change)
    shown = axes.imshow(change.numpy(), cmap=DIVERGING, vmin=-scale, vmax=scale, interpolation="nearest")
    axes.set_title(title, **words(TEXT))
    axes.set_axis_off()
    bar = figure.colorbar(shown, cax=below.inset_axes((0.0, 0.86, 1.0, 0.07)), orientation="horizontal")
    bar.set_ticks([-scale, 0, scale], labels=[f"{MINUS}{scale:.3g}", "0", f"{scale:.3g}"])
    bar.ax.tick_params(labelsize=SMALL, colors=INK, labelfontfamily=FONT)
    bar.set_label("1/255, mean over channels", **words())


def _copies(below: Axes, view: View) -> None:
    """RT3's masked copies one by one, small."""
    copies = view.pictured.transformed
    if len(copies) == 1:
        return
    across = ceil(len(copies) ** 0.5)
    edge = 0.7 / across
    for number, copy in enumerate(copies):
        row, column = divmod(number, across)
        axes = below.inset_axes((0.15 + column * edge, 0.7 - (row + 1) * edge, 0.94 * edge, 0.94 * edge))
        axes.imshow(copy.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
        axes.set_axis_off()


def _probabilities(below: Axes, view: View, stage: str) -> None:
    axes = below.inset_axes((0.48, 0.14, 0.5, 0.74))  # room for names
    axes.set_in_layout(False)  # all pictures have one width
    name, probability, right = page.read(view, stage)
    numbers = page.shown_classes(view)
    values = [100 * float(view.probabilities[stage][number]) for number in numbers]
    _bars(axes, view, numbers, values)
    axes.set_xlim(0, 100)
    axes.set_xlabel("%", **words())
    below.set_title(f"{fit(name, 80, TEXT)} {RIGHT if right else WRONG} {100 * probability:.1f} %", y=0.9, **words(TEXT))


def _votes(axes: Axes, view: View) -> None:
    counts = view.votes.bincount(minlength=len(view.classes))
    numbers = sorted(set(view.votes.tolist()) | {view.label})[: page.MOST_CLASSES]
    _bars(axes, view, numbers, [int(counts[number]) for number in numbers])
    axes.set_xlim(0, len(view.votes))
    axes.set_xlabel("draws", **words())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(
        f"vote: {page.votes_text(view)}" if len(view.votes) > 1 else "one draw: no dice are thrown", **words(TEXT)
    )


def _bars(axes: Axes, view: View, numbers: list[int], values: list[float]) -> None:
    top = max(range(len(values)), key=values.__getitem__)
    colours = [
        RIGHT_COLOUR if number == view.label else WRONG_COLOUR if place == top else OTHER_COLOUR
        for place, number in enumerate(numbers)
    ]
    axes.barh(range(len(numbers)), values, color=colours, height=0.75)
    names = [fit(page.name_of(view, number), NAME_ROOM, SMALL) for number in numbers if number != view.label]
    true = fit(page.name_of(view, view.label), NAME_ROOM - text_width(TRUE, SMALL), SMALL) + TRUE
    names.insert(numbers.index(view.label), true)
    axes.set_yticks(range(len(numbers)), names)
    axes.set_ylim(max(len(numbers), 4) - 0.5, -0.5)  # a bar is as high whether there are two or four
    style_axes(axes, grid="")


def _path(axes: Axes, view: View) -> None:
    axes.set_title("path of the attack: cross-entropy (nats)", **words(TEXT))
    style_axes(axes, grid="")
    if len(view.path_steps) == 1:
        axes.set_axis_off()
        axes.text(0.5, 0.5, page.attack_text(view), ha="center", va="center", **words(TEXT))
        return
    steps, losses = list(view.path_steps), view.path_losses.tolist()
    right = (view.path_classes == view.label).tolist()
    axes.plot(steps, losses, color=FAINT, linewidth=1.2, zorder=1)
    for kind, marker, colour, name in ((True, "o", RIGHT_COLOUR, "read right"), (False, "x", WRONG_COLOUR, "read wrong")):
        chosen = [place for place, good in enumerate(right) if good == kind]
        across, up = [steps[place] for place in chosen], [losses[place] for place in chosen]
        axes.scatter(across, up, marker=marker, color=colour, s=24, zorder=2, label=name)
    axes.set_ylim(0, 1.1 * max(*losses, 0.1))
    axes.set_xlabel("step", **words())
    axes.legend(frameon=False, prop={"family": FONT, "size": SMALL}, labelcolor=INK)
