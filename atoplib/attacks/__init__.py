"""Attacks on any module (B, 3, H, W) in [0, 1] -> logits, random or not. An attack knows nothing of what it attacks.

Two know more, and say so: ``bpda`` and ``adaptive`` look into an ``AToPPipeline``. ``foreign`` runs torchattacks; it is
imported by its own name only, so that nobody waits for a library that he does not use.
"""

from atoplib.attacks.adaptive import AdaptiveSettings, adaptive
from atoplib.attacks.bpda import BPDA, HILL_PGD, HILL_VERDICT, IdentityBackward
from atoplib.attacks.checks import check_attack, check_budget, require_eval_mode
from atoplib.attacks.eot import InputGradient, input_gradient
from atoplib.attacks.losses import margin
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
    "AdaptiveSettings",
    "IdentityBackward",
    "InputGradient",
    "PGDSettings",
    "SPSASettings",
    "SquareSettings",
    "StAdvSettings",
    "adaptive",
    "ascend",
    "check_attack",
    "check_budget",
    "check_flow",
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
]
