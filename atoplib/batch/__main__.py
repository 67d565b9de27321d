"""``python -m atoplib.batch RECIPE``."""

import sys

from atoplib.batch.cli import main

if __name__ == "__main__":
    sys.exit(main())
