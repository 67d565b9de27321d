"""A real notebook that is stopped and killed in every way goes on each time and ends as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from atoplib.checkpoints import load_checkpoint, load_state
from atoplib.runs import read_json
from benchmarks.kill_and_resume import same

ROOT = Path(__file__).resolve().parent.parent
# Some thousand short steps: what shall be struck is slowed down besides, so that no machine is done before the signal comes.
RECIPE = """
notebooks:
  01_train_classifier:
    {max_train: 512, max_test: 64, batch_size: 8, epochs: 30, classifier_options: {width: 4, stem_stride: 2}}
"""
# Python imports it at the start of every process below the batch: whoever notes progress (each ten steps) rests first.
SLOWLY = """
import sys, time

def rest(event, arguments):
    if event == "open" and str(arguments[0]).endswith("progress.txt.part"):
        time.sleep(0.6)

sys.addaudithook(rest)
"""
SOON = 60  # s in which a batch ends when told to: a slowed training takes two minutes, however slow the machine


def hears_ctrl_c() -> None:
    """Where the tests run in the background of a shell, Ctrl-C is ignored there, and below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Batch:
    """``python -m atoplib.batch`` in a process of its own, and the processes below it."""

    def __init__(self, workspace: Path, *arguments: str, slowly: bool = False) -> None:
        workspace.mkdir(exist_ok=True)
        path = [str(ROOT)]
        if slowly:
            (workspace / "slowly").mkdir(exist_ok=True)
            (workspace / "slowly" / "sitecustomize.py").write_text(SLOWLY)
            path.insert(0, str(workspace / "slowly"))
        (workspace / "recipe.yaml").write_text(RECIPE)
        self.runs = workspace / "runs" / "mnist"
        command = [sys.executable, "-m", "atoplib.batch", str(workspace / "recipe.yaml"), "--workspace", str(workspace)]
        command += arguments
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        self.log, self.began = workspace / "log", time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=hears_ctrl_c,
            )

    @property
    def run_dir(self) -> Path:
        (found,) = self.runs.glob("01_train_classifier-*")
        return found

    def training(self) -> "Batch":
        """Wait until it has trained for a moment; what is running is then known."""
        until = time.monotonic() + 600
        while time.monotonic() < until and self.process.poll() is None:
            lines = []
            with suppress(FileNotFoundError):  # the new attempt removes what an earlier one left there, which is older
                files = [path for path in self.runs.glob("*/progress.txt") if path.stat().st_mtime > self.began]
                lines = [path.read_text() for path in files]
            if any("training the classifier" in line and "training the classifier:   0 %" not in line for line in lines):
                (self.papermill,) = psutil.Process(self.process.pid).children()
                self.kernels = self.papermill.children()
                self.below = [self.papermill, *self.papermill.children(recursive=True)]
                return self
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"it did not train: {self.log.read_text()}")

    def end(self) -> int:
        """Wait until it has ended, and all that it started; returns its exit code."""
        code = self.process.wait(timeout=900)
        _, left = psutil.wait_procs(self.below, timeout=10)
        assert not left, "something was left running"
        return code

    def steps(self) -> int:
        """How many are saved."""
        state, note = load_state(self.run_dir / "state.pt")
        assert note is None
        return state["step"]

    def result(self) -> dict[str, Any]:
        """Weights and history of a complete run."""
        classifier, _ = load_checkpoint(self.run_dir / "classifier.safetensors", kind="classifier")
        history = read_json(self.run_dir / "metrics.json")["history"]
        return {
            "weights": classifier.state_dict(),
            "history": [{name: value for name, value in entry.items() if name != "seconds"} for entry in history],
        }


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Batch]]:
    """Starts a batch in a workspace of that name; what still runs at the end of the test is killed."""
    started = []

    def begin(name: str, *arguments: str, slowly: bool = False) -> Batch:
        started.append(Batch(tmp_path / name, *arguments, slowly=slowly))
        return started[-1]

    yield begin
    for batch in started:
        batch.process.kill()  # its papermill notices
        batch.process.wait()


def test_a_notebook_that_is_stopped_and_killed_in_every_way_ends_with_the_same_bits(start):
    calm = start("calm")
    steps = [0]
    for number in (signal.SIGTERM, signal.SIGINT):  # a scheduler, a terminal
        batch = start("struck", slowly=True).training()
        told = time.monotonic()
        batch.process.send_signal(number)
        assert batch.end() == 130 and time.monotonic() - told < SOON
        assert "the same command goes on from here" in batch.log.read_text()
        assert read_json(batch.run_dir / "manifest.json")["status"] == "interrupted"
        steps.append(batch.steps())

    batch = start("struck", slowly=True).training()
    batch.process.kill()
    assert batch.end() == -signal.SIGKILL
    steps.append(batch.steps())
    assert steps == sorted(set(steps)), "each went on and saved before it ended"

    for victim in ("kernel", "papermill"):  # nothing can save here: the state of the last save stays
        batch = start("struck", slowly=True).training()
        (batch.papermill if victim == "papermill" else batch.kernels[0]).kill()
        assert batch.end() == 1
        assert "01_train_classifier failed: " in batch.log.read_text() and batch.steps() == steps[-1]
        assert not (batch.run_dir / "notebook.ipynb").exists()

    batch = start("struck")
    assert batch.process.wait(timeout=900) == 0 and calm.process.wait(timeout=900) == 0
    assert same(batch.result(), calm.result())
    assert read_json(batch.run_dir / "batch.json")["attempts"] == 6


def test_a_ctrl_c_reaches_the_processes_that_torchrun_started_below_a_notebook_and_they_go_on_bit_by_bit(start):
    two = ("-p", "processes", "2", "-p", "epochs", "5")
    batch = start("struck", *two, slowly=True).training()
    assert sum("atoplib.stages" in process.cmdline() for process in batch.below) == 3, "torchrun and its two"
    told = time.monotonic()
    batch.process.send_signal(signal.SIGINT)
    assert batch.end() == 130 and time.monotonic() - told < SOON
    assert read_json(batch.run_dir / "manifest.json")["status"] == "interrupted" and batch.steps() > 0

    batch, calm = start("struck", *two), start("calm", *two)
    assert batch.process.wait(timeout=900) == 0 and calm.process.wait(timeout=900) == 0
    assert same(batch.result(), calm.result())
