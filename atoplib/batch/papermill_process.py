"""The process that executes one notebook: papermill, but for its signals. Started by ``worker`` with this file's path.

A Ctrl-C in a terminal reaches it along with the batch, another one (``kill``, an editor's stop) does not: so it ignores
that one and heeds the batch's SIGTERM, once, as if it were a Ctrl-C. It then interrupts the cell that is running, which
saves what it has, and ends its kernel; a kernel without its papermill may run on for ever. It does the same when the batch
is killed outright: standard input is a pipe that ends with the batch.
"""

import os
import signal
import sys
import threading

START_SECONDS = 600  # for a kernel to start: cold file systems and crowded machines take longer than the usual minute


def stop(*_: object) -> None:
    """The first SIGTERM; those that follow wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def follow_parent() -> None:
    """End as by SIGTERM when the batch is gone."""
    while os.read(0, 1):  # not sys.stdin: a thread that waits in it breaks the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(notebook: str, output: str, parameters: str, transport: str) -> None:
    """Execute a notebook with the parameters in a YAML file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
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
        config=Config({"KernelManager": {"transport": transport}}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
