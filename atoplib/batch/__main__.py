"""``python -m atoplib.batch RECIPE``: a recipe's notebooks by papermill, each in a process of its own."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from atoplib import files
from atoplib.batch import checks, pages, recipe, runner

MOST_ARRAY = 256  # runs that Slurm is given at once, unless --jobs says otherwise
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FLAG: dict[str, Any] = {"action": "store_true"}
NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
PAIRS: dict[str, Any] = {"action": "append", "nargs": 2, "metavar": ("NAME", "VALUE"), "default": []}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({}, "a name in notebooks/recipes, such as mnist, or the path of a YAML file"),
    "--workspace": ({"default": ""}, "folder for runs/ and data/ (default: the project's own)"),
    "--smoke": (FLAG, "a few images and steps, to see that everything runs"),
    "-p": (PAIRS, "a parameter that overrides the recipe's"),
    "--dry-run": (FLAG, "check everything, say what would be run, run nothing"),
    "--only": (
        {"action": "append", "metavar": "PATTERN"},
        "these runs and what they need: 04_attack, *seed=1",
    ),
    "--jobs": (NUMBER, f"so many runs at once (default 1; slurm {MOST_ARRAY})"),
    "--threads": (NUMBER, "of each run (default: the cores shared among --jobs)"),
    "--timeout": ({"type": float, "metavar": "SECONDS"}, "stop a run that takes longer (default: no limit)"),
    "--retry": (NUMBER | {"nargs": "?", "const": 1, "default": 0}, "try a failed run so often again"),
    "--reuse": (FLAG, "keep finished runs although code or inputs have changed since"),
    "--report": ({"action": argparse.BooleanOptionalAction}, "compare all in 08_report (default: of a grid)"),
    "--minutes": (
        {"type": float, "default": 0, "metavar": "N"},
        "then save, exit status 75; call again to go on",
    ),
    "--results": (
        {"type": Path, "metavar": "DIR"},
        "also write numbers, plots and notebooks there, no images",
    ),
    "--engine": ({"choices": ("local", "slurm"), "default": "local"}, "where runs are executed"),
    "--engine-option": (PAIRS, "what Slurm is asked for"),
}


def parse_pairs(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """NAME VALUE pairs; values as YAML reads them (true, 1, 0.5, null, text), but for its comments: " #" is
    text.
    """
    return {name: value if " #" in value else files.read_yaml(value) for name, value in pairs}


def run_recipe(options: argparse.Namespace) -> int:
    """Plan, check, and execute; returns the exit code. Raises ValueError or OSError, with a sentence, where
    nothing can be run.
    """
    overrides = (
        {"workspace": options.workspace} | parse_pairs(options.p) | ({"smoke": True} if options.smoke else {})
    )
    overrides["workspace"] = str(files.workspace_dir(str(overrides["workspace"] or "")))
    source = recipe.find_recipe(options.recipe, NOTEBOOKS)
    jobs = recipe.select(recipe.make_plan(source, NOTEBOOKS, overrides), options.only or ["*"])
    local, asked = options.engine == "local", parse_pairs(options.engine_option)
    if local and asked:
        raise ValueError(f"--engine-option is for --engine slurm, got {', '.join(asked)}")
    checking = checks.begin_checks(
        [job for job in jobs if runner.job_state(job, reuse=options.reuse)[0] != "done"], here=local
    )
    if options.dry_run:
        tell_plan(jobs, source, reuse=options.reuse)
        print(*checking.result(), "Parameters, data, sizes and device are checked.", sep="\n")
        return 0
    if local:
        at_once, threads = options.jobs or 1, options.threads
        if at_once > 1 and not threads and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, len(os.sched_getaffinity(0)) // at_once)
        engine = runner.local(options.timeout, threads)
    else:
        at_once = options.jobs or MOST_ARRAY
        engine = runner.slurm(jobs[0].run_dir.parent / ".slurm", asked, options.timeout, options.threads)
        checking.result()
    missing = runner.run_jobs(
        jobs,
        engine,
        at_once,
        retries=options.retry,
        reuse=options.reuse,
        look=lambda: checking.done() and checking.result(),
    )
    good = [job for job in jobs if not missing[job.run_dir]]
    if good and (any(job.axes for job in jobs) if options.report is None else options.report):
        report = recipe.report_job(good, NOTEBOOKS)
        missing |= runner.run_jobs([report], runner.local(), reuse=options.reuse)
        good += [] if missing[report.run_dir] else [report]
    if good:
        conclude(good, options.results, options.smoke)
    if reasons := [reason for reason in missing.values() if reason]:
        print("", *reasons, "the same command tries these again", sep="\n", file=sys.stderr)
    return bool(reasons)


def tell_plan(jobs: Sequence[recipe.Job], source: Path, *, reuse: bool) -> None:
    """Print what a recipe says of itself, such as its cost, and what would be done with each of its jobs."""
    print(
        *takewhile(lambda line: line.startswith("#"), source.read_text(encoding="utf-8").splitlines()),
        sep="\n",
    )
    words = {"new": "to run", "unfinished": "to go on with", "done": "loaded: done before"}
    for number, job in enumerate(jobs, start=1):
        state, change = runner.job_state(job, reuse=reuse)
        print(f"[{number}/{len(jobs)}] {job.label}: {words.get(state, f'to run again: {change}')}")


def conclude(good: Sequence[recipe.Job], results: Path | None, smoke: bool) -> None:
    """Print the tables of attacks, one sample an image, and where everything is."""
    tables = (
        path.read_text(encoding="utf-8")
        for job in good
        if job.stage in ("04_attack", "06_compare") and not job.axes
        for path in job.run_dir.glob("table.md")
    )
    summary = "\n".join(table.partition("\n\n**majority**")[0] for table in tables)
    print("\nSMOKE: a few images and steps; these numbers mean nothing." * smoke + f"\n{summary}")
    for job in good:
        if warning := (files.read_json(job.run_dir / "metrics.json") or {}).get("warning"):
            print(f"{job.label}: {warning}")
    experiment = good[0].run_dir.parent
    print(f"All runs, pictures and tables: {pages.write_index(experiment)}")
    if results:
        pages.write_results(results, good, f"# {experiment.name}\n\n{summary}")
        print(f"Results without weights and pictures of the data: {results}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. What runs saves and ends at a Ctrl-C, at a scheduler's SIGTERM, and
    when the minutes that it was given are over.
    """
    parser = argparse.ArgumentParser("python -m atoplib.batch", description="Run a recipe's notebooks.")
    for name, (settings, what) in OPTIONS.items():
        parser.add_argument(name, help=what, **settings)
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    try:
        return run_recipe(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return os.EX_TEMPFAIL if options.minutes and not signal.getitimer(signal.ITIMER_REAL)[0] else 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.exit(main())
