"""Attacks on any module (B, 3, H, W) in [0, 1] -> logits, random or not. An attack knows nothing of what it attacks."""

from atoplib.attacks.apgd import APGDSettings, apgd
from atoplib.attacks.attempts import Attempt, StepCallback, strongest_attempt
from atoplib.attacks.autoattack import AutoAttackSettings, autoattack, autoattack_parts
from atoplib.attacks.checks import check_attack, check_budget, require_eval_mode
from atoplib.attacks.eot import InputGradient, input_gradient
from atoplib.attacks.fab import FABSettings, fab
from atoplib.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from atoplib.attacks.norms import NORMS, project, random_start, steepest_step
from atoplib.attacks.pgd import PGDSettings, ascend, fgsm, pgd

__all__ = [
    "NORMS",
    "APGDSettings",
    "Attempt",
    "AutoAttackSettings",
    "FABSettings",
    "InputGradient",
    "PGDSettings",
    "StepCallback",
    "apgd",
    "ascend",
    "autoattack",
    "autoattack_parts",
    "check_attack",
    "check_budget",
    "cross_entropy",
    "dlr",
    "fab",
    "fgsm",
    "input_gradient",
    "margin",
    "pgd",
    "project",
    "random_start",
    "require_eval_mode",
    "steepest_step",
    "strongest_attempt",
    "targeted_dlr",
]
