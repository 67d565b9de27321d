"""What all notebooks that attack take: which defences, and where their weights are."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from atoplib.checkpoints import OF_ONES_OWN, read_header
from atoplib.data import Dataset
from atoplib.parameters.base import LATEST, OWN, PRETRAINED, Parameters, from_run
from atoplib.parameters.checking import ParameterError
from atoplib.parameters.training import FinetuneAtop, PretrainPurifier, TrainClassifier
from atoplib.pretrained import COMES_WITH, available, weights_path
from atoplib.runs import finished_runs


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
            ValueError: as ``weights``; or if AToP was fine-tuned for a classifier of one's own.
        """
        if defence != "atop":
            return self.weights("undefended")
        if self.atop_classifier_run != OWN:
            return self.checkpoint(self.atop_classifier_run, "undefended")
        its = read_header(self.weights("atop")).get("classifier")
        if its is None:  # it was fine-tuned before this was noted
            return self.weights("undefended")
        if its.startswith(OF_ONES_OWN):
            raise ValueError(
                f"AToP was fine-tuned for a classifier of one's own ({its.removeprefix(OF_ONES_OWN)}), which no notebook "
                f"can build: attack it as a module, AToPPipeline(transform, purifier, classifier), or name another "
                f"classifier by atop_classifier_run"
            )
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
        """As ``Parameters.load_data``; raises ParameterError as ``check_count``."""
        loaded = super().load_data(progress)
        self.check_count(len(loaded.test.labels))
        return loaded

    def check_count(self, there: int) -> None:
        """Raise ParameterError if more test images are asked for than there are; a notebook's default is no such wish."""
        default = type(self).__dataclass_fields__["max_test"].default
        if self.max_test not in (None, default) and not self.smoke and there < self.max_test:
            raise ParameterError(
                f"max_test of {self.STAGE} is {self.max_test}, but {self.dataset} has {there} test images: ask for at most "
                f"so many (-p max_test {there})"
            )
