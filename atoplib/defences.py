"""Defences from checkpoints: a classifier alone, or a purifier in front of the classifier that it belongs to."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoplib.checkpoints import CheckpointError, has_own_header, load_checkpoint, load_foreign, read_header
from atoplib.classifiers import fold_batch_norms, to_channels_last
from atoplib.parameters import Attacking
from atoplib.pipeline import AToPPipeline, for_attacks, load_pipeline


FOREIGN_PARAMETERS = {"classifier": "factory", "classifier_options": "options", "mean": "mean", "std": "std"}
"""What a notebook's parameters call the arguments of ``checkpoints.load_foreign``."""


def load_network(path: Path, *, device: torch.device | str = "cpu", **foreign: Any) -> nn.Module:
    """A classifier as it was saved: by the kit; or by another program, with ``foreign``, the arguments of ``load_foreign``.

    Raises:
        FileNotFoundError, CheckpointError: as ``checkpoints.load_checkpoint`` or ``load_foreign``; for another program's
            weights without a factory, too.
    """
    if path.suffix == ".safetensors" and has_own_header(path):
        return load_checkpoint(path, kind="classifier", device=device)[0]
    if ":" in str(foreign.get("factory") or "") or callable(foreign.get("factory")):
        return load_foreign(path, device=device, **foreign)
    if path.suffix == ".safetensors":
        return load_checkpoint(path, kind="classifier", device=device)[0]  # its errors say what is wrong with the file
    raise CheckpointError(
        f"{path} was written by another program, so it does not say which network it belongs to: name what builds it by "
        f"classifier: 'package.module:function' (and classifier_options, mean, std)"
    )


def load_classifier(path: Path, *, device: torch.device | str = "cpu", **foreign: Any) -> nn.Module:
    """A frozen classifier, images (B, 3, H, W) in [0, 1] -> logits, its batch norms folded into its convolutions where that
    is proved to be the same function, faster.

    Raises FileNotFoundError and CheckpointError as ``load_network``, whose arguments these are.
    """
    return to_channels_last(fold_batch_norms(load_network(path, device=device, **foreign)))


def foreign_arguments(p: Any) -> Mapping[str, Any]:
    """What a notebook's parameters say about weights of another program, for ``load_network``."""
    given = {name: getattr(p, parameter, None) for parameter, name in FOREIGN_PARAMETERS.items()}
    return {name: value for name, value in given.items() if value not in (None, "", (), [])}


def load_defence(
    weights: Path, classifier: Path, *, device: torch.device | str = "cpu", seed: int = 0, **foreign: Any
) -> nn.Module | AToPPipeline:
    """A defence, images (B, 3, H, W) in [0, 1] -> logits, ready to be attacked.

    Args:
        weights: the checkpoint of a purifier, which is put in front of ``classifier``; or that of a classifier, which is
            the whole defence.
        seed: of the pipeline's dice.
        foreign: for a classifier of another program, as ``load_network`` takes it.

    Raises FileNotFoundError and CheckpointError as ``pipeline.load_pipeline`` and ``load_network``.
    """
    if weights.suffix != ".safetensors" or not has_own_header(weights) or read_header(weights)["kind"] == "classifier":
        return load_classifier(weights, device=device, **foreign)
    network = load_network(classifier, device=device, **foreign)
    return for_attacks(load_pipeline(weights, network, device=device, seed=seed))


def load_pipelines(p: Attacking, names: Iterable[str] | None = None) -> dict[str, AToPPipeline]:
    """The purifiers that a notebook's parameters name, each in front of its classifier (``Attacking.classifier_of``), made
    ready to be attacked (``pipeline.for_attacks``), their dice seeded with ``p.seed``.

    Args:
        names: ``AP``, ``AToP``, or both; None takes those of ``p.purifiers``.

    Raises FileNotFoundError and ValueError as ``Attacking.weights``, CheckpointError as ``pipeline.load_pipeline``.
    """
    return {
        name: load_defence(
            p.weights(name.lower()),
            p.classifier_of(name.lower()),
            device=p.torch_device,
            seed=p.seed,
            **foreign_arguments(p),
        )
        for name in (p.purifiers if names is None else names)
    }
