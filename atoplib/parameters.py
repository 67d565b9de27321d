"""Parameters of the notebooks: their names, types, defaults, and what ``smoke`` makes of them.

A notebook's first code cell holds the same defaults as literals, for papermill to override; its second cell calls ``check``,
which stops it within a second if a name, a type or a value is wrong. papermill itself only warns of an unknown name.
"""

import ast
import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin

import torch

from atoplib.attacks import PGDSettings
from atoplib.attacks.suite import ATTACKS
from atoplib.checkpoints import read_header
from atoplib.classifiers import build_classifier
from atoplib.data import Dataset, load_dataset
from atoplib.evaluation import PROTOCOLS, Budget, PlannedAttack, Protocol, adjusted, lee_kim_indices
from atoplib.evaluation.ablation import Setting, mask_surface, noise_sweep
from atoplib.evaluation.tables import PUBLISHED, Published
from atoplib.losses import Objective
from atoplib.masking import FEWEST_IMAGES, MaskingSettings
from atoplib.pipeline import AVERAGES
from atoplib.pretrained import COMES_WITH, available, weights_path
from atoplib.purifiers import build_purifier
from atoplib.runs import find_run, finished_runs, workspace_dir
from atoplib.training import DTYPES, FineTuningAttack, TrainingSettings, compute_dtype
from atoplib.training.processes import share_of
from atoplib.transforms import TransformSettings

STANDARD_ORDER = ("cifar10", "cifar100", "cifar10_jpeg")  # test images in the order that the literature numbers them in
SEES = {"pipeline": ("white-box", "defence"), "bpda": ("BPDA", "bpda"), "classifier": ("transfer", "classifier")}
"""What the one attack of notebook 4 sees: its column, and as ``evaluation.PlannedAttack`` names it."""
OWN = "own"  # of a purifier: the classifier that it was fine-tuned for
PRETRAINED = "pretrained"  # in place of a run: the weights that come with the kit; pretrained:NAME are those for a data set
OF_A_DEFENCE = ("purifier", "classifier")
MADE_BY = {
    "undefended": ("01_train_classifier", "classifier"),
    "at": ("01_train_classifier", "classifier"),
    "ap": ("02_pretrain_purifier", "purifier"),
    "atop": ("03_finetune_atop", "purifier"),
}
"""The notebook that makes a defence, and the name of the checkpoint in its run."""
LATEST = {"undefended": {"adversarial": False, "purifier_run": ""}, "at": {"adversarial": True, "purifier_run": ""}}
"""What of a run of notebook 1 is meant by ``latest``: it reads images as they are."""
INJECTED = "# Parameters"  # papermill's first line in the cell that it inserts


class ParameterError(ValueError):
    """A notebook was given a parameter that cannot be; the message names it and says what is allowed."""


def from_run(stage: str, default: str = "latest") -> Any:
    """A field that names a run of another stage: ``latest``, a directory's name in the experiment, or a path; where weights
    are read, also ``pretrained`` or the path of a checkpoint. In a recipe a field that is ``latest`` by default is the run
    of the entry called ``stage``, if there is one; any other names an entry only when it is asked to.
    """
    return field(default=default, metadata={"stage": stage})


