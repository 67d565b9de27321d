"""What every notebook takes, and how it is checked and shrunk; runs and weights that a field names."""

import ast
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from atoplib.data import Dataset, load_dataset
from atoplib.parameters.checking import ParameterError, convert, suggestion
from atoplib.pretrained import weights_path
from atoplib.runs import find_run, workspace_dir

OWN = "own"  # of a purifier: the classifier that it was fine-tuned for
PRETRAINED = "pretrained"  # in place of a run: the weights that come with the kit; pretrained:NAME are those for a data set
MADE_BY = {
    "undefended": ("01_train_classifier", "classifier"),
    "at": ("01_train_classifier", "classifier"),
    "ap": ("02_pretrain_purifier", "purifier"),
    "atop": ("03_finetune_atop", "purifier"),
}
"""The notebook that makes a defence, and the name of the checkpoint in its run."""
LATEST = {"undefended": {"adversarial": False, "purifier_run": ""}, "at": {"adversarial": True, "purifier_run": ""}}
"""Parameters of the run that is meant by ``latest``, by defence."""
WEIGHTS = (".safetensors", ".pth", ".pt")  # how files of weights end
INJECTED = "# Parameters"  # papermill's first line in the cell that it inserts


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
                hint = suggestion(str(name), types_of)
                raise ParameterError(f"{cls.STAGE} has no parameter {name!r}{hint}; allowed: {', '.join(sorted(types_of))}")
        converted = {name: convert(name, value, types_of[name]) for name, value in values.items()}
        try:
            parameters = cls(**converted)
            return replace(parameters, **cls.SMOKE) if parameters.smoke else parameters
        except (ValueError, TypeError, RuntimeError) as error:
            raise ParameterError(f"{cls.STAGE}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """All of them, as JSON values; ``latest`` is the run that it means now, so that a notebook by hand and a recipe, which
        names the run that it made, have the same ones.
        """
        return asdict(self) | self.latest_runs()

    def latest_runs(self) -> dict[str, str]:
        """Names of the runs that fields mean by ``latest``; where there is none yet, the field stays as it is."""
        found = {}
        for item in fields(self):
            if "stage" not in item.metadata or getattr(self, item.name) != "latest":
                continue
            own = item.name.removesuffix("_run")
            makers = (name for name, (stage, _) in MADE_BY.items() if stage == item.metadata["stage"])
            defence = own if own in MADE_BY else next(makers, None)
            with suppress(FileNotFoundError):
                if defence is not None:
                    found[item.name] = self.checkpoint("latest", defence, **LATEST.get(defence, {})).parent.name
        return found

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
            which: the field's value; also the path of a file of weights (``WEIGHTS``), of the kit or of another program.
            defence: a key of ``MADE_BY``.
            wanted: parameters of the run that is meant by ``latest``, beside the data set and its image size.

        Raises:
            FileNotFoundError: if there is no such run or file; the message says which notebook to run first.
            ValueError: if no such weights come with the kit.
        """
        kit = self.kit(which)
        if kit is not None:
            return weights_path(kit, defence)
        if which.endswith(WEIGHTS):
            path = Path(which).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {which}; give 'latest', the name of a run, or a path")
            return path
        stage, file = MADE_BY[defence]
        wanted |= {"dataset": self.dataset, "image_size": self.image_size}
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
