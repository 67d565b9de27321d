"""What is known of a job before it runs: whether an earlier call did it, from which code and inputs, and what it cost.

The notes stand in the run's directory, ``batch.json``. A run without them (made by hand, or by an earlier version) is taken
as it is.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from atoplib.batch.plan import Job
from atoplib.batch.sources import code_hash
from atoplib.checkpoints import write_json
from atoplib.parameters import LATEST, Parameters
from atoplib.parameters.base import MADE_BY, OWN
from atoplib.runs import PLACES, locked, read_json, recorded_inputs

NOTES = "batch.json"
SPLITS = ("train", "test", "val")  # of a folder of images
SAME_WORK = ("dataset", "image_size")  # runs on other data or larger images say nothing about a cost
REPLACED = "replaced"  # folder of the experiment for runs whose code or inputs have changed since


@dataclass(frozen=True)
class Standing:
    """What an earlier call left of a job: ``new``, ``unfinished``, ``done``, or ``changed`` with the reason."""

    name: str
    reason: str = ""


def standing(job: Job, *, reuse: bool = False) -> Standing:
    """Whether a job is to be run, gone on with, skipped, or done anew.

    Args:
        reuse: take what is there even if code or inputs have changed since.
    """
    manifest = read_json(job.run_dir / "manifest.json")
    if manifest is None:
        return Standing("new")
    change = "" if reuse else changed(job, manifest)
    if change:
        return Standing("changed", change)
    return Standing("done" if manifest.get("status") == "complete" and job.executed.is_file() else "unfinished")


def changed(job: Job, manifest: Mapping[str, Any]) -> str:
    """What is no longer as it was when the run was made, empty if nothing is."""
    notes = read_json(job.run_dir / NOTES) or {}
    if notes.get("code", "") not in ("", code_hash(job.notebook)):
        return "the code has changed"
    now, before = outside_inputs(job), notes.get("inputs")
    if isinstance(before, dict):
        for name in sorted(now.keys() & before.keys()):
            if before[name] != now[name]:
                return f"its input {name} has changed"
    for name, entry in recorded_inputs(manifest).items():
        path = job.run_dir.parent / str(entry.get("file"))
        if path.is_file() and file_hash(path) != entry.get("sha256"):
            return f"its input {name} has changed"
    return ""


def outside_inputs(job: Job) -> dict[str, str]:
    """Hashes of what a job reads that no job of its recipe makes: a folder of images, files of weights by path, those of
    the kit, and of the run that ``latest`` means now.
    """
    values, found = job.parameters.as_dict(), {}
    dataset = values["dataset"]
    if dataset.startswith("folder:"):
        found["dataset"] = folder_hash(Path(dataset.removeprefix("folder:")).expanduser())
    weights = values.get("weights")
    if weights and Path(weights).expanduser().is_file():
        found["weights"] = file_hash(Path(weights).expanduser())
    for name, path in checkpoints_of(job):
        found[name] = file_hash(path)
    return found


def checkpoints_of(job: Job) -> Iterator[tuple[str, Path]]:
    """Files of weights that a job's parameters name otherwise than by a run of its experiment, by parameter."""
    parameters = job.parameters
    for item in fields(parameters):
        value, own = getattr(parameters, item.name), item.name.removesuffix("_run")
        if "stage" in item.metadata:
            stage = item.metadata["stage"]
            defence = own if own in MADE_BY else next(name for name, (maker, _) in MADE_BY.items() if maker == stage)
            yield from checkpoint_of(parameters, item.name, value, defence)
        elif "runs" in item.metadata and isinstance(value, dict):
            for name, parts in value.items():
                parts = parts if isinstance(parts, dict) else {"purifier": parts}
                for kind, run in parts.items():
                    defence = "undefended" if kind == "classifier" else "ap"
                    yield from checkpoint_of(parameters, f"{item.name}: {name}: {kind}", run, defence)


def checkpoint_of(parameters: Parameters, name: str, run: str, defence: str) -> Iterator[tuple[str, Path]]:
    """One of ``checkpoints_of``; none for a run of the experiment, or where there is nothing yet."""
    if run in ("", OWN) or Path(run).name == run and (parameters.experiment_dir / run).is_dir():
        return
    with suppress(FileNotFoundError, ValueError):
        path = parameters.checkpoint(run, defence, **LATEST.get(defence, {}))
        if path.is_file():
            yield name, path


