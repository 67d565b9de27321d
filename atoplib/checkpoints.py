"""Checkpoints: weights as safetensors with a JSON header, and the state of an unfinished training.

Nothing is ever unpickled without ``weights_only=True``.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from atoplib.classifiers import build_classifier
from atoplib.purifiers import build_purifier

FORMAT = "atoplib-checkpoint-1"
BUILDERS: dict[str, Callable[..., nn.Module]] = {"classifier": build_classifier, "purifier": build_purifier}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, why, and what to do."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush to disk, then rename; an earlier file survives a failure.

    Raises:
        OSError: with the path and what to do, when the disk is full or the folder cannot be written.
    """
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        part = Path(name)
        os.close(handle)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        os.replace(part, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {error}. What was there before is untouched; free some disk space or choose "
            f"another folder, then run again"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN is refused, as no other reader takes it."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def save_checkpoint(
    path: Path, module: nn.Module, *, kind: str, architecture: str, options: Mapping[str, Any], **facts: Any
) -> None:
    """Save a module's weights with all that is needed to build it again.

    Args:
        path: the file, ``*.safetensors``; replaced atomically.
        kind: ``classifier`` or ``purifier``.
        architecture, options: what its builder was called with.
        facts: anything else worth keeping beside the weights (settings, data, metrics, version), as JSON.
    """
    header = {"format": FORMAT, "kind": kind, "architecture": architecture, "options": dict(options), **facts}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    metadata = {"atoplib": json.dumps(header, sort_keys=True)}
    write_atomically(path, lambda part: safetensors.torch.save_file(tensors, part, metadata=metadata))


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is truncated, is no safetensors file (a pickle is never opened), or is not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; run the notebook that writes it first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it is truncated, damaged or of another format. "
            f"Delete it and run the notebook that writes it again"
        ) from error
    try:
        header = json.loads(metadata["atoplib"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no atoplib header; was it written by another program?") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; it was written by another version of atoplib")
    return header


def load_checkpoint(path: Path, *, kind: str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Build the module that a checkpoint holds, in eval mode, with its header.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is damaged, of another kind, or its weights do not fit its own header.
    """
    path = Path(path)
    header = read_header(path)
    if header.get("kind") != kind:
        raise CheckpointError(f"{path} holds a {header.get('kind')}, not a {kind}")
    try:
        module = BUILDERS[kind](header["architecture"], **header["options"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} names an architecture that cannot be built: {error}") from error
    load_weights(module, safetensors.torch.load_file(path), path)
    return module.to(device).eval(), header


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a module; every name and shape must fit (CheckpointError says which one does not)."""
    expected = module.state_dict()
    missing, surplus = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    wrong = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    if missing or surplus or wrong:
        example = (missing or surplus or wrong)[0]
        raise CheckpointError(
            f"the weights in {source} belong to another architecture: {len(missing)} missing, {len(surplus)} unknown, "
            f"{len(wrong)} of another shape (for example {example!r})"
        )
    module.load_state_dict(tensors)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training's state (tensors, numbers, strings, lists, dicts), keeping the one before as ``*.previous``."""
    newest = path.with_name(path.name + ".newest")
    write_atomically(newest, lambda part: torch.save(state, part))
    # Only now, with the new state safe on the disk: a disk that is full leaves both older ones where they are.
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(newest, path)


def load_state(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest readable state, and a sentence if it is not the newest one; (None, None) if there is none.

    Raises:
        CheckpointError: if states are there, but none of them can be read.
    """
    problems = []
    for candidate in (path, path.with_name(path.name + ".previous")):
        if not candidate.is_file():
            continue
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}, not a state")
        except Exception as error:  # a damaged file may raise anything: EOFError, RuntimeError, UnpicklingError, ...
            reason = next(iter(str(error).splitlines()), "")
            problems.append(f"{candidate} cannot be read ({type(error).__name__}: {reason})")
            continue
        return state, f"{problems[0]}; went on from the state before it" if problems else None
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. Delete the run directory to start anew")
    return None, None
