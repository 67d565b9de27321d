"""Recipes: YAML that names notebooks, their parameters and a grid of values; and the jobs that they mean.
Read as data, never run as code.

    shared: {eps: 0.3}                                  every notebook that has the parameter
    grid: {seed: [0, 1], 04_attack: {steps: [20, 40]}}  all combinations; a notebook's own axes under its name
    notebooks:
      01_train_classifier: {epochs: 6}                  in the order in which they need each other
      rival: {notebook: 01_train_classifier, adversarial: true}
      04_attack: {classifier_run: rival}                a run is named by its entry

Later entries override earlier ones: shared, the grid, the notebook's own, the grid under its name, ``-p``. So
a notebook takes no part in an axis of the grid that its own parameters fix, and one classifier serves a whole
grid of fine-tunings.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from atoplib import files, hashing, parameters, runs

REPORT = "08_report"  # of what others measured: no notebook of a recipe

# Entry (None: every notebook that has it) and parameter.
Axis = tuple[str | None, str]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says where it is wrong and what is allowed."""


@dataclass(frozen=True)
class Job:
    """One run: a notebook with its parameters, its directory, and the runs whose results it reads.

    Attributes:
        name: of its entry in the recipe.
        parameters: checked, as JSON values; papermill is given all of them.
        needs: directories of the runs that must be complete before.
        axes: its place in the grid, that of the runs that it needs included.
    """

    name: str
    notebook: Path
    parameters: Mapping[str, Any]
    run_dir: Path
    needs: tuple[Path, ...]
    axes: Mapping[Axis, Any]

    @property
    def label(self) -> str:
        """The name, and what tells the job from the others of its entry."""
        return " ".join([self.name, *(f"{key}={value}" for (_, key), value in self.axes.items())])

    @property
    def stage(self) -> str:
        """The notebook's name without its ending."""
        return self.notebook.stem

    @property
    def executed(self) -> Path:
        """The executed notebook."""
        return self.run_dir / "notebook.ipynb"


# -------------------------------------------------------------------------------------------- the YAML file


def find_recipe(name: str, notebooks_dir: Path) -> Path:
    """The file of a recipe: a path, or a name in ``notebooks/recipes``; RecipeError lists those."""
    known = {path.stem: path for path in sorted((notebooks_dir / "recipes").glob("*.yaml"))}
    if name in known or Path(name).is_file():
        return known.get(name, Path(name))
    raise RecipeError(f"there is no recipe {name!r}; allowed: {', '.join(known)}, or the path of a YAML file")


def _read(
    source: Path, notebooks_dir: Path
) -> tuple[dict[str, Any], dict[Axis, list[Any]], dict[str, tuple[Path, dict[str, Any]]]]:
    """A recipe's shared parameters, the axes of its grid, and its entries by name: their notebooks and own
    parameters.
    """
    content = _mapping("the recipe", files.read_yaml(source.read_text(encoding="utf-8")))
    if set(content) - {"shared", "grid", "notebooks"} or not content.get("notebooks"):
        raise RecipeError(
            "it must hold 'notebooks' (name: parameters) and may hold 'shared' and 'grid', nothing else"
        )
    shared, grid, notebooks = (_mapping(name, content.get(name)) for name in ("shared", "grid", "notebooks"))
    entries = {
        name: _entry(name, _mapping(name, values), notebooks_dir) for name, values in notebooks.items()
    }
    if any("workspace" in values for values in (shared, *(values for _, values in entries.values()))):
        raise RecipeError(
            "the workspace is no parameter of a recipe: give it by --workspace DIR (make: WORKSPACE=DIR)"
        )
    return shared, dict(_axes(grid, entries)), entries


def _mapping(name: str, content: Any) -> dict[str, Any]:
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"{name!r} must be a mapping, got {content!r:.200}")
    return content or {}


def _entry(name: str, values: Mapping[str, Any], notebooks_dir: Path) -> tuple[Path, dict[str, Any]]:
    stages = sorted(path.stem for path in notebooks_dir.glob("0[1-9]_*.ipynb") if path.stem != REPORT)
    stage = values.get("notebook", name)
    if stage not in stages:
        raise RecipeError(
            f"unknown notebook {stage!r:.200}; allowed: {', '.join(stages)}, or a name of yours with "
            f"'notebook'"
        )
    return notebooks_dir / f"{stage}.ipynb", {k: v for k, v in values.items() if k != "notebook"}


def _axes(grid: Mapping[str, Any], entries: Mapping[str, Any]) -> Iterator[tuple[Axis, list[Any]]]:
    for name, values in grid.items():
        owner = name if isinstance(values, dict) else None
        if owner and owner not in entries:
            raise RecipeError(
                f"the grid names {name!r}, which is no entry of notebooks: {', '.join(entries)}"
            )
        for key, listed in (values if owner else {name: values}).items():
            if not isinstance(listed, list) or not listed:
                raise RecipeError(f"the grid's {key!r} must be a list of values, got {listed!r:.200}")
            yield (owner, key), listed


# ------------------------------------------------------------------------------------------------- its jobs


