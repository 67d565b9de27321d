"""Signs of gradient masking, looked for before a robust accuracy is believed (Athalye et al. 2018, Carlini et al. 2019).

Each check compares attacks on the same images, or the gradient with the loss that it should predict, and ends as
``passed``, ``suspicious`` or ``failed`` with a sentence of evidence.
"""

from atoplib.masking.bench import MaskingSettings, attackable, smooth_margin
from atoplib.masking.checklist import FEWEST_IMAGES, masking_checklist
from atoplib.masking.verdicts import (
    Check,
    check_agreement,
    check_challenger,
    check_draws,
    check_effort,
    check_gradients,
    check_modes,
    check_unbounded,
    format_checks,
    outcome_of,
    paired_p_value,
    stamp,
    trustworthy,
)

__all__ = [
    "FEWEST_IMAGES",
    "Check",
    "MaskingSettings",
    "attackable",
    "check_agreement",
    "check_challenger",
    "check_draws",
    "check_effort",
    "check_gradients",
    "check_modes",
    "check_unbounded",
    "format_checks",
    "masking_checklist",
    "outcome_of",
    "paired_p_value",
    "smooth_margin",
    "stamp",
    "trustworthy",
]
