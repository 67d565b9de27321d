"""What an attack raises: losses (logits, labels) -> one value an image, the higher the nearer the model is to
an error."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

# (logits, labels) -> (B,); a targeted loss takes the target classes (B,) as a third argument.
Loss = Callable[..., Tensor]

MEAN_SOFTMAX = "mean_softmax"
SPREAD = 2.0  # of the kit's AToP on MNIST, 0.5 to 4 were tried: 1 and 2 find most
TINY = 1e-12  # keeps the ratios of DLR finite where logits tie


def cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each image."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def scaled_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each image after its logits are scaled to a standard deviation of ``SPREAD`` over the
    classes.

    The factor counts as a constant. So neither a shift nor a scale of the logits changes the gradient's
    direction, and no model saturates it.
    """
    logits = _wide(logits)
    spread = logits.detach().std(dim=1, keepdim=True).clamp_min(1e-20)
    return cross_entropy(logits * (SPREAD / spread), labels)


def margin(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Largest other logit minus the true one: above 0 exactly where the model is wrong.

    Source: Carlini & Wagner 2017, section IV.A (f6, kappa = 0, without the cut at 0).
    """
    return _without(logits, labels).amax(dim=1) - _of(logits, labels)


def dlr(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Difference of logits ratio: the margin over the distance from the largest logit to the third largest.

    It changes neither with a shift nor with a scale of the logits, so that no model saturates it. Within [-1,
    1] as long as the true class is among the two most likely.

    Raises:
        ValueError: for fewer than 3 classes.

    Source: Croce & Hein 2020, eq. 6.
    """
    largest = _largest(logits, 3, "the DLR loss")
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + TINY)


def target_margin(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Target's logit minus the true one: 0 on the boundary between the two classes."""
    return _of(logits, targets) - _of(logits, labels)


def targeted_dlr(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Target's logit minus the true one, over the distance from the largest logit to the mean of third and
    fourth.

    Raises:
        ValueError: for fewer than 4 classes.

    Source: Croce & Hein 2020, eq. 7.
    """
    largest = _largest(logits, 4, "the targeted DLR loss")
    return target_margin(logits, labels, targets) / (largest[:, 0] - largest[:, 2:].mean(dim=1) + TINY)


def likely_targets(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], count: int
) -> tuple[Int[Tensor, " batch"], ...]:
    """The ``count`` most likely classes other than the true one (or all of them, if they are fewer),
    likeliest first."""
    return _without(logits, labels).topk(min(count, logits.shape[1] - 1), dim=1).indices.unbind(dim=1)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "scaled_ce": scaled_cross_entropy,
    "margin": margin,
    "dlr": dlr,
    MEAN_SOFTMAX: scaled_cross_entropy,  # of each sample; ``eot_gradient`` makes one loss of them
}


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return _wide(logits).gather(1, classes.unsqueeze(1)).squeeze(1)


def _without(logits: Tensor, labels: Tensor) -> Tensor:
    return _wide(logits).scatter(1, labels.unsqueeze(1), -torch.inf)


def _largest(logits: Tensor, count: int, name: str) -> Tensor:
    if logits.shape[1] < count:
        raise ValueError(
            f"{name} needs at least {count} classes, but the model has {logits.shape[1]}; "
            "the cross-entropy works with any number"
        )
    return _wide(logits).topk(count, dim=1).values
