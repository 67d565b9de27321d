"""``python -m atoplib.batch RECIPE``: a recipe's notebooks by papermill, each in a process of its own."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoplib.batch.checks import Checking, check_writable
from atoplib.batch.pages import write_index, write_results
from atoplib.batch.recipe import (
    RecipeError,
    find_recipe,
    make_plan,
    read_recipe,
    report_job,
    select,
    stated_cost,
)
from atoplib.batch.runner import ENGINES, Outcome, job_state, run_jobs
from atoplib.files import read_json, workspace_dir
from atoplib.plain_yaml import NotPlainYAML, load_yaml

A_YEAR = 365 * 24 * 60  # minutes
MOST_ARRAY = 256  # runs that Slurm is given at once, unless --jobs says otherwise
MOST_LISTED = 12  # pages at the end; of more runs the experiment's page is named
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m atoplib.batch", description="Run a recipe's notebooks by papermill."
    )
    add = made.add_argument
    add("recipe", help="a name in notebooks/recipes, such as mnist, or the path of a YAML file")
    add("--workspace", default="", help="folder for runs/ and data/ (default: the project's own)")
    add("--smoke", action="store_true", help="a few images and steps, to see that everything runs")
    add(
        "-p",
        action="append",
        nargs=2,
        metavar=("NAME", "VALUE"),
        help="a parameter that overrides the recipe's",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check everything, say what would be run and what is there, run nothing",
    )
    add(
        "--only",
        action="append",
        metavar="PATTERN",
        help="only these runs and what they need, such as 04_attack or *seed=1",
    )
    add(
        "--jobs",
        type=_number(int, 1),
        metavar="N",
        help=f"so many runs at once (default 1; slurm {MOST_ARRAY})",
    )
    add(
        "--threads",
        type=_number(int, 1),
        metavar="N",
        help="threads of each run (default: the cores shared among --jobs)",
    )
    add(
        "--timeout",
        type=_number(float, 1),
        metavar="SECONDS",
        help="stop a run that takes longer (default: no limit)",
    )
    add(
        "--retry",
        type=_number(int, 0),
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="try a failed run so often again",
    )
    add("--reuse", action="store_true", help="keep finished runs although code or inputs have changed since")
    add(
        "--report",
        action=argparse.BooleanOptionalAction,
        help="compare all runs in 08_report (default: for a grid)",
    )
    add(
        "--minutes",
        type=_number(float, 0.001),
        metavar="N",
        help="after so long save, exit status 75; call again to go on",
    )
    add(
        "--results",
        metavar="DIR",
        help="also write numbers, plots and notebooks there, without pictures of data",
    )
    add("--engine", choices=ENGINES, default="local", help="where runs are executed (default local)")
    add(
        "--engine-option", action="append", nargs=2, metavar=("NAME", "VALUE"), help="what Slurm is asked for"
    )
    return made


def _number(kind: type, least: float) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < A_YEAR:  # NaN never is
            raise argparse.ArgumentTypeError(f"must be at least {least:g}, got {text}")
        return value

    return number


def parse_pairs(pairs: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """NAME VALUE pairs; values as YAML reads them (true, 1, 0.5, null, text), but for its comments: " #" is
    text.
    """
    try:
        return {name: value if " #" in value else load_yaml(value) for name, value in pairs or ()}
    except NotPlainYAML as error:
        raise RecipeError(f"a value given by -p: {error}") from error


class TimeIsUp(KeyboardInterrupt):
    """The minutes that a recipe was given are over: what runs saves and ends, as at a Ctrl-C."""


def _ring(*_: object) -> None:
    raise TimeIsUp


def run_recipe(options: argparse.Namespace) -> int:
    """Plan, check, and execute; returns the exit code. Raises RecipeError, with a sentence, before anything
    runs.
    """
    recipe = read_recipe(find_recipe(options.recipe, NOTEBOOKS), NOTEBOOKS)
    overrides = parse_pairs(options.p) | ({"smoke": True} if options.smoke else {})
    if any(
        "workspace" in given
        for given in (overrides, recipe.shared, *(own for _, own in recipe.entries.values()))
    ):
        raise RecipeError(
            "the workspace of a batch is given by --workspace DIR (make: WORKSPACE=DIR), not as a parameter"
        )
    jobs = make_plan(recipe, NOTEBOOKS, overrides | {"workspace": str(workspace_dir(options.workspace))})
    jobs = select(jobs, options.only) if options.only else jobs
    experiment = jobs[0].run_dir.parent
    results = Path(options.results).expanduser() if options.results else None
    for folder in {job.run_dir.parent for job in jobs} | ({results} if results else set()):
        check_writable(folder)
    local = options.engine == "local"
    checking = Checking(jobs, here=local)
    if options.dry_run:
        for number, job in enumerate(jobs, start=1):
            state, change = job_state(job, reuse=options.reuse)
            words = {"new": "to run", "unfinished": "to go on with", "done": "loaded: done before"}
            print(f"[{number}/{len(jobs)}] {job.label}: {words.get(state, f'to run again: {change}')}")
        print(
            f"The recipe says of its cost, as it is: {cost}" if (cost := stated_cost(recipe.source)) else "",
            flush=True,
        )
        checking.look(wait=True)
        print("Parameters, data, sizes, device and folders are checked.")
        return 0
    if not local:
        checking.look(wait=True)
    at_once = options.jobs or (1 if local else MOST_ARRAY)
    shared = at_once > 1 and local and "OMP_NUM_THREADS" not in os.environ
    threads = options.threads or (max(1, len(os.sched_getaffinity(0)) // at_once) if shared else None)
    more = (
        parse_pairs(options.engine_option)
        if local
        else {"folder": experiment / ".slurm"} | parse_pairs(options.engine_option)
    )
    if options.minutes:
        signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    try:
        engine = ENGINES[options.engine](at_once, options.timeout, threads, more)
        outcomes = run_jobs(jobs, engine, retries=options.retry, reuse=options.reuse, look=checking.look)
        good = [outcome.job for outcome in outcomes if outcome.good]
        if good and (bool(recipe.axes) if options.report is None else options.report):
            outcomes += run_jobs([report_job(good, NOTEBOOKS)], ENGINES["local"](), reuse=options.reuse)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return conclude(outcomes, experiment, results, recipe.source.stem)


def conclude(outcomes: Sequence[Outcome], experiment: Path, results: Path | None, name: str) -> int:
    """Print what came out and where it is; returns the exit code."""
    good = [outcome.job for outcome in outcomes if outcome.good]
    stages = [job.stage for job in good]
    tables = [
        job.run_dir / "table.md"
        for job in good
        if stages.count(job.stage) == 1 and job.stage in ("04_attack", "06_compare")
    ]
    texts = [path.read_text(encoding="utf-8").strip() for path in tables if path.is_file()]
    summary = "\n\n".join(
        text.partition("\n\n**majority**")[0] for text in texts
    )  # one sample, the other rules are in the file
    said = [
        f"{job.label}: {text}"
        for job in good
        if (text := (read_json(job.run_dir / "metrics.json") or {}).get("warning"))
    ]
    if good:
        pages = [f"  {job.page}" for job in good] if len(good) <= MOST_LISTED else []
        print(
            "\n".join(
                [
                    "",
                    *filter(None, [summary]),
                    *said,
                    f"All runs, pictures and tables: {write_index(experiment)}",
                    *pages,
                ]
            )
        )
    if good and results:
        write_results(results, good, f"# {name}\n\n{summary}")
        print(f"Results without weights and pictures of the data: {results}")
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in sorted(bad, key=lambda outcome: outcome.status):
        print(
            f"\n{outcome.reason}"
            if outcome.status == "failed"
            else f"{outcome.job.label} was not run: {outcome.reason}",
            file=sys.stderr,
        )
    if bad:
        print("the same command tries these again", file=sys.stderr)
    return bool(bad)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser().parse_args(arguments)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a scheduler's SIGTERM ends a recipe as Ctrl-C does
    try:
        return run_recipe(options)
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except TimeIsUp:
        print(
            f"\nstopped after {options.minutes:g} min, as asked; the same command goes on from here",
            file=sys.stderr,
        )
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
