"""What is proved beside what is broken: a certificate and attacks, over the radius."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atoplib.drawing import INK, SERIES, SMALL, legend_below, legend_of, new_figure, style_axes, words, wrap
from atoplib.figures.tables import Cell, check_cell, entry_value

WIDTH = 6.4  # inches
PROVED, BROKEN, UNKNOWN = SERIES[0], SERIES[2], "#bdbdbd"


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
    figure = new_figure(WIDTH, 4.2, title)
    axes = figure.add_subplot()
    radii = [point.radius for point in lower]
    columns = [[100 * getattr(point, name) for point in lower] for name in Cell._fields]
    known = sorted({0.0, end, *radii, *(point.radius for point in upper)})
    certified_at = [_bound_at(radius, lower, below=True) for radius in known]
    attacked_at = [_bound_at(radius, start + upper, below=False) for radius in known]
    # between two known radii: what is certified at the right end, what an attack broke at the left end
    axes.fill_between(
        [radius for pair in zip(known, known[1:], strict=False) for radius in pair],
        [value for value in certified_at[1:] for _ in range(2)],
        [value for value in attacked_at[:-1] for _ in range(2)],
        color=UNKNOWN,
        alpha=0.4,
        linewidth=0,
        label="not known: neither proved nor broken",
    )
    accuracy, low, high = columns
    axes.fill_between(radii, low, high, step="pre", color=PROVED, alpha=0.25, linewidth=0)
    axes.plot(
        [0.0, *radii],
        [accuracy[0], *accuracy],
        drawstyle="steps-pre",
        color=PROVED,
        linewidth=1.8,
        label="certified: lower bound",
    )
    axes.plot(known, attacked_at, drawstyle="steps-post", color=BROKEN, linewidth=1.8, label="strongest attack: upper bound")
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
            color=INK if name == "clean" else BROKEN,
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
    style_axes(axes)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.set_xlabel("l2 norm of the perturbation, images in [0, 1]", **words())
    axes.set_ylabel("accuracy of the majority vote (%), 95 % interval", **words())
    entries = {wrap(label, 72 * WIDTH / 2 - 50, SMALL): handle for label, handle in legend_of(figure).items()}
    legend_below(figure, entries, 2)
    return figure


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
        radius = 0.0 if size is None else float(entry_value(entry, size, (size, *Cell._fields)))
        name = str(entry_value(entry, "attack", ("eps", "attack", *Cell._fields))) if size == "eps" else ""
        cell = Cell(*(float(entry_value(entry, field, Cell._fields)) for field in Cell._fields))
        if not 0 <= radius < float("inf") or (size == "eps" and radius == 0):
            raise ValueError(f"{size} must be {'above' if size == 'eps' else 'at least'} 0 (an l2 norm), got {radius}")
        check_cell(cell, f"{name or 'a point'!r} at radius {radius:g}")
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
