"""Recipes: YAML that names notebooks, their parameters and a grid of values; and the jobs that they mean.
Read as data, never run as code.

    shared: {eps: 0.3}                                  every notebook that has the parameter
    grid: {seed: [0, 1], 04_attack: {steps: [20, 40]}}  all combinations; a notebook's own axes are listed
    under its name notebooks:
      01_train_classifier: {epochs: 6}                  in the order in which they need each other
      rival: {notebook: 01_train_classifier, adversarial: true}
      04_attack: {classifier_run: rival}                a run is named by its entry

Later entries override earlier ones: shared, the grid, the notebook's own, the grid under its name, ``-p``. So
a notebook takes no part in an axis of the grid that its own parameters fix, and one classifier serves a whole
grid of fine-tunings.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from atoplib.hashing import NO_IDENTITY
from atoplib.parameters import ParameterError, Parameters, read, suggestion
from atoplib.plain_yaml import load_yaml
from atoplib.runs import experiment_dir, resolve, run_name

REPORT = "08_report"  # of what others measured: no notebook of a recipe
MOST_BYTES = 1_000_000
MOST_POINTS = 10_000
LONGEST_NAME = 1000  # letters of a path

Axis = tuple[str | None, str]
"""Entry (None: every notebook that has it) and parameter."""


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says where it is wrong and what is allowed."""


