"""The cells of notebooks 1 to 3, executed in one warm interpreter."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from atoplib import losses as loss_functions
from atoplib.attacks import n_fgsm, pgd
from atoplib.pipeline import to_unit

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
STAGES = ("01_train_classifier", "02_pretrain_purifier", "03_finetune_atop")


def cells_of(stage):
    cells = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}


def execute(stage, folder, edits=(), **parameters):
    """The cells of a notebook up to its training, without pictures; returns what was said, and the
    namespace."""
    said, namespace = [], {"__annotations__": {}}
    for name, cell in cells_of(stage).items():
        source = "\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith("%"))
        for old, new in edits:
            source = source.replace(old, new)
        exec(compile(source, name, "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= {"smoke": True, "workspace": str(folder), "print": said.append, **parameters}
        if name.endswith("-train"):
            return said, SimpleNamespace(**namespace)


def step_of(stage, **namespace):
    """What the cells of a notebook's step define, in a namespace of a few parameters and networks."""
    namespace |= vars(loss_functions) | dict(torch=torch, partial=partial, pgd=pgd, n_fgsm=n_fgsm, pad=F.pad)
    namespace |= dict(cross_entropy=F.cross_entropy, to_unit=to_unit)
    for name, cell in cells_of(stage).items():
        source = "".join(cell["source"])
        if source.startswith("def ") and not name.endswith("-save"):
            exec(source, namespace)
    return SimpleNamespace(**namespace)
