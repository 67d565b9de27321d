"""Defences from checkpoints: a classifier alone, or a purifier in front of the classifier that it belongs to."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from atoplib.checkpoints import load_checkpoint, read_header
from atoplib.classifiers import fold_batch_norms
from atoplib.parameters import Attacking
from atoplib.pipeline import AToPPipeline, for_attacks, load_pipeline


def load_classifier(path: Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """A frozen classifier, images (B, 3, H, W) in [0, 1] -> logits, its batch norms folded into its convolutions: the same
    function, faster.

    Raises FileNotFoundError and CheckpointError as ``checkpoints.load_checkpoint``.
    """
    classifier, _ = load_checkpoint(path, kind="classifier", device=device)
    return fold_batch_norms(classifier).to(memory_format=torch.channels_last)


def load_defence(
    weights: Path, classifier: Path, *, device: torch.device | str = "cpu", seed: int = 0
) -> nn.Module | AToPPipeline:
    """A defence, images (B, 3, H, W) in [0, 1] -> logits, ready to be attacked.

    Args:
        weights: the checkpoint of a purifier, which is put in front of ``classifier``; or that of a classifier, which is
            the whole defence.
        seed: of the pipeline's dice.

    Raises FileNotFoundError and CheckpointError as ``pipeline.load_pipeline``.
    """
    if read_header(weights)["kind"] == "classifier":
        return load_classifier(weights, device=device)
    network, _ = load_checkpoint(classifier, kind="classifier", device=device)
    return for_attacks(load_pipeline(weights, network, device=device, seed=seed))


def load_pipelines(p: Attacking, names: Iterable[str] | None = None) -> dict[str, AToPPipeline]:
    """The purifiers that a notebook's parameters name, each in front of its classifier (``Attacking.classifier_of``), made
    ready to be attacked (``pipeline.for_attacks``), their dice seeded with ``p.seed``.

    Args:
        names: ``AP``, ``AToP``, or both; None takes those of ``p.purifiers``.

    Raises FileNotFoundError and ValueError as ``Attacking.weights``, CheckpointError as ``pipeline.load_pipeline``.
    """
    return {
        name: load_defence(p.weights(name.lower()), p.classifier_of(name.lower()), device=p.torch_device, seed=p.seed)
        for name in (p.purifiers if names is None else names)
    }
