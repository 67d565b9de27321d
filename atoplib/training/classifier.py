"""Stage 1: the classifier, trained normally or on purified images, and its rival: adversarial training (AT)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.attacks import PGDSettings, ascend
from atoplib.data import Split, to_float
from atoplib.training.loop import Batch, Step, Updater
from atoplib.verdicts import full_float32


def classifier_step(
    classifier: nn.Module,
    *,
    label_smoothing: float = 0.0,
    attack: PGDSettings | None = None,
    front: nn.Module | None = None,
) -> Step:
    """The training step of a classifier: cross-entropy on clean images, or on adversarial ones (Madry et al. 2018).

    Args:
        classifier: images in [0, 1] -> logits.
        label_smoothing: share of the label that is spread over all classes, in [0, 1).
        attack: made against the classifier in eval mode at every step; None trains normally.
        front: purifies every image before the classifier reads it (a ``front.Front``), by a new draw for each; it is not
            trained. The attack goes through it and hits the very draw that the loss uses.

    Raises:
        ValueError: for a label_smoothing outside [0, 1), or where there is a front for an attack over several draws or one
            that images leave.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if front is not None and attack is not None and (attack.eot_samples != 1 or attack.stop_after):
        raise ValueError(
            f"the attack hits one draw of the front for all images: eot_samples must be 1 and stop_after 0, got "
            f"{attack.eot_samples} and {attack.stop_after}"
        )

    def reader(batch: Batch) -> Callable[[Tensor], Tensor]:
        """What reads this batch: the classifier, behind one draw of the purifier if there is one."""
        if front is None:
            return classifier
        front.pipeline.reseed(batch.seed(), batch.share)
        draw = front.pipeline.draw(batch.images)
        return lambda images: classifier(front(images, draw))

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        images, read = batch.images, reader(batch)
        if attack is not None:
            classifier.eval()
            images = ascend(
                read,
                images,
                batch.labels,
                attack,
                generator=batch.generator,
                max_batch=len(images),  # one draw for all of them
                share=batch.share,
            )
            classifier.train()
        logits = read(images).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
        updater.update("classifier", loss)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == batch.labels).float().mean()}

    return step


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, *, max_batch: int | None = None) -> float:
    """Share of a split's images that a model classifies correctly with one forward pass each, in float32.

    Args:
        max_batch: images at once; None: as many as a GPU of 24 GB holds of a DeepFillV2 at 256 px, at most 500.
    """
    height, width = split.images.shape[2:]
    max_batch = max_batch or max(1, min(500, 2**22 // (height * width)))
    device = next(model.parameters()).device
    correct: Float[Tensor, ""] = torch.zeros((), device=device)
    for images, labels in zip(split.images.split(max_batch), split.labels.split(max_batch), strict=True):
        with full_float32(device):
            logits = model(to_float(images.to(device)).contiguous(memory_format=torch.channels_last))
        correct += (logits.argmax(dim=1) == labels.to(device)).sum()
    return float(correct) / len(split.labels)
