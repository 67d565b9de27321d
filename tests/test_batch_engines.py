"""Every engine runs the same jobs to the same end: nothing twice, failures told, a lost machine made up for.

Slurm itself is replaced by a few small scripts; submitit is the real one. Ray has a file of its own.
"""

import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from atoplib.batch import ENGINES, Job, Settings, engines, make_plan, read_recipe, run_jobs
from atoplib.batch.overview import Overview
from atoplib.runs import read_json

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
ROOT = FOLDER.parent
GRID = """
notebooks: {01_train_classifier: , 02_pretrain_purifier: , 03_finetune_atop: }
grid: {02_pretrain_purifier: {seed: [0, 1, 2]}}
"""

# A papermill for tests: it takes half a second, counts how often a run was made, and fails where the test wants it.
FAKE = """
import json, os, pathlib, time
def execute_notebook(notebook, output, values, **options):
    run = pathlib.Path(output).parent
    with open(run / "made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(os.environ.get("ATOP_TEST_SECONDS", "0.3")))
    if values.get("seed") == 1 and os.environ.get("ATOP_TEST_FAIL"):
        raise ValueError("no luck")
    pathlib.Path(output).write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (run / "metrics.json").write_text(json.dumps({"value": sum(map(ord, run.name))}))
    content = {"status": "complete", "stage": run.name.rpartition("-")[0], "ended": str(time.time())}
    (run / "manifest.json").write_text(json.dumps(content))
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> list[Job]:
    """Seven jobs, three of which may run at once, executed by the papermill above wherever they run."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "papermill.py").write_text(FAKE)
    path = [str(tmp_path / "fake"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    (tmp_path / "recipe.yaml").write_text(GRID)
    made = make_plan(read_recipe(tmp_path / "recipe.yaml"), FOLDER, {"workspace": str(tmp_path)})
    for job in made:  # pages are tested elsewhere
        job.run_dir.mkdir(parents=True)
    return made


# A Slurm for tests, of this machine: what submitit calls, each a few lines.
SLURM = {
    "sbatch": """
import os, pathlib, re, subprocess, sys
here, script = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[1]).read_text()
number = len({path.stem.split("_")[0] for path in here.glob("*.pid")}) + 1
last = re.search("--array=0-([0-9]+)", script)
for task in range(int(last[1]) + 1) if last else [None]:
    array = {} if task is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
    name = str(number) if task is None else f"{number}_{task}"
    environment = {**os.environ, **array, "SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    process = subprocess.Popen(["bash", sys.argv[1]], env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    (here / f"{name}.pid").write_text(str(process.pid))
print("Submitted batch job", number)
""",
    "srun": """
import os, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    option = arguments.pop(0)
    if option in ("--output", "--error"):
        path = arguments.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
        for letter, name in (("%A", "SLURM_ARRAY_JOB_ID"), ("%a", "SLURM_ARRAY_TASK_ID")):
            path = path.replace(letter, os.environ.get(name, ""))
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
os.execvp(arguments[0], arguments)
""",
    "sacct": """
import os, pathlib, sys
print("JobID|State|NodeList")
for path in pathlib.Path(__file__).parent.glob("*.pid"):
    there = os.path.exists(f"/proc/{path.read_text()}")
    print(f"{path.stem}|{'RUNNING' if there else 'NODE_FAIL'}|here")
""",
    "scancel": """
import os, pathlib, signal, sys
os.killpg(int((pathlib.Path(__file__).parent / f"{sys.argv[1]}.pid").read_text()), signal.SIGTERM)
""",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Puts the Slurm above on the path; its folder holds a file for each job, the number of its group of processes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in SLURM.items():
        (folder / name).write_text(f"#!{sys.executable} -IS\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def statuses(jobs: list[Job], engine: str, **options: object) -> dict[str, str]:
    settings = Settings(jobs=3, threads=1, options=options)
    overview = Overview(jobs, workers=3, out=io.StringIO(), live=False)
    return {outcome.job.label: outcome.status for outcome in run_jobs(jobs, settings, overview, engine=ENGINES[engine])}


def options_of(engine: str, tmp_path: Path) -> dict[str, object]:
    """What an engine needs to run on this machine."""
    if engine == "slurm":
        pytest.importorskip("submitit")
        return {"folder": str(tmp_path / "slurm"), "slurm_partition": "long"}
    return {}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ray"])
def test_an_engine_runs_every_job_once_and_reports_what_failed(engine, jobs, tmp_path, monkeypatch, slurm):
    options = options_of(engine, tmp_path)
    jobs = [job for job in jobs if job.name < "03"][:3]
    monkeypatch.setenv("ATOP_TEST_FAIL", "1")
    assert list(statuses(jobs, engine, **options).values()) == ["complete", "complete", "failed"]
    monkeypatch.delenv("ATOP_TEST_FAIL")
    assert list(statuses(jobs, engine, **options).values()) == ["done before", "done before", "complete"]
    assert [len((job.run_dir / "made").read_text().splitlines()) for job in jobs] == [1, 1, 2]
    assert all(read_json(job.run_dir / "metrics.json") == {"value": sum(map(ord, job.run_dir.name))} for job in jobs)


def test_submitit_runs_jobs_on_this_machine_without_slurm(jobs, tmp_path):
    pytest.importorskip("submitit")
    options = {"folder": str(tmp_path / "slurm"), "cluster": "local"}
    assert set(statuses(jobs[:2], "slurm", **options).values()) == {"complete"}


def test_a_slurm_job_asks_for_what_the_options_say(jobs, tmp_path, slurm):
    pytest.importorskip("submitit")
    options = options_of("slurm", tmp_path) | {"gpus_per_node": 1, "mem_gb": 4}
    assert statuses(jobs[:1], "slurm", **options) == {jobs[0].label: "complete"}
    (script,) = (tmp_path / "slurm").glob("*_submission.sh")
    asked = {line.removeprefix("#SBATCH --") for line in script.read_text().splitlines()}
    assert {"partition=long", "gpus-per-node=1", "mem=4GB", "cpus-per-task=1", "time=1440"} <= asked


def test_jobs_that_are_ready_together_are_one_job_array(jobs, tmp_path, slurm):
    pytest.importorskip("submitit")
    jobs = [job for job in jobs if job.name < "03"]
    found = statuses(jobs, "slurm", **options_of("slurm", tmp_path))
    assert list(found.values()) == ["complete"] * 4
    assert sorted(path.stem for path in slurm.glob("*.pid")) == ["1", "2_0", "2_1", "2_2"]  # the three wait for the first
    assert [len((job.run_dir / "made").read_text().splitlines()) for job in jobs] == [1] * 4


def test_no_slurm_is_refused(jobs, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # whatever is installed on this machine is not seen
    with pytest.raises(ValueError, match="the engine slurm cannot be used so: .*srun"):
        statuses(jobs, "slurm", **options_of("slurm", tmp_path))


def test_a_slurm_that_is_installed_but_answers_nothing_is_refused_in_one_sentence(jobs, tmp_path, slurm):
    pytest.importorskip("submitit")
    refusal = "sbatch: fatal: Could not establish a configuration source"
    (slurm / "sbatch").write_text(f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    with pytest.raises(ValueError, match="the engine slurm cannot be used so: sbatch .*configuration source") as caught:
        statuses(jobs, "slurm", **options_of("slurm", tmp_path))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert not any((job.run_dir / "made").exists() for job in jobs)


def test_an_unknown_option_of_slurm_is_refused(jobs, tmp_path, slurm):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="the engine slurm cannot be used so: .*partitoin"):
        statuses(jobs, "slurm", **{"folder": str(tmp_path / "slurm"), "partitoin": "long"})


def test_a_slurm_job_that_is_lost_with_its_machine_fails_alone_and_is_retried_on_demand(jobs, tmp_path, monkeypatch, slurm):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmJob.watcher, "_delay_s", 0.5)  # it asks sacct once in ten minutes
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0.5)
    monkeypatch.setenv("ATOP_TEST_SECONDS", "3")
    struck = []

    def strike() -> None:
        made = list(jobs[0].run_dir.parent.glob("02*/made"))
        if made and not struck:
            struck.append(made[0].parent)
            os.killpg(int((slurm / "2.pid").read_text()), signal.SIGKILL)

    overview = Overview(jobs, workers=1, out=io.StringIO(), live=False)
    monkeypatch.setattr(overview, "show", strike)
    settings = Settings(jobs=1, threads=1, options=options_of("slurm", tmp_path))
    outcomes = run_jobs(jobs[:3], settings, overview, engine=ENGINES["slurm"])
    assert [outcome.status for outcome in outcomes] == ["complete", "failed", "not run"]
    assert "failed: it was lost (UncompletedJobError" in outcomes[1].reason
    monkeypatch.setenv("ATOP_TEST_SECONDS", "0.1")
    assert set(statuses(jobs[:3], "slurm", **settings.options).values()) == {"done before", "complete"}


def test_a_slurm_job_is_told_to_stop_when_the_batch_is_interrupted(jobs, tmp_path, monkeypatch, slurm):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmJob.watcher, "_delay_s", 0.5)
    monkeypatch.setenv("ATOP_TEST_SECONDS", "600")
    overview = Overview(jobs, workers=1, out=io.StringIO(), live=False)

    def press() -> None:
        if (jobs[0].run_dir / "made").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(overview, "show", press)
    settings = Settings(jobs=1, threads=1, options=options_of("slurm", tmp_path))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, settings, overview, engine=ENGINES["slurm"])
    assert time.monotonic() - began < 300 and not (jobs[0].run_dir / "manifest.json").exists()
    made_by = int((jobs[0].run_dir / "made").read_text())
    assert not Path(f"/proc/{made_by}").exists()


@pytest.mark.parametrize("engine, package", [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_says_how_to_install_it(jobs, monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}, which is not installed: .venv/bin/pip install {package}"):
        statuses(jobs, engine)


def test_the_local_engine_refuses_options(jobs):
    with pytest.raises(ValueError, match="the engine local has no options, got num_gpus"):
        statuses(jobs, "local", num_gpus=1)


def test_a_job_that_was_completed_elsewhere_meanwhile_is_not_run_again(jobs):
    assert engines.attempt(jobs[0], None, 1, False)[1] == ""
    before = (jobs[0].run_dir / "made").read_text()
    assert engines.attempt(jobs[0], None, 1, False) == (0.0, "") and (jobs[0].run_dir / "made").read_text() == before
