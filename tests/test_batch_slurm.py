"""A batch on a real Slurm of this machine: the same numbers as without it, and a run whose node died goes on
from its state.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atoplib.batch import __main__ as command
from atoplib.batch.recipe import make_plan
from atoplib.batch.runner import job_state, slurm
from atoplib.files import read_json

SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
FIRST, SECOND = "01_train_classifier", "02_pretrain_purifier"
GRID = f"notebooks: {{{FIRST}: {{epochs: 8}}, {SECOND}: }}\ngrid: {{{SECOND}: {{noise_std: [0.1, 0.2]}}}}"


@pytest.fixture
def recipe(notebooks) -> Path:
    """A small recipe of small notebooks."""
    (notebooks / "recipe.yaml").write_text(GRID)
    return notebooks / "recipe.yaml"


def test_slurm_that_is_not_there_or_does_not_answer_is_refused_in_a_sentence(
    tmp_path, recipe, monkeypatch, capsys
):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # whatever is installed on this machine is not seen
    call = [str(recipe), "--workspace", str(tmp_path), "--engine", "slurm"]
    assert command.main(call) == 1 and "the engine slurm cannot be used so: " in capsys.readouterr().err
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'fatal: no configuration source' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    assert command.main(call) == 1
    told = capsys.readouterr().err
    assert "no configuration source" in told and "Traceback" not in told
    with pytest.raises(ValueError, match="the engine slurm cannot be used so: .*partitoin"):
        slurm(tmp_path / "slurm", {"partitoin": "long"}, None, None)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of one node; yields what is to be called with die or revive."""
    pytest.importorskip("submitit")
    needed = ("slurmctld", "slurmd", "munged", "unshare", "runuser")
    if os.getuid() or not all(map(shutil.which, needed)):
        pytest.skip(f"a Slurm is started by root alone, where all of {', '.join(needed)} are installed")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))

    def do(what: str) -> None:
        subprocess.run(["bash", str(SCRIPT), what, str(tmp_path / "slurm")], check=True, timeout=120)

    try:
        do("start")
        yield do
    finally:
        do("stop")


@pytest.mark.long
def test_a_batch_on_slurm_has_the_numbers_of_a_local_one_although_its_node_dies_once(
    tmp_path, recipe, monkeypatch, cluster
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    program = "import sys, pathlib; from atoplib.batch import __main__ as command; "
    program += f"command.NOTEBOOKS = pathlib.Path({str(recipe.parent)!r}); sys.exit(command.main())"
    arguments = [str(recipe), "--no-report", "--workspace"]
    elsewhere = [sys.executable, "-c", program, *arguments, str(tmp_path / "cluster"), "--engine", "slurm"]
    batch = subprocess.Popen(elsewhere, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300

    def epochs() -> int:
        return sum(len(path.read_text()) for path in (tmp_path / "cluster").rglob("epochs"))

    while epochs() < 2 and batch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster("die")
    assert 2 <= epochs() < 8
    cluster("revive")
    output, _ = batch.communicate(timeout=600)
    assert batch.returncode == 0, output
    assert command.main([*arguments, str(tmp_path / "local")]) == 0

    def results(where: str) -> dict[str, object]:
        jobs = make_plan(recipe, recipe.parent, {"workspace": str(tmp_path / where)})
        assert [job_state(job)[0] for job in jobs] == ["done"] * 3
        return {job.label: read_json(job.run_dir / "metrics.json") for job in jobs}

    assert results("cluster") == results("local")
    assert epochs() == 8, "no epoch was repeated: the run went on"
    scripts = [path.read_text() for path in (tmp_path / "cluster").glob("runs/*/.slurm/*_submission.sh")]
    assert all("#SBATCH --requeue" in script for script in scripts)
    assert any("#SBATCH --array=0-1" in script for script in scripts)
