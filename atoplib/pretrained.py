"""Weights that come with the kit, so that there is something to attack before anything is trained."""

from pathlib import Path

import torch
from torch import nn

from atoplib import checkpoints
from atoplib.pipeline import load_pipeline

FOLDER = Path(__file__).resolve().parents[1] / "data" / "pretrained"
DEFENCES = ("undefended", "ap", "atop", "at")
# Which weights fit a data set of ``data.load``, at its own 32 px.
DATASETS = {"mnist5k": "mnist", "mnist": "mnist", "cifar10": "cifar10", "cifar100": "cifar100"}


def available(folder: Path = FOLDER) -> list[tuple[str, str]]:
    """The (dataset, defence) of all weights that are there, by data set, the undefended classifier first."""
    names = [path.stem.rpartition("-") for path in folder.glob("*.safetensors")]
    pairs = [(dataset, defence) for dataset, _, defence in names if defence in DEFENCES]
    return sorted(pairs, key=lambda pair: (pair[0], DEFENCES.index(pair[1])))


def pretrained_path(dataset: str, defence: str, *, folder: Path = FOLDER) -> Path:
    """The file of the weights for a data set, named as ``data.load`` or ``available`` names it, in any case.

    Raises:
        ValueError: for weights that do not come with the kit; the message says which do.
    """
    pair = DATASETS.get(dataset.lower(), dataset.lower()), defence.lower()
    if pair not in available(folder):
        known = ", ".join("-".join(pair) for pair in available(folder)) or f"none, {folder} is empty"
        raise ValueError(f"no weights of {defence!r} for {dataset!r} come with the kit; there are {known}")
    return folder / f"{pair[0]}-{pair[1]}.safetensors"


def load_pretrained(
    dataset: str, defence: str, *, device: torch.device | str = "cpu", folder: Path = FOLDER
) -> nn.Module:
    """A defence that was trained and measured: images (B, 3, 32, 32) in [0, 1] -> logits, in eval mode, in
    float32.

    Args:
        dataset: ``mnist`` (also for ``mnist5k``), ``cifar10`` or ``cifar100``.
        defence: ``undefended`` (the classifier alone), ``AP``, ``AToP`` (pipelines in front of it) or ``AT``
            (adversarial training), in any case; ``available()`` tells which there are.

    Raises:
        ValueError: for weights that do not come with the kit; the message says which do.
        CheckpointError: if a file is damaged.
    """
    path = pretrained_path(dataset, defence, folder=folder)
    header = checkpoints.read_header(path)
    if header["kind"] == "classifier":
        return checkpoints.load(path, kind="classifier", device=device)[0]
    trained_for = header.get("classifier", "undefended")
    return load_pipeline(
        path, load_pretrained(dataset, trained_for, device=device, folder=folder), device=device
    )