def from_runs() -> Any:
    """A field that names runs, each by a name of one's own: {NAME: RUN} or {NAME: {KEY: RUN}}, a RUN as in ``from_run`` but
    for ``latest``.
    """
    return field(default_factory=dict, metadata={"runs": True})


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What every notebook takes.

    Attributes:
        experiment: runs of one experiment stand in one folder and find each other, WORKSPACE/runs/EXPERIMENT.
        dataset: a name of ``data.load_dataset``, or ``folder:PATH``.
        image_size: edge in pixels that images are brought to; None keeps theirs.
        max_train, max_test: use only so many images; None uses all.
        seed: of everything random.
        smoke: a few images and steps, to see that it runs; the numbers mean nothing.
        device: ``auto`` (CUDA where present), ``cpu``, ``cuda``, ``cuda:1``, ...
        data_dir, workspace: folders of downloads and of runs; "" is the project's own.
    """

    STAGE: ClassVar[str]
    SMOKE: ClassVar[dict[str, Any]] = {}

    experiment: str = "mnist"
    dataset: str = "mnist5k"
    image_size: int | None = None
    max_train: int | None = None
    max_test: int | None = None
    seed: int = 0
    smoke: bool = False
    device: str = "auto"
    data_dir: str = ""
    workspace: str = ""

    def __post_init__(self) -> None:
        if not self.experiment or Path(self.experiment).name != self.experiment or self.experiment.startswith("."):
            raise ValueError(f"experiment must be a plain folder name, got {self.experiment!r}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in 0..{2**31 - 1}, got {self.seed}")
        for name in ("image_size", "max_train", "max_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (or None), got {value}")

    @classmethod
    def check(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters in a notebook's namespace, checked, and shrunk if ``smoke`` is set.

        Args:
            namespace: the notebook's ``globals()``.

        Raises:
            ParameterError: for a name that papermill injected and this notebook does not have, a wrong type, or a value
                that is not allowed.
        """
        injected = {
            target.id
            for source in namespace.get("In", [])
            if source.lstrip().startswith(INJECTED)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        known = {item.name for item in fields(cls)}
        missing = sorted(known - set(namespace))
        if missing:
            raise ParameterError(f"the parameters cell was not run: {', '.join(missing)} not set. Run it first")
        return cls.from_mapping({**{name: None for name in injected - known}, **{n: namespace[n] for n in known}})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The parameters in a mapping (the others at their defaults), checked, and shrunk if ``smoke`` is set.

        Raises ParameterError as ``check`` does.
        """
        types_of = {item.name: item.type for item in fields(cls)}
        for name in values:
            if name not in types_of:
                near = difflib.get_close_matches(str(name), types_of, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ParameterError(f"{cls.STAGE} has no parameter {name!r}{hint}; allowed: {', '.join(sorted(types_of))}")
        converted = {name: convert(name, value, types_of[name]) for name, value in values.items()}
        try:
            parameters = cls(**converted)
            return replace(parameters, **cls.SMOKE) if parameters.smoke else parameters
        except (ValueError, TypeError, RuntimeError) as error:
            raise ParameterError(f"{cls.STAGE}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """All of them, as JSON values."""
        return asdict(self)

    @property
    def experiment_dir(self) -> Path:
        """WORKSPACE/runs/EXPERIMENT; with ``smoke`` EXPERIMENT-smoke, so that it never passes for the real thing."""
        return workspace_dir(self.workspace) / "runs" / (self.experiment + ("-smoke" if self.smoke else ""))

    @property
    def data_name(self) -> str:
        """The data set in titles: of ``folder:PATH`` the folder's own name."""
        return Path(self.dataset.removeprefix("folder:")).name

    @property
    def torch_device(self) -> torch.device:
        """Where to compute; raises ParameterError if it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ParameterError(f"device {self.device!r} cannot be used here ({reason}); allowed: auto, cpu") from error
        return device

    @property
    def test_choice(self) -> int | list[int] | None:
        """How many test images are loaded, or which."""
        return self.max_test

    def kit(self, which: str) -> str | None:
        """The data set whose weights a field of ``from_run`` means, of those that come with the kit: that of ``pretrained``
        is the notebook's own, another is named ``pretrained:NAME``. None for a run or a file.
        """
        word, _, name = which.partition(":")
        return (name or self.dataset) if word == PRETRAINED else None

    def checkpoint(self, which: str, defence: str, **wanted: Any) -> Path:
        """The file that a field of ``from_run`` names: of a run, one that comes with the kit, or a file itself.

        Args:
            which: the field's value; also the path of a ``.safetensors`` file.
            defence: a key of ``MADE_BY``.
            wanted: parameters of the run that is meant by ``latest``.

        Raises:
            FileNotFoundError: if there is no such run or file; the message says which notebook to run first.
            ValueError: if no such weights come with the kit.
        """
        kit = self.kit(which)
        if kit is not None:
            return weights_path(kit, defence)
        if which.endswith(".safetensors"):
            if not Path(which).is_file():
                raise FileNotFoundError(f"there is no file {which}; give 'latest', the name of a run, or a path")
            return Path(which)
        stage, file = MADE_BY[defence]
        return find_run(self.experiment_dir, stage, which, **wanted) / f"{file}.safetensors"

    def load_data(self, progress: Callable[[int, int, str], None] | None = None) -> Dataset:
        """The data set, on the device if it is small."""
        return load_dataset(
            self.dataset,
            data_dir=Path(self.data_dir) if self.data_dir else workspace_dir(self.workspace) / "data",
            image_size=self.image_size,
            device=self.torch_device,
            max_train=self.max_train,
            max_test=self.test_choice,
            progress=progress,
        )


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
    """What both purifier notebooks take: the random transform and the GAN term."""

    classifier_run: str = from_run(TrainClassifier.STAGE)
    transform: str = "rt2"
    missing_rate: float = 0.1
    noise_std: float = 0.1
    num_masks: int = 4
    grid_size: int = 8
    gan_weight: float = 0.0
    gan_loss: str = "hinge"
    discriminator_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.transform_settings, self.objective
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
    purifier_options: dict = field(default_factory=lambda: {"width": 8, "blocks": 1, "fold": 4, "pixel_width": 8})
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
    epochs: int = 7
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


@dataclass(frozen=True, kw_only=True)
class Attacking(Parameters):
    """What all notebooks that attack take.

    Attributes:
        atop_classifier_run: the classifier that AToP stands before: ``own`` is the one that it was fine-tuned for, which
            need not be the undefended one.
    """

    max_train: int | None = 64
    classifier_run: str = from_run(TrainClassifier.STAGE)
    ap_run: str = from_run(PretrainPurifier.STAGE)
    atop_run: str = from_run(FinetuneAtop.STAGE)
    atop_classifier_run: str = from_run(TrainClassifier.STAGE, default=OWN)
    eps: float = 0.3
    max_batch: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}")

    def weights(self, defence: str) -> Path:
        """The checkpoint of ``undefended`` or ``at`` (classifiers), ``ap`` or ``atop`` (purifiers): that of the run which a
        parameter names, or the one that comes with the kit.

        Raises:
            FileNotFoundError: if there is no such run; the message says which notebook to run first.
            ValueError: if no such weights come with the kit.
        """
        parameter = "classifier_run" if defence == "undefended" else f"{defence}_run"
        # not every notebook says which AT; classifier_run names the one that the purifiers stand before
        which = getattr(self, parameter, "latest" if self.kit(self.classifier_run) is None else self.classifier_run)
        return self.checkpoint(which, defence, **LATEST.get(defence, {}))

    def classifier_of(self, defence: str) -> Path:
        """The checkpoint of the classifier that a defence stands before: AP's is the undefended one, AToP's the one that
        ``atop_classifier_run`` names.

        Raises:
            FileNotFoundError: also if the classifier that AToP was fine-tuned for is not there any more.
            ValueError: as ``weights``.
        """
        if defence != "atop":
            return self.weights("undefended")
        if self.atop_classifier_run != OWN:
            return self.checkpoint(self.atop_classifier_run, "undefended")
        its = read_header(self.weights("atop")).get("classifier")
        if its is None:  # it was fine-tuned for a network of one's own, or before this was noted
            return self.weights("undefended")
        kit = self.kit(self.atop_run)
        if kit is not None:
            return weights_path(kit, its)
        try:
            return self.checkpoint(its, "undefended")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"AToP was fine-tuned for the classifier of {its}, which {self.experiment_dir} does not hold any more; name "
                f"another by atop_classifier_run"
            ) from error

    @property
    def purifiers(self) -> dict[str, Path]:
        """The checkpoints of AP and AToP, as ``weights``; of pretrained ones, those that come with the kit."""
        runs, come = {"AP": self.ap_run, "AToP": self.atop_run}, available()

        def there(name: str, run: str) -> bool:
            kit = self.kit(run)
            return kit is None or name.lower() in come.get(COMES_WITH.get(kit, kit), ())

        return {name: self.weights(name.lower()) for name, run in runs.items() if there(name, run)}

    def or_pretrained(self) -> Self:
        """These; or, where the experiment has no classifier yet, with the weights that come with the kit, if they do."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.default == "latest"}
        if set(named.values()) != {"latest"} or finished_runs(self.experiment_dir, TrainClassifier.STAGE):
            return self
        if self.dataset not in COMES_WITH or self.image_size not in (None, 32):
            return self
        return replace(self, **dict.fromkeys(named, PRETRAINED))

    def load_data(self, progress: Callable[[int, int, str], None] | None = None) -> Dataset:
        """As ``Parameters.load_data``; raises ParameterError if more test images are asked for than there are."""
        loaded = super().load_data(progress)
        there = len(loaded.test.labels)
        if self.max_test is not None and not self.smoke and there < self.max_test:
            raise ParameterError(f"max_test is {self.max_test}, but {self.dataset} has {there} test images; ask for fewer")
        return loaded


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


NOTEBOOKS: dict[str, type[Parameters]] = {
    item.STAGE: item
    for item in (TrainClassifier, PretrainPurifier, FinetuneAtop, Attack, Visualize, Compare, Ablate, Report, CrossCheck)
}
REPORT = Report.STAGE  # of what others measured: no notebook of a recipe


def convert(name: str, value: Any, kind: Any) -> Any:
    """A value as the type that a parameter has; text such as ``8/255`` or ``1e-3``, as a shell or YAML hands it on, becomes
    a number where a number is wanted.

    Raises:
        ParameterError: if the type does not fit.
    """
    allowed = get_args(kind) if isinstance(kind, types.UnionType) else (get_origin(kind) or kind,)
    if value is None and type(None) in allowed:
        return None
    if float in allowed:
        if isinstance(value, str):
            try:
                numerator, slash, denominator = value.partition("/")
                return float(numerator) / (float(denominator) if slash else 1)
            except (ValueError, ZeroDivisionError):
                pass
        elif isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
        return value
    wanted = " or ".join("None" if item is type(None) else item.__name__ for item in allowed)
    raise ParameterError(f"parameter {name!r} must be of type {wanted}, got {value!r} ({type(value).__name__})")
