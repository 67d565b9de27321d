"""Checks before and after an attack, so that a wrong number cannot be printed. Those before it are ``contract``'s."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.norms import NORMS, perturbation_size
from atoplib.contract import PROBABILITY_TOLERANCE, check_eval_mode, check_same_device, prepare

__all__ = ["PROBABILITY_TOLERANCE", "check_attack", "check_budget", "require_eval_mode", "require_same_device"]

require_eval_mode = check_eval_mode
require_same_device = check_same_device


def check_attack(
    model: Any, images: Any, labels: Any, *, differentiable: bool = False
) -> tuple[nn.Module, Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
    """Model, images and labels as an attack can use them; arguments and errors as ``contract.prepare``."""
    return prepare(model, images, labels, differentiable=differentiable)


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
