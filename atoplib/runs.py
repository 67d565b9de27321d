"""A directory for each run: parameters, manifest, metrics, figures, checkpoints; every file written atomically.

    WORKSPACE/runs/EXPERIMENT/STAGE-HASH/
        manifest.json     status, git revision, versions, device, seed, inputs, seconds
        parameters.json   what the notebook was run with
        metrics.json      what it measured
        figures/*.png     what it showed
        pictures/*.png    likewise, images of the data set
        *.safetensors     what it trained; *-epoch0003.safetensors: after so many epochs
        state.pt          where an unfinished training goes on
        made_from.json    hashes of the weights, and of one's own networks, that a training was begun from
        other-inputs-1/   what stood here of a training from other weights

The hash is one of the parameters, so that two settings never share a directory and one setting always finds its own. A run
that is going on holds ``run.lock``, which the system frees when its process ends, however it ends.
"""

import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from atoplib.checkpoints import write_json
from atoplib.progress import format_seconds

# Where a run happens, and what it leaves on the way, does not change what it is.
PLACES = ("workspace", "data_dir", "device", "processes", "keep_every")
PACKAGES = ("torch", "torchvision", "numpy", "torchattacks", "papermill")


class RunInUse(RuntimeError):
    """Another process works in this directory; the message says which one."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which the system frees when the process ends, even by ``kill -9``; the file itself stays.

    A file system without locks (some network ones) is used without.

    Raises:
        RunInUse: if another process holds it.
        OSError: if the file cannot be written, with what to do.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {path}: {error.strerror}. Choose another workspace, or make this folder writable"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise RunInUse(
                f"{path.parent} is in use by {holder}. Wait until it ends or stop it, then run again; no file was touched"
            ) from error
        except OSError:
            pass
        with suppress(OSError):  # a full disk: the name is only for people
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


PLANNED_NAME = "ATOPLIB_RUN_NAME"
"""The environment variable by which a batch tells a notebook the name of its run."""


def run_name(stage: str, parameters: Mapping[str, Any]) -> str:
    """STAGE-HASH: the directory's name, a function of the parameters without the places they name. A batch, which planned a run
    before those that it needs were made, tells it its name: ``latest`` may mean another run by now.
    """
    planned = os.environ.get(PLANNED_NAME, "")
    if planned.startswith(f"{stage}-"):
        return planned
    kept = {name: value for name, value in parameters.items() if name not in PLACES}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return f"{stage}-{digest[:8]}"


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, None where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def source_revision(folder: Path) -> str:
    """The git revision of a folder, with ``+changes`` if it was edited since; ``unknown`` outside a checkout."""
    command = ["git", "-C", str(folder)]
    try:
        revision = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if revision.returncode:
        return "unknown"
    return revision.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def device_description(device: torch.device) -> str:
    """What computes: the name of the GPU, or the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


@dataclass
class Run:
    """One run's directory. Made by ``open_run``."""

    path: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)

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

    def input(self, **files: Path) -> None:
        """Note in the manifest which files this run was computed from, with their hashes."""
        for name, path in files.items():
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.manifest["inputs"][name] = {"file": f"{path.parent.name}/{path.name}", "sha256": digest}
        write_json(self.path / "manifest.json", self.manifest)

    def made_from(self, names: Iterable[str], given: Mapping[str, str]) -> list[str]:
        """Which inputs of a training (noted by ``input``) are others than when an earlier call began it: ``latest`` names
        another run, the run it names was made anew, or another network of one's own was given. What that call left is then
        moved into a folder of its own.

        Args:
            given: what else the training depends on, by its name in a sentence: fingerprints of networks of one's own, of the
                code, of what computes.
        """
        files = {name: self.manifest["inputs"][name]["sha256"] for name in names}
        now = files | dict(given)
        noted = self.path / "made_from.json"
        before = read_json(noted)
        before = files if before is None else before
        changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        made = [path for pattern in ("state.pt*", "*.safetensors", "metrics.json") for path in self.path.glob(pattern)]
        if changed and made:
            number = 1 + sum(1 for _ in self.path.glob("other-inputs-*"))
            (folder := self.path / f"other-inputs-{number}").mkdir()
            for path in made:
                os.rename(path, folder / path.name)
            self.metrics.clear()
        write_json(noted, now)
        return changed if made else []

    def age(self) -> str:
        """How long ago the run's state was saved for the last time, as ``format_seconds`` says it; "" if there is none."""
        return format_seconds(time.time() - self.state_path.stat().st_mtime) if self.state_path.is_file() else ""

    def progress(self, line: str) -> None:
        """Leave a line where someone who watches the run can read it; on a full disk the run goes on without."""
        part = self.path / "progress.txt.part"
        with suppress(OSError):
            part.write_text(line + "\n")
            os.replace(part, self.path / "progress.txt")


def latest_line(run_dir: Path) -> str:
    """The run's line of progress, empty before there is one."""
    try:
        return (run_dir / "progress.txt").read_text().strip()
    except OSError:
        return ""


