"""What can be known to fail before anything trains: the data are looked at, one image of a folder is read, networks are
tried without memory or time (on the device meta), and places to write are asked for. Nothing is written or downloaded.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from atoplib.batch.plan import Job
from atoplib.batch.recipe import Recipe, RecipeError
from atoplib.classifiers import build_classifier
from atoplib.data import facts_of
from atoplib.parameters import (
    NOTEBOOKS,
    REPORT,
    Parameters,
    PretrainPurifier,
    PurifierTraining,
    TrainClassifier,
    Training,
)
from atoplib.parameters.checking import suggestion
from atoplib.purifiers import build_purifier
from atoplib.transforms import patch_size


def check_early(jobs: Sequence[Job], *, here: bool = True, results: Path | None = None) -> None:
    """Raise RecipeError for the first thing that would stop one of these jobs, after others have trained for hours.

    Args:
        here: whether they run on this machine, so that their device must be there.
        results: a folder that is written at the end.
    """
    for job in jobs:
        try:
            for problem in problems(job.parameters, here=here):
                raise RecipeError(f"{job.label or job.name}: {problem}")
        except (ValueError, OSError) as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"{job.label or job.name}: {error}") from error
    for folder in {job.run_dir.parent for job in jobs} | ({results} if results else set()):
        check_writable(folder)


def problems(p: Parameters, *, here: bool = True) -> Iterator[str]:
    """What is wrong with the parameters of one notebook on the data that they name; ValueError, OSError likewise."""
    if here:
        _ = p.torch_device
    facts = facts_of(p.dataset)
    size = (p.image_size, p.image_size) if p.image_size else facts.size
    if len(facts.classes) < 2:
        yield f"{p.dataset} has {len(facts.classes)} class; a classifier needs at least 2"
    if isinstance(p, Training):
        images = min(p.max_train or facts.train, facts.train)
        if p.batch_size > images:
            yield f"batch_size is {p.batch_size}, but {images} images are trained on: give at most {images} (-p batch_size)"
    if isinstance(p, PurifierTraining) and p.transform != "none":
        patch_size(*size, p.grid_size)
    with torch.device("meta"):
        if isinstance(p, PretrainPurifier) and not p.weights:
            _forward(build_purifier(p.purifier, **p.purifier_options), 5, size)
        if isinstance(p, TrainClassifier):
            statistics = {"mean": (0, 0, 0), "std": (1, 1, 1)}
            _forward(build_classifier(p.classifier, num_classes=10, **statistics, **p.classifier_options), 3, size)


def _forward(network: nn.Module, planes: int, size: tuple[int, int]) -> None:
    """One image through a network on the device meta. Only ValueError is a refusal; what meta cannot do is no problem."""
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, planes, *size, device="meta"))
    except ValueError:
        raise
    except Exception:  # an operation that needs numbers: the notebook will tell
        return


def check_writable(folder: Path) -> None:
    """Raise RecipeError unless a folder is there, or can be made, and may be written to; nothing is made."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise RecipeError(f"{folder} cannot be made, because {there} is a file: choose another folder, or move the file")
    if not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
        raise RecipeError(f"{folder} cannot be written to: choose another folder, or make {there} writable")


def check_names(recipe: Recipe, overrides: Iterable[str]) -> None:
    """Raise RecipeError, with the name that is meant, for one of ``-p`` or ``shared`` that no notebook of a recipe has."""
    known = {item.name for entry in recipe.entries for item in fields(NOTEBOOKS[entry.notebook])}
    known |= {item.name for item in fields(NOTEBOOKS[REPORT])}
    for name in [*overrides, *recipe.shared, *(name for owner, name in recipe.axes if owner is None)]:
        if name not in known and (hint := suggestion(str(name), known)):
            raise RecipeError(f"{recipe.source}: no notebook has the parameter {name!r}{hint}")