def file_hash(path: Path) -> str:
    """SHA-256 of a file; one that has not changed is read once."""
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=64)
def folder_hash(folder: Path) -> str:
    """SHA-256 of the names, sizes and times of all files of the splits of a folder, wherever links lead. Read once."""
    digest = hashlib.sha256()
    for split in SPLITS:
        top = os.path.realpath(folder / split)
        for path, folders, files in os.walk(top):
            folders.sort()
            for name in sorted(files):
                file = os.path.join(path, name)
                stat = os.stat(file, follow_symlinks=os.path.exists(file))
                relative = os.path.join(split, os.path.relpath(file, top))
                digest.update(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def note_start(job: Job) -> None:
    """Note from which code and inputs a run is made; earlier attempts are counted on."""
    notes = read_json(job.run_dir / NOTES) or {}
    write_json(
        job.run_dir / NOTES,
        {
            "code": notes.get("code") or code_hash(job.notebook),
            "inputs": notes.get("inputs") or outside_inputs(job),
            "attempts": notes.get("attempts", 0) + 1,
            "seconds": notes.get("seconds", 0.0),
        },
    )


def note_end(job: Job, seconds: float) -> None:
    """Add the time of an attempt."""
    notes = read_json(job.run_dir / NOTES) or {}
    write_json(job.run_dir / NOTES, {**notes, "seconds": round(notes.get("seconds", 0.0) + seconds, 2)})


def set_aside(job: Job) -> Path:
    """Move what an earlier call left of a job out of the way, so that it is done anew and nothing is lost.

    Raises:
        RunInUse: if another process is in it.
    """
    folder = job.run_dir.parent / REPLACED
    number = 1 + sum(1 for _ in folder.glob(f"{job.run_dir.name}-*"))
    while (target := folder / f"{job.run_dir.name}-{number}").exists():
        number += 1
    with locked(job.run_dir / "batch.lock"), locked(job.run_dir / "run.lock"):
        folder.mkdir(exist_ok=True)
        os.rename(job.run_dir, target)
    return target


class Costs:
    """What the complete runs of some experiments took; read once, then added to."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.known: dict[tuple[Path, str], list[tuple[Mapping[str, Any], float]]] = {}
        self.nearest: dict[Path, tuple[int, float, float | None]] = {}  # of a job: runs compared, least distance, its cost
        for folder in {job.run_dir.parent for job in jobs}:
            for path in sorted(folder.glob("*-*/manifest.json")):
                manifest = read_json(path) or {}
                seconds = (read_json(path.with_name(NOTES)) or manifest).get("seconds")
                if manifest.get("status") == "complete" and isinstance(seconds, int | float):
                    parameters = read_json(path.with_name("parameters.json")) or {}
                    self.known.setdefault((folder, str(manifest.get("stage"))), []).append((parameters, seconds))

    def add(self, job: Job, seconds: float) -> None:
        """A job that has just been executed."""
        self.known.setdefault((job.run_dir.parent, job.stage), []).append((job.parameters.as_dict(), seconds))

    def expected(self, job: Job) -> float | None:
        """What a job will take in seconds: as the run of the same notebook on the same data whose parameters differ least;
        None if there is none.
        """
        earlier = self.known.get((job.run_dir.parent, job.stage), [])
        compared, least, seconds = self.nearest.get(job.run_dir, (0, math.inf, None))
        if compared < len(earlier):  # asked four times a second, of hundreds of jobs: each run is compared once
            own = {name: value for name, value in job.parameters.as_dict().items() if name not in (*PLACES, "seed")}
            for other, cost in earlier[compared:]:
                if any(other.get(name) != own[name] for name in SAME_WORK):
                    continue
                distance = sum(other.get(name) != value for name, value in own.items())
                if distance < least:
                    least, seconds = distance, cost
            self.nearest[job.run_dir] = len(earlier), least, seconds
        return seconds


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; links count as links."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(path, name), follow_symlinks=False).st_size
            except FileNotFoundError:  # a file that is being replaced
                continue
    return total


def free_bytes(folder: Path) -> int:
    """Room left on the disk of a folder, or of the nearest one above that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
