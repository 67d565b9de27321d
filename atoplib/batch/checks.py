"""What can be known to fail before anything trains: data are looked at, one image of a folder is read,
networks are tried without memory or time (on the device meta), and the device is asked for. Nothing is
written or downloaded.

It imports torch, which takes seconds; so a batch has a process of its own do it (``start``) while its first
notebook starts.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from atoplib.batch.recipe import Job, RecipeError
from atoplib.parameters import WEIGHTS


def check_writable(folder: Path) -> None:
    """Raise RecipeError unless a folder is there, or can be made, and may be written to; nothing is made."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise RecipeError(
            f"{folder} cannot be made, because {existing} is a file: choose another folder, or move the file"
        )
    if not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise RecipeError(
            f"{folder} cannot be written to: choose another folder, or make {existing} writable"
        )


def check_runs(jobs: Sequence[Job]) -> None:
    """Raise RecipeError where a parameter names a run that is neither planned nor there."""
    planned = {job.run_dir.name for job in jobs}
    for job in jobs:
        for name, value in job.parameters.items():
            if not name.endswith("_run") or not isinstance(value, str) or value.endswith(WEIGHTS):
                continue
            if value in ("", "latest", "own", *planned) or value.startswith("pretrained"):
                continue
            places = (job.run_dir.parent / value, Path(value).expanduser())
            if not any((place / "manifest.json").is_file() for place in places):
                raise RecipeError(
                    f"{job.label}: {name} is {value!r}, but there is no such run in {job.run_dir.parent}, "
                    f"nor at that path; give latest, pretrained, the name of a run, or a path"
                )


class Checking:
    """The process that checks the parameters of jobs.

    Args:
        here: whether they run on this machine, so that their device must be there.
    """

    def __init__(self, jobs: Sequence[Job], *, here: bool = True) -> None:
        check_runs(jobs)
        self.said: TextIO = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-P", "-m", __name__, "here" if here else "elsewhere"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.said, stderr=self.said, text=True
        )
        with self.process.stdin as pipe:
            json.dump([(job.label, dict(job.parameters)) for job in jobs], pipe)

    def look(self, *, wait: bool = False) -> None:
        """Raise RecipeError if the process has found what would stop one of the jobs."""
        code = self.process.wait() if wait else self.process.poll()
        if code:
            self.said.seek(0)
            raise RecipeError(self.said.read().strip()[-2000:])


def problems(p: Mapping[str, Any], *, here: bool = True) -> Iterator[str]:
    """What is wrong with the parameters of one notebook on the data that they name; ValueError, OSError
    likewise.
    """
    import torch

    from atoplib import classifiers, purifiers
    from atoplib.data import facts_of
    from atoplib.decisions import pick_device
    from atoplib.transforms import patch_size

    if here:
        pick_device(p["device"])
        for name, value in p.items():
            weights = name.endswith("_run") and isinstance(value, str) and value.endswith(WEIGHTS)
            if weights and not Path(value).expanduser().is_file():
                yield f"{name} is {value}, but there is no such file"
    if not p.get("dataset"):
        return
    facts = facts_of(p["dataset"])
    size = (p["image_size"], p["image_size"]) if p.get("image_size") else facts.size
    if len(facts.classes) < 2:
        yield f"{p['dataset']} has {len(facts.classes)} class; a classifier needs at least 2"
    if (wanted := p.get("max_test")) and p["dataset"].startswith("folder:") and wanted > facts.test:
        yield f"max_test is {wanted}, but {p['dataset']} has {facts.test} test images: give at most that"
    images = min(p.get("max_train") or facts.train, facts.train)
    if p.get("batch_size", 0) > images:
        yield f"batch_size is {p['batch_size']}, but {images} images are trained on: give at most {images}"
    if "grid_size" in p and p["transform"] != "none":
        patch_size(*size, p["grid_size"])
    with torch.device("meta"):
        if "purifier_options" in p and not p.get("weights"):
            _forward(purifiers.build(p["purifier"], **p["purifier_options"]), torch.empty(1, 5, *size))
        if "label_smoothing" in p:
            kept = {"num_classes": len(facts.classes), "mean": (0, 0, 0), "std": (1, 1, 1)}
            _forward(
                classifiers.build(p["classifier"], **kept, **p["classifier_options"]),
                torch.empty(1, 3, *size),
            )


def _forward(network: Any, images: Any) -> None:
    """One image through a network on the device meta. Only ValueError is a refusal; what meta cannot do is no
    problem.
    """
    try:
        network.eval()(images)
    except ValueError:
        raise
    except Exception:  # an operation that needs numbers: the notebook will tell
        return


def main(where: str) -> int:
    """The process: jobs from standard input, the first problem to standard error."""
    for label, parameters in json.load(sys.stdin):
        try:
            found = next(problems(parameters, here=where == "here"), "")
        except (ValueError, OSError) as error:
            found = str(error)
        if found:
            print(f"{label}: {found}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
