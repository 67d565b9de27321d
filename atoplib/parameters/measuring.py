"""Notebooks 4 and 6, which measure by a protocol."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from atoplib.attacks.suite import ATTACKS
from atoplib.data import Dataset
from atoplib.evaluation import PROTOCOLS, Budget, PlannedAttack, Protocol, adjusted, lee_kim_indices
from atoplib.evaluation.tables import PUBLISHED, Published
from atoplib.masking import FEWEST_IMAGES, MaskingSettings
from atoplib.parameters.attacking import Attacking
from atoplib.parameters.base import from_run, from_runs
from atoplib.parameters.checking import ParameterError
from atoplib.training import DTYPES, compute_dtype
from atoplib.transforms import TransformSettings

STANDARD_ORDER = ("cifar10", "cifar100", "cifar10_jpeg")  # test images in the order that the literature numbers them in
SEES = {"pipeline": ("white-box", "defence"), "bpda": ("BPDA", "bpda"), "classifier": ("transfer", "classifier")}
"""What the one attack of notebook 4 sees: its column, and as ``evaluation.PlannedAttack`` names it."""
OF_A_DEFENCE = ("purifier", "classifier")


@dataclass(frozen=True, kw_only=True)
class Measuring(Attacking):
    """What both notebooks that measure by a protocol take: its name, what is changed of it, and the radii."""

    max_test: int | None = None
    protocol: str = "demo"
    eps_l2: float = 2.0
    steps: int | None = None
    eot_samples: int | None = None
    queries: int | None = None
    num_draws: int | None = None
    attack_batch: int = 100
    dtype: str = "auto"

    SMOKE = {"max_train": 64, "max_test": 8, "steps": 2, "eot_samples": 2, "queries": 4, "num_draws": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol!r}; allowed: {', '.join(PROTOCOLS)}")
        for name in ("steps", "eot_samples", "queries", "num_draws"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (or None: the protocol's), got {getattr(self, name)}")
        if self.attack_batch < 1:
            raise ValueError(f"attack_batch must be at least 1, got {self.attack_batch}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for planned in self.plan.attacks:
            planned.build(self.budget, random=True, verdict=self.plan.verdict)

    @property
    def plan(self) -> Protocol:
        """The protocol, with what was changed of it."""
        return adjusted(
            PROTOCOLS[self.protocol],
            steps=self.steps,
            eot_samples=self.eot_samples,
            queries=self.queries,
            num_draws=self.num_draws,
        )

    @property
    def budget(self) -> Budget:
        """How far attacks may go."""
        return Budget(linf=self.eps, l2=self.eps_l2)

    @property
    def attack_dtype(self) -> torch.dtype:
        """What attacks compute in; verdicts are always float32."""
        return compute_dtype(self.dtype, self.torch_device)

    @property
    def test_choice(self) -> int | list[int] | None:
        """The test images that the protocol attacks, ``max_test`` of them if it is set."""
        count = self.max_test or self.plan.num_images
        if self.plan.selection == "lee-kim" and self.dataset in STANDARD_ORDER and count <= 512:
            return lee_kim_indices()[:count]
        return count


@dataclass(frozen=True, kw_only=True)
class Attack(Measuring):
    """04: the protocol that the numbers are measured by, and what of it and of the defences is changed.

    ``attack`` takes the place of the protocol's attacks, and eps is then the radius of its ``norm`` (``flow`` of ``stadv``).
    """

    STAGE = "04_attack"

    image: int | None = None
    transform: str | None = None
    missing_rate: float | None = None
    noise_std: float | None = None
    num_masks: int | None = None
    attack: str | None = None
    attack_sees: str = "pipeline"
    norm: str = "linf"
    num_seeds: int = 1
    keep_images: bool = False
    masking_images: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is not None and self.image < 0:
            raise ValueError(f"image must be 0 or above (or None), got {self.image}")
        _ = replace(TransformSettings(), **self.transform_changes)
        if self.attack_sees not in SEES:
            raise ValueError(f"unknown attack_sees {self.attack_sees!r}; allowed: {', '.join(SEES)}")
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {self.num_seeds}")
        if self.masking_images and self.masking_images < FEWEST_IMAGES:
            raise ValueError(
                f"masking_images must be 0 (no checks) or at least {FEWEST_IMAGES}, got {self.masking_images}; 64 are usual"
            )

    def load_data(self, progress: Callable[[int, int, str], None] | None = None) -> Dataset:
        """As ``Attacking.load_data``; raises ParameterError also where ``image`` is not among the test images."""
        loaded = super().load_data(progress)
        count = len(loaded.test.labels)
        if self.image is not None and self.image >= count:
            raise ParameterError(f"there is no image {self.image}: {count} test images are loaded, counted from 0")
        return loaded

    @property
    def alone(self) -> bool:
        """Whether one attack takes the place of the protocol's."""
        return self.attack not in (None, "none")

    @property
    def plan(self) -> Protocol:
        """The protocol, with what was changed of it; or the one attack that takes its place."""
        if self.alone:
            wanted = {"steps": self.steps, "eot_samples": self.eot_samples, "queries": self.queries}
            options = ATTACKS[self.attack].options if self.attack in ATTACKS else ()
            settings = {name: value for name, value in wanted.items() if name in options and value is not None}
            label, sees = SEES[self.attack_sees]
            planned = PlannedAttack(label, self.attack, self.norm, sees, settings=settings)
            name = f"{self.attack} alone ({', '.join([self.norm, *(f'{key} {value}' for key, value in settings.items())])})"
            return Protocol(name, "one attack", (planned,), num_images=200, num_draws=self.num_draws or 10)
        return super().plan

    @property
    def eps_norm(self) -> str:
        """What eps is a radius of."""
        return self.norm if self.alone else "linf"

    @property
    def masking(self) -> MaskingSettings:
        """What the masking checks cost; they attack in steps as large as those of the plan's PGD."""
        eps, norm = (self.eps_l2, "l2") if self.eps_norm == "flow" else (self.eps, self.eps_norm)
        step = next(
            (item.relative_step for item in self.plan.attacks if item.attack == "pgd" and item.sees == "defence"), None
        )
        settings = MaskingSettings(eps, norm, alpha=None if step is None else step * eps)
        if self.smoke:
            return replace(settings, steps=2, eot_samples=1, num_draws=2, queries=2, noise_samples=2, directions=2)
        return settings

    @property
    def budget(self) -> Budget:
        """How far attacks may go."""
        if self.eps_norm == "linf":
            return super().budget
        return Budget(**{"linf": min(1.0, self.eps), "l2": self.eps_l2, self.eps_norm: self.eps})

    @property
    def transform_changes(self) -> dict[str, Any]:
        """What differs from the transform that a purifier was trained with."""
        names = ("transform", "missing_rate", "noise_std", "num_masks")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"name" if name == "transform" else name: value for name, value in changes.items()}

    @property
    def published(self) -> tuple[Published, ...]:
        """Numbers of the literature that ours can stand beside."""
        comparable = self.dataset in ("cifar10", "cifar10_jpeg") and abs(self.eps - 8 / 255) < 1e-4
        return PUBLISHED if comparable else ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the repetitions."""
        return tuple(range(self.seed, self.seed + self.num_seeds))


@dataclass(frozen=True, kw_only=True)
class Compare(Measuring):
    """06: undefended, AT, AP and AToP by one protocol.

    Attributes:
        at_run: the adversarially trained classifier: in a recipe the entry called ``at``.
        others: further defences, {NAME: RUN} or {NAME: {"purifier": RUN, "classifier": RUN}}: a purifier of notebook 2 or 3
            in front of a classifier of notebook 1 (without one, of the undefended one); or a classifier alone.
        eps_flow: radius of StAdv, in units of the sampling grid (the image is 2 wide).
    """

    STAGE = "06_compare"
    DEFENCES: ClassVar[dict[str, str]] = {"undefended": "undefended", "AT": "at", "AP": "ap", "AToP": "atop"}

    at_run: str = from_run("at")
    others: dict = from_runs()
    protocol: str = "compare"
    eps_flow: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given in self.others.items():
            parts = given if isinstance(given, dict) else {"purifier": given}
            texts = [name, *parts.values()]
            if not set(parts) <= set(OF_A_DEFENCE) or not parts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(
                    f'others must name runs by text, {{NAME: RUN}} or {{NAME: {{"purifier": RUN, "classifier": RUN}}}}, '
                    f"got {self.others!r}"
                )
            if name in self.DEFENCES or "latest" in parts.values():
                raise ValueError(
                    f"others need names other than {', '.join(self.DEFENCES)} and runs by name or path, not 'latest'; "
                    f"got {self.others}"
                )

    def other(self, name: str) -> dict[str, str]:
        """The runs of one of ``others``: of its purifier, of its classifier, or of both."""
        given = self.others[name]
        return given if isinstance(given, dict) else {"purifier": given}

    def classifier_of(self, defence: str) -> Path:
        """As ``Attacking.classifier_of``, also of one of ``others``; of a classifier alone, itself."""
        if defence in self.others:
            classifier = self.other(defence).get("classifier")
            return self.weights("undefended") if classifier is None else self.checkpoint(classifier, "undefended")
        return self.weights("at") if defence == "at" else super().classifier_of(defence)

    @property
    def budget(self) -> Budget:
        """How far attacks may go."""
        return replace(super().budget, flow=self.eps_flow)

    def found(self) -> tuple[dict[str, Path], dict[str, str]]:
        """The checkpoints by defence; and of each defence that is left out, why, and what makes it.

        Raises:
            FileNotFoundError, ValueError: as ``weights``, if there is no undefended classifier: every purifier stands before
                it; or if one of ``others`` is not there.
        """
        there, missing = {"undefended": self.weights("undefended")}, {}
        for name, defence in self.DEFENCES.items():
            try:
                there[name] = self.weights(defence)
            except (FileNotFoundError, ValueError) as error:
                missing[name] = f"{name} is left out: {error}. The recipe compare makes all of them"
        for name in self.others:
            purifier = self.other(name).get("purifier")
            there[name] = self.classifier_of(name) if purifier is None else self.checkpoint(purifier, "ap")
        return there, missing

    def classifiers(self, names: Iterable[str]) -> dict[str, Path]:
        """The checkpoint of the classifier in each of these defences, by its name in a table; errors as ``found``."""
        return {name: self.classifier_of(self.DEFENCES.get(name, name)) for name in names}
