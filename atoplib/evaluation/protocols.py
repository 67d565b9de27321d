"""Protocols as data: which attacks, how strong, on how many images, judged how often."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from atoplib.attacks.suite import ATTACKS
from atoplib.verdicts import Verdict

SEES = ("defence", "classifier", "bpda")
SELECTIONS = ("mixed", "lee-kim")


@dataclass(frozen=True)
class Budget:
    """How far an attack may go from an image.

    Attributes:
        linf, l2: radius in units of the image ([0, 1]): 8/255 and 0.5 for CIFAR-10.
        flow: largest displacement of StAdv in units of the sampling grid (the image is 2 wide: 0.05 is 0.8 px of 32).
    """

    linf: float
    l2: float
    flow: float = 0.05

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 < getattr(self, item.name) < float("inf"):
                raise ValueError(f"the budget {item.name} must be above 0, got {getattr(self, item.name)}")
        if self.linf > 1:
            raise ValueError(f"eps of the linf norm must be at most 1 (images lie in [0, 1]), got {self.linf}; 8/255?")


@dataclass(frozen=True)
class PlannedAttack:
    """One column of a table.

    Attributes:
        label: its heading.
        attack: a name of ``attacks.ATTACKS``.
        norm: ``linf``, ``l2`` or ``flow``: which part of the budget it uses.
        sees: ``defence`` (differentiates through all of it), ``bpda`` (the same with the identity as the backward pass of
            transform and purifier), or ``classifier`` (made against the classifier alone, then shown to the defence).
        relative_step: the step size in units of eps; None leaves it to the attack.
        settings: the attack's other settings.
    """

    label: str
    attack: str
    norm: str = "linf"
    sees: str = "defence"
    relative_step: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            raise ValueError(f"unknown attack {self.attack!r}; allowed: {', '.join(ATTACKS)}")
        if self.norm not in ATTACKS[self.attack].norms:
            raise ValueError(f"{self.attack} knows the norms {', '.join(ATTACKS[self.attack].norms)}, not {self.norm!r}")
        if self.sees not in SEES:
            raise ValueError(f"unknown sees {self.sees!r}; allowed: {', '.join(SEES)}")

    def build(self, budget: Budget, *, random: bool, verdict: Verdict) -> Any:
        """The attack's settings within ``budget``; one draw is enough against a model that is not ``random``."""
        settings_class = ATTACKS[self.attack].settings
        known = {item.name for item in fields(settings_class)}
        values = {"eps": getattr(budget, self.norm), **self.settings}
        if "norm" in known:
            values["norm"] = self.norm
        if self.relative_step is not None:
            values["alpha"] = self.relative_step * values["eps"]
        if not random:
            values |= {"eot_samples": 1} if "eot_samples" in known else {}
        elif "verdict" in known:
            values.setdefault("verdict", verdict)
        return settings_class(**values)


@dataclass(frozen=True)
class Protocol:
    """A way to measure robustness that can be named beside the number.

    Attributes:
        name: of the protocol.
        purpose: one sentence on what it is for and what it costs.
        attacks: the columns, after the clean images.
        num_images: test images attacked.
        num_draws: forward passes of each verdict on a random defence.
        verdict: when an attack itself takes an image for broken, and stops working on it.
        selection: which images: ``mixed`` (a fixed choice, all classes mixed) or ``lee-kim`` (the 512 of Lee & Kim 2023
            where the set is CIFAR in its standard order, else as ``mixed``).
    """

    name: str
    purpose: str
    attacks: tuple[PlannedAttack, ...]
    num_images: int = 512
    num_draws: int = 10
    verdict: Verdict = Verdict("majority", 10)
    selection: str = "mixed"

    def __post_init__(self) -> None:
        labels = [planned.label for planned in self.attacks]
        doubled = next((label for label in labels if labels.count(label) > 1), None)
        if doubled is not None:
            raise ValueError(f"two attacks of {self.name} have the label {doubled!r}")
        if self.num_images < 1 or self.num_draws < 1:
            raise ValueError(f"num_images and num_draws must be at least 1, got {self.num_images} and {self.num_draws}")
        if self.selection not in SELECTIONS:
            raise ValueError(f"unknown selection {self.selection!r}; allowed: {', '.join(SELECTIONS)}")


def lee_kim_indices(count: int = 10_000, chosen: int = 512) -> list[int]:
    """The test images that Lee & Kim 2023 attack: numpy's ``RandomState(0).choice`` over the standard order of CIFAR-10."""
    return np.random.RandomState(0).choice(count, chosen, replace=False).tolist()


def adjusted(
    protocol: Protocol, *, steps: int | None = None, eot_samples: int | None = None, num_draws: int | None = None
) -> Protocol:
    """The protocol with another number of steps, of draws a gradient, or of draws a verdict, under a name that says so.

    Only attacks that have such a setting in the protocol are changed; None leaves it.
    """
    wanted = {name: value for name, value in {"steps": steps, "eot_samples": eot_samples}.items() if value is not None}
    attacks = tuple(
        replace(item, settings={**item.settings, **{name: wanted[name] for name in wanted if name in item.settings}})
        for item in protocol.attacks
    )
    changes = wanted | ({} if num_draws is None else {"num_draws": num_draws})
    if not changes:
        return protocol
    name = f"{protocol.name} ({', '.join(f'{key} {value}' for key, value in changes.items())})"
    return replace(protocol, name=name, attacks=attacks, num_draws=num_draws or protocol.num_draws)


_DEMO = {"steps": 40, "eot_samples": 10, "stop_after": 3}

PROTOCOLS: dict[str, Protocol] = {
    item.name: item
    for item in (
        Protocol(
            "demo",
            "One white-box attack and the blind one beside it, in less than a minute on 2 cores.",
            (
                PlannedAttack("transfer", "pgd", sees="classifier", settings=_DEMO),
                PlannedAttack("white-box", "pgd", settings=_DEMO),
            ),
            num_images=200,
        ),
    )
}
