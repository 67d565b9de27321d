"""The attacks of torchattacks by name, and what can be set of each: a list without the library, which is slow to import."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

LINF, L2, BOTH = ("linf",), ("l2",), ("linf", "l2")


class ForeignAttack(NamedTuple):
    """What is known of an attack before its library is imported.

    Attributes:
        norms: those that it is made for.
        steps, queries: its own name for the number of iterations, or of forward passes; empty: it has none.
        alpha: whether it takes a step size beside its steps.
        dice: whether it throws dice where the model does not.
    """

    norms: tuple[str, ...]
    steps: str = ""
    queries: str = ""
    alpha: bool = False
    dice: bool = True


def _ascent(norms: tuple[str, ...] = LINF, *, dice: bool = True) -> ForeignAttack:
    return ForeignAttack(norms, "steps", alpha=True, dice=dice)


FOREIGN: Mapping[str, ForeignAttack] = MappingProxyType(
    {
        # one step
        "GN": ForeignAttack(BOTH),
        "FGSM": ForeignAttack(LINF, dice=False),
        "FFGSM": ForeignAttack(LINF),
        # gradient ascent in a ball
        "RFGSM": _ascent(),
        "BIM": _ascent(dice=False),
        "PGD": _ascent(),
        "EOTPGD": _ascent(),
        "PGDRS": _ascent(),
        "TPGD": _ascent(),
        "UPGD": _ascent(dice=False),
        "Jitter": _ascent(),
        "APGD": ForeignAttack(BOTH, "steps"),
        "APGDT": ForeignAttack(BOTH, "steps"),
        "PGDL2": _ascent(L2),
        "PGDRSL2": _ascent(L2),
        # made to transfer
        "MIFGSM": _ascent(dice=False),
        "NIFGSM": _ascent(dice=False),
        "SINIFGSM": _ascent(dice=False),
        "VMIFGSM": _ascent(),
        "VNIFGSM": _ascent(),
        "DIFGSM": _ascent(),
        "TIFGSM": _ascent(),
        "PIFGSM": ForeignAttack(LINF, "num_iter_set", dice=False),
        "PIFGSMPP": ForeignAttack(LINF, "num_iter_set", dice=False),
        # smallest perturbation
        "CW": ForeignAttack(L2, "steps", dice=False),
        "DeepFool": ForeignAttack(L2, "steps", dice=False),
        "FAB": ForeignAttack(BOTH, "steps", dice=False),
        # black box, ensembles
        "SPSA": ForeignAttack(LINF, "nb_iter"),
        "Square": ForeignAttack(BOTH, queries="n_queries"),
        "AutoAttack": ForeignAttack(BOTH),
    }
)
"""The attacks of torchattacks 3.5.1 that ask for nothing but a model."""
