"""Runs: every result in a directory of its own that tells how it was made.

    WORKSPACE/runs/EXPERIMENT/03_finetune_atop-9c41ab02/
        parameters.json   what the notebook was called with; the name's hash is of these
        manifest.json     when, by which code, on what, from which other runs, and how it ended
        metrics.json      numbers
        progress.txt      where it is now
        purifier.safetensors, state.pt, figures/, pictures/, ...
        superseded-1/     what an earlier call left, made from other code, data or weights

Two settings never share a directory and one setting always finds its own. A run that is going on holds
``run.lock``, which the system frees when its process ends, however it ends. No torch is imported here before
a run is opened."""

import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from atoplib.files import read_json, set_aside, workspace_dir, write_json, write_text
from atoplib.hashing import NO_IDENTITY, json_hash, notebook_hash, path_hash
from atoplib.parameters import Parameters
from atoplib.progress import format_seconds

NAME_FROM_BATCH = "ATOPLIB_RUN"
"""The environment variable by which a batch tells a notebook the name of its run."""
PACKAGES = ("torch", "torchvision", "numpy", "torchattacks", "papermill")


class RunInUse(RuntimeError):
    """Another process works in this directory; the message says which one."""


def experiment_dir(p: Parameters) -> Path:
    """WORKSPACE/runs/EXPERIMENT; with ``smoke`` EXPERIMENT-smoke: it never passes for the real thing."""
    return workspace_dir(p.workspace) / "runs" / (p.experiment + ("-smoke" if p.smoke else ""))


def run_name(stage: str, values: Mapping[str, Any]) -> str:
    """STAGE-HASH: a directory's name, a function of the parameters but those in ``hashing.NO_IDENTITY``."""
    planned = os.environ.get(NAME_FROM_BATCH, "")
    if planned.startswith(f"{stage}-"):
        return planned
    # what is `latest` after it was resolved has no run: the kit's own weights, as a notebook then calls them
    known = {name: "pretrained" if value == "latest" else value for name, value in values.items()}
    kept = {name: value for name, value in known.items() if name not in NO_IDENTITY}
    return f"{stage}-{json_hash(kept)[:8]}"


def resolve(p: Parameters) -> Parameters:
    """The parameters with every ``latest`` replaced by the name of the run that it means now, so that a
    notebook by hand and a batch, which names the run that it made, have the same ones. Where there is none
    yet, it stays."""
    found = {}
    for name, rule in p.run_fields.items():
        if not rule.several and getattr(p, name) == "latest":
            with suppress(FileNotFoundError):
                found[name] = find_run(p, "latest", rule.stage, **rule.wanted).name
    return p.replace(**found)


def find_run(p: Parameters, which: str, stage: str, **wanted: Any) -> Path:
    """The run that ``which`` names: ``latest`` (complete, of the same data set, its parameters as
    ``wanted``), the name of a directory, or a path.

    Raises:
        FileNotFoundError: if there is none; the message says which notebook to run first.
    """
    folder = experiment_dir(p)
    if which != "latest":
        for path in (folder / which, Path(which).expanduser()):
            if (path / "manifest.json").is_file():
                return path
        raise FileNotFoundError(
            f"there is no run {which!r} in {folder}, nor at that path; give 'latest' or a name"
        )
    wanted = {"dataset": p.dataset, "image_size": p.image_size} | wanted
    nearest = ""
    for path in reversed(complete_runs(folder, stage)):
        values = read_json(path / "parameters.json") or {}
        own = {
            name: values.get(name, type(value)()) for name, value in wanted.items()
        }  # an older run did not know it: False, ""
        others = [
            f"{name} = {own[name]!r}, not {value!r}" for name, value in wanted.items() if own[name] != value
        ]
        if not others:
            return path
        nearest = nearest or f" ({path.name} has {'; '.join(others)})"
    conditions = "".join(f", {name} = {value!r}" for name, value in wanted.items() if value not in ("", None))
    raise FileNotFoundError(
        f"{folder} holds no complete run of {stage}{conditions}{nearest}: run the notebook {stage}.ipynb "
        f"first, with the same experiment, dataset, image_size and smoke; or name a run in place of 'latest'"
    )


