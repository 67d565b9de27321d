"""The animated picture of the README, made from the digits that come with the kit: `python -m
benchmarks.picture`.
"""

import argparse
import tempfile
from pathlib import Path

from atoplib.explorer import make_explorer


def main() -> None:
    """Attack one digit in front of four defences, and write what happens step by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/explorer.gif"))
    path = parser.parse_args().path
    with tempfile.TemporaryDirectory() as folder:
        explorer = make_explorer(steps=20, folder=folder)
        explorer.refresh()
        explorer.worker.wait()
        explorer.save(["gif"])
        (made,) = Path(folder).glob("*.gif")
        path.write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