def make_plan(source: Path, notebooks_dir: Path, overrides: Mapping[str, Any]) -> list[Job]:
    """The jobs of a recipe, each after those that it needs. What several combinations of the grid share is
    one job.

    Args:
        overrides: parameters that override the recipe's and its grid's, for every notebook that has them.

    Raises:
        RecipeError: for a file that is no recipe, an unknown notebook or parameter, a wrong value, or a run
            that is neither planned nor there; it begins with the path.
    """
    try:
        shared, axes, entries = _read(source, notebooks_dir)
        defaults = {name: _defaults(notebook).as_dict() for name, (notebook, _) in entries.items()}
        names = (*shared, *overrides, *(name for owner, name in axes if owner is None))
        parameters.check_known(names, set().union(*defaults.values()), "no notebook has the parameter")
        for owner, name in axes:
            takers = [settings for entry, (_, settings) in entries.items() if name in defaults[entry]]
            fixed = name in overrides or (owner is None and all(name in settings for settings in takers))
            if fixed or name in hashing.NO_IDENTITY:
                raise RecipeError(
                    f"the grid's {name} changes no run: the notebooks have values of their own for it, or it "
                    f"does not decide on results"
                )
        jobs: dict[Path, Job] = {}
        for point in product(*axes.values()):
            earlier: dict[str, Job] = {}
            for name, (notebook, settings) in entries.items():
                here = {
                    (owner, key): value
                    for (owner, key), value in zip(axes, point, strict=True)
                    if owner == name or (owner is None and key in defaults[name] and key not in settings)
                }
                common, last = (
                    {key: value for key, value in layer.items() if key in defaults[name]}
                    for layer in (shared, overrides)
                )
                values = common | settings | {key: value for (_, key), value in here.items()} | last
                job = _job(name, notebook, values, here, earlier, list(entries))
                earlier[name] = jobs.setdefault(job.run_dir, job)
        return list(jobs.values())
    except (OSError, ValueError) as error:  # of a file that is no text, too
        raise RecipeError(f"{source}: {error}") from error


_defaults = cache(parameters.read)


def _job(
    name: str,
    notebook: Path,
    values: dict[str, Any],
    axes: Mapping[Axis, Any],
    earlier: Mapping[str, Job],
    entries: Sequence[str],
) -> Job:
    """One entry at one point of the grid; runs of earlier entries, and ``latest``, are replaced by their
    names.
    """
    needs: list[Job] = []
    others: list[str] = []

    def run_of(field: str, wanted: Any) -> Any:
        if isinstance(wanted, dict):
            return {key: run_of(field, value) for key, value in wanted.items()}
        if wanted in earlier:
            needs.append(earlier[wanted])
            return earlier[wanted].run_dir.name
        if wanted in entries:
            raise RecipeError(
                f"{name} asks for {field} = {wanted!r}, which comes after it: change their order"
            )
        others.append(wanted)
        return wanted

    for field, rule in _defaults(notebook).run_fields.items():
        wanted = values.get(field, getattr(_defaults(notebook), field))
        if wanted == "latest":
            named = [field.removesuffix("_run"), rule.stage]  # at_run: the entry called at
            fitting = [
                entry
                for entry in named
                if entry in earlier
                and earlier[entry].stage == rule.stage
                and rule.wanted.items() <= earlier[entry].parameters.items()
            ]
            later = [entry for entry in named if entry in entries and entry not in earlier]
            wanted = (fitting or later or ["latest"])[0]
        values[field] = run_of(field, wanted)
    p = runs.resolve(parameters.read(notebook, values))
    for wanted in others:
        if (
            wanted not in ("", "latest", "own")
            and not wanted.startswith("pretrained")
            and not wanted.endswith(parameters.WEIGHTS)
        ):
            runs.find_run(p, wanted, "")  # raises unless it is there
    for need in needs:
        axes = need.axes | axes
    return Job(
        name,
        notebook,
        p.as_dict(),
        runs.experiment_dir(p) / runs.run_name(notebook.stem, p.as_dict()),
        tuple(need.run_dir for need in needs),
        axes,
    )


def select(jobs: Sequence[Job], patterns: Sequence[str]) -> list[Job]:
    """The jobs whose name, label or run matches a pattern (``04_attack``, ``*seed=1*``), and all that they
    need.

    Raises:
        RecipeError: if a pattern matches none.
    """
    wanted: set[Path] = set()
    for pattern in patterns:
        matches = {
            job.run_dir
            for job in jobs
            if fnmatch.filter((job.name, job.stage, job.label, job.run_dir.name), pattern)
        }
        if not matches:
            raise RecipeError(
                f"--only {pattern} matches no run of this recipe; it has "
                f"{', '.join(dict.fromkeys(job.name for job in jobs))}"
            )
        wanted |= matches
    for job in reversed(jobs):
        if job.run_dir in wanted:
            wanted.update(job.needs)
    return [job for job in jobs if job.run_dir in wanted]


def report_job(jobs: Sequence[Job], notebooks_dir: Path) -> Job:
    """The job that turns the runs of others, at least one, into tables and pictures."""
    notebook = notebooks_dir / f"{REPORT}.ipynb"
    known, here = _defaults(notebook).as_dict(), jobs[0].run_dir.parent
    values = {name: value for name, value in jobs[0].parameters.items() if name in known} | {
        "runs": sorted(job.run_dir.name if job.run_dir.parent == here else str(job.run_dir) for job in jobs)
    }
    return _job(REPORT, notebook, values, {}, {}, [])