def complete_runs(folder: Path, stage: str = "*") -> list[Path]:
    """Complete runs of a stage in an experiment's folder; the one that ended last is the last, whatever the
    clock said.
    """
    return [
        path
        for _, _, path in sorted(_ended(folder, stage))
        if (read_json(path / "manifest.json") or {})["status"] == "complete"
    ]


def _ended(folder: Path, stage: str) -> Iterator[tuple[int, str, Path]]:
    for path in folder.glob(f"{stage}-*"):
        manifest = read_json(path / "manifest.json") or {}
        if stage in ("*", manifest.get("stage")) and "ended" in manifest:
            number = manifest.get("number", 0)
            yield number if isinstance(number, int) else 0, str(manifest["ended"]), path


# ------------------------------------------------------------------------------------------------------------
# one run


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which the system frees when the process ends, even by ``kill -9``; the file itself
    stays.

    Raises:
        RunInUse: if another process holds it.
        OSError: if the file cannot be written, with what to do.
    """
    lock = _lock(path)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(path: Path) -> FileLock | None:
    lock = FileLock(
        path, timeout=0, is_singleton=True
    )  # this process may ask again: a cell is executed twice
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        manifest = read_json(path.parent / "manifest.json") or {}
        holder = (
            f"process {manifest['process']} on {manifest.get('host')}"
            if "process" in manifest
            else "another process"
        )
        raise RunInUse(
            f"{path.parent} is in use by {holder}. Wait until it ends or stop it, then run again; "
            f"no file was touched"
        ) from None
    except NotImplementedError:
        lock = None  # a file system without locks, as some network ones, is used without
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path}: {error.strerror}. Choose another workspace, or make this folder "
            f"writable",
        ) from error
    return lock


def in_use(run_dir: Path) -> bool:
    """Whether another process works in a run's directory now."""
    if not (run_dir / "run.lock").is_file():
        return False
    try:
        with locked(run_dir / "run.lock"):
            return False
    except RunInUse:
        return True


