"""Small notebooks with the names and the form of the kit's own, for tests of the batch: they train
nothing.
"""

import json
from pathlib import Path

COMMON = """experiment: str = "mnist"
dataset: str = "mnist5k"
image_size: int | None = None
max_train: int | None = None
seed: int = 0
eps: float = 0.3
smoke: bool = False
device: str = "cpu"
data_dir: str = ""
workspace: str = ""
"""
CLASSIFIER = "classifier_run=run_of('01_train_classifier', adversarial=False)"
NOTEBOOKS = {  # parameters, their rules, what is done
    "01_train_classifier": (
        "epochs: int = 2\nadversarial: bool = False\nbatch_size: int = 4\nlabel_smoothing: float = 0.1\n"
        "classifier: str = 'small_resnet'\nclassifier_options: dict = {}\n",
        "epochs=at_least(1), smoke=dict(epochs=1)",
        # resumes: an epoch is a second, and a line in a file
        "file = run.path / 'epochs'\n"
        "for epoch in range(len(file.read_text()) if file.exists() else 0, p.epochs):\n"
        "    time.sleep(1)\n"
        "    with file.open('a') as out:\n"
        "        out.write('i')\n"
        "    run.progress(f'epoch {epoch + 1} of {p.epochs}, 1 epochs/s, {p.epochs - epoch - 1} s left')",
    ),
    "02_pretrain_purifier": (
        "classifier_run: str = 'latest'\nbatch_size: int = 4\ntransform: str = 'rt2'\ngrid_size: int = 8\n"
        "purifier: str = 'gated_unet'\npurifier_options: dict = {}\nnoise_std: float = 0.05\n",
        CLASSIFIER,
        "pass",
    ),
    "03_finetune_atop": (
        "classifier_run: str = 'latest'\npurifier_run: str = 'latest'\nvariant: str = 'ft_adv'\n",
        f"{CLASSIFIER}, purifier_run=run_of('02_pretrain_purifier'), "
        "variant=one_of('ft_adv', 'ft_clean', 'bad')",
        "assert p.variant != 'bad', 'no luck'",
    ),
    "04_attack": (
        "classifier_run: str = 'latest'\natop_run: str = 'latest'\nsteps: int = 3\nprotocol: str = 'demo'\n",
        f"{CLASSIFIER}, atop_run=run_of('03_finetune_atop'), steps=at_least(1)",
        "pass",
    ),
    "06_compare": (
        "classifier_run: str = 'latest'\nat_run: str = 'latest'\nothers: dict = {}\n",
        f"{CLASSIFIER}, at_run=run_of('01_train_classifier', adversarial=True), others=runs_of()",
        "pass",
    ),
    "08_report": ("runs: list[str] = []\n", "", "pass"),
}


def write_notebooks(folder: Path) -> Path:
    """The notebooks, in a folder that is made."""
    (folder / "recipes").mkdir(parents=True)
    for stage, (parameters, rules, body) in NOTEBOOKS.items():
        check = "from atoplib.parameters import at_least, check, one_of, run_of, runs_of\n"
        check += f"p = check(globals(), {rules})"
        file = folder / f"{stage}.ipynb"
        work = "import time\nfrom pathlib import Path\nfrom atoplib.runs import open_run\n"
        work += f"with open_run(p, {stage!r}, notebook=Path({str(file)!r})) as run:\n"
        work += "".join(f"    {line}\n" for line in f"{body}\nrun.record(test_accuracy=0.5)".splitlines())
        cells = [
            ("markdown", f"# {stage}", []),
            ("code", COMMON + parameters, ["parameters"]),
            ("code", check, []),
            ("code", work, []),
        ]
        content = {
            "cells": [cell(i, *each) for i, each in enumerate(cells)],
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        }
        file.write_text(json.dumps(content))
    return folder


def cell(number: int, kind: str, source: str, tags: list[str]) -> dict:
    """A cell of a notebook."""
    return {
        "cell_type": kind,
        "id": f"cell{number}",
        "metadata": {"tags": tags},
        "source": source,
        **({"outputs": [], "execution_count": None} if kind == "code" else {}),
    }
