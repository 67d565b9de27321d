"""Protocols as data: which attacks, how strong, on how many images, judged how often."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from atoplib.attacks.bpda import HILL_VERDICT
from atoplib.attacks.suite import ATTACKS
from atoplib.verdicts import STANDING, Verdict

SEES = ("defence", "classifier", "bpda")
SELECTIONS = ("mixed", "lee-kim")
KNOWN, UNSEEN, BLIND = "known", "unseen", "blind"  # what a label says first, see ``with_seen``


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
        label: its heading; ``{steps}``, ``{eot_samples}`` or ``{queries}`` in it stand for those of ``settings``.
        attack: a name of ``attacks.ATTACKS``.
        norm: ``linf``, ``l2`` or ``flow``: which part of the budget it uses.
        sees: ``defence`` (differentiates through all of it), ``bpda`` (the same with the identity as the backward pass of
            transform and purifier), or ``classifier`` (made against the classifier alone, then shown to the defence).
        relative_step: the step size in units of eps; None leaves it to the attack.
        settings: the attack's other settings.
        num_draws: forward passes of each verdict after it, in place of the protocol's; None: the protocol's.
        equal_passes: a deterministic model, which needs no EOT, is attacked by as many restarts as a random one has EOT samples,
            so that all rows of a table get as many gradient passes.
    """

    label: str
    attack: str
    norm: str = "linf"
    sees: str = "defence"
    relative_step: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_draws: int | None = None
    equal_passes: bool = False

    def __post_init__(self) -> None:
        if self.num_draws is not None and self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1 (or None: the protocol's), got {self.num_draws}")
        if self.attack not in ATTACKS:
            raise ValueError(f"unknown attack {self.attack!r}; allowed: {', '.join(ATTACKS)}")
        if self.norm not in ATTACKS[self.attack].norms:
            raise ValueError(f"{self.attack} knows the norms {', '.join(ATTACKS[self.attack].norms)}, not {self.norm!r}")
        if self.sees not in SEES:
            raise ValueError(f"unknown sees {self.sees!r}; allowed: {', '.join(SEES)}")
        try:
            _ = self.heading
        except (KeyError, IndexError, ValueError) as error:
            named = ", ".join(f"{{{name}}}" for name in self.settings) or "nothing"
            raise ValueError(f"the label {self.label!r} may name the settings {named} in braces, not {error}") from error

    @property
    def heading(self) -> str:
        """The label, with the numbers that it names."""
        return self.label.format(**self.settings)

    def build(self, budget: Budget, *, random: bool, verdict: Verdict) -> Any:
        """The attack's settings within ``budget``; one draw is enough against a model that is not ``random``.

        Raises:
            ValueError: for settings that the attack does not take, or values that it does not allow.
        """
        attack = ATTACKS[self.attack]
        unknown = sorted(set(self.settings) - attack.options)
        if unknown:
            allowed = ", ".join(sorted(attack.options - {"eps", "norm"}))
            raise ValueError(f"{self.attack} does not take {', '.join(unknown)}; allowed: {allowed}")
        values = {"eps": getattr(budget, self.norm), **self.settings}
        defaults = {"norm": self.norm, "version": "rand" if random else "standard"}
        if random:
            defaults["verdict"] = verdict
        if self.relative_step is not None:
            defaults["alpha"] = self.relative_step * values["eps"]
        values = {name: value for name, value in defaults.items() if name in attack.options} | values
        if not random and "eot_samples" in attack.options:
            if self.equal_passes:
                values["restarts"] = values.get("restarts", 1) * values.get("eot_samples", 1)
            values["eot_samples"] = 1
        return attack.settings(**values)


@dataclass(frozen=True)
class Protocol:
    """A way to measure robustness that can be named beside the number.

    Attributes:
        name: of the protocol.
        purpose: one sentence on what it is for and what it costs.
        attacks: the columns, after the clean images.
        num_images: test images attacked.
        num_draws: forward passes of each verdict on a random defence.
        verdict: when an attack itself takes an image for broken, and stops working on it: once every draw is wrong. By a
            majority it would stop while a single draw, which is what tables show, is still right four times in ten.
        selection: which images: ``mixed`` (a fixed choice, all classes mixed) or ``lee-kim`` (the 512 of Lee & Kim 2023
            where the set is CIFAR in its standard order, else as ``mixed``).
    """

    name: str
    purpose: str
    attacks: tuple[PlannedAttack, ...]
    num_images: int = 512
    num_draws: int = 10
    verdict: Verdict = Verdict(STANDING, 10)
    selection: str = "mixed"

    def __post_init__(self) -> None:
        for planned in self.attacks:  # a wrong setting is found where it is written, not when it is used
            for random in (False, True):
                planned.build(Budget(0.1, 0.1), random=random, verdict=self.verdict)
        labels = [planned.heading for planned in self.attacks]
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


def with_seen(protocol: Protocol, norms: Collection[str]) -> Protocol:
    """The protocol, each label saying first what trained defences know of the attack.

    *known*: PGD through the whole defence in a norm that was attacked in training; *unseen*: every other attack on the whole
    defence; *blind*: it sees the classifier alone, whatever it is.

    Args:
        norms: those of the attacks in training.
    """

    def said(item: PlannedAttack) -> str:
        if item.sees == "classifier":
            return BLIND
        return KNOWN if item.attack in ("fgsm", "pgd") and item.sees == "defence" and item.norm in norms else UNSEEN

    return replace(protocol, attacks=tuple(replace(item, label=f"{said(item)}: {item.label}") for item in protocol.attacks))


def adjusted(
    protocol: Protocol,
    *,
    steps: int | None = None,
    eot_samples: int | None = None,
    queries: int | None = None,
    num_draws: int | None = None,
) -> Protocol:
    """The protocol with other numbers of steps, draws a gradient, queries or draws a verdict, under a name that says so.

    Only attacks that have such a setting in the protocol are changed; None leaves it.
    """
    numbers = {"steps": steps, "eot_samples": eot_samples, "queries": queries}
    wanted = {name: value for name, value in numbers.items() if value is not None}
    attacks = tuple(
        replace(
            item,
            settings={**item.settings, **{name: wanted[name] for name in wanted if name in item.settings}},
            num_draws=item.num_draws if num_draws is None else None,
        )
        for item in protocol.attacks
    )
    changes = wanted | ({} if num_draws is None else {"num_draws": num_draws})
    if not changes:
        return protocol
    name = f"{protocol.name} ({', '.join(f'{key} {value}' for key, value in changes.items())})"
    return replace(protocol, name=name, attacks=attacks, num_draws=num_draws or protocol.num_draws)


_DEMO = {"steps": 40, "eot_samples": 10, "stop_after": 3, "decay": True, "cycles": 2, "joint": True, "momentum": 0.75}
_FLOW = {"steps": 25, "eot_samples": 3, "restarts": 4}  # more starts and targets find more than longer means in as many passes
_FIRST_STEP = 1.0  # of a step that decays, in units of eps
_STEP = 0.007 * 255 / 8  # Lee & Kim 2023: 0.007 at eps 8/255, in units of eps
_LEE_KIM_L2_STEP = 0.005 / 0.5  # likewise at l2 eps 0.5, 200 of which cross the ball twice; _STEP orbits in it
_HILL_STEP = 2 / 8  # Hill et al. 2021: 2/255 at eps 8/255


def _white_box(
    steps: int,
    *,
    auto_steps: int,
    bpda_steps: int,
    bpda_draws: int,
    flow_steps: int,
    queries: int,
    bpda_verdict: int | None = None,
) -> tuple[PlannedAttack, ...]:
    """The attacks of ``strict``, as long as asked for; EOT 20 throughout, as published, but for BPDA."""
    from_the_image = {"steps": steps, "eot_samples": 20, "start": "clean", "stop_after": 5}
    return (
        PlannedAttack("transfer PGD-{steps}", "pgd", sees="classifier", relative_step=_STEP, settings={"steps": steps}),
        PlannedAttack("PGD-{steps} + EOT-{eot_samples} linf", "pgd", relative_step=_STEP, settings=from_the_image),
        PlannedAttack("PGD-{steps} + EOT-{eot_samples} l2", "pgd", "l2", relative_step=_STEP, settings=from_the_image),
        PlannedAttack(
            "AutoAttack linf", "autoattack", settings={"steps": auto_steps, "eot_samples": 20, "queries": queries}
        ),
        PlannedAttack(
            "BPDA + EOT linf",
            "pgd",
            sees="bpda",
            relative_step=_HILL_STEP,
            settings={"steps": bpda_steps, "eot_samples": bpda_draws, "stop_after": 5},
            num_draws=bpda_verdict,
        ),
        PlannedAttack("StAdv", "stadv", "flow", settings={"steps": flow_steps, "eot_samples": 20}, equal_passes=True),
        PlannedAttack("Square linf", "square", settings={"queries": queries, "eot_samples": 1}),
    )


_STRICT = _white_box(
    200, auto_steps=100, bpda_steps=50, bpda_draws=15, flow_steps=100, queries=5000, bpda_verdict=HILL_VERDICT.num_draws
)

PROTOCOLS: dict[str, Protocol] = {
    item.name: item
    for item in (
        Protocol(
            "demo",
            "one white-box attack (PGD-40 + EOT-10) and the blind one beside it; under a minute on 2 cores",
            (
                PlannedAttack("transfer", "pgd", sees="classifier", relative_step=_FIRST_STEP, settings=_DEMO),
                PlannedAttack("white-box", "pgd", relative_step=_FIRST_STEP, settings=_DEMO, equal_passes=True),
            ),
            num_images=200,
        ),
        Protocol(
            "quick",
            "a look at every kind of attack, each too short to be believed alone; minutes on 2 cores",
            (
                PlannedAttack("transfer PGD-{steps}", "pgd", sees="classifier", settings={"steps": 40}),
                PlannedAttack(
                    "PGD-{steps} + EOT-{eot_samples} linf",
                    "pgd",
                    relative_step=_FIRST_STEP,
                    settings=_DEMO,
                    equal_passes=True,
                ),
                PlannedAttack(
                    "PGD-{steps} + EOT-{eot_samples} l2",
                    "pgd",
                    "l2",
                    relative_step=_FIRST_STEP,
                    settings=_DEMO,
                    equal_passes=True,
                ),
                PlannedAttack("APGD-DLR linf", "apgd", settings={"steps": 30, "eot_samples": 10, "loss": "dlr"}),
                PlannedAttack(
                    "BPDA + EOT linf", "pgd", sees="bpda", relative_step=_HILL_STEP, settings=_DEMO | {"steps": 20}
                ),
                PlannedAttack("StAdv", "stadv", "flow", settings={"steps": 30, "eot_samples": 5}, equal_passes=True),
                PlannedAttack("Square linf", "square", settings={"queries": 200}),
            ),
            num_images=128,
        ),
        Protocol(
            "compare",
            "the attack that AT and AToP were trained on, and others that they never saw, 200 images; minutes on 2 cores",
            (
                PlannedAttack("transfer", "pgd", sees="classifier", relative_step=_FIRST_STEP, settings=_DEMO),
                PlannedAttack(
                    "PGD-{steps} + EOT-{eot_samples} linf",
                    "pgd",
                    relative_step=_FIRST_STEP,
                    settings=_DEMO,
                    equal_passes=True,
                ),
                PlannedAttack(
                    "PGD-{steps} + EOT-{eot_samples} l2",
                    "pgd",
                    "l2",
                    relative_step=_FIRST_STEP,
                    settings=_DEMO,
                    equal_passes=True,
                ),
                PlannedAttack(
                    "StAdv + EOT-{eot_samples}", "stadv", "flow", settings=_FLOW, equal_passes=True
                ),
                PlannedAttack("Square linf", "square", settings={"queries": 500}),
            ),
            num_images=200,
        ),
        Protocol(
            "cpu",
            "half as long as ``strict`` (Square a fifth), 128 images; for 2 cores, an hour for small models, in pieces",
            _white_box(100, auto_steps=50, bpda_steps=25, bpda_draws=15, flow_steps=50, queries=1000),
            num_images=128,
        ),
        Protocol(
            "lee-kim",
            "PGD-200 + EOT-20 in both norms as Lee & Kim 2023, and transfer, 512 images; minutes on a GPU for small models",
            (*_STRICT[:2], replace(_STRICT[2], relative_step=_LEE_KIM_L2_STEP)),
            num_draws=20,
            verdict=Verdict(STANDING, 20),
            selection="lee-kim",
        ),
        Protocol(
            "standard",
            "the attacks of the literature without the black box, 512 images; an hour or more on a GPU",
            _white_box(100, auto_steps=100, bpda_steps=50, bpda_draws=15, flow_steps=100, queries=1000)[:4],
        ),
        Protocol(
            "strict",
            "everything at its published length on the 512 images of Lee & Kim; hours on a GPU",
            _STRICT,
            num_draws=20,
            verdict=Verdict(STANDING, 20),
            selection="lee-kim",
        ),
        Protocol(
            "authors-log",
            "what the log of the published code measures: attacks on the classifier alone, shown to the defence once",
            (
                PlannedAttack("FGSM on f", "fgsm", sees="classifier"),
                PlannedAttack("PGD-{steps} on f", "pgd", sees="classifier", settings={"steps": 20}),
                PlannedAttack("AutoAttack on f", "autoattack", sees="classifier"),
            ),
            num_draws=1,
        ),
    )
}
