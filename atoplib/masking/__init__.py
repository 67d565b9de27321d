"""Signs of gradient masking, looked for before a robust accuracy is believed (Athalye et al. 2018, Carlini et
al. 2019).

Each check compares attacks on the same images, or the gradient with the loss that it should predict, and ends
as ``passed``, ``suspicious`` or ``failed`` with a sentence that holds the numbers.
"""

from atoplib.masking.checklist import FEWEST_IMAGES, masking_checklist
from atoplib.masking.checks import Check, format_checks, warning

__all__ = ["FEWEST_IMAGES", "Check", "format_checks", "masking_checklist", "warning"]
