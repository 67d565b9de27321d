"""A training that is killed again and again, also while it saves, ends with the same bits as one that was
not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import sys, torch
from functools import partial
from pathlib import Path
from torch.nn.functional import cross_entropy
from atoplib import classifiers, data, purifiers
from atoplib.attacks import pgd
from atoplib.parameters import Parameters
from atoplib.pipeline import AToPPipeline, to_unit
from atoplib.runs import open_run
from atoplib.training import fit, loop
from atoplib.transforms import Transform

loop.CHECK_EVERY = 1
torch.set_num_threads(1)
torch.manual_seed(0)
folder = Path(sys.argv[1])
train = data.load("mnist5k", max_train=96, max_test=1).train
options = dict(num_classes=10, mean=[0.1] * 3, std=[0.3] * 3, width=2, stem_stride=2)
frozen = classifiers.build("small_resnet", **options)
network = purifiers.build("gated_unet", width=4, blocks=1, fold=2)
pipeline = AToPPipeline(Transform("rt2", 0.25, 0.1, grid_size=4), network, frozen, seed=None)

def step(x, y, epoch):
    t = pipeline.sample(x)
    x = pgd(partial(pipeline, sample=t), x, y, eps=0.3, steps=2, seed=None)
    return cross_entropy(pipeline.classifier(to_unit(pipeline.outputs(x, t)[-1])), y)

values = dict(experiment="kills", dataset="mnist5k", image_size=None, smoke=False)
p = Parameters(values | {"workspace": str(folder)})
with open_run(p, "03_finetune_atop") as run:
    settings = dict(epochs=4, batch_size=8, learning_rate=0.01, ema_decay=0.9, dtype="float32")
    history = fit(step, network, train, run=run, save_every=0.0, **settings)
for entry in history:
    entry.pop("seconds")
torch.save((network.state_dict(), history), folder / "result.pt")
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )


def finish(folder):
    process = start(folder)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    return torch.load(folder / "result.pt")


def saves(folder):
    """When the state was written last; 0 before there is one, or while it is renamed."""
    try:
        return max((path.stat().st_mtime for path in folder.glob("runs/kills/*/.state.pt")), default=0.0)
    except FileNotFoundError:
        return 0.0


@pytest.mark.long
@pytest.mark.parametrize(
    "signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]], ids=["KILL", "TERM and INT"]
)
def test_what_is_killed_ends_with_the_same_bits(tmp_path, signals):
    weights, history = finish(tmp_path / "uninterrupted")
    chance, folder = random.Random(0), tmp_path / "killed"
    for number in range(4):
        process, before = start(folder), saves(folder)
        while (
            saves(folder) == before and process.poll() is None
        ):  # a signal waits for a state, not for seconds
            time.sleep(0.01)
        if number % 2:  # within a save
            while not any(folder.glob("runs/kills/*/.state*.part")) and process.poll() is None:
                pass
        else:
            time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signals[number % len(signals)])
        process.wait(timeout=60)
        process.stderr.close()
    killed, history_of_killed = finish(folder)
    assert history_of_killed == history
    assert all(torch.equal(weights[name], killed[name]) for name in weights)
