"""Where jobs are executed: an engine takes the jobs that are ready, and gives for each a future of the seconds that it took.

``local`` is this machine. ``ray`` and ``slurm`` need a file system that all machines share, and the same environment on each
(docs/cluster.md).
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from atoplib.batch import ledger, worker
from atoplib.batch.plan import Job
from atoplib.batch.worker import NotebookFailed, execute

A_DAY = 24 * 60  # minutes that a Slurm job may take, unless its options say otherwise; submitit's own default is 5
LOST_NODES = 3  # so often Ray begins a run anew because the node under it was lost, unless its options say otherwise
STARTS = 3  # attempts to start a Ray on this machine: on a crowded one its own time limits of seconds can be too short
ANSWER_SECONDS = 10  # for a Ray cluster to take a call
RAY_MEMORY = 80 * 2**20  # bytes, the least that Ray allows for what its tasks hand on: here a number each
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would copy the working directory to the nodes
    "RAY_worker_niceness": "0",  # of a Ray that is started here: its own choice, 15, starves runs beside other work
}
OF_A_RAY_TASK = (
    "num_cpus",
    "num_gpus",
    "memory",
    "resources",
    "accelerator_type",
    "label_selector",
    "scheduling_strategy",
    "max_retries",
)


@dataclass(frozen=True)
class Settings:
    """How jobs are executed.

    Attributes:
        jobs: so many at once, at least 1.
        retries: so many more attempts for one that fails.
        timeout: seconds for one attempt; None sets no limit.
        threads: that each run computes with; None leaves the choice to torch.
        reuse: take finished runs even if code or inputs have changed since.
        options: what an engine itself takes. ``ray``: ``address`` of a cluster, and what a task asks for (``num_gpus``,
            ``num_cpus``, ``resources``, ...). ``slurm``: anything of submitit's executor (``slurm_partition``,
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
def ray(settings: Settings) -> Iterator[Submit]:
    """Ray Core: one task a run, begun anew on another node when its own is lost; by the option ``address`` on a cluster that
    is there (``auto`` or ``HOST:PORT``), else on a Ray of its own on this machine. When the block ends by an error or a
    Ctrl-C, the notebooks that run save, end, and are waited for.

    Raises:
        ValueError: if Ray is not installed, there is no cluster, an option is unknown, or no node has what it asks for.
    """
    core = optional("ray")
    options = {"num_cpus": settings.threads or 1, "max_retries": LOST_NODES, **settings.options}
    address = str(options.pop("address", os.environ.get("RAY_ADDRESS", "local")))
    if unknown := [name for name in options if name not in OF_A_RAY_TASK]:
        raise ValueError(f"the engine ray has no option {unknown[0]}; allowed: {', '.join(('address', *OF_A_RAY_TASK))}")
    try:
        task = core.remote(**options, retry_exceptions=False)(attempt)
        join_ray(core, address)
    except (ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError(f"the engine ray cannot be used so: {error}") from error
    references: list[Any] = []
    # What Ray has to say of a lost node, some sixty lines in the middle of the overview, stands in its logs, too.
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        ThreadPoolExecutor(settings.jobs, thread_name_prefix="ray") as pool,
    ):

        def submit(jobs: Sequence[Job]) -> "list[Future[float]]":
            how = (settings.timeout, settings.threads, settings.reuse)
            submitted = [task.remote(job, *how) for job in jobs]
            references.extend(submitted)
            return [
                pool.submit(seconds_of, job, partial(core.get, reference))
                for job, reference in zip(jobs, submitted, strict=True)
            ]

        try:
            check_demand(core.nodes(), options)
            yield submit
        except BaseException:
            for reference in references:  # a KeyboardInterrupt in the task: its notebook saves and ends
                core.cancel(reference)
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            core.shutdown()


def join_ray(core: ModuleType, address: str) -> None:
    """Connect this process to a Ray cluster, or start one here, with nothing printed, reported or copied to other machines.

    Raises:
        RuntimeError, OSError: as Ray does, if that is impossible.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "error"}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address != "local":
            check_answers(address)
            core.init(address=address, **quiet)
            return
        for attempts_left in reversed(range(STARTS)):
            try:
                core.init(address=address, include_dashboard=False, object_store_memory=RAY_MEMORY, **quiet)
                return
            except Exception as error:  # a bare one, at a time limit
                core.shutdown()
                if not attempts_left:
                    raise RuntimeError(error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the batch without saving


def check_answers(address: str) -> None:
    """Raise OSError if nothing answers at HOST:PORT, for which Ray would try for ten minutes; ``auto`` is left to Ray."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise OSError(f"nothing answers at {address} ({error})") from error


def check_demand(nodes: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Raise ValueError if no node of a Ray cluster has what a run asks for: it would wait for ever."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    wanted = {names[name]: value for name, value in options.items() if name in names and value}
    wanted |= options.get("resources") or {}
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(offer.get(name, 0) >= value for name, value in wanted.items()) for offer in offers):
        most = {name: max((offer.get(name, 0) for offer in offers), default=0) for name in wanted}
        text = ", ".join(f"{value:g} {name} (at most {most[name]:g})" for name, value in wanted.items())
        raise ValueError(f"no node of the Ray cluster has what a run asks for: {text}")


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
            how = (settings.timeout, settings.threads, settings.reuse)
            try:
                with executor.batch():
                    submitted = [executor.submit(attempt, job, *how) for job in jobs]
            except (submitit.core.utils.FailedJobError, OSError) as error:  # sbatch is installed, but no cluster answers it
                reason = " ".join(str(error).split())[-300:]
                raise ValueError(f"the engine slurm cannot be used so: sbatch refused the runs ({reason})") from error
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


ENGINES: Mapping[str, Engine] = {"local": local, "ray": ray, "slurm": slurm}
