"""The command ``python -m atoplib.batch``."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from atoplib.batch import ledger
from atoplib.batch.early import check_early, check_names
from atoplib.batch.engines import ENGINES, Settings
from atoplib.batch.overview import Overview, format_bytes
from atoplib.batch.plan import Job, check_images, make_plan, report_job, select
from atoplib.batch.recipe import RecipeError, find_recipe, read_recipe, stated_cost
from atoplib.batch.results import write_results
from atoplib.batch.runner import Outcome, run_jobs
from atoplib.batch.table import write_table
from atoplib.evaluation import Score
from atoplib.parameters import Attack, Compare, Measuring
from atoplib.plain_yaml import NotPlainYAML, load_yaml
from atoplib.progress import format_seconds
from atoplib.runs import read_json, workspace_dir

A_YEAR = 365 * 24 * 60  # minutes
MOST_LISTED = 12  # files at the end; of more runs their folder is named


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m atoplib.batch", description="Run a recipe's notebooks by papermill.")
    made.add_argument("recipe", help="a name in notebooks/recipes, such as mnist, or the path of a YAML file")
    made.add_argument("--workspace", default="", help="folder for runs/ and data/ (default: the project's own)")
    made.add_argument("--smoke", action="store_true", help="a few images and steps, to see that everything runs")
    made.add_argument(
        "-p", action="append", nargs=2, metavar=("NAME", "VALUE"), help="a parameter that wins over the recipe's"
    )
    made.add_argument("--dry-run", action="store_true", help="print the plan with its cost, run nothing")
    made.add_argument(
        "--only", action="append", metavar="PATTERN", help="only these runs and what they need, such as 04_attack or *seed=1"
    )
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="so many runs at once (default 1)")
    made.add_argument(
        "--threads", type=int, metavar="N", help="threads of each run (default: the cores shared among --jobs)"
    )
    made.add_argument("--timeout", type=float, metavar="SECONDS", help="stop a run that takes longer (default: no limit)")
    made.add_argument(
        "--retry", type=int, nargs="?", const=1, default=0, metavar="N", help="try a run that fails so many times more"
    )
    made.add_argument("--reuse", action="store_true", help="keep finished runs although code or inputs have changed since")
    made.add_argument(
        "--report", action=argparse.BooleanOptionalAction, help="compare all runs in 08_report (default: for a grid)"
    )
    made.add_argument(
        "--minutes", type=float, metavar="N", help="after so long save, and end with exit status 75; call again to go on"
    )
    made.add_argument(
        "--results", metavar="DIR", help="also write numbers, plots and notebooks there, without pictures of data"
    )
    made.add_argument("--engine", choices=ENGINES, default="local", help="where runs are executed (default local)")
    made.add_argument(
        "--engine-option", action="append", nargs=2, metavar=("NAME", "VALUE"), help="what ray or slurm itself takes"
    )
    return made


def parse_overrides(pairs: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """``-p NAME VALUE`` pairs; values as YAML reads them (true, 1, 0.5, null, text), but for its comments: " #" is text."""
    try:
        read = {name: load_yaml(value) for name, value in pairs or ()}
    except NotPlainYAML as error:
        raise RecipeError(f"a value given by -p: {error}") from error
    given = dict(pairs or ())
    return {name: given[name] if isinstance(value, str) and " #" in given[name] else value for name, value in read.items()}


def settings_of(options: argparse.Namespace) -> Settings:
    """How to execute, as the options say. Raises RecipeError for impossible numbers."""
    threads = options.threads
    if threads is None and options.jobs > 1 and options.engine == "local" and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    if options.minutes is not None and not 0 < options.minutes < A_YEAR:
        raise RecipeError(f"--minutes must be a number above 0, got {options.minutes:g}")
    try:
        own = parse_overrides(options.engine_option)
        return Settings(options.jobs, options.retry, options.timeout, threads, options.reuse, own)
    except ValueError as error:
        raise RecipeError(f"--{error}") from error


def described(jobs: Sequence[Job], settings: Settings, stated: str = "") -> Iterator[str]:
    """The plan as ``--dry-run`` prints it; ``stated`` is the cost that the recipe itself states, for runs never made."""
    costs = ledger.Costs(jobs)
    width = max(len(job.label) for job in jobs)
    total, unknown, done = 0.0, 0, set()
    for number, job in enumerate(jobs, start=1):
        standing = ledger.standing(job, reuse=settings.reuse)
        expected = costs.expected(job)
        cost = "cost unknown" if expected is None else f"about {format_seconds(expected)}"
        if standing.name == "done":
            done.add(job.run_dir)
            text = "done before" if done.issuperset(job.needs) else "done before, but what it needs is run again"
        else:
            total, unknown = total + (expected or 0.0), unknown + (expected is None)
            verb = {"new": "to run", "unfinished": "to go on with", "changed": f"to run again: {standing.reason}"}
            text = f"{verb[standing.name]}, {cost}"
        yield f"[{number}/{len(jobs)}] {job.label:<{width}}  {text}"
    left = len(jobs) - len(done)
    free = ledger.free_bytes(jobs[0].run_dir)
    yield ""
    yield f"{len(jobs)} runs, {len(done)} of them done; {left} to run"
    if left:
        known = f"about {format_seconds(total / settings.jobs)} with --jobs {settings.jobs}" if left > unknown else "unknown"
        yield f"time: {known}" + (f", without the {unknown} runs of unknown cost" if 0 < unknown < left else "")
        if unknown and stated:
            yield f"the recipe says of its cost: {stated}"
    yield f"disk: {format_bytes(sum(ledger.folder_bytes(job.run_dir) for job in jobs))} used, {format_bytes(free)} free"


def scores_of(job: Job) -> list[Score]:
    """The scores that a notebook measured, if it is one that measures."""
    metrics = read_json(job.run_dir / "metrics.json") or {}
    return [Score(**entry) for entry in metrics.get("scores", ())]


def measured(attack: Measuring, images: int) -> Iterator[str]:
    """What the table of one notebook shows: how many images, by which protocol, how strong, seen from where."""
    budget = {"linf": "l_inf eps", "l2": "l_2 eps", "flow": "flow"}
    used = [norm for norm in budget if any(planned.norm == norm for planned in attack.plan.attacks)]
    yield (
        f"Accuracy in % with its 95 % interval, one draw an image, {images} test images of {attack.data_name}; "
        f"protocol {attack.plan.name}, {', '.join(f'{budget[norm]} {getattr(attack.budget, norm):.4g}' for norm in used)}."
    )
    blind = [planned.heading for planned in attack.plan.attacks if planned.sees == "classifier"]
    seeing = [planned.heading for planned in attack.plan.attacks if planned.sees != "classifier"]
    if blind:
        rest = "; the others meet the whole pipeline" if seeing else ""
        rest = f"; {seeing[0]}: it sees the whole pipeline" if len(seeing) == 1 else rest
        yield f"{', '.join(blind)}: the attack sees the classifier alone{rest}."


def score_tables(good: Sequence[Job]) -> Iterator[str]:
    """The table of the notebook that measured, with what it shows; nothing where several did, which a report compares."""
    from atoplib.figures import format_table  # here, because a recipe should start without a second of matplotlib's import

    for stage in (Attack.STAGE, Compare.STAGE):
        jobs = [job for job in good if job.stage == stage]
        scores = scores_of(jobs[0]) if len(jobs) == 1 else []
        if scores:
            yield ""
            yield from measured(jobs[0].parameters, scores[0].images)
            yield ""
            yield format_table(scores)


def warnings(good: Sequence[Job]) -> Iterator[str]:
    """What the trainings themselves say is wrong with them."""
    for job in good:
        if said := (read_json(job.run_dir / "metrics.json") or {}).get("warning"):
            yield f"{job.label}: {said}"


def places(good: Sequence[Job], table: Path) -> Iterator[str]:
    """Where everything is."""
    yield f"All parameters and metrics: {table}"
    if len(good) > MOST_LISTED:
        yield f"Executed notebooks, each as notebook.ipynb and notebook.html: {good[0].run_dir.parent}/*/"
        yield from (f"Comparison: {job.page}" for job in good if job.name == job.stage == "08_report")
        return
    yield "Executed notebooks, each as .ipynb and .html:"
    yield from (f"  {job.page}" for job in good)
    pictures = [
        path for job in good for kind in ("figures", "pictures") for path in sorted(job.run_dir.glob(f"{kind}/*.png"))
    ]
    if pictures:
        yield "Pictures:"
        yield from (f"  {path}" for path in pictures)


def failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The runs that failed, with the failing cell and its error, and those that were not run for it."""
    for status in ("failed", "not run"):
        for outcome in outcomes:
            if outcome.status == status:
                yield outcome.reason if status == "failed" else f"{outcome.job.label} was not run: {outcome.reason}"
    yield "the same command tries these again"


