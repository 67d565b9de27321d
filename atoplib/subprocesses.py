"""Processes that another one starts, waits for, and does not leave behind."""

import os
import signal
import subprocess
from pathlib import Path


def finished(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process has ended, after a wait of at most so many seconds."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Have a process save and end by SIGTERM, and kill it if it does not within so many seconds."""
    process.terminate()
    if not finished(process, seconds):
        process.kill()
        process.wait()


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def follow_parent() -> None:
    """Wait until standard input, a pipe that is never written to, ends with the process that holds its other end; then end
    as by SIGTERM. For a thread of its own.
    """
    while os.read(0, 1):  # not sys.stdin: a thread that waits in it breaks the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
