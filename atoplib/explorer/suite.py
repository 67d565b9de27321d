"""The attacks that the explorer offers: one line each, from the knobs to the settings of an attack."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from atoplib.attacks import PGDSettings, pgd
from atoplib.explorer.knobs import Knobs


class AttackEntry(NamedTuple):
    """An attack and how the knobs set it.

    Attributes:
        run: ``run(model, images, labels, settings, *, generator, max_batch, callback)`` -> adversarial images in [0, 1];
            the callback is called as ``pgd`` does after every step.
        settings: the attack's settings for the knobs; raises ValueError with a sentence for values that it refuses.
        uses: names of the knobs that it reads; the others are disabled.
    """

    run: Callable[..., Tensor]
    settings: Callable[[Knobs], Any]
    uses: tuple[str, ...]


def _fgsm(knobs: Knobs) -> PGDSettings:
    return PGDSettings(eps=knobs.eps, norm=knobs.norm, steps=1, eot_samples=knobs.eot_samples, start="clean")


def _pgd(knobs: Knobs) -> PGDSettings:
    return PGDSettings(eps=knobs.eps, norm=knobs.norm, steps=knobs.steps, eot_samples=knobs.eot_samples)


ATTACKS: Mapping[str, AttackEntry] = MappingProxyType(
    {
        "fgsm": AttackEntry(pgd, _fgsm, ("norm", "eps", "eot_samples")),
        "pgd": AttackEntry(pgd, _pgd, ("norm", "eps", "steps", "eot_samples", "seed")),
    }
)