def run_plan(
    jobs: Sequence[Job], settings: Settings, notebooks_dir: Path, options: argparse.Namespace, *, grid: bool
) -> int:
    """Execute a plan, compare its runs, and print what came out; returns the exit code."""
    engine = ENGINES[options.engine]
    outcomes = run_jobs(jobs, settings, Overview(jobs, workers=settings.jobs), engine=engine)
    good = [outcome.job for outcome in outcomes if outcome.good]
    if good and (grid if options.report is None else options.report):
        report = report_job(good, notebooks_dir)
        outcomes += run_jobs([report], replace(settings, options={}), Overview([report]))
    if good:
        table = good[0].run_dir.parent / "table.csv"
        write_table(table, [job.run_dir for job in good])
        good = [outcome.job for outcome in outcomes if outcome.good]
        tables = "\n".join(score_tables(good))
        said = list(warnings(good))
        print("\n".join([*filter(None, [tables]), *([""] if said else []), *said, "", *places(good, table)]))
        if options.results:
            folder = write_results(Path(options.results).expanduser(), good, f"# {Path(options.recipe).stem}\n{tables}")
            print(f"Results without weights and pictures of the data: {folder}")
    if all(outcome.good for outcome in outcomes):
        return 0
    print("\n" + "\n".join(failures(outcomes)), file=sys.stderr)
    return 1


