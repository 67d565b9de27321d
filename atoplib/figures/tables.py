"""Accuracies and their intervals, by defence and attack: read with care, and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple

from atoplib.drawing import MISSING


def format_table(table: Iterable[Any]) -> str:
    """A Markdown table, readable as plain text: rows defences, columns attacks, cells ``97.2 [95.1, 98.4]`` in %.

    ``table`` and errors are those of ``accuracy_bars``; a missing combination is a dash.
    """
    content = read_table(table)
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


class Cell(NamedTuple):
    """An accuracy and its interval, shares in [0, 1]."""

    accuracy: float
    low: float
    high: float

    def text(self) -> str:
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Table(NamedTuple):
    """Names in their order of appearance, cells by (defence, attack)."""

    defences: list[str]
    attacks: list[str]
    cells: dict[tuple[str, str], Cell]


def read_table(table: Iterable[Any]) -> Table:
    """The table of ``accuracy_bars``; raises ValueError as it says."""
    cells: dict[tuple[str, str], Cell] = {}
    for entry in table:
        defence, attack = str(entry_value(entry, "defence")), str(entry_value(entry, "attack"))
        cell = Cell(*(float(entry_value(entry, name)) for name in Cell._fields))
        check_cell(cell, f"{defence!r} under {attack!r}")
        if (defence, attack) in cells:
            raise ValueError(f"the table holds {defence!r} under {attack!r} twice: give each combination once")
        cells[defence, attack] = cell
    if not cells:
        raise ValueError("the table is empty: give at least one entry with defence, attack, accuracy, low and high")
    defences, attacks = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    return Table(defences, attacks, cells)


def check_cell(cell: Cell, where: str) -> None:
    """Raise ValueError unless 0 <= low <= accuracy <= high <= 1."""
    slack = 1e-6  # an interval computed in floating point may miss its own end by a rounding error
    if not -slack <= cell.low <= cell.accuracy + slack <= cell.high + 2 * slack <= 1 + 3 * slack:
        raise ValueError(
            f"{where} has low {cell.low}, accuracy {cell.accuracy}, high {cell.high}: "
            f"0 <= low <= accuracy <= high <= 1 must hold (shares, not per cent)"
        )


def entry_value(entry: Any, name: str, needed: Sequence[str] = ("defence", "attack", *Cell._fields)) -> Any:
    """An entry of a mapping, or an attribute; raises ValueError, naming all that are needed, without it."""
    if isinstance(entry, Mapping) and name in entry:
        return entry[name]
    if not isinstance(entry, Mapping) and hasattr(entry, name):
        return getattr(entry, name)
    raise ValueError(f"a table entry lacks {name!r}: each needs {', '.join(needed)}, got {entry!r}")


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
