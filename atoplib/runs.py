"""Runs: every result in a directory of its own that tells how it was made.

    WORKSPACE/runs/EXPERIMENT/03_finetune_atop-seed1-9c41ab02/
        parameters.json   what the notebook was called with; the name's hash is of these
        manifest.json     when, by which code, on what, from which other runs, and how it ended
        metrics.json      numbers
        purifier.safetensors, figures/, pictures/, ...
        .state.pt, .pieces/, .progress.txt, .run.lock   what goes on from where it stopped, out of sight
        superseded-1/     what an earlier call left, made from other code, data or weights

Two settings never share a directory and one setting always finds its own. A run that is going on holds
``.run.lock``, which the system frees when its process ends, however it ends. No torch is imported here before
a run is opened."""

import ast
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from atoplib import hashing, progress
from atoplib.files import read_json, supersede, workspace_dir, write_json, write_text
from atoplib.parameters import MissingFileError, Parameters

# The environment variable by which a batch tells a notebook the name of its run.
NAME_FROM_BATCH = "ATOPLIB_RUN"
EDITED = "edited by hand"  # in place of a hash, of code that no file holds


class RunInUse(RuntimeError):
    """Another process works in this directory; the message says which one."""


def experiment_dir(p: Parameters) -> Path:
    """WORKSPACE/runs/EXPERIMENT; with ``smoke`` EXPERIMENT-smoke: it never passes for the real thing."""
    return workspace_dir(p.workspace) / "runs" / (p.experiment + ("-smoke" if p.smoke else ""))


def run_name(stage: str, values: Mapping[str, Any]) -> str:
    """STAGE-TOLD-HASH: a directory's name, a function of the parameters but those in
    ``hashing.NO_IDENTITY``, with what a reader looks for: adversarial, purifier, attack or protocol, seed.
    """
    planned = os.environ.get(NAME_FROM_BATCH, "")
    if planned.startswith(f"{stage}-"):
        return planned
    # what is `latest` after it was resolved has no run: the kit's own weights, as a notebook then calls them
    kept = {
        name: "pretrained" if values[name] == "latest" else values[name]
        for name in {*values} - {*hashing.NO_IDENTITY}
    }
    told = [
        "adversarial" if values.get("adversarial") else "",
        values.get("purifier"),
        values.get("attack") or values.get("protocol"),
        f"seed{values['seed']}" if values.get("seed") else "",
    ]
    words = (re.sub(r"\W+", "_", word)[:40] for word in told if word)
    return "-".join([stage, *words, hashing.json_hash(kept)[:8]])


def resolve(p: Parameters) -> Parameters:
    """The parameters with every ``latest`` replaced by the name of the run that it means now, so that a
    notebook by hand and a batch, which names the run that it made, have the same ones. Where there is none
    yet, it stays."""
    latest = {}
    for name, rule in p.run_fields.items():
        if not rule.several and getattr(p, name) == "latest":
            with suppress(FileNotFoundError):
                latest[name] = find_run(p, "latest", rule.stage, **rule.wanted).name
    return p.replace(**latest)


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
        raise MissingFileError(
            f"there is no run {which!r} in {folder}, nor at that path; give 'latest' or a name"
        )
    wanted = {"dataset": p.dataset, "image_size": p.image_size} | wanted
    nearest = ""
    for path in reversed(complete_runs(folder, stage)):
        values = read_json(path / "parameters.json") or {}
        others = [
            f"{name} = {values.get(name)!r}, not {value!r}"
            for name, value in wanted.items()
            if values.get(name, type(value)()) != value  # an older run did not know it: False, ""
        ]
        if not others:
            return path
        nearest = nearest or f" ({path.name} has {'; '.join(others)})"
    conditions = "".join(f", {name} = {value!r}" for name, value in wanted.items() if value not in ("", None))
    raise MissingFileError(
        f"{folder} holds no complete run of {stage}{conditions}{nearest}: run the notebook {stage}.ipynb "
        f"first, with the same experiment, dataset, image_size and smoke; or name a run in place of 'latest'"
    )


def complete_runs(folder: Path, stage: str = "*") -> list[Path]:
    """Complete runs of a stage in an experiment's folder; the one that ended last is the last, whatever the
    clock said.
    """
    return [path for *_, path, status in sorted(_ended(folder, stage)) if status == "complete"]


