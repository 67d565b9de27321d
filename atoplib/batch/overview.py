"""What a person sees of a batch: a line a run when it ends; in a terminal also those that run now, and how it stands."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from atoplib.batch.ledger import Costs, folder_bytes
from atoplib.batch.plan import Job
from atoplib.progress import format_seconds
from atoplib.runs import latest_line

MEASURE_SECONDS = 30.0  # between two looks at the sizes of the runs' folders


def format_bytes(count: float) -> str:
    """12 kB, 3.4 MB, 1.2 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


class Overview:
    """The state of a batch, shown.

    Args:
        jobs: all of them, in order.
        workers: how many run at once.
        out: where to; ``live`` (a terminal) renews the lines of what is running.
    """

    def __init__(
        self, jobs: Sequence[Job], *, workers: int = 1, out: TextIO | None = None, live: bool | None = None
    ) -> None:
        self.out = out or sys.stdout
        self.live = self.out.isatty() if live is None else live
        self.jobs = jobs
        self.workers = workers
        self.numbers = {job.run_dir: number for number, job in enumerate(jobs, start=1)}
        self.width = max((len(job.label) for job in jobs), default=0)
        self.running: dict[Path, tuple[Job, float]] = {}
        self.statuses: dict[Path, str] = {}
        self.costs = Costs(jobs) if self.live else None
        self.lines = 0  # on the screen, to be renewed
        self.bytes, self.measured = 0, -MEASURE_SECONDS

    def started(self, job: Job) -> None:
        """A job begins."""
        self.running[job.run_dir] = (job, time.monotonic())

    def ended(self, job: Job, status: str, seconds: float) -> None:
        """A job has ended."""
        self.statuses[job.run_dir] = status
        if status == "complete" and self.costs is not None:
            self.costs.add(job, seconds)
        self.say(job, format_seconds(seconds) if status == "complete" else status)

    def again(self, job: Job, attempt: int) -> None:
        """An attempt at a job has failed, and there will be another."""
        self.say(job, f"attempt {attempt} failed, trying again")

    def say(self, job: Job, text: str) -> None:
        """A line that stays; the job no longer runs."""
        self.running.pop(job.run_dir, None)
        self.clear()
        self.out.write(f"{self.head(job)}  {text}\n")
        self.out.flush()

    def head(self, job: Job) -> str:
        """What a job's line begins with."""
        return f"[{self.numbers[job.run_dir]}/{len(self.jobs)}] {job.label:<{self.width}}"

    def show(self) -> None:
        """Renew the lines of what is running."""
        if not self.live:
            return
        now = time.monotonic()
        lines = [
            f"{self.head(job)}  {format_seconds(now - began)}  {latest_line(job.run_dir)}"
            for job, began in self.running.values()
        ]
        if len(self.jobs) > 1 and self.running:
            lines.append(self.standing(now))
        self.clear()
        columns = shutil.get_terminal_size().columns
        self.out.write("".join(f"{line[: columns - 1]}\n" for line in lines))
        self.out.flush()
        self.lines = len(lines)

    def clear(self) -> None:
        """Take the lines of what is running from the screen."""
        if self.lines:
            self.out.write(f"\x1b[{self.lines}F\x1b[J")
            self.lines = 0

    def standing(self, now: float) -> str:
        """The last line: counts, time left, size."""
        if now - self.measured > MEASURE_SECONDS:
            self.bytes, self.measured = sum(folder_bytes(job.run_dir) for job in self.jobs), now
        counts = list(self.statuses.values())
        done = sum(status in ("complete", "done before") for status in counts)
        failed = sum(status in ("failed", "not run") for status in counts)
        left = self.seconds_left(now)
        parts = [
            f"{done} of {len(self.jobs)} done",
            f"{len(self.running)} running",
            *([f"{failed} failed"] if failed else []),
            f"about {format_seconds(left)} left" if left is not None else "time left unknown",
            format_bytes(self.bytes),
        ]
        return " · ".join(parts)

    def seconds_left(self, now: float) -> float | None:
        """The time that the rest will take, by earlier runs; None while one of its notebooks was never run to the end."""
        total = 0.0
        for job in self.jobs:
            if job.run_dir in self.statuses:
                continue
            expected = self.costs.expected(job) if self.costs is not None else None
            if expected is None:
                return None
            began = self.running.get(job.run_dir, (job, now))[1]
            total += max(0.0, expected - (now - began))
        return total / self.workers
