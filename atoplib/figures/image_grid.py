"""Images in rows and columns, each of their pixels a whole square of the figure's, with headings, names and scales."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from atoplib.drawing import DIVERGING, DPI, FAINT, FONT, FRAME, INK, MINUS, SMALL, TEXT, TITLE, bare_figure, fit, words, wrap

IMAGE_PIXELS = 256  # of the figure, for the longer side of an image: a whole multiple of the image's own pixels near it


@dataclass(frozen=True)
class Grid:
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


def image_grid(grid: Grid, title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure with empty places for the images, row by row."""
    lines = wrap(title, 72 * (grid.figure_width - 2 * grid.margin) / DPI, TITLE)
    width = grid.figure_width
    height = grid.content_height + ((lines.count("\n") + 1) * 34 + 12 if title else 0)
    # A hair more than whole pixels: matplotlib cuts the fraction off, and width / DPI * DPI may fall short of width.
    figure = bare_figure((width + 0.01) / DPI, (height + 0.01) / DPI)
    if title:
        figure.text(0.5, 1 - 10 / height, lines, ha="center", va="top", **words(TITLE), linespacing=1.25)
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
            spine.set_color(FRAME)
            spine.set_linewidth(0.6)
    return figure, axes


def show_image(axes: Axes, image: Tensor) -> None:
    """An image in [0, 1]."""
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axes.imshow(pixels, interpolation="nearest", origin="upper", aspect="auto")


def show_change(axes: Axes, change: Tensor, scale: float) -> AxesImage:
    """A signed map, white at 0."""
    pixels = change.cpu().numpy()
    return axes.imshow(
        pixels, cmap=DIVERGING, vmin=-scale, vmax=scale, interpolation="nearest", origin="upper", aspect="auto"
    )


def heading(axes: Axes, grid: Grid, name: str, explanation: str = "") -> None:
    """A name above the first image of a column, and a fainter line below the name."""
    faint = fit(explanation, grid.room, SMALL)
    lines = 1 if explanation else 2
    wrapped = wrap(name, grid.room, TEXT).split("\n")
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], fit(" ".join(wrapped[lines - 1 :]), grid.room, TEXT)]
    common = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "bottom"}
    common |= {"family": FONT, "parse_math": False}
    axes.annotate("\n".join(wrapped), (0.5, 1), xytext=(0, 14 if faint else 3), fontsize=TEXT, color=INK, **common)
    if faint:
        axes.annotate(faint, (0.5, 1), xytext=(0, 3), fontsize=SMALL, color=FAINT, **common)


def row_name(axes: Axes, grid: Grid, name: str) -> None:
    """The true class, upwards along the left of a row."""
    axes.annotate(
        fit(name, 72 * (grid.zoom * grid.height + grid.below - 6) / DPI, TEXT),
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


def colour_bar(
    figure: Figure, grid: Grid, column: int, image: AxesImage, scale: float, largest: float, beyond: bool
) -> None:
    """Under the last image of a column: the scale of a map of changes, in units of 1/255."""
    width, height = round(figure.bbox.width), round(figure.bbox.height)
    place = (grid.x(column) / width, (grid.bottom - 22) / height, grid.zoom * grid.width / width, 13 / height)
    axes = figure.add_axes(place, facecolor="white")
    bar = figure.colorbar(
        image, cax=axes, orientation="horizontal", ticks=[-scale, 0, scale], extend="both" if beyond else "neither"
    )
    number = short(scale)
    left, _, right = bar.ax.set_xticklabels([f"{MINUS}{number}", "0", number])
    left.set_horizontalalignment("left")  # so that neither stands out of the column
    right.set_horizontalalignment("right")
    axes.tick_params(axis="x", labelsize=SMALL, labelcolor=INK, color=INK, labelfontfamily=FONT, length=3, pad=2)
    axes.grid(False)
    bar.outline.set_linewidth(0.6)
    bar.outline.set_edgecolor(FRAME)
    text = f"scale ±{number}/255,\nmean over channels;\none channel: ≤ {short(largest)}/255"
    bar.set_label(text, **words(), labelpad=2, linespacing=1.1)


def short(value: float) -> str:
    """A number of one decimal place, or of two digits below 1."""
    return f"{value:.1f}".removesuffix(".0") if value >= 1 else f"{value:.2g}"
