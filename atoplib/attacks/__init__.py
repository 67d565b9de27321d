"""Attacks on any module (B, 3, H, W) in [0, 1] -> logits, random or not. An attack knows nothing of what it attacks."""

from atoplib.attacks.checks import check_attack, check_budget, require_eval_mode
from atoplib.attacks.eot import InputGradient, input_gradient
from atoplib.attacks.norms import NORMS, project, random_start, steepest_step
from atoplib.attacks.pgd import PGDSettings, ascend, fgsm, pgd

__all__ = [
    "NORMS",
    "InputGradient",
    "PGDSettings",
    "ascend",
    "check_attack",
    "check_budget",
    "fgsm",
    "input_gradient",
    "pgd",
    "project",
    "random_start",
    "require_eval_mode",
    "steepest_step",
]
