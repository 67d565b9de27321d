"""Pieces of a long evaluation on disk, so that it goes on where it was interrupted and ends with the same numbers."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from atoplib.checkpoints import write_atomically, write_json
from atoplib.runs import read_json

IDENTITY = "evaluation.json"


class Store:
    """Finished pieces in a directory, each a safetensors file; without a directory they are kept in memory only.

    Args:
        directory: where; made if needed.
        identity: what the pieces were measured with, JSON values. A directory of another identity is refused;
        keep_others: or it is kept, each identity having a folder of its own below the directory.

    Raises:
        ValueError: if the directory holds pieces of another evaluation.
        OSError: if it cannot be written.
    """

    def __init__(self, directory: Path | None, identity: Mapping[str, Any], *, keep_others: bool = False) -> None:
        if directory is not None and keep_others:
            directory = directory / f"{hashed(json.dumps(identity, sort_keys=True)):016x}"
        self.directory = directory
        if directory is None:
            return
        known = read_json(directory / IDENTITY)
        if known is None and any(directory.glob("*.safetensors")):
            raise ValueError(f"{directory} holds results, but no {IDENTITY} that says of what; choose another directory")
        if known is not None:
            different = [name for name in identity if known.get(name) != identity[name]]
            if different:
                raise ValueError(
                    f"{directory} holds results of another evaluation (different: {', '.join(different)}); choose another "
                    f"directory, or delete this one to measure anew"
                )
        write_json(directory / IDENTITY, dict(identity))

    def load(self, name: str) -> tuple[dict[str, Tensor], float] | None:
        """A finished piece and the seconds it took, or None; a damaged file counts as not finished."""
        if self.directory is None:
            return None
        path = self.directory / f"{name}.safetensors"
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                return tensors, float(file.metadata()["seconds"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """Keep a finished piece. Raises OSError where it cannot be written; earlier pieces stay."""
        if self.directory is None:
            return
        content = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"seconds": repr(seconds)}
        path = self.directory / f"{name}.safetensors"
        write_atomically(path, lambda part: safetensors.torch.save_file(content, part, metadata=metadata))


def attack_seed(seed: int, batch: int) -> int:
    """Of the attack on a batch and the dice that it meets; the first batch has ``seed`` itself, as a call by hand would."""
    return seed if batch == 0 else hashed("attack", seed, batch)


def verdict_seed(seed: int, batch: int) -> int:
    """Of the dice of a batch's verdict, which the attack has not seen: ``seed + 1`` for the first batch."""
    return seed + 1 if batch == 0 else hashed("verdict", seed, batch)


def hashed(*parts: str | int) -> int:
    """A number of 63 bits that is a function of the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
