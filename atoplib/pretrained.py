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
MORE = ("frozen", "at_pgd2")  # the classifier that AToP stands before, if not the undefended one; AT of another making
COMES_WITH = {"mnist5k": "mnist", "mnist": "mnist", "cifar10": "cifar10", "cifar10_jpeg": "cifar10"}
"""Which weights fit a data set of ``data.load_dataset``, at its own 32 px."""


def available(folder: Path = FOLDER) -> dict[str, tuple[str, ...]]:
    """Which defences there are weights of, by data set."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        dataset, _, defence = path.stem.rpartition("-")
        if defence in (*DEFENCES, *MORE):
            found.setdefault(dataset, []).append(defence)
    return {dataset: tuple(sorted(names, key=(*DEFENCES, *MORE).index)) for dataset, names in found.items()}


def weights_path(dataset: str, defence: str, *, folder: Path = FOLDER) -> Path:
    """The file of the weights for a data set, named as ``data.load_dataset`` or ``available`` names it.

    Raises:
        ValueError: for weights that do not come with the kit; the message says which do.
    """
    found = available(folder)
    name = COMES_WITH.get(dataset, dataset)
    if defence not in found.get(name, ()):
        known = "; ".join(f"{name}: {', '.join(defences)}" for name, defences in found.items()) or f"none, {folder} is empty"
        raise ValueError(f"no weights of {defence!r} for {dataset!r} come with the kit; there are {known}")
    return folder / f"{name}-{defence}.safetensors"


def load_pretrained(dataset: str, defence: str, *, device: torch.device | str = "cpu", folder: Path = FOLDER) -> nn.Module:
    """A defence that was trained and measured: images (B, 3, 32, 32) in [0, 1] -> logits, in eval mode, in float32.

    Args:
        dataset: ``mnist`` (the digits of ``mnist5k``) or ``cifar10`` (trained on CIFAR-10 after JPEG), or a data set of
            ``COMES_WITH``.
        defence: ``undefended`` (the classifier alone), ``ap``, ``atop`` (pipelines in front of it), ``at`` (a classifier
            that was trained adversarially), ``frozen`` (the classifier that AToP stands before, where it is not the
            undefended one), ``at_pgd2`` (AT by PGD-2, where ``at`` is by FGSM); ``available()`` tells which there are.

    Raises:
        ValueError: for weights that do not come with the kit; the message says which do.
        CheckpointError: if a file is damaged.
    """
    path = weights_path(dataset, defence, folder=folder)
    if defence not in ("ap", "atop"):
        return load_checkpoint(path, kind="classifier", device=device)[0]
    its = read_header(path).get("classifier", "undefended")
    classifier, _ = load_checkpoint(weights_path(dataset, its, folder=folder), kind="classifier", device=device)
    return load_pipeline(path, classifier, device=device)


def save_pretrained(source: Path, name: str, defence: str, /, *, folder: Path = FOLDER, **facts: Any) -> Path:
    """Put a run's checkpoint among those that come with the kit, in half precision.

    Args:
        source: ``classifier.safetensors`` or ``purifier.safetensors`` of a run.
        name, defence: as ``load_pretrained`` takes them.
        facts: what was measured with it, for its header, in place of or beside what is there. Of the run's parameters the
            places (folders, device) and runs are left out, and ``dataset`` is the one given. ``classifier`` says of AToP
            that it stands before ``frozen``; without, it stands before ``undefended``.
    """
    header: Mapping[str, Any] = read_header(source)
    module, _ = load_checkpoint(source, kind=header["kind"])
    own = ("format", "kind", "architecture", "options", "classifier")
    known = {key: value for key, value in header.items() if key not in own}
    known["parameters"] = {
        key: value for key, value in known.get("parameters", {}).items() if key not in PLACES and not key.endswith("_run")
    }
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
