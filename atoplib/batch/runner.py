"""Many jobs: each as soon as what it needs is complete, as many at once as asked for; one that fails stops no
other.

An engine executes them: this machine, or Slurm by submitit, which needs a file system that all machines share
and the same environment on each (docs/cluster.md).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from atoplib import files, progress, runs
from atoplib.batch import worker
from atoplib.batch.pages import write_page
from atoplib.batch.recipe import Job

POLL_SECONDS = 0.1  # between two looks at a process, or at what is running
STOP_SECONDS = 60  # for a notebook to save and end after a Ctrl-C
SAY_SECONDS = 60.0  # between two lines about a run where no terminal renews them
ASK_SECONDS = 20  # between two questions to Slurm


# Begins jobs that are ready together, and ends them when the event is set. Each of the calls waits until its
# job has ended, and returns why it failed; "" if it is complete.
Engine = Callable[[Sequence[Job], threading.Event], list[Callable[[], str]]]


# ----------------------------------------------------------------------------------------- on this machine


def local(timeout: float | None = None, threads: int | None = None) -> Engine:
    """This machine; ``execute`` has the arguments."""
    return lambda jobs, stop: [partial(execute, job, stop, timeout, threads) for job in jobs]


def execute(
    job: Job,
    stop: threading.Event | None = None,
    timeout: float | None = None,
    threads: int | None = None,
    patience: float = 0.0,
) -> str:
    """Execute a job's notebook in a process of its own and keep it as ``notebook.ipynb`` in the run's
    directory.

    Args:
        stop: when it is set, the notebook saves what it has and ends.
        timeout: seconds after which it does so, too.
        threads: that it computes with; None leaves the choice to torch. Another number rounds otherwise.
        patience: seconds to wait for another process that works in the run's directory.

    Returns:
        why it failed: the failing cell with its error, and where to look; "" if it is complete.

    Raises:
        OSError: if its directory cannot be written.
    """
    started, manifest_path = time.monotonic(), job.run_dir / "manifest.json"
    folder = job.run_dir / ".batch"  # of an execution that goes on, or failed
    part, log = folder / "notebook.ipynb", folder / "papermill.log"
    while runs.in_use(job.run_dir):
        if time.monotonic() >= started + patience:
            return f"{job.run_dir} is in use by another process: wait until it ends, or stop it"
        time.sleep(POLL_SECONDS)
    before = files.read_json(manifest_path)
    files.write_json(folder / "parameters.json", dict(job.parameters))
    for left_over in (part, job.run_dir / ".progress.txt"):
        left_over.unlink(missing_ok=True)
    with log.open("w") as file:
        code, in_time = _run_process(job, file, stop or threading.Event(), timeout, threads)
    manifest = files.read_json(manifest_path) or {}
    if code == 0 and manifest.get("status") == "complete" and manifest != before:
        os.replace(part, job.executed)
        job.executed.with_suffix(".html").unlink(missing_ok=True)  # of an earlier execution
        shutil.rmtree(folder)
        return ""
    reason = _failing_cell(part) or manifest.get("error") or log.read_text(errors="replace")[-500:].strip()
    if not in_time:
        reason = (
            f"it ran longer than the {progress.format_seconds(timeout)} of --timeout; a training goes on "
            "next time"
        )
    return f"{reason}\nnotebook so far: {part}\nlog: {log}"


def _run_process(
    job: Job, log: TextIO, stop: threading.Event, timeout: float | None, threads: int | None
) -> tuple[int, bool]:
    """Run papermill; returns its exit status, and whether it needed no longer than it was given."""
    until = time.monotonic() + (timeout or float("inf"))
    # In /tmp, as the system allows the name of a kernel's socket 107 letters.
    with (
        tempfile.TemporaryDirectory(prefix="atop-", dir="/tmp", ignore_cleanup_errors=True) as scratch,
        subprocess.Popen(
            papermill_command(job),
            env={
                **os.environ,
                **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
                runs.NAME_FROM_BATCH: job.run_dir.name,
                "PYTHONUNBUFFERED": "1",
                # Notebooks that run side by side would otherwise share a history and race for ports.
                "IPYTHONDIR": scratch,
                "JUPYTER_RUNTIME_DIR": scratch,
            },
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        while process.poll() is None and time.monotonic() < until and not stop.wait(POLL_SECONDS):
            pass
        in_time = time.monotonic() < until
        process.terminate()  # does nothing, as kill, to one that has ended
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
    return process.returncode, in_time


def papermill_command(job: Job) -> list[str]:
    """The command that executes a job."""
    return [
        sys.executable,
        "-P",  # the current folder is no place to import from
        "-m",
        worker.__name__,
        str(job.notebook),
        str(job.run_dir),
        str(job.run_dir / ".batch"),
    ]


def _failing_cell(notebook: Path) -> str:
    """The error of the first cell that failed: its number as Jupyter shows it, type and message; "" if none
    did. Of a killed kernel all cells read "completed".
    """
    errors = (
        f"In [{cell.get('execution_count')}]: {output.get('ename')}: {output.get('evalue')}"
        for cell in (files.read_json(notebook) or {}).get("cells", [])
        for output in cell.get("outputs", [])
        if output.get("output_type") == "error"
    )
    return next(errors, "")


# ------------------------------------------------------------------------------------------------- on Slurm


def slurm(folder: Path, options: Mapping[str, Any], timeout: float | None, threads: int | None) -> Engine:
    """Slurm: jobs that are ready together are one job array, a task a run; a run whose node died is requeued.

    Args:
        folder: for its logs.
        options: anything of submitit's executor (``slurm_partition``, ``gpus_per_node``, ``timeout_min``).

    Raises:
        ValueError: if submitit is not installed, there is no Slurm, or an option is none of submitit's.
    """
    try:
        import submitit

        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        asked = {"cpus_per_task": threads or 1, "timeout_min": 24 * 60} | options  # submitit would say 5
        more = {"requeue": True} | asked.pop("slurm_additional_parameters", {})
        executor.update_parameters(slurm_additional_parameters=more, **asked)
    except (ImportError, RuntimeError, NameError, TypeError) as error:
        raise ValueError(f"the engine slurm cannot be used so: {error}") from error

    def begin(jobs: Sequence[Job], stop: threading.Event) -> list[Callable[[], str]]:
        # begun anew on another node when one is lost: the first may hold the run's directory for a while
        with executor.batch():
            tasks = [executor.submit(execute, job, None, timeout, threads, 2 * STOP_SECONDS) for job in jobs]
        return [partial(_follow, task, stop) for task in tasks]

    return begin


def _follow(task: Any, stop: threading.Event) -> str:
    """Wait for a task's file of results; the task is lost when Slurm says twice that it knows it no longer,
    and no such file has come.
    """
    lost, ask = 0, time.monotonic() + ASK_SECONDS
    while not task.paths.result_pickle.exists():
        if stop.wait(1):
            task.cancel(check=False)  # what runs saves and ends
            return "it was stopped with the batch"
        if lost == 2:
            return f"Slurm lost job {task.job_id}; log: {task.paths.stderr}"
        if time.monotonic() > ask:
            # not sacct: small clusters keep no accounts
            asked = subprocess.run(
                ("squeue", "--noheader", "--format=%T", f"--jobs={task.job_id}"),
                capture_output=True,
                text=True,
            )
            gone = "Invalid job id" in asked.stderr or (asked.returncode == 0 and not asked.stdout.strip())
            lost, ask = lost + 1 if gone else 0, time.monotonic() + ASK_SECONDS
    return task.result()


# ------------------------------------------------------------------------------------------------ many jobs


def job_state(job: Job, *, reuse: bool = False) -> tuple[str, str]:
    """What an earlier call left of a job: new, unfinished, done, or changed with a sentence that says what.

    Args:
        reuse: take what is there even if code, versions or inputs have changed since.
    """
    manifest = files.read_json(job.run_dir / "manifest.json")
    if manifest is None:
        return "new", ""
    if not reuse and (change := runs.difference(job.run_dir, job.notebook)):
        return "changed", change
    return ("done" if manifest.get("status") == "complete" and job.executed.is_file() else "unfinished"), ""


def run_jobs(
    jobs: Sequence[Job],
    engine: Engine,
    at_once: int = 1,
    *,
    retries: int = 0,
    reuse: bool = False,
    look: Callable[[], None] = lambda: None,
    out: TextIO | None = None,
) -> dict[Path, str]:
    """Execute what is not done yet of a plan, and tell of it.

    Whether a job is done is asked when all that it needs is complete: one whose inputs came out as before is
    not repeated. Each notebook's page is made while others run.

    Args:
        retries: so many more attempts for one that fails.
        reuse: as ``job_state``.
        look: called again and again; what it raises ends the batch as a Ctrl-C does.
        out: where what happens is told; None is standard output.

    Returns:
        by run directory, why there are no results; "" where they are.

    Raises:
        KeyboardInterrupt: after the notebooks that were running have saved and ended.
    """
    overview, stop = Overview(jobs, out or sys.stdout), threading.Event()
    by_folder = {job.run_dir: job for job in jobs}
    waiting, running = list(jobs), dict[Future[str], tuple[Job, float]]()
    missing, attempts = dict[Path, str](), {job.run_dir: 0 for job in jobs}
    pages = list[tuple[Job, Future[None]]]()

    def settle(job: Job, shown: str, reason: str = "") -> None:
        missing[job.run_dir] = reason
        overview.say(job, shown)
        if not reason:
            pages.append((job, background.submit(write_page, job.executed)))

    with ThreadPoolExecutor(at_once) as pool, ThreadPoolExecutor(1) as background:
        try:
            while waiting or running:
                begun: list[Job] = []
                for job in list(waiting):
                    bad = [by_folder[need] for need in job.needs if missing.get(need)]
                    if not bad and (
                        not missing.keys() >= {*job.needs} or len(running) + len(begun) >= at_once
                    ):
                        continue
                    waiting.remove(job)
                    state, change = ("", "") if bad else job_state(job, reuse=reuse)
                    if bad:
                        settle(job, "not run", f"{job.label} was not run: it needs {bad[0].label}")
                    elif state == "done":
                        settle(job, "done before")
                    else:
                        overview.say(job, f"run again: {change}" if change else "started")
                        begun.append(job)
                for job, call in zip(begun, engine(begun, stop) if begun else [], strict=True):
                    running[pool.submit(call)] = job, time.monotonic()
                for future in wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    job, began = running.pop(future)
                    error = future.exception()
                    reason = f"{type(error).__name__}: {error}" if error else future.result()
                    attempts[job.run_dir] += 1
                    if not reason:
                        settle(job, f"complete, {progress.format_seconds(time.monotonic() - began)}")
                    elif attempts[job.run_dir] <= retries:
                        overview.say(job, f"attempt {attempts[job.run_dir]} failed, trying again")
                        waiting.insert(0, job)
                    else:
                        settle(job, "failed", f"{job.label} failed: {reason}")
                overview.show([job for job, _ in running.values()])
                look()
        finally:
            stop.set()
            overview.line.close()
    for job, page in pages:
        if error := page.exception():
            overview.say(job, f"complete, but without a page: {error!r:.150}")
    return missing


class Overview:
    """What a person sees of a batch: a line when a run starts and when it ends, and what its notebook tells
    in between, with a rate and the time left: in a terminal one line, renewed, which shows the runs in turn;
    else another line now and then.
    """

    def __init__(self, jobs: Sequence[Job], out: TextIO) -> None:
        width = max(len(job.label) for job in jobs)
        self.heads = {job.run_dir: f"[{i}/{len(jobs)}] {job.label:<{width}}" for i, job in enumerate(jobs, 1)}
        # disable=None: but on a terminal
        self.line = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True, file=out, disable=None)
        self.out, self.told = out, time.monotonic()

    def say(self, job: Job, text: str) -> None:
        """A line that stays."""
        tqdm.write(f"{self.heads[job.run_dir]}  {text}", file=self.out)
        self.out.flush()

    def show(self, running: Sequence[Job]) -> None:
        """Renew, or tell, what is running."""
        now = time.monotonic()
        if running:
            job = running[int(now / 3) % len(running)]  # each for 3 seconds
            self.line.set_description_str(f"{self.heads[job.run_dir]}  {runs.latest_line(job.run_dir)}")
        if self.line.disable and now > self.told + SAY_SECONDS:
            self.told = now
            for job in running:
                self.say(job, runs.latest_line(job.run_dir) or "running")
