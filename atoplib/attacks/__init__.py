"""Attacks on any module (B, 3, H, W) in [0, 1] -> logits, random or not. An attack knows nothing of what it attacks.

Two know more, and say so: ``bpda`` and ``adaptive`` look into an ``AToPPipeline``. ``foreign`` runs torchattacks; it is
imported by its own name only, so that nobody waits for a library that he does not use. ``suite`` has them all by name.
"""

from atoplib.attacks.adaptive import AdaptiveSettings, adaptive
from atoplib.attacks.apgd import APGDSettings, apgd
from atoplib.attacks.attempts import Attempt, StepCallback, strongest_attempt
from atoplib.attacks.autoattack import AutoAttackSettings, autoattack, autoattack_parts
from atoplib.attacks.bpda import BPDA, HILL_PGD, HILL_VERDICT, IdentityBackward
from atoplib.attacks.checks import check_attack, check_budget, require_eval_mode
from atoplib.attacks.eot import InputGradient, input_gradient
from atoplib.attacks.fab import FABSettings, fab
from atoplib.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from atoplib.attacks.norms import NORMS, project, random_start, steepest_step
from atoplib.attacks.pgd import PGDSettings, ascend, fgsm, pgd
from atoplib.attacks.spsa import SPSASettings, spsa
from atoplib.attacks.square import SquareSettings, square
from atoplib.attacks.stadv import StAdvSettings, check_flow, stadv

__all__ = [
    "BPDA",
    "HILL_PGD",
    "HILL_VERDICT",
    "NORMS",
    "APGDSettings",
    "AdaptiveSettings",
    "Attempt",
    "AutoAttackSettings",
    "FABSettings",
    "IdentityBackward",
    "InputGradient",
    "PGDSettings",
    "SPSASettings",
    "SquareSettings",
    "StAdvSettings",
    "StepCallback",
    "adaptive",
    "apgd",
    "ascend",
    "autoattack",
    "autoattack_parts",
    "check_attack",
    "check_budget",
    "check_flow",
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
    "spsa",
    "square",
    "stadv",
    "steepest_step",
    "strongest_attempt",
    "targeted_dlr",
]