def _ended(folder: Path, stage: str) -> Iterator[tuple[int, str, Path, str]]:
    """The runs that ended: a number and a time by which they are sorted, directory, and status."""
    for path in folder.glob(f"{stage}-*"):
        manifest = read_json(path / "manifest.json") or {}
        if stage in ("*", manifest.get("stage")) and "ended" in manifest:
            yield manifest.get("number", 0), manifest["ended"], path, manifest["status"]


# ------------------------------------------------------------------------------------------------------------
# one run


def _lock(path: Path, timeout: float = 0.5) -> FileLock:
    """Hold a lock file, which the system frees when the process ends, even by ``kill -9``; the file itself
    stays. Who only asks (``in_use``) has it for a moment: others wait a little."""
    lock = FileLock(path, is_singleton=True)  # this process may ask again: a cell executed twice
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout, poll_interval=0.01)
    except Timeout:
        manifest = read_json(path.parent / "manifest.json") or {}
        raise RunInUse(
            f"{path.parent} is in use by process {manifest.get('process', '?')} on "
            f"{manifest.get('host', 'another machine')}. Wait until it ends or stop it, then run again; no "
            f"file was touched"
        ) from None
    except NotImplementedError:
        pass  # a file system without locks, as some network ones, is used without
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path}: {error.strerror}. Choose another workspace, or make this folder "
            f"writable",
        ) from error
    return lock


def in_use(run_dir: Path) -> bool:
    """Whether another process works in a run's directory now."""
    try:
        if (run_dir / ".run.lock").is_file():
            _lock(run_dir / ".run.lock", timeout=0).release()
    except RunInUse:
        return True
    return False


