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
from atoplib.batch.recipe import make_plan, read_recipe
from atoplib.batch.runner import Slurm, job_state
from atoplib.files import read_json
from tests.small_notebooks import write_notebooks

SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
FIRST, SECOND = "01_train_classifier", "02_pretrain_purifier"
GRID = f"notebooks: {{{FIRST}: {{epochs: 8}}, {SECOND}: }}\ngrid: {{{SECOND}: {{noise_std: [0.1, 0.2]}}}}"


def test_slurm_that_is_not_there_or_does_not_answer_is_refused_in_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    options = {"folder": tmp_path / "slurm"}
    monkeypatch.setenv("PATH", str(tmp_path))  # whatever is installed on this machine is not seen
    with pytest.raises(ValueError, match="the engine slurm cannot be used so: "):
        Slurm(1, None, None, options)
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'fatal: Could not establish a configuration source' >&2\nexit 1\n"
        )
        (tmp_path / name).chmod(0o755)
    folder = write_notebooks(tmp_path / "notebooks")
    (folder / "recipe.yaml").write_text(GRID)
    jobs = make_plan(read_recipe(folder / "recipe.yaml", folder), folder, {"workspace": str(tmp_path)})
    engine = Slurm(1, None, None, options)
    with pytest.raises(
        ValueError, match="the engine slurm cannot be used so: sbatch .*configuration source"
    ) as caught:
        engine.submit(jobs[:1])
    engine.close()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(ValueError, match="the engine slurm cannot be used so: .*partitoin"):
        Slurm(1, None, None, options | {"partitoin": "long"})


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
    tmp_path, monkeypatch, cluster
):
    folder = write_notebooks(tmp_path / "notebooks")
    monkeypatch.setattr(command, "NOTEBOOKS", folder)
    (folder / "recipe.yaml").write_text(GRID)
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    program = "import sys, pathlib; from atoplib.batch import __main__ as command; "
    program += f"command.NOTEBOOKS = pathlib.Path({str(folder)!r}); sys.exit(command.main())"
    arguments = [
        str(folder / "recipe.yaml"),
        "--workspace",
        str(tmp_path / "cluster"),
        "--engine",
        "slurm",
        "--no-report",
    ]
    batch = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300

    def epochs() -> int:
        files = list((tmp_path / "cluster").rglob("epochs"))
        return len(files[0].read_text()) if files else 0

    while epochs() < 2 and batch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster("die")
    before = epochs()
    assert 2 <= before < 8
    cluster("revive")
    output, _ = batch.communicate(timeout=600)
    assert batch.returncode == 0, output
    assert (
        command.main([str(folder / "recipe.yaml"), "--workspace", str(tmp_path / "local"), "--no-report"])
        == 0
    )

    def results(where: str) -> dict[str, object]:
        jobs = make_plan(
            read_recipe(folder / "recipe.yaml", folder), folder, {"workspace": str(tmp_path / where)}
        )
        assert [job_state(job)[0] for job in jobs] == ["done"] * 3
        return {job.label: read_json(job.run_dir / "metrics.json") for job in jobs}

    assert results("cluster") == results("local")
    assert epochs() == 8, "no epoch was repeated: the run went on"
    (folder,) = (tmp_path / "cluster").glob("runs/*/.slurm")
    scripts = [path.read_text() for path in folder.glob("*_submission.sh")]
    assert all("#SBATCH --requeue" in script for script in scripts) and any(
        "#SBATCH --array=0-1" in script for script in scripts
    )
