"""The defences that a notebook's parameters name: which weights are meant, and the modules that they make.

A parameter such as ``classifier_run`` names a run: ``latest``, the name of one of this experiment, a path,
``pretrained`` (the weights that come with the kit; ``pretrained:cifar10`` those of another data set), or a
file of weights, of the kit or of another program.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from atoplib import checkpoints, classifiers, data, decisions, freezing, hashing, pretrained, runs
from atoplib.parameters import WEIGHTS, MissingFileError, Parameters, check_settings, each, one_of
from atoplib.pipeline import load_pipeline

# Which notebook makes each defence, and the parameters of its run that ``latest`` means.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "undefended": ("01_train_classifier", {"adversarial": False, "purifier_run": ""}),
    "AT": ("01_train_classifier", {"adversarial": True, "purifier_run": ""}),
    "AP": ("02_pretrain_purifier", {}),
    "AToP": ("03_finetune_atop", {}),
}
# The parameter that names each defence.
FIELDS = {"undefended": "classifier_run", "AT": "at_run", "AP": "ap_run", "AToP": "atop_run"}


class Defences(dict[str, nn.Module]):
    """Modules by name, images in [0, 1] -> logits, frozen, to be attacked.

    Attributes:
        sources: the file of each one's weights.
        missing: a sentence for each that was left out, which says what makes it.
    """

    def __init__(self) -> None:
        self.sources, self.missing = dict[str, Path](), dict[str, str]()


def resolve(p: Parameters, notify: Callable[[str], None] = lambda sentence: None) -> Parameters:
    """The parameters with every ``latest`` replaced by what it means now: the name of a run; or, where the
    experiment has none yet, ``pretrained`` if the kit has weights for the data set, which ``notify`` is
    told.
    """
    data.facts_of(p.dataset)  # a name that does not exist is no missing run
    p = runs.resolve(p)
    absent = {}
    for name, rule in p.run_fields.items():
        if not rule.several and getattr(p, name) == "latest" and p.image_size in (None, 32):
            defences = (
                key
                for key, (stage, wanted) in STAGES.items()
                if stage == rule.stage and wanted.items() >= rule.wanted.items()
            )
            kind = next(defences, "").lower()
            if (pretrained.DATASETS.get(p.dataset), kind) in pretrained.available():
                absent[name] = "pretrained"
                wanted = "".join(f", {key} = {value!r}" for key, value in rule.wanted.items() if value)
                notify(f"{name}: no run of {rule.stage}{wanted}, so the kit's weights for {p.dataset} serve.")
    return p.replace(**absent)


def find_weights(p: Parameters, which: str, defence: str = "undefended") -> Path:
    """The file of weights that a parameter names.

    Args:
        which: the parameter's value.
        defence: a key of ``STAGES``.

    Raises:
        FileNotFoundError: if there is no such run or file; the message says which notebook to run first.
        ValueError: if no such weights come with the kit.
    """
    word, _, dataset = which.partition(":")
    if word == "pretrained":
        return pretrained.pretrained_path(dataset or p.dataset, defence)
    if which.endswith(WEIGHTS):
        path = Path(which).expanduser()
        if not path.is_file():
            raise MissingFileError(f"there is no file {which}; give 'latest', the name of a run, or a path")
        return path
    stage, wanted = STAGES[defence]
    file = "classifier.safetensors" if stage == "01_train_classifier" else "purifier.safetensors"
    return runs.find_run(p, which, stage, **wanted) / file


def load_classifier(p: Parameters, which: str | None = None) -> nn.Module:
    """A trained classifier, images in [0, 1] -> logits, frozen and in eval mode, faster than in its
    training.

    Args:
        p: ``classifier`` (``package.module:function``), ``classifier_options``, ``mean`` and ``std``, where
            it has them, belong to a network that the kit cannot build by itself.
        which: names it; None: ``p.classifier_run``.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as ``find_weights``, ``checkpoints.load`` and
            ``load_foreign``.
    """
    which = p.classifier_run if which is None else which
    network = _classifier(p, find_weights(p, which))
    network.source = which
    return network


def _classifier(p: Parameters, path: Path) -> nn.Module:
    values, device = p.as_dict(), decisions.pick_device(p.device)
    factory = values.get("classifier") or ""
    try:
        header = checkpoints.read_header(path)
    except checkpoints.CheckpointError:
        if ":" not in factory:
            raise checkpoints.CheckpointError(
                f"{path} was not written by atoplib, so it does not say which network it belongs to: name "
                f"what builds it by classifier: 'package.module:function' (and classifier_options, mean, std)"
            ) from None
        options, norm = values.get("classifier_options"), {name: values.get(name) for name in ("mean", "std")}
        return freezing.freeze(checkpoints.load_foreign(path, factory, options, device=device, **norm))
    is_custom = ":" in factory and header.get("architecture") == factory
    build = partial(classifiers.build, factory, **header["options"]) if is_custom else None
    return freezing.freeze(checkpoints.load(path, kind="classifier", device=device, build=build)[0])


def load_purifier(p: Parameters, which: str | None = None) -> tuple[nn.Module, Mapping[str, Any]]:
    """A pre-trained purifier as it was saved, and the header of its checkpoint (``transform``,
    ``architecture``, ...).

    Args:
        which: names it; None: ``p.purifier_run``.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as ``find_weights`` and ``checkpoints.load``.
    """
    return checkpoints.load(
        find_weights(p, p.purifier_run if which is None else which, "AP"),
        kind="purifier",
        device=decisions.pick_device(p.device),
    )


def facts(p: Parameters) -> dict[str, Any]:
    """What a checkpoint says of how it was made, beside its weights: the data set and the parameters,
    without places."""
    return {
        "dataset": p.dataset,
        "parameters": {name: value for name, value in p.as_dict().items() if name not in hashing.NO_IDENTITY},
    }


def source_of(network: nn.Module) -> str:
    """What names a loaded classifier again: the run or file that ``load_classifier`` took it from, or
    ``custom: CLASS``."""
    return getattr(network, "source", f"{checkpoints.CUSTOM}{type(network).__name__}")


def training_flops(path: Path) -> int | None:
    """FLOPs of the training of saved weights and of all that it started from; None where the file does not
    say."""
    try:
        metrics = checkpoints.read_header(path).get("metrics", {})
    except checkpoints.CheckpointError:  # of another program
        return None
    train_flops, start_flops = metrics.get("train_flops"), metrics.get("start_flops", 0)
    return None if train_flops is None or start_flops is None else train_flops + start_flops


def load_defences(
    p: Parameters, names: tuple[str, ...] = tuple(FIELDS), others: Mapping[str, Any] | None = None
) -> Defences:
    """The defences that a notebook's parameters name: a classifier alone, or a pipeline in front of the
    classifier that its purifier belongs to (for AToP the one that ``p.atop_classifier_run`` names, ``own``:
    for which it was fine-tuned).

    Args:
        p: resolved (``resolve``).
        names: of ``FIELDS``; those that ``p`` has no field for are left out.
        others: further ones: {NAME: RUN}, or {NAME: {"purifier": RUN, "classifier": RUN}}; None:
            ``p.others``, where it has that.

    Raises:
        FileNotFoundError, ValueError: for the undefended classifier, one of ``others``, or a named run that
            is not there; of what else there is not ``missing`` tells.
    """
    values, loaded, classifier_at = p.as_dict(), Defences(), cache(partial(_classifier, p))
    options = {"device": decisions.pick_device(p.device), "seed": values.get("seed", 0)}

    def add(name: str, path: Path, classifier: Path) -> None:
        network, loaded.sources[name] = classifier_at(classifier), path
        loaded[name] = (
            network if path == classifier else load_pipeline(path, network, **options).freeze_for_attack()
        )

    for name in (name for name in names if FIELDS[name] in values):
        which = values[FIELDS[name]]
        if which not in ("latest", "pretrained"):  # what was named must be there
            find_weights(p, which, name)
        try:
            path = find_weights(p, which, name)
            add(name, path, _classifier_path(p, path, name))
        except (FileNotFoundError, ValueError) as error:
            if name == "undefended":
                raise
            loaded.missing[name] = f"{name} is left out: {error}"
    for name, run in (values.get("others", {}) if others is None else others).items():
        parts = run if isinstance(run, Mapping) else {"purifier": run}
        check_settings(**{f"parts of {name}": (sorted(parts), each(one_of("purifier", "classifier")))})
        classifier = find_weights(p, parts.get("classifier", p.classifier_run))
        path = find_weights(p, parts["purifier"], "AP") if "purifier" in parts else classifier
        add(name, path, classifier)
    return loaded


def _classifier_path(p: Parameters, path: Path, defence: str) -> Path:
    """The weights of the classifier that a defence's weights are composed with; of a classifier,
    themselves."""
    if STAGES[defence][0] == "01_train_classifier":
        return path
    which = p.as_dict().get("atop_classifier_run", "own") if defence == "AToP" else p.classifier_run
    if which != "own":
        return find_weights(p, which)
    trained_for = checkpoints.read_header(path).get("classifier", "undefended")
    if path.parent == pretrained.FOLDER:
        return pretrained.pretrained_path(path.stem.rpartition("-")[0], trained_for)
    if trained_for.startswith(checkpoints.CUSTOM):
        raise ValueError(
            f"{defence} was fine-tuned for a custom classifier "
            f"({trained_for.removeprefix(checkpoints.CUSTOM)}): attack it as a module, "
            "AToPPipeline(transform, purifier, classifier), or name another one by atop_classifier_run"
        )
    try:
        return find_weights(p, trained_for)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{defence} was fine-tuned for the classifier of {trained_for}, which {runs.experiment_dir(p)} "
            "does not hold any more; name another by atop_classifier_run"
        ) from error
