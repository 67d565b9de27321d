"""``python -m atoplib.batch.clean``: free the space that no result needs.

It removes results that were superseded, what killed processes left half written, logs of failures, and, of
complete trainings, the state before the last. A run that is going on is left alone. ``--all`` removes every
run of the workspace.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence

from atoplib import files, runs

NEEDLESS = ("superseded-*", "**/.*.part")
NEEDLESS_WHEN_COMPLETE = ("state.pt.previous", "state.pt.newest", ".batch")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m atoplib.batch.clean", description=__doc__)
    parser.add_argument("--workspace", default="", help="folder of runs/ (default: the project's own)")
    parser.add_argument("--all", action="store_true", help="remove every run, results included")
    options = parser.parse_args(arguments)
    workspace = files.workspace_dir(options.workspace)
    for manifest in sorted(workspace.glob("runs/*/*-*/manifest.json")):
        run_dir = manifest.parent
        if runs.in_use(run_dir):
            print(f"{run_dir.name}: in use, left alone")
            continue
        complete = (files.read_json(manifest) or {}).get("status") == "complete"
        patterns = NEEDLESS + (NEEDLESS_WHEN_COMPLETE if complete else ())
        for path in [run_dir] if options.all else [path for each in patterns for path in run_dir.glob(each)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            print(f"removed {path.relative_to(workspace)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