class Run:
    """A run's directory; made by ``open_run``. ``finish`` ends it, or leaving it as a context manager."""

    def __init__(
        self, path: Path, parameters: Parameters, manifest: dict[str, Any], lock: FileLock | None
    ) -> None:
        self.path, self.parameters, self.manifest = path, parameters, manifest
        self.metrics: dict[str, Any] = read_json(path / "metrics.json") or {}
        self.started = time.monotonic()
        self._lock = lock

    def __repr__(self) -> str:
        return f"Run({self.path.name}, {self.manifest['status']})"

    @property
    def state_path(self) -> Path:
        """Where an unfinished training goes on."""
        return self.path / "state.pt"

    def figure_path(self, name: str) -> Path:
        """Where a plot is kept, which anybody may see."""
        return self.path / "figures" / f"{name}.png"

    def picture_path(self, name: str) -> Path:
        """Where a picture is kept that shows images of the data set."""
        return self.path / "pictures" / f"{name}.png"

    def record(self, **metrics: Any) -> None:
        """Add to ``metrics.json``."""
        self.metrics.update(metrics)
        write_json(self.path / "metrics.json", self.metrics)

    def progress(self, line: str) -> None:
        """Leave a line where someone who watches can read it; on a full disk the run goes on without."""
        with suppress(OSError):
            write_text(self.path / "progress.txt", line + "\n")

    def supersede(self, patterns: Iterable[str] = ("*",)) -> Path | None:
        """Move what an earlier call left, files and folders that match the patterns, into superseded-N/, and
        forget its metrics; None where there is nothing. What tells about this call stays."""
        kept = ("run.lock", "parameters.json", "manifest.json", "progress.txt")
        found = {path for pattern in patterns for path in self.path.glob(pattern)}
        left = [
            path
            for path in sorted(found)
            if path.name not in kept and not path.name.startswith(("superseded-", "."))
        ]
        if not left:
            return None
        folder = set_aside(self.path, left)
        self.metrics.clear()
        return folder

    def age(self, name: str = "state.pt") -> str:
        """How long ago one of the run's files was written, such as ``21 min 05 s``; "" if there is none."""
        path = self.path / name
        return format_seconds(time.time() - path.stat().st_mtime) if path.is_file() else ""

    def finish(self, status: str = "complete", error: str = "", **metrics: Any) -> None:
        """Write how the run ended, and free its directory."""
        if metrics:
            self.record(**metrics)
        numbers = (number for number, _, _ in _ended(self.path.parent, self.manifest["stage"]))
        self.manifest |= {
            "status": status,
            "seconds": round(self.manifest.get("seconds", 0) + time.monotonic() - self.started, 2),
            "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "number": 1 + max(numbers, default=0),
        } | ({"error": error} if error else {})
        if self.path.is_dir():
            write_json(self.path / "manifest.json", self.manifest)
        if self._lock is not None:
            self._lock.release(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.finish(
                "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
                f"{kind.__name__}: {error}",
            )


def open_run(
    p: Parameters, stage: str, *, inputs: Mapping[str, Path] | None = None, notebook: Path | None = None
) -> Run:
    """The directory of the run with these parameters, new or found again. What an earlier call left there,
    state and results, stays until this one writes its own.

    Args:
        stage: the notebook's name, such as ``01_train_classifier``.
        inputs: files that it is computed from, by name; their hashes are noted, and that of a data set
            ``folder:PATH``.
        notebook: its file, to note its code; the one of that name in the project if None.

    Raises:
        RunInUse: if another process is in the directory.
        OSError: if it cannot be written, with what to do.
    """
    p = resolve(p)
    path = experiment_dir(p) / run_name(stage, p.as_dict())
    lock = _lock(path / "run.lock")
    for left_over in path.rglob(".*.part"):  # of a process that was killed while it wrote
        left_over.unlink(missing_ok=True)
    before = read_json(path / "manifest.json") or {}
    if str(p.as_dict().get("dataset", "")).startswith("folder:"):
        inputs = {**(inputs or {}), "data": Path(p.dataset.removeprefix("folder:")).expanduser()}
    manifest: dict[str, Any] = {
        "stage": stage,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": before.get("seconds", 0) if before.get("status") != "complete" else 0,
        "attempts": 1 + (before.get("attempts", 0) if before.get("status") != "complete" else 0),
        "seed": p.as_dict().get("seed"),
        "inputs": {name: _input(Path(file)) for name, file in (inputs or {}).items()},
        "process": os.getpid(),
        "host": socket.gethostname(),
        **identity(notebook or notebook_path(stage)),
        "revision": _revision(Path(__file__).parent),
        "platform": platform.platform(),
        "hardware": _hardware(p.as_dict().get("device", "auto")),
    }
    write_json(path / "parameters.json", p.as_dict())
    write_json(path / "manifest.json", manifest)
    return Run(path, p, manifest, lock)


def notebook_path(stage: str) -> Path:
    """The notebook of a stage in the project."""
    return Path(__file__).resolve().parents[1] / "notebooks" / f"{stage}.ipynb"


def identity(notebook: Path) -> dict[str, Any]:
    """What a run depends on beside its parameters and inputs: its notebook's code with all of atoplib that it
    imports, and releases of the packages that decide numbers."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"code": notebook_hash(notebook) if notebook.is_file() else "", "versions": versions}


def difference(run_dir: Path, notebook: Path) -> str:
    """What has changed since a run was made, in one sentence; "" if nothing has."""
    manifest = read_json(run_dir / "manifest.json") or {}
    now = identity(notebook)
    if manifest.get("code") != now["code"]:
        return f"the code of {notebook.name}, or of atoplib that it uses, has changed"
    before = manifest.get("versions", {})
    for name, release in now["versions"].items():
        if before.get(name) != release:
            return f"{name} is {release}, it was {before.get(name)}"
    for name, noted in manifest.get("inputs", {}).items():
        path = Path(noted["path"])
        if not path.exists() or path_hash(path) != noted["sha256"]:
            state = "another" if path.exists() else "gone"
            return f"the {name} that it was made from, {noted['file']}, is {state}"
    return ""


def latest_line(run_dir: Path) -> str:
    """The run's line of progress, empty before there is one."""
    try:
        return (run_dir / "progress.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _input(path: Path) -> dict[str, str]:
    return {"file": f"{path.parent.name}/{path.name}", "path": str(path.resolve()), "sha256": path_hash(path)}


@cache
def _revision(folder: Path) -> str:
    """The git revision of a folder, ``+changes`` if it was edited since; ``unknown`` outside a checkout."""
    command = ["git", "-C", str(folder)]
    try:
        revision = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            [*command, "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if revision.returncode:
        return "unknown"
    return revision.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _hardware(device: str) -> str:
    """What computes: the name of the GPU, or the processor and its number of threads."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"