@contextmanager
def open_run(
    experiment_dir: Path, stage: str, parameters: Mapping[str, Any], *, device: torch.device, source: Path | None = None
) -> Iterator[Run]:
    """The directory of the run with these parameters, new or found again; its manifest tells how the run ended.

    Status: ``running`` inside the block, then ``complete``, ``failed`` (with the error) or ``interrupted``. What an earlier
    run left there, state and results, stays until this one writes its own.

    Args:
        experiment_dir: WORKSPACE/runs/EXPERIMENT.
        stage: the notebook's name, such as ``01_train_classifier``.
        parameters: JSON values; those in ``PLACES`` are not part of the identity.
        source: folder whose git revision is noted.

    Raises:
        RunInUse: if another process is in the directory.
        OSError: if it cannot be written, with what to do.
    """
    path = experiment_dir / run_name(stage, parameters)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"could not make {path}: {error.strerror}. Choose another workspace, or make that folder writable"
        ) from error
    with locked(path / "run.lock"):
        for left_over in path.rglob(".*.part"):  # of a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        yield from record_run(path, stage, parameters, device, source)


def record_run(
    path: Path, stage: str, parameters: Mapping[str, Any], device: torch.device, source: Path | None
) -> Iterator[Run]:
    """The run in a directory that this process holds, its manifest written before and after."""
    manifest: dict[str, Any] = {
        "stage": stage,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": source_revision(source or Path(__file__).parent),
        "versions": package_versions(),
        "device": device_description(device),
        "platform": platform.platform(),
        "seed": parameters.get("seed"),
        "inputs": {},
        "process": os.getpid(),
    }
    run = Run(path, manifest, read_json(path / "metrics.json") or {})
    write_json(path / "parameters.json", dict(parameters))
    write_json(path / "manifest.json", manifest)
    started = time.monotonic()
    try:
        yield run
    except BaseException as error:
        manifest["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        manifest["error"] = f"{type(error).__name__}: {error}"
        raise
    else:
        manifest["status"] = "complete"
    finally:
        manifest["seconds"] = round(time.monotonic() - started, 2)
        manifest["ended"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        manifest["number"] = 1 + max((number for number, *_ in ended_runs(path.parent, stage)), default=0)
        if sys.exc_info()[0] is None or path.is_dir():
            write_json(path / "manifest.json", manifest)


def recorded_inputs(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a run was computed from, by name, as ``Run.input`` notes it; nothing else that a damaged manifest may hold."""
    inputs = manifest.get("inputs")
    return (
        {name: entry for name, entry in sorted(inputs.items()) if isinstance(entry, dict)}
        if isinstance(inputs, dict)
        else {}
    )


def finished_runs(experiment_dir: Path, stage: str) -> list[Path]:
    """Complete runs of a stage, the one that ended last is the last, whatever the clock said."""
    return [path for _, status, _, path in sorted(ended_runs(experiment_dir, stage), key=itemgetter(0, 2, 3)) if status]


def ended_runs(experiment_dir: Path, stage: str) -> Iterator[tuple[int, bool, str, Path]]:
    """Of every run of a stage that ended: its number in the order of their ends, whether it is complete, when, and where."""
    for path in experiment_dir.glob(f"{stage}-*"):
        manifest = read_json(path / "manifest.json") or {}
        if manifest.get("stage") == stage and "ended" in manifest:
            number = manifest.get("number", 0)
            yield (
                number if isinstance(number, int) else 0,
                manifest.get("status") == "complete",
                str(manifest["ended"]),
                path,
            )


def find_run(experiment_dir: Path, stage: str, which: str = "latest", **wanted: Any) -> Path:
    """The run that ``which`` names: ``latest`` (complete, its parameters as ``wanted``), a directory's name, or a path.

    Raises:
        FileNotFoundError: if there is none; the message says which notebook to run first.
    """
    if which != "latest":
        for path in (experiment_dir / which, Path(which).expanduser()):
            if (path / "manifest.json").is_file():
                return path
        raise FileNotFoundError(f"there is no run {which!r} in {experiment_dir}, nor at that path; give 'latest' or a name")
    nearest = ""
    for path in reversed(finished_runs(experiment_dir, stage)):
        parameters = read_json(path / "parameters.json") or {}
        # what an older run did not know yet it did not do: False, or ""
        its = {name: parameters.get(name, type(value)()) for name, value in wanted.items()}
        others = [f"{name} = {its[name]!r}, not {value!r}" for name, value in wanted.items() if its[name] != value]
        if not others:
            return path
        nearest = nearest or f" ({path.name} has {'; '.join(others)})"
    conditions = "".join(f", {name} = {value!r}" for name, value in wanted.items() if value not in ("", None))
    raise FileNotFoundError(
        f"{experiment_dir} holds no complete run of {stage}{conditions}{nearest}: run the notebook {stage}.ipynb first, "
        f"with the same experiment, dataset, image_size and smoke; or name a run in place of 'latest'"
    )


def workspace_dir(workspace: str = "") -> Path:
    """The folder that holds ``runs/`` and ``data/``: the one given, or the project's own, found upwards from here.

    A notebook is run from its own folder by JupyterLab and from the caller's, wherever that is, by papermill; both find the same.
    """
    if workspace:
        return Path(workspace).expanduser().resolve()
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):  # the last: where the kit itself lies
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here
