"""Notebooks 1 to 3, which train."""

from dataclasses import dataclass, field, fields

import torch

from atoplib.attacks import PGDSettings
from atoplib.classifiers import build_classifier
from atoplib.losses import Objective
from atoplib.parameters.base import Parameters, from_run
from atoplib.parameters.checking import check_foreign
from atoplib.purifiers import build_purifier
from atoplib.training import FineTuningAttack, TrainingSettings
from atoplib.training.processes import share_of
from atoplib.transforms import TransformSettings



@dataclass(frozen=True, kw_only=True)
class Training(Parameters):
    """What every training notebook takes: the fields of ``training.TrainingSettings``.

    Attributes:
        processes: that share every batch, a GPU each where there are any; 1 trains in the notebook's own process.
        keep_every: epochs after which a checkpoint of its own is kept beside the last one; 0 keeps the last one only.
    """

    epochs: int = 3
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 0.003
    schedule: str = "one_cycle"
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    grad_clip: float = 1.0
    padding: int = 2
    flip: bool = False
    dtype: str = "auto"
    max_steps: int | None = None
    processes: int = 1
    keep_every: int = 0

    SMOKE = {"max_train": 64, "max_test": 16, "max_steps": 2, "batch_size": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.training
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        share_of(self.batch_size, 0, self.processes)
        if self.keep_every < 0:
            raise ValueError(f"keep_every must be 0 (keep the last one only) or more, got {self.keep_every}")

    @property
    def training(self) -> TrainingSettings:
        """How to train."""
        names = {item.name for item in fields(TrainingSettings)}
        return TrainingSettings(**{name: value for name, value in vars(self).items() if name in names})


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(Training):
    """01: architecture, and adversarial training if asked for.

    Attributes:
        start_run: the classifier whose weights the training starts from: a run of this experiment by name, a path, or
            ``pretrained``; "" starts from fresh ones.
        purifier_run: the pre-trained purifier, named likewise, through which the classifier reads every image, attacked
            ones, too; "" has it read images as they are.
    """

    STAGE = "01_train_classifier"

    classifier: str = "small_resnet"
    classifier_options: dict = field(default_factory=lambda: {"width": 8, "stem_stride": 2})
    start_run: str = from_run(STAGE, default="")
    purifier_run: str = from_run("02_pretrain_purifier", default="")
    label_smoothing: float = 0.1
    adversarial: bool = False
    eps: float = 0.3
    norm: str = "linf"
    attack_steps: int = 5
    attack_alpha: float | None = None
    epochs: int = 6
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 0.0005
    ema_decay: float = 0.0
    grad_clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.attack
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if set(self.classifier_options) & {"num_classes", "mean", "std"}:
            raise ValueError("classifier_options: num_classes, mean and std come from the data, leave them out")
        with torch.device("meta"):  # no memory, no time: it only tells whether the options fit
            build_classifier(self.classifier, num_classes=2, mean=(0, 0, 0), std=(1, 1, 1), **self.classifier_options)

    @property
    def attack(self) -> PGDSettings | None:
        """The attack of adversarial training; None trains normally."""
        settings = PGDSettings(eps=self.eps, norm=self.norm, steps=self.attack_steps, alpha=self.attack_alpha)
        return settings if self.adversarial else None


@dataclass(frozen=True, kw_only=True)
class PurifierTraining(Training):
    """What both purifier notebooks take: the classifier, the random transform and the GAN term.

    Attributes:
        classifier, classifier_options, mean, std: of somebody's weights, as ``checkpoints.load_foreign`` takes them; "" for
            those of the kit, which say themselves what they belong to.
    """

    classifier_run: str = from_run(TrainClassifier.STAGE)
    classifier: str = ""
    classifier_options: dict = field(default_factory=dict)
    mean: list | None = None
    std: list | None = None
    transform: str = "rt2"
    missing_rate: float = 0.1
    noise_std: float = 0.05
    num_masks: int = 4
    grid_size: int = 8
    gan_weight: float = 0.0
    gan_loss: str = "hinge"
    discriminator_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.transform_settings, self.objective
        check_foreign(self.classifier_run, self.classifier, self.classifier_options, self.mean, self.std)
        if self.discriminator_width < 1:
            raise ValueError(f"discriminator_width must be at least 1, got {self.discriminator_width}")

    @property
    def transform_settings(self) -> TransformSettings:
        """What destroys the perturbation."""
        return TransformSettings(self.transform, self.missing_rate, self.noise_std, self.num_masks, self.grid_size)

    @property
    def objective(self) -> Objective:
        """What the purifier is trained for: here, to rebuild images (AP)."""
        return Objective("ap", gan_weight=self.gan_weight, gan_loss=self.gan_loss)


@dataclass(frozen=True, kw_only=True)
class PretrainPurifier(PurifierTraining):
    """02: architecture of the purifier, and public weights to start from."""

    STAGE = "02_pretrain_purifier"

    epochs: int = 2
    purifier: str = "gated_unet"
    purifier_options: dict = field(
        default_factory=lambda: {"width": 8, "blocks": 1, "fold": 4, "front_width": 8, "pixel_width": 8}
    )
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        with torch.device("meta"):  # as for the classifier
            build_purifier(self.purifier, **self.purifier_options)
        if self.weights and self.purifier != "deepfill_v2":
            raise ValueError(f"weights are of DeepFillV2: they need purifier = 'deepfill_v2', got {self.purifier!r}")


@dataclass(frozen=True, kw_only=True)
class FinetuneAtop(PurifierTraining):
    """03: the objective of AToP and the attack in its training."""

    STAGE = "03_finetune_atop"

    purifier_run: str = from_run(PretrainPurifier.STAGE)
    variant: str = "ft_adv"
    target: str = "clean"
    classification_weight: float = 2.0
    warmup_epochs: float = 0.0
    attack_sees: str = "pipeline"
    eps: float = 0.3
    norm: str = "linf"
    attack_steps: int = 2
    attack_alpha: float | None = None
    attack_eot: int = 1
    ramp_epochs: float = 3.0
    epochs: int = 9
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.attack

    @property
    def objective(self) -> Objective:
        """What the purifier is trained for."""
        return Objective(
            self.variant,
            self.target,
            self.classification_weight,
            self.warmup_epochs,
            self.gan_weight,
            self.gan_loss,
        )

    @property
    def attack(self) -> FineTuningAttack:
        """How x_adv is made."""
        start = "clean" if self.attack_steps == 1 and self.attack_sees == "classifier" else "random"
        settings = PGDSettings(self.eps, self.norm, self.attack_steps, self.attack_alpha, self.attack_eot, start)
        return FineTuningAttack(settings, self.attack_sees, self.ramp_epochs)
