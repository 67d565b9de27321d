"""Many jobs: each as soon as what it needs is complete, as many at once as asked for; one that fails stops no
other.

An engine executes them: this machine, or Slurm by submitit, which needs a file system that all machines share
and the same environment on each (docs/cluster.md).
"""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from atoplib.batch.pages import write_page
from atoplib.batch.recipe import Job
from atoplib.batch.worker import STOP_SECONDS, NotebookFailed, Stopped, execute
from atoplib.files import read_json
from atoplib.progress import format_seconds
from atoplib.runs import difference, latest_line

LOOK_SECONDS = 0.25  # between two looks at what is running
SAY_SECONDS = 60.0  # between two lines about a run where no terminal renews them
ASK_SECONDS = 20  # between two questions to Slurm
A_DAY = (
    24 * 60
)  # minutes that a Slurm job may take, unless its options say otherwise; submitit's own default is 5


@dataclass(frozen=True)
class Outcome:
    """How a job ended: ``done before``, ``complete``, ``failed`` or ``not run`` (something that it needs
    failed), and why.
    """

    job: Job
    status: str
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether its results are there."""
        return self.status in ("done before", "complete")


def job_state(job: Job, *, reuse: bool = False) -> tuple[str, str]:
    """What an earlier call left of a job: new, unfinished, done, or changed with a sentence that says what.

    Args:
        reuse: take what is there even if code, versions or inputs have changed since.
    """
    manifest = read_json(job.run_dir / "manifest.json")
    if manifest is None:
        return "new", ""
    if not reuse and (change := difference(job.run_dir, job.notebook)):
        return "changed", change
    return ("done" if manifest.get("status") == "complete" and job.executed.is_file() else "unfinished"), ""


class Local:
    """This machine.

    Args:
        jobs: so many at once.
        timeout: seconds for one attempt; None sets no limit.
        threads: that each run computes with; None leaves the choice to torch.
        options: what the engine itself takes; this one nothing.
    """

    def __init__(
        self,
        jobs: int = 1,
        timeout: float | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] = {},
    ) -> None:
        if options and type(self) is Local:
            raise ValueError(f"the engine local has no options, got {', '.join(options)}")
        self.jobs, self.timeout, self.threads = jobs, timeout, threads
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(jobs, thread_name_prefix="job")

    def submit(self, jobs: Sequence[Job]) -> list[Future[float]]:
        """Begin jobs that are ready; the futures hold the seconds that each took, or raise NotebookFailed."""
        return [self.pool.submit(self._execute, job) for job in jobs]

    def _execute(self, job: Job) -> float:
        return execute(job, stop=self.stop, timeout=self.timeout, threads=self.threads)

    def close(self) -> None:
        """Have the notebooks that run save and end, and wait for it."""
        self.stop.set()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _attempt(job: Job, timeout: float | None, threads: int | None) -> tuple[float, str]:
    """A job as Slurm executes it, begun anew on another node when its own is lost: its seconds, or why it
    failed.
    """
    try:
        return execute(job, timeout=timeout, threads=threads, patience=2 * STOP_SECONDS), ""
    except NotebookFailed as error:
        return 0.0, str(error)


class Slurm(Local):
    """Slurm: jobs that are ready together are one job array, a task a run; a run whose node died is requeued.

    Args:
        options: anything of submitit's executor (``slurm_partition``, ``gpus_per_node``, ``timeout_min``,
            ...), ``folder`` for its logs, and ``cluster``: ``local`` tries it on this machine.

    Raises:
        ValueError: if submitit is not installed, there is no Slurm, or an option is none of submitit's.
    """

    def __init__(
        self, jobs: int, timeout: float | None, threads: int | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(jobs, timeout, threads, options)
        self.tasks: list[Any] = []
        try:
            import submitit

            executor = submitit.AutoExecutor(
                folder=options["folder"], cluster=options.get("cluster", "slurm")
            )
            asked = {name: value for name, value in options.items() if name not in ("folder", "cluster")}
            requeue = {"requeue": True} | asked.pop("slurm_additional_parameters", {})
            defaults = {
                "cpus_per_task": threads or 1,
                "timeout_min": A_DAY,
                "slurm_additional_parameters": requeue,
            }
            executor.update_parameters(**defaults | asked)
        except ImportError as error:
            raise ValueError(
                "the engine slurm needs submitit, which is not installed: pip install submitit"
            ) from error
        except (RuntimeError, NameError, TypeError) as error:
            raise ValueError(f"the engine slurm cannot be used so: {error}") from error
        self.executor = executor

    def submit(self, jobs: Sequence[Job]) -> list[Future[float]]:
        """As Local."""
        try:
            with self.executor.batch():
                tasks = [self.executor.submit(_attempt, job, self.timeout, self.threads) for job in jobs]
        except (RuntimeError, OSError) as error:  # sbatch is installed, but no cluster answers it
            reason = " ".join(str(error).split())[-300:]
            raise ValueError(
                f"the engine slurm cannot be used so: sbatch refused the runs ({reason})"
            ) from error
        self.tasks += tasks
        return [self.pool.submit(self._follow, job, task) for job, task in zip(jobs, tasks, strict=True)]

    def _follow(self, job: Job, task: Any) -> float:
        """Wait for a task's file of results; it is lost when Slurm knows it no longer, and no such file has
        come.
        """
        answers: list[bool] = []
        while not task.paths.result_pickle.exists():
            for _ in range(ASK_SECONDS):
                if self.stop.wait(1) or task.paths.result_pickle.exists():
                    break
            if self.stop.is_set():
                raise Stopped(f"{job.label} was stopped")
            answers.append(_is_gone(task.job_id))
            if answers[-2:] == [True, True]:
                raise NotebookFailed(
                    f"{job.label} failed: Slurm lost it, job {task.job_id}; log: {task.paths.stderr}"
                )
        try:
            seconds, reason = task.result()
        except Exception as error:  # of submitit's own kinds
            raise NotebookFailed(
                f"{job.label} failed: it was lost ({type(error).__name__}: {error})"
            ) from error
        if reason:
            raise NotebookFailed(reason)
        return seconds

    def close(self) -> None:
        """Cancel what is queued; what runs saves and ends."""
        for task in self.tasks:
            if not task.paths.result_pickle.exists():
                task.cancel(check=False)
        super().close()


def _is_gone(job_id: str) -> bool:
    """Whether Slurm answers, and does not know a job any more. It keeps no accounts on small clusters: sacct
    is not asked.
    """
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"], capture_output=True, text=True
        )
    except OSError:
        return False
    return "Invalid job id" in asked.stderr or (asked.returncode == 0 and not asked.stdout.strip())


ENGINES = {"local": Local, "slurm": Slurm}


def run_jobs(
    jobs: Sequence[Job],
    engine: Local,
    *,
    retries: int = 0,
    reuse: bool = False,
    look: Callable[[], None] = lambda: None,
    out: TextIO | None = None,
) -> list[Outcome]:
    """Execute what is not done yet of a plan, tell of it, and close the engine.

    Whether a job is done is asked when all that it needs is complete: one whose inputs came out as before is
    not repeated. Each notebook's page is made while others run.

    Args:
        retries: so many more attempts for one that fails.
        reuse: as ``job_state``.
        look: called again and again; what it raises ends the batch as a Ctrl-C does.
        out: where what happens is told; None is standard output.

    Returns:
        the outcomes, in the order of the jobs.

    Raises:
        KeyboardInterrupt: after the notebooks that were running have saved and ended.
    """
    waiting, overview = list(jobs), Overview(jobs, out or sys.stdout)
    running: dict[Future[float], Job] = {}
    outcomes: dict[Path, Outcome] = {}
    attempts: Counter[Path] = Counter()

    def settle(job: Job, status: str, reason: str = "", shown: str = "") -> None:
        outcomes[job.run_dir] = outcome = Outcome(job, status, reason)
        if outcome.good and not job.page.exists():
            background.submit(write_page, job.executed, job.page)
        overview.say(job, shown or status)

    def ready() -> Iterator[Job]:
        for job in list(waiting):
            needed = [outcomes.get(need) for need in job.needs]
            bad = [outcome for outcome in needed if outcome is not None and not outcome.good]
            if not bad and (None in needed or len(running) + len(begun) >= engine.jobs):
                continue
            waiting.remove(job)
            state, change = ("", "") if bad else job_state(job, reuse=reuse)
            if bad:
                was = "was not run" if bad[0].status == "not run" else bad[0].status
                settle(job, "not run", f"it needs {bad[0].job.label}, which {was}")
            elif state == "done":
                settle(job, "done before")
            else:
                overview.started(job, f"run again: {change}" if change else "started")
                attempts[job.run_dir] += 1
                yield job

    with ThreadPoolExecutor(1, thread_name_prefix="page") as background:
        try:
            while waiting or running:
                begun: list[Job] = []
                for job in ready():
                    begun.append(job)
                running |= zip(engine.submit(begun), begun, strict=True) if begun else ()
                for future in wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED).done:
                    job, error = running.pop(future), future.exception()
                    if error is None:
                        settle(job, "complete", shown=f"complete, {format_seconds(future.result())}")
                    elif not isinstance(error, NotebookFailed):
                        raise error
                    elif attempts[job.run_dir] <= retries:
                        overview.say(job, f"attempt {attempts[job.run_dir]} failed, trying again")
                        waiting.insert(0, job)
                    else:
                        settle(job, "failed", str(error))
                overview.show()
                look()
        finally:
            engine.close()
            overview.close()
    return [outcomes[job.run_dir] for job in jobs]


class Overview:
    """What a person sees of a batch: a line when a run starts and when it ends, and what its notebook tells
    in between, with
    a rate and the time left: in a terminal a line for each that runs, renewed; else another line now and
        then.
    """

    def __init__(self, jobs: Sequence[Job], out: TextIO) -> None:
        width = max((len(job.label) for job in jobs), default=0)
        self.heads = {
            job.run_dir: f"[{i}/{len(jobs)}] {job.label:<{width}}" for i, job in enumerate(jobs, start=1)
        }
        self.out = out
        self.running: dict[Path, tuple[float, tqdm]] = {}
        self.told = time.monotonic()

    def started(self, job: Job, text: str) -> None:
        """A job begins."""
        self.say(job, text)
        line = tqdm(
            bar_format="{desc}", leave=False, dynamic_ncols=True, file=self.out, disable=None
        )  # None: but on a terminal
        self.running[job.run_dir] = time.monotonic(), line

    def say(self, job: Job, text: str) -> None:
        """A line that stays; the job does not run, or no longer."""
        if job.run_dir in self.running:
            self.running.pop(job.run_dir)[1].close()
        self._write(job.run_dir, text)

    def _write(self, run_dir: Path, text: str) -> None:
        tqdm.write(f"{self.heads[run_dir]}  {text}", file=self.out)
        self.out.flush()

    def show(self) -> None:
        """Renew, or tell, what is running."""
        now = time.monotonic()
        tell, self.told = (True, now) if now - self.told > SAY_SECONDS else (False, self.told)
        for run_dir, (began, line) in self.running.items():
            text = f"{format_seconds(now - began)}  {latest_line(run_dir)}"
            if not line.disable:
                line.set_description_str(f"{self.heads[run_dir]}  {text}")
            elif tell:
                self._write(run_dir, text)

    def close(self) -> None:
        """Take the renewed lines away."""
        for _, line in self.running.values():
            line.close()
