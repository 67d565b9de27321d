"""The command ``python -m atoplib.batch.clean``: free the room that no result needs.

It removes runs that were replaced by newer ones, what killed processes left half written, and, of complete trainings, the
state before the last. A run that is going on is left alone. With ``--all`` it removes every run of the workspace.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from atoplib.batch.ledger import REPLACED, folder_bytes
from atoplib.batch.overview import format_bytes
from atoplib.runs import RunInUse, locked, read_json, workspace_dir

HALF_WRITTEN = "*.part"
OF_NO_USE_WHEN_COMPLETE = ("state.pt.previous", "state.pt.newest", "notebook.part.ipynb")


def needless(run_dir: Path) -> Iterator[Path]:
    """The files of a run that no result needs."""
    yield from run_dir.glob(HALF_WRITTEN)
    if (read_json(run_dir / "manifest.json") or {}).get("status") == "complete":
        yield from (path for name in OF_NO_USE_WHEN_COMPLETE if (path := run_dir / name).is_file())


def clean(runs_dir: Path, *, everything: bool = False) -> Iterator[tuple[Path, int]]:
    """Remove what is needless below ``WORKSPACE/runs``.

    Yields:
        what was removed, with its size in bytes; -1 for a run that is in use and stays.
    """
    for experiment in sorted(path for path in runs_dir.glob("*") if path.is_dir() and not path.is_symlink()):
        replaced = experiment / REPLACED
        if replaced.is_dir():
            yield remove(replaced)
        for run_dir in sorted(
            {path.parent for name in ("manifest.json", "batch.json") for path in experiment.glob(f"*/{name}")}
        ):
            try:
                with ExitStack() as locks:
                    for name in ("batch.lock", "run.lock"):
                        locks.enter_context(locked(run_dir / name))
                    if everything:
                        yield remove(run_dir)
                    else:
                        yield from [remove(path) for path in needless(run_dir)]
            except RunInUse:
                yield run_dir, -1
        if everything and not any(experiment.glob("*/")):
            yield remove(experiment)


def remove(path: Path) -> tuple[Path, int]:
    """Remove a file or a folder; returns it with the size that it had."""
    size = folder_bytes(path) if path.is_dir() else path.stat().st_size
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path, size


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m atoplib.batch.clean", description="Free the room that no result needs.")
    parser.add_argument("--workspace", default="", help="folder of runs/ (default: the project's own)")
    parser.add_argument("--all", action="store_true", help="remove every run, results included")
    options = parser.parse_args(arguments)
    runs_dir, freed = workspace_dir(options.workspace) / "runs", 0
    for path, size in clean(runs_dir, everything=options.all):
        print(f"{path.relative_to(runs_dir)}: " + ("in use, left alone" if size < 0 else f"{format_bytes(size)} freed"))
        freed += max(0, size)
    print(f"{format_bytes(freed)} freed, {format_bytes(folder_bytes(runs_dir))} left in {runs_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
