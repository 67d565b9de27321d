"""One thread that works for a person who changes their mind: the last request wins, nothing older is shown
after it."""

import threading
from collections.abc import Callable

IDLE_SECONDS = 20.0  # then the thread ends, and lets go of the networks; the next request starts another one


class Superseded(Exception):
    """Raised inside a job that is no longer wanted."""


class Ticket:
    """A job's right to go on and to show what it found."""

    def __init__(self, worker: "Worker", number: int) -> None:
        self._worker, self._number = worker, number

    def check(self) -> None:
        """Raise Superseded if a later request, or a cancellation, has come."""
        if self._number != self._worker.latest:
            raise Superseded

    def pause(self, seconds: float) -> None:
        """Wait; raise Superseded as soon as a later request comes."""
        with self._worker.lock:
            self._worker.changed.wait_for(lambda: self._number != self._worker.latest, seconds)
            self.check()

    def publish(self, show: Callable[[], None]) -> None:
        """Call ``show`` unless a later request has come; none can come in between. Raises Superseded
        instead."""
        with self._worker.lock:
            self.check()
            show()


Job = Callable[[Ticket], None]


class Worker:
    """Runs jobs in a thread of its own, one at a time; a new one takes the place of all that were asked for
    before.

    Args:
        on_error: called with whatever a job raised, unless the job had been superseded.
        on_idle: called when the last job has ended, however it ended.
    """

    def __init__(self, on_error: Callable[[Exception], None], on_idle: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.latest = 0
        self._on_error, self._on_idle = on_error, on_idle
        self._waiting: tuple[Ticket, Job] | None = None
        self._busy = False
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self.lock:
            return not self._busy and self._waiting is None

    def submit(self, job: Job) -> None:
        """Run ``job(ticket)`` next; the job that runs now is told to stop, one that waits is forgotten."""
        with self.lock:
            self.latest += 1
            self._waiting = Ticket(self, self.latest), job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="atoplib explorer", daemon=True)
                self._thread.start()
            self.changed.notify_all()

    def cancel(self) -> bool:
        """Stop what runs and forget what waits; whether there was anything."""
        with self.lock:
            there = not self.idle
            self.latest += 1
            self._waiting = None
            self.changed.notify_all()
            return there

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs and nothing waits; False if that took longer than ``timeout`` seconds."""
        with self.lock:
            return self.changed.wait_for(lambda: self.idle, timeout)

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self.changed.wait_for(lambda: self._waiting is not None, IDLE_SECONDS):
                    self._thread = None
                    return
                ticket, job = self._waiting
                self._waiting, self._busy = None, True
            try:
                job(ticket)
            except Superseded:
                pass
            except (
                Exception
            ) as error:  # whatever a model or an attack raises: a person reads it as a sentence
                with self.lock:
                    if ticket._number == self.latest:
                        self._on_error(error)
            finally:
                with self.lock:
                    self._busy = False
                    if self._waiting is None:
                        self._on_idle()
                    self.changed.notify_all()
