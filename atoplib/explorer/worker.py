"""Work for a person who changes their mind: the last request wins, nothing older is shown after it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple


class Superseded(Exception):
    """Raised inside a job that is no longer wanted."""


class Ticket(NamedTuple):
    """A job's right to go on and to show what it found."""

    worker: "Worker"
    number: int

    def check(self) -> None:
        """Raise Superseded if a later request, or a cancellation, has come."""
        if self.number != self.worker.latest:
            raise Superseded

    def publish(self, show: Callable[[], None]) -> None:
        """Call ``show`` unless a later request has come, and raise Superseded if so; none can come in
        between."""
        with self.worker.lock:
            self.check()
            show()


class Worker:
    """Runs jobs one at a time, each in a thread that ends with it; a new one takes the place of all that were
    asked for before.

    Args:
        on_error: called with whatever a job raised, unless the job had been superseded.
        on_idle: called when the last job has ended, however it ended.
    """

    def __init__(self, on_error: Callable[[Exception], None], on_idle: Callable[[], None]) -> None:
        self.lock = threading.Condition()  # of an RLock; notified when a job has ended
        self.latest = self.unfinished = 0
        self._turn = threading.Lock()
        self._on_error, self._on_idle = on_error, on_idle

    def submit(self, job: Callable[[Ticket], None]) -> None:
        """Run ``job(ticket)`` next; the job that runs now is told to stop, those that wait never start."""
        with self.lock:
            self.cancel()
            self.unfinished += 1
            ticket = Ticket(self, self.latest)
            threading.Thread(target=self._work, args=(ticket, job), daemon=True).start()

    def cancel(self) -> bool:
        """Stop what runs and forget what waits; whether there was anything."""
        with self.lock:
            self.latest += 1
            return self.unfinished > 0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs and nothing waits; False if that took longer than ``timeout`` seconds."""
        with self.lock:
            return self.lock.wait_for(lambda: not self.unfinished, timeout)

    def _work(self, ticket: Ticket, job: Callable[[Ticket], None]) -> None:
        try:
            with suppress(Superseded), self._turn:
                ticket.check()
                job(ticket)
        except Exception as error:  # whatever a model or an attack raises: a person reads it as a sentence
            with suppress(Superseded):
                ticket.publish(partial(self._on_error, error))
        finally:
            with self.lock:
                self.unfinished -= 1
                if not self.unfinished:
                    self._on_idle()
                self.lock.notify_all()
