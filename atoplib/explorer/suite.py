"""The attacks that the explorer offers: all of ``attacks.suite``, set by the knobs exactly as notebook 4 sets them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from atoplib.attacks import NORMS, suite
from atoplib.attacks.foreign_names import FOREIGN
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
            the callback is called as ``pgd`` does after every step, or as (passes so far, 0, images, losses) by an attack
            that does not say how far it is.
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


def is_foreign(name: str) -> bool:
    """Whether an attack is one of torchattacks."""
    return name.startswith(suite.FOREIGN_PREFIX)


def title(name: str) -> str:
    """An attack's name as people write it."""
    if is_foreign(name):
        return f"torchattacks {name.removeprefix(suite.FOREIGN_PREFIX)}"
    return NAMES.get(name, name.upper())


def settings_of(knobs: Knobs, random: bool) -> Any:
    """The settings with which notebook 4 runs the attack of the knobs."""
    own = ("attack", "attack_sees", "norm", "eps", "steps", "eot_samples", "queries")
    parameters = Attack(**{name: getattr(knobs, name) for name in own})
    (planned,) = parameters.plan.attacks
    return planned.build(parameters.budget, random=random, verdict=parameters.plan.verdict)


def run_foreign(
    model: nn.Module, images: Tensor, labels: Tensor, settings: Any, *, callback: Callable[..., None], **options: Any
) -> Tensor:
    """An attack of torchattacks. It tells nothing on its way but that it asks the model again: there it can be stopped."""

    def on_pass(number: int) -> None:
        callback(number, 0, images, None)

    return suite.run_foreign(model, images, labels, settings, callback=callback, on_pass=on_pass, **options)


def _entry(name: str, attack: suite.Attack) -> AttackEntry:
    foreign = FOREIGN[name.removeprefix(suite.FOREIGN_PREFIX)] if is_foreign(name) else None
    uses = {"eps"} | (attack.options & {"steps", "eot_samples", "queries"})
    uses |= {"seed"} if (name not in WITHOUT_DICE if foreign is None else foreign.dice) else set()
    uses |= {"norm"} if len(attack.norms) > 1 else set()
    without_dice = ("queries",) if "version" in attack.options else ()  # AutoAttack's for random models has no Square
    run = attack.function if foreign is None else run_foreign
    return AttackEntry(run, settings_of, tuple(sorted(uses)), attack.norms, without_dice)


ATTACKS: Mapping[str, AttackEntry] = MappingProxyType({name: _entry(name, attack) for name, attack in suite.ATTACKS.items()})
"""All of ``attacks.suite``, those of torchattacks last."""
