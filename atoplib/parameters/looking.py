"""Notebooks 5, 7, 8 and 9, which look at what the others have made."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from atoplib.attacks import PGDSettings
from atoplib.evaluation.ablation import Setting, mask_surface, noise_sweep
from atoplib.parameters.attacking import Attacking
from atoplib.parameters.base import Parameters
from atoplib.parameters.training import FinetuneAtop
from atoplib.pipeline import AVERAGES
from atoplib.training import TrainingSettings
from atoplib.transforms import TransformSettings


@dataclass(frozen=True, kw_only=True)
class Visualize(Attacking):
    """05: how many images can be explored, how many stand in the still pictures, and the attack on them."""

    STAGE = "05_visualize"

    max_test: int | None = 200
    rows: int = 3
    show: str = "atop"
    norm: str = "linf"
    steps: int = 40
    alpha: float | None = None
    eot_samples: int = 10
    stop_after: int = 3
    num_draws: int = 10

    SMOKE = {"max_train": 64, "max_test": 8, "steps": 2, "eot_samples": 2, "num_draws": 3}

    @property
    def attack(self) -> PGDSettings:
        """PGD's settings."""
        return PGDSettings(self.eps, self.norm, self.steps, self.alpha, self.eot_samples, stop_after=self.stop_after)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.attack
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {self.num_draws}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        if self.show not in ("ap", "atop"):
            raise ValueError(f"unknown show {self.show!r}; allowed: ap, atop")


@dataclass(frozen=True, kw_only=True)
class Ablate(Attacking):
    """07: which settings are measured without training, how strong the attack on each is, and what table of trained ones."""

    STAGE = "07_ablate"

    max_test: int | None = 64
    transform: str = "rt2"
    missing_rates: list = field(default_factory=lambda: [0.1, 0.25, 0.5])
    mask_counts: list = field(default_factory=lambda: [1, 4])
    partitions: list = field(default_factory=lambda: [2, 4])
    noise_stds: list = field(default_factory=lambda: [0.0, 0.1, 0.2])
    average: str = "images"
    vote_counts: list = field(default_factory=lambda: [1, 3, 10, 30])
    norm: str = "linf"
    steps: int = 20
    alpha: float | None = None
    eot_samples: int = 8
    stop_after: int = 3
    num_draws: int = 5
    trained: str = "ablate"
    down: str = "transform"
    across: str = "variant"

    SMOKE = {
        "max_train": 64,
        "max_test": 8,
        "missing_rates": [0.25],
        "mask_counts": [1, 2],
        "partitions": [2],
        "noise_stds": [0.0, 0.1],
        "vote_counts": [1, 3],
        "steps": 2,
        "eot_samples": 2,
        "num_draws": 3,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (
            ("missing_rates", "numbers"),
            ("noise_stds", "numbers"),
            ("mask_counts", "whole numbers"),
            ("partitions", "whole numbers"),
            ("vote_counts", "whole numbers"),
        ):
            values = getattr(self, name)
            allowed = int if kind == "whole numbers" else int | float
            if not all(isinstance(value, allowed) and not isinstance(value, bool) for value in values):
                raise ValueError(f"{name} must be a list of {kind}, got {values!r}")
            if kind == "whole numbers" and any(value < 1 for value in values):
                raise ValueError(f"{name} must be at least 1, got {values!r}")
        if not self.missing_rates or not self.mask_counts:
            raise ValueError("missing_rates and mask_counts span the surface: give at least one of each")
        if self.average not in AVERAGES:
            raise ValueError(f"unknown average {self.average!r}; allowed: {', '.join(AVERAGES)}")
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {self.num_draws}")
        allowed = sorted(item.name for item in fields(FinetuneAtop))
        for name in (self.down, self.across):
            if name not in allowed:
                raise ValueError(f"no training has the parameter {name!r} (down, across); allowed: {', '.join(allowed)}")
        _ = self.attack, self.surface(TransformSettings()), self.sweep(TransformSettings()), self.trained_dir

    @property
    def attack(self) -> PGDSettings:
        """PGD's settings; its draws count passes through the purifier."""
        return PGDSettings(self.eps, self.norm, self.steps, self.alpha, self.eot_samples, stop_after=self.stop_after)

    def surface(self, trained: TransformSettings) -> list[Setting]:
        """Missing rate x number of masks; noise and grid are those of the training."""
        return mask_surface(
            replace(trained, name=self.transform),
            missing_rates=self.missing_rates,
            mask_counts=self.mask_counts,
            partitions=self.partitions,
            average=self.average,
        )

    def sweep(self, trained: TransformSettings) -> list[Setting]:
        """The noise levels; missing rate and grid are those of the training."""
        return noise_sweep(replace(trained, name=self.transform), self.noise_stds, self.average)

    @property
    def trained_dir(self) -> Path:
        """Where the runs of the table of trained variants are: runs/TRAINED."""
        return Parameters(experiment=self.trained, workspace=self.workspace, smoke=self.smoke).experiment_dir


@dataclass(frozen=True, kw_only=True)
class Report(Parameters):
    """08: the runs that are compared.

    Attributes:
        runs: their names in the experiment, or paths; [] takes every complete run of the experiment.
    """

    STAGE = "08_report"
    SMOKE = {"max_train": 64, "max_test": 16}

    runs: list = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(run, str) for run in self.runs):
            raise ValueError(f"runs must be a list of names or paths of runs, got {self.runs!r}")


@dataclass(frozen=True, kw_only=True)
class CrossCheck(Attacking):
    """09: other people's attacks, the certificate, and whether the purifier still purifies."""

    STAGE = "09_cross_check"

    max_train: int | None = None
    max_test: int | None = 128
    attacked: str = "atop"
    steps: int = 20
    alpha: float | None = None
    eot_samples: int = 10
    num_draws: int = 20
    certified_images: int = 32
    certified_draws: int = 1000
    reader_epochs: int = 3

    SMOKE = {
        "max_train": 64,
        "max_test": 8,
        "steps": 2,
        "eot_samples": 2,
        "num_draws": 3,
        "certified_images": 4,
        "certified_draws": 20,
        "reader_epochs": 1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        PGDSettings(self.eps, steps=self.steps, alpha=self.alpha, eot_samples=self.eot_samples)
        for name in ("num_draws", "certified_images", "certified_draws", "reader_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.attacked not in ("ap", "atop"):
            raise ValueError(f"unknown attacked {self.attacked!r}; allowed: ap, atop")

    @property
    def reader_training(self) -> TrainingSettings:
        """How the classifier that the purifier never saw is trained."""
        return TrainingSettings(
            epochs=self.reader_epochs, batch_size=8 if self.smoke else 64, learning_rate=3e-3, flip=False
        )
