"""Progress of long work: what is done, how fast, how long it still takes. The library calls back; this shows
it by tqdm.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

# Called as ``report(done, total, unit, numbers)``; ``numbers`` is a mapping such as {"loss": 0.3}, or may be
# left out.
Report = Callable[..., None]


def format_seconds(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    short = f"{whole // 60} min {whole % 60:02d} s" if whole >= 100 else f"{whole} s"
    return short if whole < 6000 else f"{whole // 3600} h {whole // 60 % 60:02d} min"


class Progress:
    """One line that renews itself, in a terminal or a notebook cell; executed headless, its last state is
    kept.

    Args:
        title: what is being done.
        listener: called with every renewed line, too (``Run.progress`` leaves it where a batch can read it).
        every: seconds between two renewals.
    """

    def __init__(self, title: str, listener: Callable[[str], Any] = str, *, every: float = 0.5) -> None:
        self.title, self.listener, self.every = title, listener, every
        self.first: int | None = None  # what was done before: a resumed training has not done it now
        self.running = ""  # the part that the rate is of: others may have been faster
        self.started = self.last_shown = 0.0
        self.displayed = False

    def __call__(
        self, done: int, total: int, unit: str = "it", numbers: Mapping[str, float] | str | None = None
    ) -> None:
        """Report that ``done`` of ``total`` units are finished."""
        now = time.monotonic()
        running = numbers.partition(":")[0] if isinstance(numbers, str) else ""
        if self.first is None or running != self.running:
            self.first, self.started, self.running = done, now, running
        if done < total and self.last_shown and now - self.last_shown < self.every:
            return
        self.last_shown = now
        if not isinstance(numbers, str):
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in (numbers or {}).items())
        line = tqdm.format_meter(
            done,
            total,
            now - self.started,
            initial=self.first,
            bar_format="{l_bar}{bar:4}{r_bar}",  # the line fits a cell of JupyterLab at 1280 px
            unit=f" {unit}",
            prefix=self.title,
            postfix=numbers or None,
        ).replace("/ ", "/")  # 9 s/images
        self.listener(line)
        ipython = sys.modules.get("IPython")
        if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
            from IPython.display import display

            display(
                {"text/plain": line}, raw=True, display_id=f"{self.title} {id(self)}", update=self.displayed
            )
            self.displayed = True
        elif sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
