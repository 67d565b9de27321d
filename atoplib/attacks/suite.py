"""The attacks by name, all with one signature: (model, images, labels, settings, *, generator, max_batch, callback)."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor

from atoplib.attacks.adaptive import AdaptiveSettings, adaptive
from atoplib.attacks.apgd import APGDSettings, apgd
from atoplib.attacks.autoattack import AutoAttackSettings, autoattack
from atoplib.attacks.fab import FABSettings, fab
from atoplib.attacks.foreign_names import FOREIGN
from atoplib.attacks.norms import NORMS
from atoplib.attacks.pgd import PGDSettings, pgd
from atoplib.attacks.spsa import SPSASettings, spsa
from atoplib.attacks.square import SquareSettings, square
from atoplib.attacks.stadv import StAdvSettings, stadv


class Attack(NamedTuple):
    """An attack: its function, what makes its settings from eps, norm and the rest, and the norms that eps can be of.

    ``lacks`` are names that ``settings`` has for others of its kind.
    """

    function: Callable[..., Tensor]
    settings: Callable[..., Any]
    norms: tuple[str, ...] = NORMS
    lacks: frozenset[str] = frozenset()

    @property
    def options(self) -> frozenset[str]:
        """Names that ``settings`` takes."""
        return frozenset(signature(self.settings).parameters) - self.lacks


def fgsm_settings(eps: float, norm: str = "linf", *, eot_samples: int = 1) -> PGDSettings:
    """FGSM (Goodfellow et al. 2015): one step of size eps from the image itself."""
    return PGDSettings(eps, norm, steps=1, eot_samples=eot_samples, start="clean")


def adaptive_settings(
    eps: float,
    norm: str = "linf",
    *,
    steps: int = 20,
    alpha: float | None = None,
    eot_samples: int = 1,
    start: str = "random",
    cross_entropy: float = 1.0,
    margin: float = 0.0,
    distance: float = 0.0,
    fixed_for: int = 1,
    warm_steps: int = 0,
) -> AdaptiveSettings:
    """``AdaptiveSettings`` from one flat list of names."""
    base = PGDSettings(eps, norm, steps, alpha, eot_samples, start)
    return AdaptiveSettings(base, cross_entropy, margin, distance, fixed_for, warm_steps)


def stadv_settings(
    eps: float, *, steps: int = 100, eot_samples: int = 20, restarts: int = 1, control: int | None = None
) -> StAdvSettings:
    """``StAdvSettings``, whose bound is called eps as everywhere else."""
    return StAdvSettings(eps, steps, eot_samples, restarts, control)


def foreign_settings(
    eps: float, norm: str = "linf", *, name: str, eot_samples: int = 1, options: Mapping[str, Any] | None = None
) -> Any:
    """``foreign.ForeignSettings``: the attack ``name`` of torchattacks."""
    from atoplib.attacks.foreign import ForeignSettings  # here: its library is slow to import and seldom wanted

    return ForeignSettings(name, eps, norm, eot_samples, options or {})


def run_foreign(*given: Any, **settings: Any) -> Tensor:
    """``foreign.torchattacks_attack``."""
    from atoplib.attacks.foreign import torchattacks_attack

    return torchattacks_attack(*given, **settings)


def foreign(name: str) -> Attack:
    """The attack ``name`` of torchattacks, its steps as large as those of our PGD, its other options at its own defaults."""
    known = FOREIGN[name]

    def settings(
        eps: float,
        norm: str = known.norms[0],
        *,
        steps: int | None = None,
        queries: int | None = None,
        version: str | None = None,
        eot_samples: int = 1,
    ) -> Any:
        step = PGDSettings(eps, norm, steps or DEFAULT_STEPS).step_size
        wanted = {known.steps: steps, known.queries: queries, "version": version, "alpha": step if known.alpha else None}
        options = {option: value for option, value in wanted.items() if option and value is not None}
        return foreign_settings(eps, norm, name=name, eot_samples=eot_samples, options=options)

    has = {"steps": known.steps, "queries": known.queries, "version": name == "AutoAttack"}
    return Attack(run_foreign, settings, known.norms, frozenset(option for option, there in has.items() if not there))


FOREIGN_PREFIX = "torchattacks:"
DEFAULT_STEPS = 10  # of torchattacks
ATTACKS: dict[str, Attack] = {
    "fgsm": Attack(pgd, fgsm_settings),
    "pgd": Attack(pgd, PGDSettings),
    "apgd": Attack(apgd, APGDSettings),
    "fab": Attack(fab, FABSettings),
    "autoattack": Attack(autoattack, AutoAttackSettings),
    "adaptive": Attack(adaptive, adaptive_settings),
    "stadv": Attack(stadv, stadv_settings, ("flow",)),
    "square": Attack(square, SquareSettings),
    "spsa": Attack(spsa, SPSASettings),
    **{f"{FOREIGN_PREFIX}{name}": foreign(name) for name in FOREIGN},
}
