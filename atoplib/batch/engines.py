"""Where jobs are executed: an engine takes the jobs that are ready, and gives for each a future of the seconds that it took.

``local`` is this machine. ``slurm`` needs a file system that all machines share, and the same environment on each
(docs/cluster.md).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from atoplib.batch import ledger, worker
from atoplib.batch.plan import Job
from atoplib.batch.worker import NotebookFailed, execute

A_DAY = 24 * 60  # minutes that a Slurm job may take, unless its options say otherwise; submitit's own default is 5


@dataclass(frozen=True)
class Settings:
    """How jobs are executed.

    Attributes:
        jobs: so many at once, at least 1.
        retries: so many more attempts for one that fails.
        timeout: seconds for one attempt; None sets no limit.
        threads: that each run computes with; None leaves the choice to torch.
        reuse: take finished runs even if code or inputs have changed since.
        options: what an engine itself takes. ``slurm``: anything of submitit's executor (``slurm_partition``,
            ``gpus_per_node``, ``timeout_min``, ...), ``folder`` for its logs, and ``cluster``.
    """

    jobs: int = 1
    retries: int = 0
    timeout: float | None = None
    threads: int | None = None
    reuse: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("retries", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be a number of seconds above 0, got {self.timeout}")


Submit = Callable[[Sequence[Job]], "list[Future[float]]"]
Engine = Callable[[Settings], AbstractContextManager[Submit]]


@contextmanager
def local(settings: Settings) -> Iterator[Submit]:
    """This machine. When the block ends by an error or a Ctrl-C, the notebooks that run save, end, and are waited for.

    Raises:
        ValueError: for any option of its own: it has none.
    """
    if settings.options:
        raise ValueError(f"the engine local has no options, got {', '.join(settings.options)}")
    stop = threading.Event()
    with ThreadPoolExecutor(settings.jobs, thread_name_prefix="job") as pool:

        def submit(jobs: Sequence[Job]) -> "list[Future[float]]":
            how = {"timeout": settings.timeout, "threads": settings.threads, "reuse": settings.reuse}
            return [pool.submit(execute, job, stop=stop, **how) for job in jobs]

        try:
            yield submit
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def attempt(job: Job, timeout: float | None, threads: int | None, reuse: bool) -> tuple[float, str]:
    """Execute a job on another machine: the seconds that it took, or why it failed.

    One that was begun on a machine that is lost now may still be saving, which is waited for; or it was completed there.
    """
    if ledger.standing(job, reuse=reuse).name == "done":
        return 0.0, ""
    try:
        patience = 2 * worker.STOP_SECONDS
        return execute(job, timeout=timeout, threads=threads, reuse=reuse, patience=patience), ""
    except NotebookFailed as error:
        return 0.0, str(error)


def seconds_of(job: Job, get: Callable[[], tuple[float, str]]) -> float:
    """The seconds of an ``attempt`` whose result ``get`` waits for.

    Raises:
        NotebookFailed: if the attempt failed, or was lost with its machine.
    """
    try:
        seconds, reason = get()
    except Exception as error:  # of the cluster's own kinds
        raise NotebookFailed(f"{job.label} failed: it was lost ({type(error).__name__}: {error})") from error
    if reason:
        raise NotebookFailed(reason)
    return seconds


@contextmanager
def slurm(settings: Settings) -> Iterator[Submit]:
    """Slurm, by submitit: jobs that are ready together are one job array of the cluster, a task a run; the option
    ``cluster=local`` tries it on this machine.

    Raises:
        ValueError: if submitit is not installed, there is no Slurm, or an option is none of submitit's.
    """
    submitit = optional("submitit")
    options = dict(settings.options)
    folder = Path(options.pop("folder", "runs/slurm")).expanduser().resolve()
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", "slurm"))
        executor.update_parameters(**{"cpus_per_task": settings.threads or 1, "timeout_min": A_DAY, **options})
    except (RuntimeError, NameError, TypeError) as error:
        raise ValueError(f"the engine slurm cannot be used so: {error}") from error
    tasks: list[Any] = []
    with ThreadPoolExecutor(settings.jobs, thread_name_prefix="slurm") as pool:

        def submit(jobs: Sequence[Job]) -> "list[Future[float]]":
            with executor.batch():
                how = (settings.timeout, settings.threads, settings.reuse)
                submitted = [executor.submit(attempt, job, *how) for job in jobs]
            tasks.extend(submitted)
            return [pool.submit(seconds_of, job, task.result) for job, task in zip(jobs, submitted, strict=True)]

        try:
            yield submit
        except BaseException:
            for task in tasks:
                if not task.done():
                    task.cancel()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def optional(name: str) -> ModuleType:
    """A package that is no part of the installation.

    Raises:
        ValueError: saying how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"this engine needs {name}, which is not installed: .venv/bin/pip install {name}") from error


ENGINES: Mapping[str, Engine] = {"local": local, "slurm": slurm}
