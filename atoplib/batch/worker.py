"""The process of one run: ``python -m atoplib.batch.worker NOTEBOOK RUN_DIR FOLDER`` is papermill, but for
its signals. By hand: ``papermill NOTEBOOK OUTPUT -k python3 -f FOLDER/parameters.json``.

A Ctrl-C in a terminal reaches it along with the batch, another one (``kill``, an editor's stop) does not: so
it ignores that one and heeds the batch's SIGTERM, once, as if it were a Ctrl-C. It then interrupts the
running cell, waits until that has saved and left the run's directory, and ends its kernel. It does the same
when the batch is killed outright: standard input is a pipe that ends with the batch.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from atoplib import files, runs


def main(notebook: str, run_dir: str, folder: str) -> None:
    """Execute a notebook with the parameters in a folder, where its output is left, too."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # those that follow wait for the first
        for kernel in psutil.Process().children():
            kernel.send_signal(signal.SIGINT)
        until = time.monotonic() + 50  # for the cell to save; the batch kills this process after a minute
        while time.monotonic() < until and runs.in_use(
            Path(run_dir)
        ):  # papermill would kill the kernel at once
            time.sleep(0.05)
        raise KeyboardInterrupt

    def follow_parent() -> None:
        os.read(0, 1)  # returns when the batch ends; not sys.stdin, which would break the interpreter's end
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=follow_parent, daemon=True).start()
    # A check of URIs, which notebooks have none of; its import takes seconds.
    sys.modules["rfc3987_syntax"] = None
    import papermill
    from traitlets.config import Config

    papermill.execute_notebook(
        notebook,
        f"{folder}/notebook.ipynb",
        files.read_json(Path(folder, "parameters.json")),
        kernel_name="python3",
        progress_bar=False,
        start_timeout=600,  # cold file systems take longer than the usual minute
        shutdown_kernel="immediate",  # its own farewell takes seconds once it has imported torch
        # In a folder of its own: in the current one, the sockets of two kernels would have the same names.
        config=Config(
            KernelManager={"transport": "ipc", "ip": f"{os.environ['JUPYTER_RUNTIME_DIR']}/kernel"}
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