class TimeIsUp(KeyboardInterrupt):
    """The minutes that a recipe was given are over: what runs saves and ends, as at a Ctrl-C."""


@contextmanager
def limited(minutes: float | None) -> Iterator[None]:
    """Raises TimeIsUp in the block after so many minutes; None sets no limit."""
    if minutes is None:
        yield
        return

    def ring(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM ends a recipe as Ctrl-C does
    notebooks_dir = Path(__file__).resolve().parent.parent.parent / "notebooks"
    try:
        overrides: Mapping[str, Any] = parse_overrides(options.p) | ({"smoke": True} if options.smoke else {})
        settings = settings_of(options)
        recipe = read_recipe(find_recipe(options.recipe, notebooks_dir))
        if any("workspace" in given for given in (overrides, recipe.shared, *(entry.own for entry in recipe.entries))):
            raise RecipeError(
                "the workspace of a batch is given by --workspace DIR (make: WORKSPACE=DIR), not as a parameter"
            )
        overrides = {**overrides, "workspace": str(workspace_dir(options.workspace))}
        check_names(recipe, overrides)
        jobs = make_plan(recipe, notebooks_dir, overrides)
        jobs = select(jobs, options.only) if options.only else jobs
        results = Path(options.results).expanduser() if options.results else None
        check_early(jobs, here=options.engine == "local", results=results)
        check_images(jobs)
        if options.dry_run:
            asked = {"smoke", "dataset", "image_size", "max_train", "max_test"} & set(overrides)
            stated = "" if asked or options.only else stated_cost(recipe.source)  # it was stated for what the recipe says
            print("\n".join(described(jobs, settings, stated)))
            return 0
        with limited(options.minutes):
            return run_plan(jobs, settings, notebooks_dir, options, grid=recipe.size > 1)
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except TimeIsUp:
        print(f"\nstopped after {options.minutes:g} min, as asked; the same command goes on from here", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
