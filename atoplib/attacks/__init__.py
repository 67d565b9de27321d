"""Attacks on any model (B, C, H, W) in [0, 1] -> logits, random or not: one function each, all with one
signature.

``attack(model, images, labels, *, eps, norm="linf", ..., targets=None, seed=0, max_batch=256,
callback=None)`` returns adversarial images in [0, 1]. ``ATTACKS`` has them all by name.
"""

from atoplib.attacks.apgd import apgd
from atoplib.attacks.autoattack import autoattack
from atoplib.attacks.bpda import IdentityBackward, bpda
from atoplib.attacks.eot import EOTGradient, EOTWrapper, PassCounter, StepCallback, eot_gradient
from atoplib.attacks.flow import flow
from atoplib.attacks.minimum_norm import ddn, fmn, minimum_norms
from atoplib.attacks.norms import NORMS, Ball
from atoplib.attacks.pgd import fgsm, pgd, pgd_ensemble
from atoplib.attacks.registry import ATTACKS, Attack, default_eps
from atoplib.attacks.spsa import spsa
from atoplib.attacks.square import square
from atoplib.attacks.third_party import third_party
from atoplib.attacks.unseen import CORRUPTIONS, corrupt, corruption, occlusion, rotation_translation

__all__ = [
    "ATTACKS",
    "CORRUPTIONS",
    "NORMS",
    "Attack",
    "Ball",
    "EOTGradient",
    "EOTWrapper",
    "IdentityBackward",
    "PassCounter",
    "StepCallback",
    "apgd",
    "autoattack",
    "bpda",
    "corrupt",
    "corruption",
    "ddn",
    "default_eps",
    "eot_gradient",
    "fgsm",
    "flow",
    "fmn",
    "minimum_norms",
    "occlusion",
    "pgd",
    "pgd_ensemble",
    "rotation_translation",
    "spsa",
    "square",
    "third_party",
]
