"""``python -m atoplib.batch.clean``: free the space that no result needs.

It removes results that were superseded, what killed processes left half written, logs of failures, and, of
complete trainings, the state before the last. A run that is going on is left alone. ``--all`` removes every
run of the workspace.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence

from atoplib.files import read_json, workspace_dir
from atoplib.runs import in_use

NEEDLESS = ("superseded-*", "**/.*.part")
NEEDLESS_WHEN_COMPLETE = ("state.pt.previous", "state.pt.newest", ".batch")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m atoplib.batch.clean", description="Free space that no result needs."
    )
    parser.add_argument("--workspace", default="", help="folder of runs/ (default: the project's own)")
    parser.add_argument("--all", action="store_true", help="remove every run, results included")
    options = parser.parse_args(arguments)
    runs_dir = workspace_dir(options.workspace) / "runs"
    for run_dir in sorted(path.parent for path in runs_dir.glob("*/*-*/manifest.json")):
        name = run_dir.relative_to(runs_dir)
        if in_use(run_dir):
            print(f"{name}: in use, left alone")
            continue
        complete = (read_json(run_dir / "manifest.json") or {}).get("status") == "complete"
        patterns = NEEDLESS + (NEEDLESS_WHEN_COMPLETE if complete else ())
        needless = (
            [run_dir] if options.all else [path for pattern in patterns for path in run_dir.glob(pattern)]
        )
        for path in needless:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if needless:
            print(
                f"{name}: removed {'all of it' if options.all else ', '.join(path.name for path in needless)}"
            )
    print(f"{shutil.disk_usage(runs_dir if runs_dir.is_dir() else '/').free / 1e9:.1f} GB are free")
    return 0


if __name__ == "__main__":
    sys.exit(main())
