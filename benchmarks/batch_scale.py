"""What the batch layer itself costs: many runs that do nothing, and what is left behind.

    python benchmarks/batch_scale.py [--runs 200] [--jobs 2] [--notebook 5]

Each run is a process that only writes what a complete run leaves. Printed for every quarter of the runs: seconds a run, this
process's memory and open files, and the processes it has left. The time of a run must not grow with their number, and
nothing may leak. ``--notebook N`` prints what a run costs before its first training step, medians of N: notebook 1 through
the batch layer, and by the papermill command.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import yaml

from atoplib.batch import Job, Settings, make_plan, read_recipe, run_jobs, worker
from atoplib.batch.overview import Overview

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SHORT = {"max_train": 512, "max_test": 64, "epochs": 6, "classifier_options": {"width": 4, "stem_stride": 2}}
NOTHING = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
(run / "notebook.part.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
(run / "manifest.json").write_text(json.dumps({"status": "complete", "stage": "01_train_classifier"}))
"""


def nothing(job: Job, parameters_file: Path, output: Path, transport: str) -> list[str]:
    """In the place of papermill: a process that leaves a complete run and does nothing else."""
    return [sys.executable, "-I", "-S", "-c", NOTHING, str(job.run_dir)]


def plan(folder: Path, runs: int) -> list[Job]:
    """So many independent jobs."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"notebooks": {"01_train_classifier": None}, "grid": {"seed": list(range(runs))}}))
    return make_plan(read_recipe(recipe), NOTEBOOKS, {"workspace": str(folder)})


def resident_megabytes() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> int:
    """Processes that this one has left, zombies included."""
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return len(task.read_text().split()) if task.exists() else 0


def measure(runs: int, jobs: int) -> list[tuple[int, float, float, int, int]]:
    """(runs so far, seconds a run, MB, open files, child processes) after each quarter."""
    worker.papermill_command, real = nothing, worker.papermill_command
    try:
        with tempfile.TemporaryDirectory(prefix="batch-scale-") as folder:
            planned, rows, before = plan(Path(folder), runs), [], children()
            for quarter in range(4):
                chosen = planned[runs * quarter // 4 : runs * (quarter + 1) // 4]
                started = time.monotonic()
                outcomes = run_jobs(
                    chosen, Settings(jobs=jobs), Overview(chosen, workers=jobs, out=io.StringIO(), live=True)
                )
                seconds = (time.monotonic() - started) / len(chosen)
                assert all(outcome.status == "complete" for outcome in outcomes)
                files = len(os.listdir("/proc/self/fd"))
                rows.append((runs * (quarter + 1) // 4, seconds, resident_megabytes(), files, children() - before))
            return rows
    finally:
        worker.papermill_command = real


class Watch(Overview):
    """An overview that shows nothing and notes when each run was begun."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(jobs, out=io.StringIO(), live=False)
        self.began: dict[Path, float] = {}

    def started(self, job: Job) -> None:
        """A job begins."""
        self.began[job.run_dir] = time.time()


@contextmanager
def first_steps(folder: Path) -> Iterator[dict[Path, float]]:
    """When the trainings below a folder took their first step, by run directory, as soon as each is known."""
    found: dict[Path, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            for path in folder.glob("runs/*/*/progress.txt"):  # written at the first step, removed at the end
                with suppress(FileNotFoundError):
                    found.setdefault(path.parent, path.stat().st_mtime)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def seconds_to_first_step(repetitions: int) -> tuple[float, float, float]:
    """Medians over so many runs of notebook 1: through the batch layer, from the moment that a run is begun, and by the
    papermill command; and of a batch's own start, once for all its runs (``--dry-run``).
    """
    ours, theirs, once = [], [], []
    environment = {**os.environ, "PYTHONPATH": str(NOTEBOOKS.parent)}
    with tempfile.TemporaryDirectory(prefix="batch-scale-") as name, first_steps(Path(name)) as steps:
        folder = Path(name)
        recipe, output, values = folder / "recipe.yaml", folder / "out.ipynb", folder / "values.yaml"
        for seed in range(repetitions):  # in turn, so that another load of the machine meets both
            recipe.write_text(yaml.safe_dump({"notebooks": {"01_train_classifier": {**SHORT, "seed": seed}}}))
            jobs = make_plan(read_recipe(recipe), NOTEBOOKS, {"workspace": name})
            watch = Watch(jobs)
            assert run_jobs(jobs, Settings(), watch)[0].status == "complete"
            ours.append(steps[jobs[0].run_dir] - watch.began[jobs[0].run_dir])

            values.write_text(yaml.safe_dump({**jobs[0].values, "seed": repetitions + seed}))
            command = [sys.executable, "-m", "papermill", str(jobs[0].notebook), str(output), "-k", "python3"]
            known, started = set(steps), time.time()
            subprocess.run([*command, "-f", str(values), "--no-progress-bar"], check=True, capture_output=True)
            (run_dir,) = set(steps) - known
            theirs.append(steps[run_dir] - started)

            started = time.time()
            command = [sys.executable, "-m", "atoplib.batch", str(recipe), "--workspace", name, "--dry-run"]
            subprocess.run(command, check=True, capture_output=True, env=environment)
            once.append(time.time() - started)
    return median(ours), median(theirs), median(once)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="What the batch layer itself costs.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--notebook", type=int, default=0, metavar="N", help="also time N real runs to their first step")
    options = parser.parse_args(arguments)
    if options.runs < 4:
        parser.error(f"--runs must be at least 4, got {options.runs}")
    print("| runs | seconds a run | MB | open files | child processes |")
    print("|---:|---:|---:|---:|---:|")
    for runs, seconds, memory, files, left in measure(options.runs, options.jobs):
        print(f"| {runs} | {seconds:.3f} | {memory:.0f} | {files} | {left} |")
    if options.notebook:
        ours, theirs, once = seconds_to_first_step(options.notebook)
        print(f"\nfrom start to first training step: {ours:.1f} s through the batch layer, {theirs:.1f} s by papermill")
        print(f"a batch's own start, once: {once:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
