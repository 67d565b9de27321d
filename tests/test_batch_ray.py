"""Ray for real, three node processes on this machine: a batch is interrupted, goes on, loses a node, and ends as ever.

A short notebook stands in for the real one, which ``ATOP_LONG_TESTS=1`` has run, too: in minutes.
"""

import json
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

from atoplib.batch import Settings, engines
from atoplib.checkpoints import load_checkpoint
from atoplib.runs import read_json
from benchmarks.kill_and_resume import same

ray = pytest.importorskip("ray", reason="Ray is not installed")

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds that a crowded machine may take for any step
RECIPE = """
notebooks:
  01_train_classifier:
    {max_train: 512, max_test: 64, batch_size: 8, epochs: 15, classifier_options: {width: 4, stem_stride: 2}}
grid: {seed: [0, 1, 2]}
"""

# The stand-in for papermill. Its kernel takes steps that build on each other, writes each one down, and saves at a Ctrl-C.
PAPERMILL = """
import pathlib, subprocess, sys, time
def execute_notebook(notebook, output, values, **options):
    kernel = str(pathlib.Path(__file__).with_name("kernel.py"))
    process = subprocess.Popen([sys.executable, "-IS", kernel, str(pathlib.Path(output).parent), str(values["seed"])])
    try:
        while process.poll() is None:
            time.sleep(0.01)
    finally:  # at once, as the real one: a kernel that has not begun when the Ctrl-C comes does not hear it
        process.kill()
        process.wait()
    assert process.returncode == 0
"""
KERNEL = """
import fcntl, hashlib, json, os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
run, value, step = pathlib.Path(sys.argv[1]), sys.argv[2], 0
def write(name, content):
    (run / "half").write_text(json.dumps(content))
    os.replace(run / "half", run / name)
lock = open(run / "run.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
if (run / "state").exists():
    value, step = json.loads((run / "state").read_text())
write("manifest.json", {"status": "running"})
try:
    while step < 300:  # half a minute: a loaded machine needs some seconds to pass a Ctrl-C on
        time.sleep(0.1)
        value, step = hashlib.sha256(value.encode()).hexdigest(), step + 1
        with open(run / "steps", "a") as file:
            print(step, file=file)
        (run / "progress.txt").write_text(f"training the classifier: {step:3d} %")
except KeyboardInterrupt:
    write("state", [value, step])
    write("manifest.json", {"status": "interrupted"})
    raise
write("notebook.part.ipynb", {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
write("metrics.json", {"value": value})
write("manifest.json", {"status": "complete", "stage": "01_train_classifier"})
"""


@pytest.fixture(scope="module", params=["short", "real"])
def environment(request, tmp_path_factory) -> dict[str, str]:
    """Of every process: which papermill it finds."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if request.param == "short":
        folder = tmp_path_factory.mktemp("papermill")
        (folder / "papermill.py").write_text(PAPERMILL)
        (folder / "kernel.py").write_text(KERNEL)
        path.insert(0, str(folder))
    elif not os.environ.get("ATOP_LONG_TESTS"):
        pytest.skip("real notebooks on Ray take minutes; ATOP_LONG_TESTS=1 has them run")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.fixture(scope="module")
def cluster(environment) -> Iterator[dict[str, Any]]:
    """The address of a cluster and the processes of its nodes, the head first. It is a process of its own: a Ray that hangs
    or dies takes no test with it. A machine may be too crowded for the time limits of Ray's start, so there is a second try.
    """
    for _ in range(2):
        command = [sys.executable, str(Path(__file__).with_name("ray_cluster.py"))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
            if line := process.stdout.readline():
                yield json.loads(line)
                below = psutil.Process(process.pid).children(recursive=True)
                process.stdin.close()
                psutil.wait_procs([process], timeout=60)
                for left in (*below, process):
                    with suppress(psutil.NoSuchProcess):
                        left.kill()
                return
    pytest.fail("the cluster did not start")


@pytest.fixture
def start(environment) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a batch of three runs in a process of its own; one that still runs at the end of the test is killed."""
    started = []

    def begin(workspace: Path, *arguments: str) -> subprocess.Popen:
        workspace.mkdir(exist_ok=True)
        (workspace / "recipe.yaml").write_text(RECIPE)
        command = [sys.executable, "-m", "atoplib.batch", str(workspace / "recipe.yaml"), "--workspace", str(workspace)]
        with (workspace / "log").open("a") as log:
            command += ["--threads", "1", "--no-report", *arguments]
            hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731; ignored below a shell's background job
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=hear))
        return started[-1]

    yield begin
    for batch in started:
        batch.kill()
        batch.wait()


def wait_for(what: Callable[[], Any], batch: subprocess.Popen, workspace: Path) -> Any:
    """What a function returns as soon as it is true."""
    until = time.monotonic() + PATIENCE
    while not (found := what()):
        assert batch.poll() is None and time.monotonic() < until, (workspace / "log").read_text()
        time.sleep(0.05)
    return found


def papermills(node: int) -> list[psutil.Process]:
    """The notebooks that a node executes."""
    try:
        below = psutil.Process(node).children(recursive=True)
        return [process for process in below if any("papermill_process" in word for word in process.cmdline())]
    except psutil.NoSuchProcess:
        return []


