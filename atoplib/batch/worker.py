"""One run, executed: a papermill in a process of its own, with its own folders and time limit.

Started as a program (``python -m atoplib.batch.worker``), this module is that process: papermill, but for its
signals. A Ctrl-C in a terminal reaches it along with the batch, another one (``kill``, an editor's stop) does
not: so it ignores that one and heeds the batch's SIGTERM, once, as if it were a Ctrl-C. It then interrupts
the running cell, waits until that has saved and left the run's directory, and ends its kernel. It does the
same when the batch is killed outright: standard input is a pipe that ends with the batch.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from atoplib.batch.recipe import Job
from atoplib.files import read_json, write_json
from atoplib.progress import format_seconds
from atoplib.runs import NAME_FROM_BATCH, in_use

POLL_SECONDS = 0.1
STOP_SECONDS = 60  # for a notebook to save and end after a Ctrl-C
SAVE_SECONDS = 50  # the part of it in which its cell saves
START_SECONDS = 600  # for a kernel to start: cold file systems take longer than the usual minute
LONGEST_SOCKET = 60  # letters of the folder of a kernel's sockets: the system allows 107 with their names
OUTPUT, PARAMETERS, LOG = "notebook.ipynb", "parameters.json", "papermill.log"


class NotebookFailed(RuntimeError):
    """A notebook that did not end well; the message holds the failing cell with its error, and where to
    look.
    """


class Stopped(RuntimeError):
    """A notebook that was told to stop, and did."""


def execute(
    job: Job,
    *,
    stop: threading.Event | None = None,
    timeout: float | None = None,
    threads: int | None = None,
    patience: float = 0.0,
) -> float:
    """Execute a job's notebook in a process of its own and keep it as ``notebook.ipynb`` in the run's
    directory.

    Args:
        stop: when it is set, the notebook saves what it has and ends.
        timeout: seconds after which it does so, too.
        threads: that it computes with; None leaves the choice to torch. Another number rounds otherwise.
        patience: seconds to wait for another process that works in the run's directory.

    Returns:
        the seconds that it took.

    Raises:
        NotebookFailed: if it stopped with an error or by the time limit; what it computed stays.
        Stopped: if ``stop`` was set.
    """
    started = time.monotonic()
    while busy := in_use(job.run_dir):
        if time.monotonic() >= started + patience:
            break
        time.sleep(POLL_SECONDS)
    try:
        if busy:
            raise NotebookFailed(
                f"{job.run_dir} is in use by another process: wait until it ends, or stop it"
            )
        before = _written(job)
        code = _run_process(job, stop or threading.Event(), timeout, threads)
        manifest = read_json(job.run_dir / "manifest.json") or {}
        part, log = job.hidden / OUTPUT, job.hidden / LOG
        if code or manifest.get("status") != "complete" or _written(job) == before or not part.is_file():
            # its cells are not asked: of a killed kernel they all read "completed"
            reason = _failing_cell(part) or manifest.get("error") or _last_lines(log)
            raise NotebookFailed(f"{reason}\nnotebook so far: {part}\nlog: {log}")
        os.replace(part, job.executed)
        job.page.unlink(missing_ok=True)  # of an earlier execution
        shutil.rmtree(job.hidden)
    except (OSError, NotebookFailed) as error:
        raise NotebookFailed(f"{job.label} failed: {error}") from error
    return time.monotonic() - started


def _run_process(job: Job, stop: threading.Event, timeout: float | None, threads: int | None) -> int:
    """Start papermill and wait for it; returns its exit status. Raises as ``execute`` does."""
    write_json(job.hidden / PARAMETERS, dict(job.values))
    for left_over in (job.hidden / OUTPUT, job.run_dir / "progress.txt"):
        left_over.unlink(missing_ok=True)
    started, log = time.monotonic(), (job.hidden / LOG).open("w")
    with tempfile.TemporaryDirectory(prefix="atop-", ignore_cleanup_errors=True) as own, log:
        # Notebooks that run side by side would otherwise share a history and race for ports.
        environment = os.environ | {"IPYTHONDIR": own, "JUPYTER_RUNTIME_DIR": own, "PYTHONUNBUFFERED": "1"}
        environment[NAME_FROM_BATCH] = job.run_dir.name
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        # standard input ends with this process
        pipe = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(papermill_command(job), env=environment, **pipe)
        try:
            while (code := process.poll()) is None:
                if stop.wait(POLL_SECONDS):
                    raise Stopped(f"{job.label} was stopped")
                if timeout is not None and time.monotonic() - started > timeout:
                    raise NotebookFailed(
                        f"it ran longer than the {format_seconds(timeout)} of --timeout and was stopped; "
                        f"a training goes on from there next time"
                    )
            return code
        finally:
            _end(process)
            process.stdin.close()


def papermill_command(job: Job) -> list[str]:
    """The command that executes a job; by hand: ``papermill NOTEBOOK OUTPUT -k python3 -f PARAMETERS``."""
    program = [sys.executable, "-P", "-m", __name__]  # -P: the current folder is no place to import from
    return [*program, str(job.notebook), str(job.run_dir), str(job.hidden)]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Have a process save and end by SIGTERM, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _written(job: Job) -> int:
    """When the run's manifest was written, in ns; 0 where there is none."""
    path = job.run_dir / "manifest.json"
    return path.stat().st_mtime_ns if path.is_file() else 0


def _failing_cell(notebook: Path) -> str:
    """The error of the first cell that failed: its number as Jupyter shows it, type and message; "" if none
    did.
    """
    for cell in (read_json(notebook) or {}).get("cells", []):
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                return f"In [{cell.get('execution_count')}]: {output.get('ename')}: {output.get('evalue')}"
    return ""


def _last_lines(path: Path, count: int = 5) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


# ---------------------------------------------------------------------------------------- the other process


def _stop(run_dir: Path) -> None:
    """The first SIGTERM; those that follow wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import psutil

    for kernel in psutil.Process().children():
        kernel.send_signal(signal.SIGINT)
    until = time.monotonic() + SAVE_SECONDS
    while time.monotonic() < until and in_use(run_dir):  # papermill would kill the kernel at once
        time.sleep(0.05)
    raise KeyboardInterrupt


def _follow_parent() -> None:
    """Wait until standard input, which is never written to, ends with the process that holds its other
    end.
    """
    while os.read(0, 1):  # not sys.stdin: a thread that waits in it breaks the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(notebook: str, run_dir: str, folder: str) -> None:
    """Execute a notebook with the parameters in a folder, where its output is left, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _stop(Path(run_dir)))
    threading.Thread(target=_follow_parent, daemon=True).start()

    sys.modules["rfc3987_syntax"] = (
        None  # a check of URIs, which notebooks have none of; its import takes seconds
    )
    import papermill
    from traitlets.config import Config

    # In a folder of its own: in the current one, the sockets of two kernels would have the same names.
    own = os.environ["JUPYTER_RUNTIME_DIR"]
    sockets = (
        {"transport": "ipc", "ip": f"{own}/kernel"} if len(own) < LONGEST_SOCKET else {"transport": "tcp"}
    )
    papermill.execute_notebook(
        notebook,
        f"{folder}/{OUTPUT}",
        read_json(Path(folder, PARAMETERS)),
        kernel_name="python3",
        progress_bar=False,
        start_timeout=START_SECONDS,
        shutdown_kernel="immediate",  # its own farewell takes seconds once it has imported torch
        config=Config({"KernelManager": sockets}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
