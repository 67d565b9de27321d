"""What can be known to fail before anything trains: data are looked at, one image of a folder is read,
networks are tried without memory or time (on the device meta), and the device is asked for. Nothing is
written or downloaded.
"""

import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from atoplib.batch.recipe import Job, RecipeError
from atoplib.parameters import WEIGHTS, Parameters, check_settings, one_of


def begin_checks(jobs: Sequence[Job], *, here: bool) -> Future[list[str]]:
    """Check the parameters of jobs in a process of its own, as torch is imported for seconds; the future
    tells what they would download, or raises RecipeError with the first problem.

    Args:
        here: whether they run on this machine, so that their device must be there.
    """
    process = ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # so that a Ctrl-C ends it without a traceback
        initargs=(signal.SIGINT, signal.SIG_DFL),
        max_tasks_per_child=1,  # it ends even if this one is killed
    )
    future = process.submit(_check, [(job.label, dict(job.parameters)) for job in jobs], here)
    process.shutdown(wait=False)
    return future


def _check(labelled: Sequence[tuple[str, Mapping[str, Any]]], here: bool) -> list[str]:
    from atoplib.data import download_of

    for label, parameters in labelled:
        try:
            check(parameters, here=here)
        except (ValueError, OSError) as error:
            raise RecipeError(f"{label}: {error}") from error
    sets = {(p["dataset"], p["data_dir"]) for _, p in labelled if p.get("dataset")}
    return sorted({download_of(*each) for each in sets} - {""})


def _texts(value: Any) -> list[str]:
    """A text itself, or the texts in the values of a dict."""
    inner = value.values() if isinstance(value, Mapping) else ()
    return [value] if isinstance(value, str) else [text for each in inner for text in _texts(each)]


def check(p: Mapping[str, Any], *, here: bool = True) -> None:
    """Raise ValueError or OSError for what is wrong with the parameters of one notebook on the data that they
    name.
    """
    import torch

    from atoplib import classifiers, contract, data, decisions, defences, pretrained, purifiers, transforms
    from atoplib.attacks import ATTACKS

    if here:
        decisions.pick_device(p["device"])
    for name, value in p.items():
        for path in _texts(value) if name.endswith("_run") or isinstance(value, dict) else ():
            if path.endswith(WEIGHTS) and not Path(path).expanduser().is_file():
                raise ValueError(f"{name} is {value}, but there is no file {path}")
            if path.startswith("pretrained:"):
                pretrained.pretrained_path(path.partition(":")[2], "undefended")
    if (attack := p.get("attack")) not in (None, "none"):
        check_settings(attack=(attack, one_of(*ATTACKS)))
        check_settings(**{f"norm of {attack}": (p["norm"], one_of(*ATTACKS[attack].norms))})
    if not p.get("dataset"):
        return
    facts = data.facts_of(p["dataset"])
    size = (p["image_size"], p["image_size"]) if p.get("image_size") else facts.size
    if (wanted := p.get("max_test")) and p["dataset"].startswith("folder:") and wanted > facts.test:
        raise ValueError(
            f"max_test is {wanted}, but {p['dataset']} has {facts.test} test images: give at most that"
        )
    images = min(p.get("max_train") or facts.train, facts.train)
    if p.get("batch_size", 0) > images:
        raise ValueError(
            f"batch_size is {p['batch_size']}, but {images} images are trained on: give at most {images}"
        )
    if "grid_size" in p and p["transform"] != "none":
        transforms.patch_size(*size, p["grid_size"])
    if str(p.get("classifier_run", "")).endswith(WEIGHTS):
        network = defences.load_classifier(Parameters({**p, "device": "cpu"}))
        one = contract.prepare(network, torch.zeros(1, 3, *size), torch.zeros(1, dtype=torch.int64))
        classes = decisions.sample_logits(*one[:2]).shape[2]
        if classes != len(facts.classes):
            raise ValueError(
                f"the network of classifier_run tells {classes} classes apart, but {p['dataset']} has "
                f"{len(facts.classes)}: give weights that were trained on it"
            )
    # RuntimeError: of an operation that needs numbers, which the device meta has not; the notebook will tell
    with torch.device("meta"), suppress(RuntimeError):
        if "purifier_options" in p and not p.get("weights"):
            purifiers.build(p["purifier"], **p["purifier_options"]).eval()(torch.empty(1, 5, *size))
        if "label_smoothing" in p:  # only notebook 1 trains a classifier
            options = {"num_classes": len(facts.classes), "mean": (0, 0, 0), "std": (1, 1, 1)}
            classifiers.build(p["classifier"], **p["classifier_options"] | options).eval()(
                torch.empty(1, 3, *size)
            )
