"""Many jobs: each as soon as what it needs is complete, as many at once as asked for; one that fails stops no other."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from atoplib.batch import engines, ledger, worker
from atoplib.batch.engines import Settings
from atoplib.batch.overview import Overview
from atoplib.batch.plan import Job

LOOK_SECONDS = 0.25  # between two looks at what is running


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: ``done before``, ``complete``, ``failed`` or ``not run`` (something that it needs failed).
        reason: why it failed or was not run, with where to look.
        seconds: of the last attempt.
    """

    job: Job
    status: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether its results are there."""
        return self.status in ("done before", "complete")


def run_jobs(
    jobs: Sequence[Job],
    settings: Settings,
    overview: Overview,
    *,
    engine: engines.Engine = engines.local,
) -> list[Outcome]:
    """Execute what is not done yet of a plan.

    Whether a job is done is asked when all that it needs is complete: one whose inputs came out as before is not repeated.
    Each notebook's page is made while others run.

    Returns:
        the outcomes, in the order of the jobs.

    Raises:
        KeyboardInterrupt: after the notebooks that were running have saved and ended.
    """
    waiting = list(jobs)
    outcomes: dict[Path, Outcome] = {}
    attempts: dict[Path, int] = {}
    running: dict[Future[float], Job] = {}
    pages: list[Future[None]] = []

    def settle(job: Job, status: str, reason: str = "", seconds: float = 0.0) -> None:
        outcomes[job.run_dir] = outcome = Outcome(job, status, reason, seconds)
        if outcome.good and not job.page.exists():
            pages.append(background.submit(worker.write_page, job))
        overview.ended(job, status, seconds)

    with ThreadPoolExecutor(1, thread_name_prefix="page") as background, engine(settings) as submit:
        while waiting or running:
            ready: list[Job] = []
            for job in list(waiting):
                needed = [outcomes.get(need) for need in job.needs]
                bad = [outcome for outcome in needed if outcome is not None and not outcome.good]
                if bad:
                    waiting.remove(job)
                    settle(job, "not run", f"it needs {bad[0].job.label}, which {was(bad[0].status)}")
                elif None not in needed and len(running) + len(ready) < settings.jobs:
                    waiting.remove(job)
                    if ledger.standing(job, reuse=settings.reuse).name == "done":
                        settle(job, "done before")
                    else:
                        overview.started(job)
                        attempts[job.run_dir] = attempts.get(job.run_dir, 0) + 1
                        ready.append(job)
            if ready:
                running |= zip(submit(ready), ready, strict=True)
            overview.show()
            for future in wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is None:
                    settle(job, "complete", seconds=future.result())
                elif not isinstance(error, worker.NotebookFailed):
                    raise error
                elif attempts[job.run_dir] <= settings.retries:
                    overview.again(job, attempts[job.run_dir])
                    waiting.insert(0, job)
                else:
                    settle(job, "failed", str(error))
    for page in pages:
        page.result()
    return [outcomes[job.run_dir] for job in jobs]


def was(status: str) -> str:
    """A status in a sentence."""
    return "was not run" if status == "not run" else status
