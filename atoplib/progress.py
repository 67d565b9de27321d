"""Progress of long work: what is done, how fast, how long it still takes. The library calls back; this shows it."""

import sys
import time
from collections.abc import Callable, Mapping

Report = Callable[[int, int, str, Mapping[str, float]], None]
"""Called as ``report(done, total, unit, numbers)``; ``numbers`` may hold a loss, an accuracy, ..."""


def format_seconds(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class ProgressLine:
    """One line that renews itself, in a terminal or a notebook cell; executed headless, its last state is kept.

    Args:
        title: what is being done.
        every: seconds between two renewals.
        listener: called with every renewed line, too (a run writes it where a batch can read it).
    """

    def __init__(self, title: str, *, every: float = 0.5, listener: Callable[[str], None] | None = None) -> None:
        self.title = title
        self.every = every
        self.listener = listener
        self.started = time.monotonic()
        self.first: int | None = None
        self.last_shown = 0.0
        self.display = None

    def __call__(self, done: int, total: int, unit: str = "it", numbers: Mapping[str, float] | None = None) -> None:
        """Report that ``done`` of ``total`` units are finished."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now
        if now - self.last_shown < self.every and done < total:
            return
        self.last_shown = now
        self.show(self.line(done, total, unit, numbers or {}, now - self.started))

    def line(self, done: int, total: int, unit: str, numbers: Mapping[str, float], elapsed: float) -> str:
        """The text of the line."""
        rate = (done - (self.first or 0)) / elapsed if elapsed > 0 else 0.0
        left = f", {format_seconds((total - done) / rate)} left" if rate and done < total else ""
        speed = f", {rate:.3g} {unit}/s" if rate else ""
        values = "".join(f", {name} {value:.3g}" for name, value in numbers.items())
        percent = 100 * done // max(1, total)
        return f"{self.title}: {percent:3d} % ({done}/{total} {unit}){values}{speed}, {format_seconds(elapsed)}{left}"

    def show(self, line: str) -> None:
        """Replace the line that is on screen."""
        if self.listener is not None:
            self.listener(line)
        if "ipykernel" in sys.modules:
            from IPython.display import display

            data = {"text/plain": line}
            if self.display is None:
                self.display = display(data, raw=True, display_id=True)
            else:
                self.display.update(data, raw=True)
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
