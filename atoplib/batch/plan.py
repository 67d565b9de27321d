"""Plans: the runs that a recipe asks for, each once, with what each needs; every parameter checked before any runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from atoplib.batch.recipe import Entry, Point, Recipe, RecipeError
from atoplib.data import count_test_images
from atoplib.parameters import NOTEBOOKS, REPORT, Attacking, ParameterError, Parameters
from atoplib.runs import PLACES, run_name


@dataclass(frozen=True)
class Job:
    """One run: a notebook with its checked parameters, its directory, and the jobs whose results it reads.

    Attributes:
        name: of its entry in the recipe.
        label: the name, and what tells the job from the others of its entry.
        values: what papermill is given.
        needs: directories of the runs that must be complete before.
    """

    name: str
    notebook: Path
    parameters: Parameters
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


def make_plan(recipe: Recipe, notebooks_dir: Path, overrides: Mapping[str, Any]) -> list[Job]:
    """The jobs of a recipe, each after those that it needs. What several combinations of the grid share is one job.

    Args:
        overrides: parameters that win over the recipe's and over its grid, for every notebook that has them.

    Raises:
        RecipeError: for a parameter that no notebook has, a wrong value, or a run of an entry that comes later.
    """
    places = sorted(name for _, name in recipe.axes if name in PLACES)
    if places:
        raise RecipeError(
            f"{recipe.source}: {places[0]} changes no result, so a grid over it would be one run: leave it out"
        )
    jobs: dict[Path, Job] = {}
    used: set[Any] = set()
    for point in recipe.points():
        names_of_runs: dict[str, str] = {}
        dirs: dict[str, Path] = {}
        for position, entry in enumerate(recipe.entries):
            later = {other.name for other in recipe.entries[position:]}
            try:
                values, needs = values_of(entry, recipe.shared, point, overrides, names_of_runs, later, used)
                parameters = NOTEBOOKS[entry.notebook].from_mapping(values)
            except (ParameterError, RecipeError) as error:
                raise RecipeError(f"{recipe.source}: {error}") from error
            names_of_runs[entry.name] = run_name(entry.notebook, parameters.as_dict())
            dirs[entry.name] = run_dir = parameters.experiment_dir / names_of_runs[entry.name]
            if run_dir not in jobs:
                notebook = notebooks_dir / f"{entry.notebook}.ipynb"
                jobs[run_dir] = Job(entry.name, notebook, parameters, values, run_dir, tuple(dirs[name] for name in needs))
    unused = {*recipe.shared, *overrides, *(name for owner, name in recipe.axes if owner is None)} - used
    if unused:
        listed = ", ".join(map(repr, sorted(unused, key=str)))
        raise RecipeError(f"{recipe.source}: no notebook has the parameter {listed}, or each has a value of its own for it")
    return labelled(list(jobs.values()))


def check_images(jobs: Sequence[Job]) -> None:
    """Raise RecipeError if a notebook asks for more test images than a folder has, before any hour is spent on training."""
    counts: dict[str, int] = {}
    for job in jobs:
        name = job.parameters.dataset
        if name.startswith("folder:") and isinstance(job.parameters, Attacking):
            try:
                counts[name] = counts[name] if name in counts else count_test_images(name)
            except (ValueError, OSError):
                return  # its notebook says what is wrong with the folder
            try:
                job.parameters.check_count(counts[name])
            except ParameterError as error:
                raise RecipeError(str(error)) from error


def values_of(
    entry: Entry,
    shared: Mapping[str, Any],
    point: Point,
    overrides: Mapping[str, Any],
    names_of_runs: Mapping[str, str],
    later: set[str],
    used: set[Any],
) -> tuple[dict[str, Any], list[str]]:
    """What one entry's notebook is given at one point of the grid, and the entries whose runs it reads.

    Args:
        names_of_runs: runs of the entries before this one.
        later: this entry and those after it.
        used: the shared names that found a notebook are added to it.
    """
    kind = fields(NOTEBOOKS[entry.notebook])
    known = {item.name for item in kind}
    general = {**shared, **{name: value for (owner, name), value in point.items() if owner is None}}
    here = {name: value for (owner, name), value in point.items() if owner == entry.name}
    used |= {name for name in general if name in known and name not in entry.own} | (known & set(overrides))
    used |= {name for name in shared if name in known}
    values = {name: value for name, value in general.items() if name in known}
    values |= {**entry.own, **here, **{name: value for name, value in overrides.items() if name in known}}
    needs = []
    for item in kind:
        stage = item.metadata.get("stage")
        if stage is None:
            continue
        wanted = values.get(item.name, item.default)
        if wanted == item.default == "latest":  # also where it is written out
            wanted = stage
        if isinstance(wanted, str) and wanted in later:
            raise RecipeError(f"{entry.name} asks for {item.name} = {wanted!r}, which comes after it: change their order")
        if isinstance(wanted, str) and wanted in names_of_runs:
            values[item.name] = names_of_runs[wanted]
            needs.append(wanted)
    for item in kind:
        named = values.get(item.name)
        if not item.metadata.get("runs") or not isinstance(named, dict):
            continue

        def found(wanted: Any, name: str = item.name) -> Any:
            if isinstance(wanted, dict):
                return {key: found(value) for key, value in wanted.items()}
            if isinstance(wanted, str) and wanted in later:
                raise RecipeError(f"{entry.name} asks for {name} = {wanted!r}, which comes after it: change their order")
            if not isinstance(wanted, str) or wanted not in names_of_runs:
                return wanted
            needs.append(wanted)
            return names_of_runs[wanted]

        values[item.name] = found(named)
    return values, needs


def labelled(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with labels: the parameters in which the jobs of one entry differ, or else the run's hash."""
    by_name: dict[str, list[Job]] = {}
    for job in jobs:
        by_name.setdefault(job.name, []).append(job)
    labels = {}
    for name, group in by_name.items():
        own = [job.parameters.as_dict() for job in group]
        runs = {item.name for item in fields(type(group[0].parameters)) if {"stage", "runs"} & set(item.metadata)}
        varied = [key for key in own[0] if key not in runs and len({repr(values[key]) for values in own}) > 1]
        texts = [" ".join([name, *(f"{key}={shown(values[key])}" for key in varied)]) for values in own]
        for job, text in zip(group, texts, strict=True):
            labels[job.run_dir] = text if texts.count(text) == 1 else f"{text} ({job.run_dir.name.rpartition('-')[2]})"
    return [Job(**{**vars(job), "label": labels[job.run_dir]}) for job in jobs]


