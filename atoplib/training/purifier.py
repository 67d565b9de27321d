"""Stages 2 and 3: pre-training of the purifier for inpainting (AP), and its adversarial fine-tuning (AToP)."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.attacks import PGDSettings, ascend
from atoplib.losses import Objective, atop_loss, discriminator_loss
from atoplib.pipeline import AToPPipeline, to_unit
from atoplib.training.loop import Batch, Step, Updater
from atoplib.transforms import Draw

SEES = ("classifier", "pipeline")
MAX_COPIES = 512  # images x draws in memory at once, where the attack averages over draws


@dataclass(frozen=True)
class FineTuningAttack:
    """How x_adv is made during fine-tuning.

    Attributes:
        attack: its norm, radius and steps; with ``eot_samples`` 1 an attack on the pipeline hits the very draw of t that
            the loss will use, with more it averages over draws of its own.
        sees: ``classifier`` (Lin et al. 2024, FGSM on f alone) or ``pipeline`` (through t and g as well).
        ramp_epochs: eps grows linearly from 0 to its full size over so many epochs; a large eps from the start leaves the
            purifier at chance.
    """

    attack: PGDSettings
    sees: str = "pipeline"
    ramp_epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.sees not in SEES:
            raise ValueError(f"unknown sees {self.sees!r}; allowed: {', '.join(SEES)}")
        if not 0 <= self.ramp_epochs < float("inf"):
            raise ValueError(f"ramp_epochs must be 0 or more, got {self.ramp_epochs}")
        if self.attack.stop_after:  # the draw that it hits is one for the whole batch
            raise ValueError(f"no image leaves the attack of a training: stop_after must be 0, got {self.attack.stop_after}")

    def at(self, epoch: float) -> PGDSettings:
        """The attack after so many epochs: its eps and step size so far along the ramp."""
        share = min(1.0, max(epoch / self.ramp_epochs, 0.01)) if self.ramp_epochs else 1.0
        return replace(self.attack, eps=share * self.attack.eps, alpha=share * self.attack.step_size)

    def make(self, pipeline: AToPPipeline, batch: Batch, draw: Draw) -> Float[Tensor, "batch 3 height width"]:
        """x_adv for a batch; with one EOT sample the attack on the pipeline hits ``draw`` itself."""
        target = pipeline
        if self.sees == "classifier":
            target = pipeline.classifier
        elif self.attack.eot_samples == 1:
            target = partial(pipeline, draw=draw)
        copies = len(batch.images) if self.attack.eot_samples == 1 else max(1, MAX_COPIES // batch.share.processes)
        return ascend(
            target,
            batch.images,
            batch.labels,
            self.at(batch.epoch),
            generator=batch.generator,
            max_batch=copies,
            share=batch.share,
        )


def own_pretraining_step(purifier: nn.Module, objective: Objective) -> Step:
    """The training step of a purifier that predicts noise: its ``pretraining_loss``, each image at a random level of noise.

    Raises:
        ValueError: for a GAN term, which that loss has not.
    """
    if objective.gan_weight:
        raise ValueError(f"gan_weight must be 0 for a purifier with a loss of its own, got {objective.gan_weight}")

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        images, dice = batch.images, {"generator": batch.generator, "device": batch.images.device}
        shares = batch.share.throw(torch.rand, (len(images),), **dice)
        noise = batch.share.throw(torch.randn, tuple(images.shape), **dice)
        loss = purifier.pretraining_loss(images * 2 - 1, shares, noise)
        updater.update("purifier", loss)
        return {"loss": loss}

    return step


def purifier_step(
    pipeline: AToPPipeline,
    objective: Objective,
    *,
    attack: FineTuningAttack | None = None,
    discriminator: nn.Module | None = None,
) -> Step:
    """The training step of a purifier, for every variant of the objective; ``ap`` is its pre-training. A purifier that has a
    ``pretraining_loss`` of its own (``DiffusionPurifier``) is pre-trained by that.

    Args:
        pipeline: holds transform, purifier (trained under the name ``purifier``) and frozen classifier.
        objective: which terms, with which weights.
        attack: makes x_adv for ``ft_adv``.
        discriminator: trained under the name ``discriminator``; needed if the objective has a GAN term.

    Raises:
        ValueError: if the objective needs an attack or a discriminator that is not given, or has a GAN term where the
            purifier has a loss of its own.
    """
    if objective.variant == "ap" and hasattr(pipeline.purifier, "pretraining_loss"):
        return own_pretraining_step(pipeline.purifier, objective)
    if objective.needs_adversarial and attack is None:
        raise ValueError("the variant 'ft_adv' needs an attack")
    if objective.gan_weight and discriminator is None:
        raise ValueError("gan_weight is not 0: a discriminator is needed")

    def score(image: Float[Tensor, "batch 3 height width"], draw: Draw) -> Float[Tensor, "batch scores"]:
        mask = draw.masks[0] if not draw.composite else torch.ones_like(draw.masks[0])
        return discriminator(torch.cat([image, mask], dim=1))

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        clean, labels = batch.images, batch.labels
        pipeline.reseed(batch.seed(), batch.share)
        draw = pipeline.draw(clean)
        adversarial = attack.make(pipeline, batch, draw) if objective.needs_adversarial else None
        stages = pipeline.purify_stages(clean if adversarial is None else adversarial, draw)
        logits = None
        if objective.weight_of_classification(batch.epoch):
            logits = pipeline.classifier(to_unit(stages[-1]))
        losses = atop_loss(
            objective,
            stages=stages,
            clean=clean,
            adversarial=adversarial,
            logits=logits,
            labels=labels,
            discriminate=partial(score, draw=draw) if objective.gan_weight else None,
            epoch=batch.epoch,
        )
        updater.update("purifier", losses["loss"])
        if objective.gan_weight:
            wanted = adversarial if objective.needs_adversarial and objective.target == "adversarial" else clean
            real, fake = score(wanted * 2 - 1, draw), score(stages[-1].detach(), draw)
            losses["discriminator"] = discriminator_loss(real, fake, objective.gan_loss)
            updater.update("discriminator", losses["discriminator"])
        if logits is not None:
            losses["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        return losses

    return step
