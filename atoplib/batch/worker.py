"""One job, executed: a papermill in a process of its own, with its own directories, log and time limit."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from atoplib.batch import ledger, papermill_process
from atoplib.batch.plan import Job
from atoplib.checkpoints import write_atomically
from atoplib.progress import format_seconds
from atoplib.runs import PLANNED_NAME, RunInUse, locked, read_json
from atoplib.subprocesses import end, finished, last_lines

POLL_SECONDS = 0.1
STOP_SECONDS = 60  # for a notebook to save and end after a Ctrl-C
LONGEST_SOCKET = 60  # letters of the folder of a kernel's sockets: the system allows about 107 with their names


class NotebookFailed(RuntimeError):
    """A notebook that did not end well; the message holds the failing cell with its error, and where to look."""


class Stopped(RuntimeError):
    """A notebook that was told to stop, and did."""


def execute(
    job: Job,
    *,
    stop: threading.Event | None = None,
    timeout: float | None = None,
    threads: int | None = None,
    reuse: bool = False,
    patience: float = 0.0,
) -> float:
    """Execute a job's notebook in a process of its own and keep it as ``notebook.ipynb``.

    Args:
        stop: when it is set, the notebook saves what it has and ends.
        timeout: seconds after which it does so, too.
        threads: that it computes with; None leaves the choice to torch. Another number rounds otherwise.
        reuse: go on with what is there even if code or inputs have changed since.
        patience: seconds to wait for another process that works in the run's directory.

    Returns:
        the seconds that it took.

    Raises:
        NotebookFailed: if it stopped with an error or by the time limit; what it computed stays.
        Stopped: if ``stop`` was set.
    """
    started = time.monotonic()
    try:
        wait_until_free(job.run_dir, patience)
        if ledger.standing(job, reuse=reuse).name == "changed":
            ledger.set_aside(job)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with locked(job.run_dir / "batch.lock"):
            ledger.note_start(job)
            try:
                run_process(job, stop or threading.Event(), timeout, threads)
            finally:
                with suppress(OSError):
                    ledger.note_end(job, time.monotonic() - started)
    except (OSError, RunInUse) as error:
        raise NotebookFailed(f"{job.label} failed: {error}") from error
    return time.monotonic() - started


def wait_until_free(run_dir: Path, patience: float) -> None:
    """Wait until no process holds a run's directory; raises RunInUse after ``patience`` seconds."""
    until = time.monotonic() + patience
    while run_dir.is_dir():
        try:
            with locked(run_dir / "batch.lock"), locked(run_dir / "run.lock"):
                return
        except RunInUse:
            if time.monotonic() > until:
                raise
            time.sleep(POLL_SECONDS)


def run_process(job: Job, stop: threading.Event, timeout: float | None, threads: int | None) -> None:
    """Start papermill, wait for it, and believe the manifest rather than the notebook. Raises as ``execute`` does."""
    part = job.run_dir / "notebook.part.ipynb"
    for left_over in (part, job.run_dir / "progress.txt"):
        left_over.unlink(missing_ok=True)
    parameters_file = job.run_dir / "papermill.yaml"
    write_atomically(parameters_file, lambda path: path.write_text(yaml.safe_dump(dict(job.values), sort_keys=False)))
    log_path = job.run_dir / "papermill.log"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="atop-", ignore_cleanup_errors=True) as folder, log_path.open("w") as log:
        command = papermill_command(job, parameters_file, part, "ipc" if len(folder) < LONGEST_SOCKET else "tcp")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written to: it ends when this process does
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(folder, threads) | {PLANNED_NAME: job.run_dir.name},
        )
        try:
            while not finished(process, POLL_SECONDS):
                if stop.is_set():
                    raise Stopped(f"{job.label} was stopped")
                if timeout is not None and time.monotonic() - started > timeout:
                    raise NotebookFailed(
                        f"{job.label} failed: it ran longer than the {format_seconds(timeout)} of --timeout and was "
                        f"stopped; a training goes on from there next time\nlog: {log_path}"
                    )
        except BaseException:
            end(process, STOP_SECONDS)
            raise
        finally:
            process.stdin.close()
    manifest = read_json(job.run_dir / "manifest.json") or {}
    if process.returncode or manifest.get("status") != "complete" or not part.is_file():
        reason = failing_cell(part) or manifest.get("error") or last_lines(log_path)
        raise NotebookFailed(f"{job.label} failed: {reason}\nnotebook so far: {part}\nlog: {log_path}")
    os.replace(part, job.executed)
    job.page.unlink(missing_ok=True)  # of an earlier execution


def papermill_command(job: Job, parameters_file: Path, output: Path, transport: str) -> list[str]:
    """The command that executes a job; by hand it is ``papermill NOTEBOOK OUTPUT -k python3 -f PARAMETERS``."""
    # -P: the folder of that file is no place to import from.
    script = [sys.executable, "-P", papermill_process.__file__]
    return [*script, str(job.notebook), str(output), str(parameters_file), transport]


def environment(folder: str, threads: int | None) -> dict[str, str]:
    """The environment of a run. Notebooks that run side by side would otherwise share a history and race for ports."""
    own = {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if threads is not None:
        own |= {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **own}


def failing_cell(notebook: Path) -> str | None:
    """The error of the first cell that failed: its number as Jupyter shows it, type and message; None if none did."""
    try:
        cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                return f"In [{cell.get('execution_count')}]: {output.get('ename')}: {output.get('evalue')}"
    return None


def write_page(job: Job) -> None:
    """The executed notebook as a page."""
    # Here, because a recipe that cannot be run should say so at once; and without the check of URIs, as papermill.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbconvert
    import nbformat

    html, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.read(job.executed, as_version=4))
    write_atomically(job.page, lambda part: part.write_text(html))
