"""What notebooks 1 to 3 train, built from their parameters."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoplib.checkpoints import load_built, load_checkpoint
from atoplib.classifiers import build_classifier, fold_batch_norms
from atoplib.data import Dataset, channel_statistics
from atoplib.defences import foreign_arguments, load_network
from atoplib.flops import training_total
from atoplib.front import load_front
from atoplib.parameters import LATEST, FinetuneAtop, PretrainPurifier, PurifierTraining, TrainClassifier
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import PatchDiscriminator, build_purifier, load_deepfill_weights
from atoplib.stages.given import architecture_of, fingerprint_of
from atoplib.training import accuracy, classifier_step, purifier_step
from atoplib.training.loop import Step


@dataclass(frozen=True)
class Stage:
    """What one of the notebooks trains, and all that belongs to its checkpoint.

    Attributes:
        title: of its progress.
        networks: by name; the first one, ``classifier`` or ``purifier``, is the result.
        step: of the training.
        model: what reads the test images: the classifier, or the pipeline.
        architecture, options: what the result's builder was called with.
        facts: that stand beside the weights.
        inputs: checkpoints that it starts from.
        before: metrics from before the training: what it begins with, and what that cost.
        warmup_epochs: until every term of the loss applies.
        validate: whether test images are read after every epoch.
        given: fingerprints of networks of one's own, by what they are (``classifier``, ``purifier``), which the parameters
            do not describe.
        front: what the result reads images through, if it does.
        only_measures: inputs that the training does not see, its accuracy alone is measured with them.
    """

    title: str
    networks: dict[str, nn.Module]
    step: Step
    model: nn.Module
    architecture: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    before: Mapping[str, float | None] = field(default_factory=dict)
    warmup_epochs: float = 0.0
    validate: bool = False
    given: Mapping[str, str] = field(default_factory=dict)
    front: nn.Module | None = None
    only_measures: tuple[str, ...] = ()

    @property
    def result(self) -> nn.Module:
        """The network that is trained."""
        return self.networks[self.kind]

    @property
    def kind(self) -> str:
        """``classifier`` or ``purifier``, which is also the name of the checkpoint."""
        return next(iter(self.networks))


def classifier_stage(p: TrainClassifier, dataset: Dataset, *, classifier: nn.Module | None = None) -> Stage:
    """Notebook 1: the classifier, from the weights of ``start_run`` or fresh ones by the seed, unless one is given; it reads
    images as they are, or what the purifier of ``purifier_run`` makes of them.

    Args:
        classifier: one of your own, images in [0, 1] -> logits; it is trained from the weights that it has.

    Raises:
        ValueError: if the classifier of ``start_run`` is not of the architecture and classes that are asked for.
        FileNotFoundError: if there is no such run.
    """
    mean, std = channel_statistics(dataset.train.images)
    options = {**p.classifier_options, "num_classes": len(dataset.classes), "mean": mean, "std": std}
    torch.manual_seed(p.seed)  # the initial weights
    inputs, before = {}, {}
    if classifier is not None:
        network, options = classifier, {}
    elif p.start_run:
        inputs["start"] = p.checkpoint(p.start_run, "undefended", **LATEST["undefended"])
        network, header = load_built(inputs["start"], build_classifier, kind="classifier")
        for name, wanted in {"architecture": p.classifier, **options}.items():
            found = header.get(name, header["options"].get(name))
            if name not in ("mean", "std") and found != wanted:
                raise ValueError(
                    f"start_run = {p.start_run!r} has {name} {found}, and {wanted} is asked for: let them agree"
                )
        options = header["options"]
        before["start_flops"] = training_total(header.get("metrics", {}))
    else:
        network = build_classifier(p.classifier, **options)
    network = network.to(p.torch_device, memory_format=torch.channels_last)
    front, facts = None, {"classes": dataset.classes}
    if p.purifier_run:
        inputs["purifier"] = p.checkpoint(p.purifier_run, "ap")
        front = load_front(inputs["purifier"], device=p.torch_device, seed=p.seed)
        facts["reads_through"] = inputs["purifier"].parent.name if p.purifier_run == "latest" else p.purifier_run
    return Stage(
        "training the classifier",
        {"classifier": network},
        classifier_step(network, label_smoothing=p.label_smoothing, attack=p.attack, front=front),
        network if front is None else nn.Sequential(front, network),
        p.classifier if classifier is None else architecture_of(classifier),
        options,
        facts,
        inputs,
        before,
        validate=True,
        given=fingerprints(classifier=classifier),
        front=front,
    )


def frozen_classifier(p: PurifierTraining) -> tuple[nn.Module, Mapping[str, Any], Path]:
    """The classifier that a purifier is trained for, the header of its checkpoint, and its path; FileNotFoundError says what
    to run first.
    """
    path = p.checkpoint(p.classifier_run, "undefended", **LATEST["undefended"])
    if p.classifier:
        return load_network(path, device=p.torch_device, **foreign_arguments(p)), {}, path
    return *load_checkpoint(path, kind="classifier", device=p.torch_device), path


def pretraining_stage(
    p: PretrainPurifier, dataset: Dataset, *, purifier: nn.Module | None = None, classifier: nn.Module | None = None
) -> Stage:
    """Notebook 2: the purifier, freshly initialised from the seed or from public weights unless one is given.

    Args:
        purifier: one of your own, (B, 5, H, W) -> (B, 3, H, W) in [-1, 1]; it is trained from the weights that it has.
        classifier: one of your own, which says what purified images are worth; else that of ``classifier_run``.
    """
    inputs = {}
    given = fingerprints(purifier=purifier)
    if classifier is None:
        classifier, _, inputs["classifier"] = frozen_classifier(p)
    torch.manual_seed(p.seed)  # the initial weights
    if purifier is not None:
        network = purifier
    else:
        network = (
            load_deepfill_weights(Path(p.weights).expanduser())
            if p.weights
            else build_purifier(p.purifier, **p.purifier_options)
        )
    network = network.to(p.torch_device, memory_format=torch.channels_last)
    pipeline, networks = pipeline_of(p, network, classifier)
    return Stage(
        "pre-training the purifier",
        networks,
        purifier_step(pipeline, p.objective, discriminator=networks.get("discriminator")),
        pipeline,
        p.purifier if purifier is None else architecture_of(purifier),
        p.purifier_options if purifier is None else {},
        {"transform": asdict(p.transform_settings)},
        inputs,
        only_measures=("classifier",),
        given=given,
    )


def finetuning_stage(
    p: FinetuneAtop, dataset: Dataset, *, classifier: nn.Module | None = None, purifier: nn.Module | None = None
) -> Stage:
    """Notebook 3: the pre-trained purifier in front of the frozen classifier, those of the runs unless others are given.

    Args:
        classifier: one of your own, images in [0, 1] -> logits; it stays as it is.
        purifier: one of your own, pre-trained; it is fine-tuned from the weights that it has.
    """
    given, inputs, before = fingerprints(classifier=classifier, purifier=purifier), {}, {}
    its = "" if classifier is None else architecture_of(classifier)
    if classifier is None:
        loaded, header, inputs["classifier"] = frozen_classifier(p)
        classifier = fold_batch_norms(loaded)  # the same function, faster
        its = inputs["classifier"].parent.name if p.classifier_run == "latest" else p.classifier_run
        before["classifier_flops"] = training_total(header.get("metrics", {}))
    architecture, options = ("", {}) if purifier is None else (architecture_of(purifier), {})
    if purifier is None:
        inputs["purifier"] = p.checkpoint(p.purifier_run, "ap")
        purifier, start = load_checkpoint(inputs["purifier"], kind="purifier", device=p.torch_device)
        architecture, options = start["architecture"], start["options"]
        before["pretrain_flops"] = training_total(start.get("metrics", {}))
    torch.manual_seed(p.seed)  # the discriminator's initial weights
    classifier = classifier.to(p.torch_device)
    purifier = purifier.to(p.torch_device, memory_format=torch.channels_last)
    pipeline, networks = pipeline_of(p, purifier, classifier)
    before["test_accuracy_before"] = accuracy(pipeline.eval(), dataset.test)
    discriminator = networks.get("discriminator")
    return Stage(
        "fine-tuning the purifier",
        networks,
        purifier_step(pipeline.train(), p.objective, attack=p.attack, discriminator=discriminator),
        pipeline,
        architecture,
        options,
        {"transform": asdict(p.transform_settings), "classifier": its},
        inputs,
        before,
        warmup_epochs=p.objective.warmup_epochs,
        given=given,
    )


def fingerprints(**networks: nn.Module | None) -> dict[str, str]:
    """Of those that are given, as they are before any training."""
    return {name: fingerprint_of(network) for name, network in networks.items() if network is not None}


def pipeline_of(
    p: PurifierTraining, purifier: nn.Module, classifier: nn.Module
) -> tuple[AToPPipeline, dict[str, nn.Module]]:
    """The pipeline, and the networks in it that are trained; with a GAN term also the discriminator, freshly initialised."""
    networks = {"purifier": purifier}
    if p.gan_weight:
        networks["discriminator"] = PatchDiscriminator(p.discriminator_width).to(p.torch_device)
    return AToPPipeline(p.transform_settings, purifier, classifier, seed=p.seed), networks


BUILDERS: Mapping[str, Callable[..., Stage]] = {
    TrainClassifier.STAGE: classifier_stage,
    PretrainPurifier.STAGE: pretraining_stage,
    FinetuneAtop.STAGE: finetuning_stage,
}