@dataclass(frozen=True)
class Recipe:
    """A recipe's content: ``entries`` maps the name of an entry to its notebook and its own parameters."""

    source: Path
    shared: Mapping[str, Any]
    axes: Mapping[Axis, list[Any]]
    entries: Mapping[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Job:
    """One run: a notebook with its parameters, its directory, and the runs whose results it reads.

    Attributes:
        name: of its entry in the recipe.
        label: the name, and what tells the job from the others of its entry.
        parameters: checked, as JSON values.
        values: what papermill is given.
        needs: directories of the runs that must be complete before.
    """

    name: str
    notebook: Path
    parameters: Mapping[str, Any]
    values: Mapping[str, Any]
    run_dir: Path
    needs: tuple[Path, ...] = ()
    label: str = ""

    @property
    def stage(self) -> str:
        """The notebook's name without its ending."""
        return self.notebook.stem

    @property
    def executed(self) -> Path:
        """The executed notebook."""
        return self.run_dir / "notebook.ipynb"

    @property
    def page(self) -> Path:
        """The executed notebook as HTML."""
        return self.run_dir / "notebook.html"

    @property
    def hidden(self) -> Path:
        """The folder of an execution that goes on, or failed: its notebook so far and its log."""
        return self.run_dir / ".batch"


# -------------------------------------------------------------------------------------------- the YAML file


def find_recipe(name: str, notebooks_dir: Path) -> Path:
    """The file of a recipe: a path, or a name in ``notebooks/recipes``.

    Raises:
        RecipeError: naming the recipes that are there.
    """
    for path in (notebooks_dir / "recipes" / f"{name}.yaml", Path(name)):
        if len(name) < LONGEST_NAME and path.is_file():
            return path
    names = sorted(path.stem for path in (notebooks_dir / "recipes").glob("*.yaml"))
    raise RecipeError(f"there is no recipe {name!r}; allowed: {', '.join(names)}, or the path of a YAML file")


def read_recipe(source: Path, notebooks_dir: Path) -> Recipe:
    """Read a recipe and check its form.

    Raises:
        RecipeError: for a file that is no recipe, an unknown notebook, or a grid that is none; it begins with
            the path.
    """
    try:
        if source.stat().st_size > MOST_BYTES:
            raise RecipeError(f"it is larger than {MOST_BYTES / 1e6:.0f} MB: no recipe is")
        content = load_yaml(source.read_text(encoding="utf-8"))
        if (
            not isinstance(content, dict)
            or set(content) - {"shared", "grid", "notebooks"}
            or not content.get("notebooks")
        ):
            raise RecipeError(
                "it must hold 'notebooks' (name: parameters) and may hold 'shared' and 'grid', nothing else"
            )
        shared, grid, notebooks = (
            _mapping(name, content.get(name)) for name in ("shared", "grid", "notebooks")
        )
        entries = {name: _entry(name, _mapping(name, own), notebooks_dir) for name, own in notebooks.items()}
        recipe = Recipe(source, shared, dict(_axes(grid, entries)), entries)
        if (size := prod(map(len, recipe.axes.values()))) > MOST_POINTS:
            raise RecipeError(f"the grid has {size} combinations; allowed: at most {MOST_POINTS}")
        return recipe
    except (OSError, ValueError) as error:  # of a file that is no text, too
        raise RecipeError(f"{source}: {error}") from error


def stated_cost(source: Path) -> str:
    """What the comments at the head of a recipe say after ``cost``, on one line; "" where they say
    nothing.
    """
    found = re.search(r"^#\s+cost\s(.*(\n#\s{8,}.*)*)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return " ".join(found[1].replace("#", " ").split()) if found else ""


def _mapping(name: str, content: Any) -> Mapping[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{name!r} must be a mapping, got {_short(content)}")
    for key in content:
        if not isinstance(key, str):
            raise RecipeError(f"{name!r} holds the name {_short(key)}: names must be text, put it in quotes")
    return content


def _entry(name: str, own: Mapping[str, Any], notebooks_dir: Path) -> tuple[str, Mapping[str, Any]]:
    stages = sorted(path.stem for path in notebooks_dir.glob("0[1-9]_*.ipynb") if path.stem != REPORT)
    stage = own.get("notebook", name)
    if stage not in stages:
        allowed = f"{', '.join(stages)}, or a name of yours with 'notebook'"
        raise RecipeError(f"unknown notebook {_short(stage)}; allowed: {allowed}")
    if name in stages and stage != name:
        raise RecipeError(f"the entry {name} is the notebook {name}: give {stage} another name")
    return stage, {key: value for key, value in own.items() if key != "notebook"}


def _axes(grid: Mapping[str, Any], entries: Mapping[str, Any]) -> Iterator[tuple[Axis, list[Any]]]:
    for name, values in grid.items():
        if isinstance(values, dict) and name not in entries:
            raise RecipeError(
                f"the grid names {_short(name)}, which is no entry of notebooks: {', '.join(entries)}"
            )
        owner, axes = (name, _mapping(name, values)) if isinstance(values, dict) else (None, {name: values})
        for key, listed in axes.items():
            if not isinstance(listed, list) or not listed:
                raise RecipeError(f"the grid's {_short(key)} must be a list of values, got {_short(listed)}")
            if key in NO_IDENTITY:
                raise RecipeError(
                    f"{key} changes no result, so a grid over it would be one run: leave it out"
                )
            yield (owner, key), listed


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# ------------------------------------------------------------------------------------------------- its jobs


def make_plan(recipe: Recipe, notebooks_dir: Path, overrides: Mapping[str, Any]) -> list[Job]:
    """The jobs of a recipe, each after those that it needs. What several combinations of the grid share is
    one job.

    Args:
        overrides: parameters that override the recipe's and its grid's, for every notebook that has them.

    Raises:
        RecipeError: for a parameter that no notebook has, a wrong value, or a run of an entry that comes
            later.
    """
    defaults = {
        name: _defaults(notebooks_dir / f"{stage}.ipynb") for name, (stage, _) in recipe.entries.items()
    }
    general = {*recipe.shared, *overrides, *(name for owner, name in recipe.axes if owner is None)}
    known = {name for parameters in defaults.values() for name in parameters}
    for name in sorted(general - known, key=str):
        raise RecipeError(
            f"{recipe.source}: no notebook has the parameter {name!r}{suggestion(str(name), known)}"
        )
    jobs: dict[Path, Job] = {}
    for point in product(*recipe.axes.values()):
        grid = dict(zip(recipe.axes, point, strict=True))
        earlier: dict[str, Job] = {}
        for name, (stage, own) in recipe.entries.items():
            shared = recipe.shared | {key: value for (owner, key), value in grid.items() if owner is None}
            here = {key: value for (owner, key), value in grid.items() if owner == name}
            values = {key: value for key, value in shared.items() if key in defaults[name]} | own | here
            values |= {key: value for key, value in overrides.items() if key in defaults[name]}
            try:
                job = _job(name, notebooks_dir / f"{stage}.ipynb", values, earlier, list(recipe.entries))
            except ValueError as error:
                raise RecipeError(f"{recipe.source}: {error}") from error
            earlier[name] = jobs.setdefault(job.run_dir, job)
    for owner, name in recipe.axes:
        takers = [entry for entry in recipe.entries if owner in (None, entry) and name in defaults[entry]]
        if name in overrides or (owner is None and all(name in recipe.entries[entry][1] for entry in takers)):
            raise RecipeError(
                f"{recipe.source}: the grid's {name} reaches no notebook: each has a value of its own for it"
            )
    return labelled(list(jobs.values()))


@cache
def _defaults(notebook: Path) -> Parameters:
    return read(notebook)


def _job(
    name: str, notebook: Path, values: dict[str, Any], earlier: Mapping[str, Job], entries: list[str]
) -> Job:
    """One entry at one point of the grid; runs of earlier entries, and ``latest``, are replaced by their
    names.
    """
    needs: list[Path] = []

    def run_of(field: str, wanted: Any) -> Any:
        if isinstance(wanted, dict):
            return {key: run_of(field, value) for key, value in wanted.items()}
        if wanted in earlier:
            needs.append(earlier[wanted].run_dir)
            return earlier[wanted].run_dir.name
        if wanted in entries:
            raise ParameterError(
                f"{name} asks for {field} = {wanted!r}, which comes after it: change their order"
            )
        return wanted

    for field, rule in _defaults(notebook).run_fields.items():
        wanted = values.get(field, getattr(_defaults(notebook), field))
        if wanted == "latest":
            named = [field.removesuffix("_run"), rule.stage]  # at_run: the entry called at
            fitting = [entry for entry in named if entry in earlier and _fits(earlier[entry], rule)]
            later = [entry for entry in named if entry in entries and entry not in earlier]
            wanted = (fitting or later or ["latest"])[0]
        values[field] = run_of(field, wanted)
    p = resolve(read(notebook, values))
    values |= {field: getattr(p, field) for field in p.run_fields}
    return Job(
        name,
        notebook,
        p.as_dict(),
        values,
        experiment_dir(p) / run_name(notebook.stem, p.as_dict()),
        tuple(needs),
    )


def _fits(job: Job, rule: Any) -> bool:
    """Whether an entry is the run that ``latest`` means."""
    return job.stage == rule.stage and all(
        job.parameters.get(key) == value for key, value in rule.wanted.items()
    )


def labelled(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with labels: the parameters in which the jobs of one entry differ, or else the run's hash."""
    labels: dict[Path, str] = {}
    for name in dict.fromkeys(job.name for job in jobs):
        group = [job for job in jobs if job.name == name]
        runs = _defaults(group[0].notebook).run_fields
        axes = [
            key
            for key in group[0].parameters
            if len({repr(job.parameters[key]) for job in group}) > 1 and key not in runs
        ]
        texts = [" ".join([name, *(f"{key}={_shown(job.parameters[key])}" for key in axes)]) for job in group]
        for job, text in zip(group, texts, strict=True):
            labels[job.run_dir] = (
                text if texts.count(text) == 1 else f"{text} ({job.run_dir.name.rpartition('-')[2]})"
            )
    return [replace(job, label=labels[job.run_dir]) for job in jobs]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def select(jobs: Sequence[Job], patterns: Sequence[str]) -> list[Job]:
    """The jobs whose name, label or run matches a pattern (``04_attack``, ``*seed=1*``), and all that they
    need.

    Raises:
        RecipeError: if a pattern matches none.
    """
    wanted: set[Path] = set()
    for pattern in patterns:
        found = {
            j.run_dir
            for j in jobs
            if any(fnmatch(text, pattern) for text in (j.name, j.stage, j.label, j.run_dir.name))
        }
        if not found:
            names = ", ".join(dict.fromkeys(job.name for job in jobs))
            raise RecipeError(f"--only {pattern} matches no run of this recipe; it has {names}")
        wanted |= found
    for job in reversed(jobs):
        wanted |= set(job.needs) if job.run_dir in wanted else set()
    return [job for job in jobs if job.run_dir in wanted]


def report_job(jobs: Sequence[Job], notebooks_dir: Path) -> Job:
    """The job that turns the runs of others, at least one, into tables and pictures."""
    notebook = notebooks_dir / f"{REPORT}.ipynb"
    here = jobs[0].run_dir.parent
    runs = sorted(job.run_dir.name if job.run_dir.parent == here else str(job.run_dir) for job in jobs)
    shared = {name: value for name, value in jobs[0].parameters.items() if name in _defaults(notebook)}
    return replace(_job(REPORT, notebook, {**shared, "runs": runs}, {}, []), label=REPORT)
