"""Runs: a directory each, found again, and true about how it was made and how it ended."""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell

from atoplib import runs
from atoplib.parameters import Parameters, run_of
from atoplib.runs import RunInUse, find_run, open_run, resolve, run_name, workspace_dir

STAGE = "01_train_classifier"


@pytest.fixture
def p(tmp_path):
    return Parameters(
        {
            "experiment": "mnist",
            "dataset": "mnist5k",
            "image_size": None,
            "epochs": 3,
            "adversarial": False,
            "seed": 7,
            "smoke": False,
            "device": "cpu",
            "workspace": str(tmp_path),
            "data_dir": "",
        }
    )


def made(p, **changes):
    run = open_run(p.replace(**changes), STAGE)
    run.finish()
    return run


def test_the_name_depends_on_every_parameter_but_places_and_on_the_stage(p):
    names = [
        run_name(STAGE, p.as_dict() | change)
        for change in ({}, {"epochs": 4}, {"seed": 8}, {"dataset": "mnist"})
    ]
    assert len({*names, run_name("02_pretrain_purifier", p.as_dict())}) == 5
    assert run_name(
        "my own-2",
        {"adversarial": True, "purifier": "mine.nets:Net", "attack": None, "protocol": "demo", "seed": 3},
    ).startswith("my own-2-adversarial-mine_nets_Net-demo-seed3-")
    for place in ("workspace", "data_dir", "device"):
        assert run_name(STAGE, p.as_dict() | {place: "elsewhere"}) == run_name(STAGE, p.as_dict())


def test_a_run_tells_how_it_was_made_and_how_it_ended(p, tmp_path):
    (weights := tmp_path / "weights.bin").write_bytes(b"abc")
    with open_run(p, STAGE, inputs={"weights": weights}) as run:
        assert json.loads((run.path / "manifest.json").read_text())["status"] == "running"
        run.record(accuracy=0.5)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert [
        *(manifest[name] for name in ("status", "stage", "seed")),
        manifest["inputs"]["weights"]["sha256"],
    ] == ["complete", STAGE, 7, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]
    assert (
        {"torch", "python"} <= manifest["versions"].keys() and manifest["code"] and manifest["seconds"] >= 0
    )
    assert (json.loads((run.path / "parameters.json").read_text()), run.path.parent) == (
        p.as_dict(),
        tmp_path / "runs" / "mnist",
    )


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("odd"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_did_not_end_well_says_how_and_hands_the_error_on(p, error, status):
    with pytest.raises(type(error)), open_run(p, STAGE) as run:
        raise error
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["status"] == status and type(error).__name__ in manifest["error"]
    assert open_run(p, STAGE).manifest.keys().isdisjoint({"error", "ended"})


def test_earlier_results_survive_until_they_are_superseded_and_are_kept_then(p):
    first = made(p)
    first.record(accuracy=0.5)
    (first.path / ".state.pt").write_bytes(b"1")
    first.figure_path("bars").parent.mkdir()
    again = open_run(p, STAGE)
    assert again.metrics == {"accuracy": 0.5} and again.age()
    folder = again.supersede((".state.pt*", "metrics.json", "figures"))
    assert {path.name for path in folder.iterdir()} == {"metrics.json", ".state.pt", "figures"}
    assert again.metrics == {} and (again.path / "manifest.json").is_file()
    os.replace(folder, folder.with_name("superseded-3"))  # others were deleted by hand
    assert again.supersede(("manifest.json",)).name == "superseded-4"
    again.finish()


def test_latest_is_the_complete_run_that_ended_last_with_what_is_wanted(p):
    first, second = made(p), made(p, epochs=4)
    made(p, adversarial=True)
    open_run(p.replace(epochs=5), STAGE)  # not finished
    made(p, dataset="mnist")
    assert find_run(p, "latest", STAGE, adversarial=False) == second.path
    assert find_run(p, first.path.name, STAGE) == find_run(p, str(first.path), STAGE) == first.path
    made(p)
    assert find_run(p, "latest", STAGE, adversarial=False) == first.path


def test_latest_does_not_believe_the_clock_and_smoke_never_passes_for_the_real_thing(p, monkeypatch):
    made(p)

    earlier = runs.datetime(1999, 1, 1, tzinfo=runs.UTC)
    monkeypatch.setattr(runs, "datetime", SimpleNamespace(now=lambda _: earlier))
    second = made(p, epochs=4)
    made(p, smoke=True)
    assert find_run(p, "latest", STAGE) == second.path


@pytest.mark.parametrize("which", ["latest", "nothing", "../x"])
def test_a_missing_run_names_what_to_do(p, which):
    made(p, adversarial=True)
    with pytest.raises(FileNotFoundError) as error:
        find_run(p, which, STAGE, adversarial=False)
    assert "latest" in str(error.value)
    assert which != "latest" or (
        "adversarial = True, not False" in str(error.value) and f"{STAGE}.ipynb" in str(error.value)
    )


def test_latest_is_resolved_before_the_name_so_that_by_hand_and_in_a_batch_a_run_is_the_same(p):
    q = Parameters(
        p.as_dict() | {"classifier_run": "latest"}, {"classifier_run": run_of(STAGE, adversarial=False)}
    )
    assert resolve(q).classifier_run == "latest"
    first = made(p)
    by_hand, by_batch = (
        open_run(q, "03_finetune_atop"),
        open_run(q.replace(classifier_run=first.path.name), "03_finetune_atop"),
    )
    assert by_hand.path == by_batch.path and by_hand.parameters.classifier_run == first.path.name
    by_hand.finish()
    made(p, epochs=9)
    other = open_run(q, "03_finetune_atop")
    assert other.path != by_hand.path
    other.finish()


def notebook_with(path, *sources):
    cells = [{"cell_type": "code", "metadata": {}, "source": [source]} for source in sources]
    cells[0]["metadata"]["tags"] = ["parameters"]
    path.write_text(json.dumps({"cells": cells}))
    return path


def test_a_difference_is_one_sentence_about_code_versions_or_inputs(p, tmp_path):
    (weights := tmp_path / "weights.bin").write_bytes(b"abc")
    (folder := tmp_path / "images" / "train").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"1")
    notebook = notebook_with(tmp_path / f"{STAGE}.ipynb", "a: int = 1", "x = 1")
    p = p.replace(dataset=f"folder:{folder.parent}")
    with open_run(p, STAGE, inputs={"classifier": weights}, notebook=notebook) as run:
        (folder / ".hidden").write_bytes(b"1")
    assert runs.difference(run.path, notebook) == ""
    values = json.loads((run.path / "parameters.json").read_text())
    runs.write_json(run.path / "parameters.json", values | {"classifier": "nets:make"})
    assert "code of your own" in runs.difference(run.path, notebook)
    runs.write_json(run.path / "parameters.json", values)
    (folder / "b.png").write_bytes(b"1")
    assert "data" in runs.difference(run.path, notebook)
    weights.write_bytes(b"abd")
    assert "classifier" in runs.difference(run.path, notebook)
    run.manifest["versions"]["torch"] = "1.0"
    runs.write_json(run.path / "manifest.json", run.manifest)
    assert re.search(r"torch is .*1\.0", runs.difference(run.path, notebook))
    assert "code" in runs.difference(run.path, notebook_with(notebook, "a: int = 1", "x = 2"))


