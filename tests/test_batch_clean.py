"""Cleaning removes what no result needs, and nothing else; a run that is going on is left alone."""

from pathlib import Path

import pytest

from atoplib.batch.clean import clean, main
from atoplib.checkpoints import write_json
from atoplib.runs import locked

RESULTS = ("manifest.json", "metrics.json", "classifier.safetensors", "state.pt", "notebook.ipynb")
LEFT_OVERS = ("state.pt.previous", "state.pt.newest", "notebook.part.ipynb", ".state.pt.newest.x1.part", "progress.txt.part")


@pytest.fixture
def workspace(tmp_path) -> Path:
    """A complete, an interrupted and a replaced run, each of ten files of 1000 bytes."""
    for name, status in (("01-complete", "complete"), ("02-cut", "interrupted"), ("replaced/01-complete-1", "complete")):
        run_dir = tmp_path / "runs" / "mnist" / name
        run_dir.mkdir(parents=True)
        for file in (*RESULTS, *LEFT_OVERS):
            (run_dir / file).write_bytes(b"0" * 1000)
        write_json(run_dir / "manifest.json", {"status": status})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").write_bytes(b"1")
    return tmp_path


def left(workspace: Path, run: str) -> set[str]:
    return {path.name for path in (workspace / "runs" / "mnist" / run).iterdir()} - {"run.lock", "batch.lock"}


def test_only_what_no_result_needs_is_removed_and_what_a_training_goes_on_from_stays(workspace):
    sizes = dict(clean(workspace / "runs"))
    assert left(workspace, "01-complete") == set(RESULTS)
    assert left(workspace, "02-cut") == {*RESULTS, "state.pt.previous", "state.pt.newest", "notebook.part.ipynb"}
    assert not (workspace / "runs" / "mnist" / "replaced").exists()
    assert sum(sizes.values()) == 5000 + 2000 + 9000 + len('{\n  "status": "complete"\n}\n')
    assert list(clean(workspace / "runs")) == []


@pytest.mark.parametrize("name", ["run.lock", "batch.lock"])
@pytest.mark.parametrize("everything", [False, True])
def test_a_run_that_is_in_use_is_left_alone_and_named(workspace, name, everything):
    run_dir = workspace / "runs" / "mnist" / "02-cut"
    with locked(run_dir / name):
        assert (run_dir, -1) in list(clean(workspace / "runs", everything=everything))
    assert left(workspace, "02-cut") == {*RESULTS, *LEFT_OVERS}


def test_everything_is_every_run_and_nothing_outside(workspace, tmp_path):
    (workspace / "runs" / "mnist" / "table.csv").write_text("run\n")
    (workspace / "elsewhere").mkdir()
    (workspace / "elsewhere" / "kept").write_text("kept")
    (workspace / "runs" / "linked").symlink_to(workspace / "elsewhere")
    list(clean(workspace / "runs", everything=True))
    assert {path.name for path in (workspace / "runs").iterdir()} == {"linked"}
    assert (workspace / "elsewhere" / "kept").exists() and (workspace / "data" / "images").exists()


def test_the_command_says_what_it_freed_and_what_is_left(workspace, capsys):
    assert main(["--workspace", str(workspace)]) == 0
    printed = capsys.readouterr().out
    assert "mnist/01-complete/state.pt.previous: 1 kB freed" in printed
    assert "16 kB freed" in printed and f"left in {workspace / 'runs'}" in printed
    assert main(["--workspace", str(workspace / "nowhere")]) == 0
    assert "0 kB freed" in capsys.readouterr().out
