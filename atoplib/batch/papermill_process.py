"""The process that executes one notebook: papermill, but for its signals. Started by ``worker`` with this file's path.

A Ctrl-C in a terminal reaches it along with the batch, another one (``kill``, an editor's stop) does not: so it ignores
that one and heeds the batch's SIGTERM, once, as if it were a Ctrl-C. It then interrupts the cell that is running, waits
until that has saved and left the run's directory, and ends its kernel; a kernel without its papermill may run on for ever.
It does the same when the batch is killed outright: standard input is a pipe that ends with the batch.
"""

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

from atoplib.subprocesses import follow_parent

START_SECONDS = 600  # for a kernel to start: cold file systems and crowded machines take longer than the usual minute


SAVE_SECONDS = 50  # for a cell to end its step and save; the worker that waits for this process has more patience


def stop(run_dir: Path) -> None:
    """The first SIGTERM; those that follow wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import psutil

    for kernel in psutil.Process().children():
        kernel.send_signal(signal.SIGINT)
    until = time.monotonic() + SAVE_SECONDS
    # papermill would kill the kernel at once: here it is given the time to save.
    while time.monotonic() < until and in_use(run_dir / "run.lock"):
        time.sleep(0.05)
    raise KeyboardInterrupt


def in_use(lock: Path) -> bool:
    """Whether a process holds the run (``runs.locked``, without its import of torch)."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def sockets(transport: str) -> dict[str, str]:
    """Where a kernel's sockets lie: in the run's own folder. Jupyter would give those of all kernels the same names in the
    current folder, and two runs at once would take each other's for their own.
    """
    folder = os.environ.get("JUPYTER_RUNTIME_DIR")
    return {"ip": os.path.join(folder, "kernel")} if transport == "ipc" and folder else {}


def main(notebook: str, output: str, parameters: str, transport: str) -> None:
    """Execute a notebook with the parameters in a YAML file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # Ray blocks it for all that it starts
    signal.signal(signal.SIGTERM, lambda *_: stop(Path(output).parent))
    threading.Thread(target=follow_parent, daemon=True).start()

    sys.modules["rfc3987_syntax"] = None  # a check of URIs, which notebooks have none of; its import takes seconds
    import papermill
    import yaml
    from traitlets.config import Config

    with open(parameters, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    papermill.execute_notebook(
        notebook,
        output,
        values,
        kernel_name="python3",
        progress_bar=False,
        start_timeout=START_SECONDS,
        shutdown_kernel="immediate",  # its own farewell takes seconds once it has imported torch
        config=Config({"KernelManager": {"transport": transport, **sockets(transport)}}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
