"""What the batch layer itself costs: many runs that do nothing, and what is left behind.

    python benchmarks/batch_scale.py [--runs 200] [--jobs 2]

Each run is a process that only writes what a complete run leaves. Printed for every quarter of the runs: seconds a run, this
process's memory and open files, and the processes it has left. The time of a run must not grow with their number, and
nothing may leak. What papermill and a kernel add is printed by ``--notebook``: the time of one run of a notebook with a
single cell, through the batch layer's process and by the papermill command.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import yaml

from atoplib.batch import Job, Settings, make_plan, read_recipe, run_jobs, worker
from atoplib.batch.overview import Overview

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
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


def notebook_seconds() -> tuple[float, float]:
    """Seconds to execute a notebook with one cell: through the batch layer's process, and by the papermill command."""
    with tempfile.TemporaryDirectory(prefix="batch-scale-") as folder:
        cell = nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]})
        notebook, out, values = (str(Path(folder) / name) for name in ("in.ipynb", "out.ipynb", "values.yaml"))
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), notebook)
        Path(values).write_text("a: 2\n")
        ours = [sys.executable, "-P", worker.papermill_process.__file__, notebook, out, values, "ipc"]
        theirs = [sys.executable, "-m", "papermill", notebook, out, "-k", "python3", "-f", values, "--no-progress-bar"]
        seconds = []
        for command in (ours, theirs):
            started = time.monotonic()
            with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.wait() == 0
            seconds.append(time.monotonic() - started)
        return seconds[0], seconds[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="What the batch layer itself costs.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--notebook", action="store_true", help="also time a notebook of one cell")
    options = parser.parse_args(arguments)
    if options.runs < 4:
        parser.error(f"--runs must be at least 4, got {options.runs}")
    print("| runs | seconds a run | MB | open files | child processes |")
    print("|---:|---:|---:|---:|---:|")
    for runs, seconds, memory, files, left in measure(options.runs, options.jobs):
        print(f"| {runs} | {seconds:.3f} | {memory:.0f} | {files} | {left} |")
    if options.notebook:
        ours, theirs = notebook_seconds()
        print(f"\na notebook of one cell: {ours:.1f} s through the batch layer, {theirs:.1f} s by the papermill command")
    return 0


if __name__ == "__main__":
    sys.exit(main())
