"""Checks before and after an attack, so that a wrong number cannot be printed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.norms import NORMS, perturbation_size

PROBABILITY_TOLERANCE = 5e-3  # of the sum of one image's outputs; a softmax in bfloat16 misses 1 by nearly as much


def require_eval_mode(model: nn.Module) -> None:
    """Raise ValueError if the model or a part of it is in train mode: batch statistics and dropout falsify a verdict."""
    wrong = next((name or "the model itself" for name, part in model.named_modules() if part.training), None)
    if wrong is not None:
        raise ValueError(f"the model must be in eval mode to be attacked, but {wrong} is in train mode; call model.eval()")


def require_same_device(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless model, images and labels are on one device; a model without weights is on any."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if devices and images.device not in devices:
        names = " and ".join(sorted(str(device) for device in devices))
        raise ValueError(f"the model is on {names}, but the images are on {images.device}; move them with images.to(...)")
    if labels.device != images.device:
        raise ValueError(f"the images are on {images.device}, but the labels are on {labels.device}; move them together")


def check_attack(model: nn.Module, images: Float[Tensor, "batch 3 height width"], labels: Int[Tensor, " batch"]) -> None:
    """Raise ValueError unless the model is in eval mode and returns logits, the images lie in [0, 1], every label has a
    logit, and all are on one device."""
    require_eval_mode(model)
    require_same_device(model, images, labels)
    if len(images) == 0:
        raise ValueError("there are no images to attack")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1] without NaN, got values from {low:.4g} to {high:.4g}")
    with torch.no_grad():
        logits = model(images[:1])
    if logits.ndim != 2:
        raise ValueError(f"the model must return logits of shape (batch, classes), got {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise ValueError("the model returns logits that are not finite; an attack would follow no gradient")
    if (logits >= 0).all() and (logits.float().sum(dim=1) - 1).abs().max() < PROBABILITY_TOLERANCE:
        raise ValueError(
            "the model returns probabilities (none below 0, their sum 1), whose gradients vanish where it is sure; "
            "an attack needs the logits before the softmax"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{logits.shape[1] - 1} for this model, got {int(labels.min())}..{int(labels.max())}"
        )


def check_budget(
    adversarial: Float[Tensor, "batch 3 height width"],
    images: Float[Tensor, "batch 3 height width"],
    eps: float,
    norm: str,
    tolerance: float = 1e-6,
) -> None:
    """Raise AssertionError if an attack's result leaves [0, 1] or the eps-ball, or holds NaN: a bug, never a number.

    Args:
        tolerance: that is forgiven, in units of the image; for a radius above 1 (l2) in units of the radius.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; allowed: {', '.join(NORMS)}")
    if not torch.isfinite(adversarial).all():
        raise AssertionError("the attack returned values that are not finite")
    low, high = float(adversarial.min()), float(adversarial.max())
    if low < 0 or high > 1:
        raise AssertionError(f"the attack left [0, 1]: {low} to {high}")
    largest = float(perturbation_size(adversarial - images, norm).max())
    if largest > eps + tolerance * max(1.0, eps):
        raise AssertionError(f"the attack left its budget: {norm} norm {largest} of {eps}")
