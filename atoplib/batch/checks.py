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
from atoplib.parameters import WEIGHTS


def begin_checks(jobs: Sequence[Job], *, here: bool) -> Future[None]:
    """Check the parameters of jobs in a process of its own, as torch is imported for seconds; the future
    raises RecipeError with the first problem.

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


def _check(labelled: Sequence[tuple[str, Mapping[str, Any]]], here: bool) -> None:
    for label, parameters in labelled:
        try:
            check(parameters, here=here)
        except (ValueError, OSError) as error:
            raise RecipeError(f"{label}: {error}") from error


def check(p: Mapping[str, Any], *, here: bool = True) -> None:
    """Raise ValueError or OSError for what is wrong with the parameters of one notebook on the data that they
    name.
    """
    import torch

    from atoplib import classifiers, data, decisions, purifiers, transforms

    if here:
        decisions.pick_device(p["device"])
    for name, value in p.items():
        if name.endswith("_run") and str(value).endswith(WEIGHTS) and not Path(value).expanduser().is_file():
            raise ValueError(f"{name} is {value}, but there is no such file")
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
    # RuntimeError: of an operation that needs numbers, which the device meta has not; the notebook will tell
    with torch.device("meta"), suppress(RuntimeError):
        if "purifier_options" in p and not p.get("weights"):
            purifiers.build(p["purifier"], **p["purifier_options"]).eval()(torch.empty(1, 5, *size))
        if "label_smoothing" in p:  # only notebook 1 trains a classifier
            options = {"num_classes": len(facts.classes), "mean": (0, 0, 0), "std": (1, 1, 1)}
            network = classifiers.build(p["classifier"], **p["classifier_options"] | options)
            network.eval()(torch.empty(1, 3, *size))