def trains(papermill: psutil.Process) -> Path | None:
    """The directory of the run that a papermill executes, once that has trained for a moment."""
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        run_dir = Path(papermill.cmdline()[-3]).parent
        line = (run_dir / "progress.txt").read_text()
        if "training the classifier" in line and "classifier:   0 %" not in line:
            return run_dir
    return None


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def attempts(workspace: Path) -> dict[str, int]:
    """How often each run was begun."""
    return {path.parent.name: read_json(path)["attempts"] for path in workspace.glob("runs/mnist/*/batch.json")}


def results(workspace: Path) -> dict[str, Any]:
    """Weights and history, or the steps and the value that the stand-in came to, of every run, by its name."""
    found = {}
    for run_dir in workspace.glob("runs/mnist/01_train_classifier-*"):
        assert read_json(run_dir / "manifest.json")["status"] == "complete" and (run_dir / "notebook.ipynb").is_file()
        metrics = read_json(run_dir / "metrics.json")
        if "history" not in metrics:
            found[run_dir.name] = {"steps": (run_dir / "steps").read_text(), **metrics}
            continue
        found[run_dir.name] = {
            "weights": load_checkpoint(run_dir / "classifier.safetensors", kind="classifier")[0].state_dict(),
            "history": [{**entry, "seconds": None} for entry in metrics["history"]],
        }
    return found


def test_a_batch_on_three_nodes_is_interrupted_and_loses_a_node_and_ends_with_the_same_bits(cluster, start, tmp_path):
    there, here, nodes = tmp_path / "ray", tmp_path / "local", cluster["nodes"]
    on_ray = ("--jobs", "3", "--engine", "ray", "--engine-option", "address", cluster["address"])

    batch = start(there, *on_ray)
    wait_for(lambda: any(trains(papermill) for node in nodes for papermill in papermills(node)), batch, there)
    running = [papermill for node in nodes for papermill in papermills(node)]
    below = [process for papermill in running for process in (papermill, *papermill.children(recursive=True))]
    assert max(len(papermills(node)) for node in nodes) == 1, "each node has room for one"
    batch.send_signal(signal.SIGINT)
    assert batch.wait(timeout=PATIENCE) == 130 and not alive(below)
    statuses = [read_json(path)["status"] for path in there.glob("runs/mnist/*/manifest.json")]
    assert "interrupted" in statuses and set(statuses) <= {"interrupted", "complete"}, "they had the time to save"
    before = attempts(there)

    batch = start(there, *on_ray)

    def executing() -> tuple[int, psutil.Process] | None:
        return next(((node, found) for node in nodes[1:] for found in papermills(node) if trains(found)), None)

    node, papermill = wait_for(executing, batch, there)
    run_dir, orphans = trains(papermill), [papermill, *papermill.children(recursive=True)]
    for process in (psutil.Process(node), papermill.parent()):  # the node and its worker, at once
        process.kill()
    assert batch.wait(timeout=PATIENCE) == 0, (there / "log").read_text()
    assert not alive(orphans), "what the lost node executed went on"
    begun = {name: count - before.get(name, 0) for name, count in attempts(there).items()}
    assert begun.pop(run_dir.name) == 2, "the lost run was begun once more"
    assert list(begun.values()) == [1, 1], "and no other"

    batch = start(here, "--jobs", "3")
    assert batch.wait(timeout=PATIENCE) == 0, (here / "log").read_text()
    assert len(results(here)) == 3 and same(results(there), results(here)), "no step twice, and the same bits"


def test_without_an_address_a_ray_is_started_here_and_ended(start, tmp_path):
    batch = start(tmp_path, "--engine", "ray", "--only", "*seed=0")
    (ray_of_its_own,) = wait_for(
        lambda: [found for found in psutil.Process(batch.pid).children() if found.name() == "raylet"], batch, tmp_path
    )
    assert batch.wait(timeout=PATIENCE) == 0, (tmp_path / "log").read_text()
    assert len(results(tmp_path)) == 1 and not alive([ray_of_its_own])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_gpu": 1}, "the engine ray has no option num_gpu; allowed: address, num_cpus, num_gpus, "),
        ({"num_gpus": -1}, "the engine ray cannot be used so: .*num_gpus"),
        ({"num_gpus": "many"}, "the engine ray cannot be used so: .*num_gpus"),
        ({"address": 6379}, "the engine ray cannot be used so: "),
        ({"address": "127.0.0.1:1"}, "the engine ray cannot be used so: nothing answers at 127.0.0.1:1 .*refused"),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message), engines.ray(Settings(options=options)):
        pass
    assert not ray.is_initialized()


def test_what_no_node_has_is_refused():
    node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}}
    nodes = [node, {"Alive": False, "Resources": {"CPU": 64.0}}]
    engines.check_demand(nodes, {"num_cpus": 8, "num_gpus": 1, "memory": None, "resources": None})
    with pytest.raises(ValueError, match=r"no node of the Ray cluster has what a run asks for: 16 CPU \(at most 8\)"):
        engines.check_demand(nodes, {"num_cpus": 16, "num_gpus": 0})
    with pytest.raises(ValueError, match=r"8 CPU \(at most 8\), 1 fast \(at most 0\)"):
        engines.check_demand(nodes, {"num_cpus": 8, "resources": {"fast": 1}})
