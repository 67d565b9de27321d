"""Files that are never half written, and the folder that they lie in."""

import json
import os
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# What network drives, archives and file systems put into folders, in lower case; thumbnails are in some of
# them.
NOT_OF_THE_DATA = frozenset(
    ("@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot")
    + ("~snapshot", "__macosx", "lost+found", "$recycle.bin", "system volume information", "thumbs.db")
)


def is_data(path: Path) -> bool:
    """Whether no part of a path within a folder of data is hidden, or of a drive, archive or file system."""
    return not any(part[0] == "." or part.lower() in NOT_OF_THE_DATA for part in path.parts)


def data_files(folder: Path) -> list[Path]:
    """The files in and below a folder of data by name; links to files and to folders are followed.

    Raises:
        ValueError: for a folder that is there twice, by links: in a circle, or with the same images again.
    """
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if is_data(Path(name))]
        if os.path.realpath(root) in seen:
            raise ValueError(f"{root} is a link to a folder that {folder} holds already: remove the link")
        seen.add(os.path.realpath(root))
        files += [Path(root, name) for name in names if is_data(Path(name))]
    return sorted(files)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush to disk, then rename; an earlier file
    survives a failure.

    Raises:
        OSError: with the path and what to do, when the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {error}. What was there before is untouched; free some disk space or "
            f"choose another folder, then run again"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN is refused, as no other reader takes it."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file that holds an object, None where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_yaml(text: str) -> Any:
    """What a text in YAML 1.2 holds: only true and false are truth values, 010 is ten, and a name that is
    there twice is an error.

    Raises:
        ValueError: for what is no YAML.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read as YAML: {error}") from error


def supersede(folder: Path, paths: Iterable[Path]) -> Path:
    """Move files and folders of ``folder`` to the same places in its next ``superseded-N``; returns that."""
    numbers = (path.name.rpartition("-")[2] for path in folder.glob("superseded-*"))
    archive = folder / f"superseded-{1 + max((int(n) for n in numbers if n.isdigit()), default=0)}"
    for path in paths:
        place = archive / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    return archive


def workspace_dir(workspace: str = "") -> Path:
    """The folder that holds ``runs/`` and ``data/``: the one given, or the project's own, found upwards from
    here.

    A notebook is run from its own folder by JupyterLab and from the caller's, wherever that is, by papermill;
    both find the same, also where only the kit was installed from a checkout elsewhere."""
    if workspace:
        return Path(workspace).expanduser().resolve()
    here = Path.cwd()
    folders = (here, *here.parents, Path(__file__).resolve().parents[1])
    return next(
        (each for each in folders if (each / "notebooks").is_dir() and (each / "pyproject.toml").is_file()),
        here,
    )
