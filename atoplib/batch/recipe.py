"""Recipes: YAML that names notebooks, their parameters and a grid of values. Read as data, never run as code.

    shared: {eps: 0.3}                                  every notebook that has the parameter
    grid: {seed: [0, 1], 04_attack: {steps: [20, 40]}}  all combinations; a notebook's own axes stand under its name
    notebooks:
      01_train_classifier: {epochs: 6}                  in the order in which they need each other
      rival: {notebook: 01_train_classifier, adversarial: true}
      04_attack: {classifier_run: rival}                a run is named by its entry

What stands later wins: shared, the grid, the notebook's own, the grid under its name. So a notebook takes no part in an
axis of the grid that its own parameters fix, and one classifier serves a whole grid of fine-tunings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from atoplib.parameters import NOTEBOOKS, REPORT
from atoplib.plain_yaml import NotPlainYAML, load_yaml

MOST_BYTES = 1_000_000
MOST_POINTS = 10_000

Axis = tuple[str | None, str]
"""Entry (None: every notebook that has it) and parameter."""
Point = Mapping[Axis, Any]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says where it is wrong and what is allowed."""


@dataclass(frozen=True)
class Entry:
    """One line under ``notebooks``: a name that others refer to, the notebook, and its own parameters."""

    name: str
    notebook: str
    own: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe's content; its parameters are checked when a plan is made of it."""

    source: Path
    shared: Mapping[str, Any]
    axes: Mapping[Axis, tuple[Any, ...]]
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """How many combinations the grid has."""
        return prod(map(len, self.axes.values()))

    def points(self) -> Iterator[Point]:
        """Every combination of the grid; one empty point without a grid."""
        for values in product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


def find_recipe(name: str, notebooks_dir: Path) -> Path:
    """The file of a recipe: a path, or a name in ``notebooks/recipes``.

    Raises:
        RecipeError: naming the recipes that are there.
    """
    for path in (notebooks_dir / "recipes" / f"{name}.yaml", Path(name)):
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name that no file can have
            break
    there = sorted(path.stem for path in (notebooks_dir / "recipes").glob("*.yaml"))
    raise RecipeError(f"there is no recipe {name!r}; allowed: {', '.join(there)}, or the path of a YAML file")


def read_recipe(source: Path) -> Recipe:
    """Read a recipe and check its form.

    Raises:
        RecipeError: for a file that is no recipe, an unknown notebook, or a grid that is none; it begins with the path.
    """
    try:
        if source.stat().st_size > MOST_BYTES:
            raise RecipeError(f"it is larger than {MOST_BYTES / 1e6:.0f} MB: no recipe is")
        return parse_recipe(load_yaml(source.read_text(encoding="utf-8")), source)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} cannot be read as YAML: {error}") from error
    except (NotPlainYAML, RecipeError) as error:
        raise RecipeError(f"{source}: {error}") from error


def stated_cost(source: Path) -> str:
    """What the comments at the head of a recipe say after ``cost``, on one line; "" where they say nothing."""
    head = [line[1:] for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found: list[str] = []
    for line in head:
        first, _, rest = line.strip().partition(" ")
        if found and line.startswith(" " * 8):
            found.append(line.strip())
        elif found:
            break
        elif first == "cost":
            found.append(rest.strip())
    return " ".join(found)


def parse_recipe(content: Any, source: Path) -> Recipe:
    """The recipe in what YAML holds; raises RecipeError as ``read_recipe`` does, without the path."""
    if not isinstance(content, dict) or set(content) - {"shared", "grid", "notebooks"} or not content.get("notebooks"):
        raise RecipeError("it must hold 'notebooks' (name: parameters) and may hold 'shared' and 'grid', nothing else")
    shared, grid, notebooks = content.get("shared") or {}, content.get("grid") or {}, content["notebooks"]
    for name, part in (("shared", shared), ("grid", grid), ("notebooks", notebooks)):
        check_names(name, part)
    entries = tuple(parse_entry(name, own) for name, own in notebooks.items())
    recipe = Recipe(source, shared, parse_grid(grid, [entry.name for entry in entries]), entries)
    if recipe.size > MOST_POINTS:
        raise RecipeError(f"the grid has {recipe.size} combinations; allowed: at most {MOST_POINTS}")
    return recipe


def parse_entry(name: str, own: Any) -> Entry:
    """One entry of ``notebooks``; raises RecipeError."""
    own = {} if own is None else own
    check_names(name, own)
    notebook = own.get("notebook", name)
    if not isinstance(notebook, str) or notebook not in NOTEBOOKS or notebook == REPORT:
        allowed = ", ".join(stage for stage in NOTEBOOKS if stage != REPORT)
        raise RecipeError(f"unknown notebook {short(notebook)}; allowed: {allowed}, or a name of yours with 'notebook'")
    if name in NOTEBOOKS and notebook != name:
        raise RecipeError(f"the entry {name} is the notebook {name}: give {notebook} another name")
    return Entry(name, notebook, {key: value for key, value in own.items() if key != "notebook"})


def check_names(where: str, content: Any) -> None:
    """Raise RecipeError unless something is a mapping whose names are text."""
    if not isinstance(content, dict):
        raise RecipeError(f"{where!r} must be a mapping, got {short(content)}")
    wrong = next((name for name in content if not isinstance(name, str)), None)
    if wrong is not None:
        raise RecipeError(f"{where!r} holds the name {short(wrong)}: names must be text, put it in quotes")


def parse_grid(grid: Mapping[str, Any], entries: list[str]) -> dict[Axis, tuple[Any, ...]]:
    """The axes of a grid; raises RecipeError."""
    axes: dict[Axis, tuple[Any, ...]] = {}
    for name, values in grid.items():
        if isinstance(values, dict):
            check_names(name, values)
            if name not in entries:
                raise RecipeError(f"the grid names {short(name)}, which is no entry of notebooks: {', '.join(entries)}")
            axes |= {(name, key): axis_values(key, own) for key, own in values.items()}
        else:
            axes[None, name] = axis_values(name, values)
    return axes


def axis_values(name: str, values: Any) -> tuple[Any, ...]:
    """The values of one axis, at least one; raises RecipeError."""
    if not isinstance(values, list) or not values:
        raise RecipeError(f"the grid's {short(name)} must be a list of values, got {short(values)}")
    return tuple(values)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
