"""The attacks that the explorer offers: those of ``attacks.suite``, set by the knobs exactly as notebook 4 sets them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from atoplib.attacks import NORMS, suite
from atoplib.explorer.knobs import Knobs
from atoplib.parameters import Attack

WITHOUT_DICE = ("fgsm", "fab", "stadv")  # they start from the image and draw nothing: no seed
NAMES = {
    "adaptive": "Adaptive PGD",
    "autoattack": "AutoAttack",
    "square": "Square",
    "stadv": "StAdv",
}  # the others are abbreviations


class AttackEntry(NamedTuple):
    """An attack and how the knobs set it.

    Attributes:
        run: ``run(model, images, labels, settings, *, generator, max_batch, callback)`` -> adversarial images in [0, 1];
            the callback is called as ``pgd`` does after every step.
        settings: ``settings(knobs, random)``, the attack's settings against a model that throws dice or does not; raises
            ValueError with a sentence for values that it refuses.
        uses: names of the knobs that it reads; the others are disabled.
        norms: what eps can be a radius of.
        without_dice: those of ``uses`` that it reads against a model without randomness only.
    """

    run: Callable[..., Tensor]
    settings: Callable[[Knobs, bool], Any]
    uses: tuple[str, ...]
    norms: tuple[str, ...] = NORMS
    without_dice: tuple[str, ...] = ()

    def used(self, random: bool) -> tuple[str, ...]:
        """The knobs that it reads against a model that throws dice or does not."""
        useless = self.without_dice if random else ("eot_samples",)
        return tuple(name for name in self.uses if name not in useless)


def title(name: str) -> str:
    """An attack's name as people write it."""
    return NAMES.get(name, name.upper())


def settings_of(knobs: Knobs, random: bool) -> Any:
    """The settings with which notebook 4 runs the attack of the knobs."""
    own = ("attack", "attack_sees", "norm", "eps", "steps", "eot_samples", "queries")
    parameters = Attack(**{name: getattr(knobs, name) for name in own})
    (planned,) = parameters.plan.attacks
    return planned.build(parameters.budget, random=random, verdict=parameters.plan.verdict)


def _entry(name: str, attack: suite.Attack) -> AttackEntry:
    uses = {"eps"} | (attack.options & {"steps", "eot_samples", "queries"})
    uses |= set() if name in WITHOUT_DICE else {"seed"}
    uses |= {"norm"} if len(attack.norms) > 1 else set()
    without_dice = ("queries",) if "version" in attack.options else ()  # AutoAttack's for random models has no Square
    return AttackEntry(attack.function, settings_of, tuple(sorted(uses)), attack.norms, without_dice)


ATTACKS: Mapping[str, AttackEntry] = MappingProxyType(
    {name: _entry(name, attack) for name, attack in suite.ATTACKS.items() if name != "torchattacks"}
)
"""All of ``attacks.suite`` but the foreign ones, each of which has options of its own."""
