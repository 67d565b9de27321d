"""Weights that come with the kit, so that there is something to look at before anything is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoplib.checkpoints import load_checkpoint, read_header, save_checkpoint
from atoplib.pipeline import load_pipeline
from atoplib.runs import PLACES

FOLDER = Path(__file__).resolve().parents[1] / "data" / "pretrained"
DEFENCES = ("undefended", "ap", "atop", "at")


def available(folder: Path = FOLDER) -> dict[str, tuple[str, ...]]:
    """Which defences there are weights of, by data set."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        dataset, _, defence = path.stem.rpartition("-")
        if defence in DEFENCES:
            found.setdefault(dataset, []).append(defence)
    return {dataset: tuple(sorted(names, key=DEFENCES.index)) for dataset, names in found.items()}


def load_pretrained(dataset: str, defence: str, *, device: torch.device | str = "cpu", folder: Path = FOLDER) -> nn.Module:
    """A defence that was trained and measured: images (B, 3, 32, 32) in [0, 1] -> logits, in eval mode, in float32.

    Args:
        dataset: ``mnist`` (the digits of ``mnist5k``) or ``cifar10`` (trained on CIFAR-10 after JPEG).
        defence: ``undefended`` (the classifier alone), ``ap``, ``atop`` (pipelines in front of it), ``at`` (a classifier
            that was trained adversarially); ``available()`` tells which there are.

    Raises:
        ValueError: for weights that do not come with the kit; the message says which do.
        CheckpointError: if a file is damaged.
    """
    found = available(folder)
    if defence not in found.get(dataset, ()):
        known = "; ".join(f"{name}: {', '.join(defences)}" for name, defences in found.items()) or f"none, {folder} is empty"
        raise ValueError(f"no weights of {defence!r} for {dataset!r} come with the kit; there are {known}")
    path = folder / f"{dataset}-{defence}.safetensors"
    if defence in ("undefended", "at"):
        return load_checkpoint(path, kind="classifier", device=device)[0]
    classifier, _ = load_checkpoint(folder / f"{dataset}-undefended.safetensors", kind="classifier", device=device)
    return load_pipeline(path, classifier, device=device)


def save_pretrained(source: Path, name: str, defence: str, /, *, folder: Path = FOLDER, **facts: Any) -> Path:
    """Put a run's checkpoint among those that come with the kit, in half precision.

    Args:
        source: ``classifier.safetensors`` or ``purifier.safetensors`` of a run.
        name, defence: as ``load_pretrained`` takes them.
        facts: what was measured with it, for its header, in place of or beside what is there. Of the run's parameters the
            places (folders, device) are left out, and ``dataset`` is the one given.
    """
    header: Mapping[str, Any] = read_header(source)
    module, _ = load_checkpoint(source, kind=header["kind"])
    known = {name: value for name, value in header.items() if name not in ("format", "kind", "architecture", "options")}
    known["parameters"] = {key: value for key, value in known.get("parameters", {}).items() if key not in PLACES}
    if "dataset" in facts and "dataset" in known["parameters"]:
        known["parameters"]["dataset"] = facts["dataset"]
    path = folder / f"{name}-{defence}.safetensors"
    save_checkpoint(
        path,
        module.half(),
        kind=header["kind"],
        architecture=header["architecture"],
        options=header["options"],
        **{**known, **facts},
    )
    return path