def shown(value: Any) -> str:
    """A parameter's value in a label."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def select(jobs: Sequence[Job], patterns: Sequence[str]) -> list[Job]:
    """The jobs whose name, label or run matches a pattern (``04_attack``, ``*seed=1*``), and all that they need.

    Raises:
        RecipeError: if a pattern matches none.
    """
    wanted: set[Path] = set()
    for pattern in patterns:
        found = {
            j.run_dir for j in jobs if any(fnmatch(text, pattern) for text in (j.name, j.stage, j.label, j.run_dir.name))
        }
        if not found:
            names = ", ".join(dict.fromkeys(job.name for job in jobs))
            raise RecipeError(f"--only {pattern} matches no run of this recipe; it has {names}")
        wanted |= found
    for job in reversed(jobs):
        if job.run_dir in wanted:
            wanted |= set(job.needs)
    return [job for job in jobs if job.run_dir in wanted]


def report_job(jobs: Sequence[Job], notebooks_dir: Path) -> Job:
    """The job that turns the runs of others into tables and pictures.

    Args:
        jobs: complete ones, at least one.
    """
    first = jobs[0].parameters
    kind = NOTEBOOKS[REPORT]
    common = {name: getattr(first, name) for name in ("experiment", "dataset", "smoke", "device", "data_dir", "workspace")}
    here = jobs[0].run_dir.parent
    values = {**common, "runs": sorted(j.run_dir.name if j.run_dir.parent == here else str(j.run_dir) for j in jobs)}
    parameters = kind.from_mapping(values)
    run_dir = parameters.experiment_dir / run_name(REPORT, parameters.as_dict())
    return Job(REPORT, notebooks_dir / f"{REPORT}.ipynb", parameters, values, run_dir, label=REPORT)