class Run:
    """A run's directory; made by ``open_run``. ``finish`` ends it, or leaving it as a context manager."""

    def __init__(
        self,
        path: Path,
        parameters: Parameters,
        manifest: dict[str, Any],
        lock: FileLock,
        before: dict[str, Any],
        notebook: Path,
    ) -> None:
        self.path, self.parameters, self.manifest, self.notebook = path, parameters, manifest, notebook
        self.metrics: dict[str, Any] = read_json(path / "metrics.json") or {}
        self._lock, self._before, self.started, self.opened = lock, before, time.monotonic(), time.time()

    @property
    def state_path(self) -> Path:
        """Where an unfinished training goes on."""
        return self.path / ".state.pt"

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
            write_text(self.path / ".progress.txt", line + "\n")

    def supersede(self, patterns: Iterable[str]) -> Path:
        """Move what an earlier call left, files and folders that match the patterns, into superseded-N/, and
        forget its metrics."""
        self.metrics.clear()
        return supersede(self.path, {path for pattern in patterns for path in self.path.glob(pattern)})

    def age(self) -> str:
        """How long ago its training's state was written, such as ``21 min 05 s``."""
        states = self.path.glob(f"{self.state_path.name}*")
        return progress.format_seconds(time.time() - max(state.stat().st_mtime for state in states))

    def finish(self, status: str = "complete", error: str = "", **metrics: Any) -> None:
        """Write how the run ended, and free its directory. One whose training or measurements were all loaded
        keeps the time that they took and when they ended."""
        self.record(**metrics)
        made = [path.stat().st_mtime for kept in (".state.pt*", ".pieces/*") for path in self.path.glob(kept)]
        loaded = self._before if made and max(made) < self.opened else {}
        seconds = round(self.manifest["seconds"] + time.monotonic() - self.started, 2)
        self.manifest |= {
            "status": status,
            "seconds": loaded.get("seconds", seconds),
            "ended": loaded.get("ended", datetime.now(UTC).isoformat(timespec="milliseconds")),
            "number": 1 + max((n for n, *_ in _ended(self.path.parent, self.manifest["stage"])), default=0),
        } | ({"error": error} if error else {})
        if _is_edited(self.notebook):  # known only now: by cells before or after ``open_run``
            self.manifest["code"] = EDITED
        write_json(self.path / "manifest.json", self.manifest)
        self._lock.release(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        status = {None: "complete", KeyboardInterrupt: "interrupted"}.get(kind, "failed")
        self.finish(status, f"{kind.__name__}: {error}" if kind else "")


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
    lock = _lock(path / ".run.lock")
    for left_over in path.rglob(".*.part"):  # of a process that was killed while it wrote
        left_over.unlink(missing_ok=True)
    before = read_json(path / "manifest.json") or {}
    done, begun = (before, {}) if before.get("status") == "complete" else ({}, before)
    if str(p.as_dict().get("dataset", "")).startswith("folder:"):
        inputs = {**(inputs or {}), "data": Path(p.dataset.removeprefix("folder:")).expanduser()}
    notebook = notebook or Path(__file__).resolve().parents[1] / "notebooks" / f"{stage}.ipynb"
    manifest = {
        "stage": stage,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": begun.get("seconds", 0),
        "attempts": 1 + begun.get("attempts", 0),
        "seed": p.as_dict().get("seed"),
        "inputs": {
            name: {
                "file": "/".join(file.parts[-2:]),
                "path": str(file.resolve()),
                "sha256": hashing.path_hash(file),
            }
            for name, file in (inputs or {}).items()
        },
        "process": os.getpid(),
        "host": platform.node(),
        **identity(notebook),
        "revision": _revision(Path(__file__).parent),
        "platform": platform.platform(),
        "hardware": _hardware(p.as_dict().get("device", "auto")),
    }
    write_json(path / "parameters.json", p.as_dict())
    write_json(path / "manifest.json", manifest)
    return Run(path, p, manifest, lock, done, notebook)


def _is_edited(notebook: Path) -> bool:
    """Whether this process is a notebook's, and executed a cell that the file does not hold, but for its
    parameters: what was edited and not saved, or saved elsewhere, is another notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    content = read_json(notebook)
    if shell is None or content is None:
        return False
    sources = {"".join(cell["source"]).strip(): cell["metadata"].get("tags", []) for cell in content["cells"]}
    parameters = [text.splitlines()[0] for text, tags in sources.items() if "parameters" in tags]
    others = {cell.strip() for cell in shell.history_manager.input_hist_raw} - {"", *sources}
    return any(
        cell.splitlines()[0] not in ("# Parameters", *parameters) or not _only_sets(cell) for cell in others
    )


def _only_sets(cell: str) -> bool:
    """Whether a cell does nothing but set names to values; one that cannot be read did nothing at all."""
    with suppress(SyntaxError):
        return all(isinstance(line, ast.Assign | ast.AnnAssign) for line in ast.parse(cell).body)
    return True


def identity(notebook: Path) -> dict[str, Any]:
    """What a run depends on beside its parameters and inputs: its notebook's code with all of atoplib that it
    imports, and releases of the packages that decide numbers."""
    code = hashing.notebook_hash(notebook) if notebook.is_file() else ""
    return {"code": code, "versions": hashing.versions()}


def difference(run_dir: Path, notebook: Path) -> str:
    """What has changed since a run was made, in one sentence; "" if nothing has."""
    manifest, now = read_json(run_dir / "manifest.json") or {}, identity(notebook)
    if manifest.get("code") == EDITED:
        return f"{notebook.name} had been edited by hand when it was made"
    if manifest.get("code") != now["code"]:
        return f"the code of {notebook.name}, or of atoplib that it uses, has changed"
    before = manifest.get("versions", {})
    for name, release in now["versions"].items():
        if before.get(name) != release:
            return f"{name} is {release}, it was {before.get(name)}"
    parameters = read_json(run_dir / "parameters.json") or {}
    if ":" in str(parameters.get("classifier")):  # what it imports is known to the notebook alone
        return (
            f"{parameters['classifier']} is code of your own: the notebook asks what of it is still the same"
        )
    for name, noted in manifest.get("inputs", {}).items():
        path = Path(noted["path"])
        if not path.exists() or hashing.path_hash(path) != noted["sha256"]:
            return (
                f"the {name} that it was made from, {noted['file']}, is "
                f"{'another' if path.exists() else 'gone'}"
            )
    return ""


def latest_line(run_dir: Path) -> str:
    """The run's line of progress, empty before there is one."""
    try:
        return (run_dir / ".progress.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _revision(folder: Path) -> str:
    """The git revision of a folder, ``+changes`` if a file was edited since; ``unknown`` outside a
    checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ("git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    return "unknown"


def _hardware(device: str) -> str:
    """What computes: the name of the GPU, or the processor and its number of threads."""
    import torch

    from atoplib.decisions import pick_device

    if pick_device(device).type == "cuda":
        return torch.cuda.get_device_name(pick_device(device))
    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"
