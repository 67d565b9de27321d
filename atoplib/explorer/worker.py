"""One thread that works for a person who changes his mind: the last request wins, nothing older is ever shown after it."""

import threading
from collections.abc import Callable

IDLE_SECONDS = 20.0  # then the thread ends; the next request starts another one


class Superseded(Exception):
    """Raised inside a job that is no longer wanted."""


class Ticket:
    """A job's right to go on and to show what it found."""

    def __init__(self, worker: "Worker", number: int) -> None:
        self._worker = worker
        self._number = number

    def check(self) -> None:
        """Raise Superseded if a later request, or a cancellation, has come."""
        if self._number != self._worker.latest:
            raise Superseded

    def publish(self, show: Callable[[], None]) -> None:
        """Call ``show``, unless a later request has come; none can come in between. Raises Superseded instead."""
        with self._worker.lock:
            self.check()
            show()


Job = Callable[[Ticket], None]


class Worker:
    """Runs jobs in a thread of its own, one at a time; a new one takes the place of all that were asked for before.

    Args:
        on_error: called with whatever a job raised, unless the job had been superseded.
        on_idle: called when the last job has ended, however it ended.
    """

    def __init__(self, on_error: Callable[[Exception], None], on_idle: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.latest = 0
        self._on_error = on_error
        self._on_idle = on_idle
        self._wakened = threading.Condition(self.lock)
        self._waiting: tuple[Ticket, Job] | None = None
        self._busy = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Run ``job(ticket)`` next; the job that runs now is told to stop, one that waits is forgotten."""
        with self.lock:
            self.latest += 1
            self._waiting = Ticket(self, self.latest), job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="atoplib explorer", daemon=True)
                self._thread.start()
            self._wakened.notify_all()

    def cancel(self) -> bool:
        """Stop what runs and forget what waits; whether there was anything."""
        with self.lock:
            there = self._busy or self._waiting is not None
            self.latest += 1
            self._waiting = None
            return there

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self.lock:
            return not self._busy and self._waiting is None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs and nothing waits; False if that took longer than ``timeout`` seconds."""
        with self.lock:
            return self._wakened.wait_for(lambda: not self._busy and self._waiting is None, timeout)

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self._wakened.wait_for(lambda: self._waiting is not None, IDLE_SECONDS):
                    self._thread = None
                    return
                ticket, job = self._waiting
                self._waiting, self._busy = None, True
            try:
                job(ticket)
            except Superseded:
                pass
            except Exception as error:  # whatever a model or an attack raises: a person reads it as a sentence
                self._report(ticket, error)
            finally:
                with self.lock:
                    self._busy = False
                    if self._waiting is None:
                        self._on_idle()
                    self._wakened.notify_all()

    def _report(self, ticket: Ticket, error: Exception) -> None:
        try:
            ticket.publish(lambda: self._on_error(error))
        except Superseded:
            pass