SET = "# to play with\na: int = {}"
EXECUTED = {
    "as it is": ([SET.format(1)], ["x = 1"], False),
    "with other parameters": ([SET.format(3), "# Parameters\na = 5", ""], [" x = 1\n"], False),
    "a parameter that cannot be read": ([SET.format("*"), SET.format(1)], ["x = 1"], False),
    "code among the parameters": ([SET.format(3) + "\nprint(a)"], ["x = 1"], True),
    "an edited cell": ([SET.format(1), "x = 2"], [], True),
    "a cell of one's own": ([SET.format(1), "y = 1"], ["x = 1"], True),
    "a cell edited after the run was opened": ([SET.format(1)], ["x = 2"], True),
}


@pytest.mark.parametrize("before, after, edited", EXECUTED.values(), ids=EXECUTED)
def test_a_run_of_cells_that_the_notebooks_file_does_not_hold_is_known_as_edited_by_hand(
    p, tmp_path, before, after, edited
):
    notebook = notebook_with(tmp_path / "n.ipynb", SET.format(1), "x = 1")
    shell = InteractiveShell.instance()
    try:
        for cell in before:
            shell.run_cell(cell, store_history=True)
        run = open_run(p, STAGE, notebook=notebook)
        for cell in after:
            shell.run_cell(cell, store_history=True)
        run.finish()
    finally:
        shell.history_manager.end_session()
        InteractiveShell.clear_instance()
    assert ("edited by hand" in runs.difference(run.path, notebook)) == edited


HOLD = """
import sys, time
from atoplib.parameters import Parameters
from atoplib.runs import open_run
run = open_run(Parameters(eval(sys.argv[1])), "01_train_classifier")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_on_a_run_stops_with_a_sentence_and_goes_on_once_the_first_was_killed(p):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, repr(p.as_dict())], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(RunInUse, match=f"process {process.pid}"):
            open_run(p, STAGE)
        assert runs.in_use(runs.experiment_dir(p) / run_name(STAGE, p.as_dict()))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run = open_run(p, STAGE)
    (left_over := run.path / ".state.pt.x.part").write_bytes(b"1")
    assert open_run(p, STAGE).manifest["attempts"] == 3 and not left_over.exists()  # a cell executed twice
    run.finish()
    assert not runs.in_use(run.path)


def test_a_workspace_that_cannot_be_written_is_refused_with_what_to_do(p, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match="Choose another workspace"):
        open_run(p, STAGE)


def test_a_full_disk_does_not_end_a_run_at_its_line_of_progress(p, monkeypatch):
    run = open_run(p, STAGE)
    run.progress("half")
    assert runs.latest_line(run.path) == "half"
    monkeypatch.setattr(runs, "write_text", lambda *_: (_ for _ in ()).throw(OSError("full")))
    run.progress("more")
    assert runs.latest_line(run.path) == "half"
    run.finish()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_damaged_json_counts_as_none(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert runs.read_json(tmp_path / "x.json") is None and runs.read_json(tmp_path / "y.json") is None


def test_the_workspace_is_the_projects_wherever_a_notebook_is_started(tmp_path, monkeypatch):
    (project := tmp_path / "project" / "notebooks").mkdir(parents=True)
    (project.parent / "pyproject.toml").touch()
    for folder in (project, project.parent):
        monkeypatch.chdir(folder)
        assert workspace_dir() == project.parent
    monkeypatch.chdir(tmp_path)
    assert (workspace_dir() / "pyproject.toml").is_file()  # where the kit itself lies
    assert workspace_dir(str(tmp_path / "w")) == tmp_path / "w"
