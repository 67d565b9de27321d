"""A run's directory tells what it was and how it ended, and is found again."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from atoplib import runs
from atoplib.runs import (
    RunInUse,
    find_run,
    finished_runs,
    locked,
    open_run,
    read_json,
    run_name,
    source_revision,
    workspace_dir,
)

CPU = torch.device("cpu")
PARAMETERS = {"eps": 0.3, "seed": 7, "adversarial": False, "workspace": "/a", "data_dir": "/b", "device": "cpu"}


def make_run(folder: Path, stage: str = "01_train_classifier", **changes: object) -> Path:
    with open_run(folder, stage, {**PARAMETERS, **changes}, device=CPU) as run:
        pass
    return run.path


@pytest.mark.parametrize("place", ["workspace", "data_dir", "device"])
def test_the_name_does_not_depend_on_places(place):
    assert run_name("01", {**PARAMETERS, place: "elsewhere"}) == run_name("01", PARAMETERS)


@pytest.mark.parametrize("change", [{"eps": 0.31}, {"seed": 8}, {"adversarial": True}, {"more": None}])
def test_the_name_depends_on_every_other_parameter_and_on_the_stage(change):
    assert run_name("01", {**PARAMETERS, **change}) != run_name("01", PARAMETERS)
    assert run_name("02", PARAMETERS) != run_name("01", PARAMETERS)


def test_the_name_is_the_same_in_every_process_and_order():
    name = run_name("01_train_classifier", PARAMETERS)
    assert name == run_name("01_train_classifier", dict(reversed(PARAMETERS.items())))
    assert name == "01_train_classifier-9fca833e"


def test_a_run_is_running_inside_the_block_and_complete_after_it(tmp_path):
    with open_run(tmp_path, "01_train_classifier", PARAMETERS, device=CPU) as run:
        inside = read_json(run.path / "manifest.json")
        assert inside["status"] == "running" and finished_runs(tmp_path, "01_train_classifier") == []
    after = read_json(run.path / "manifest.json")
    assert after["status"] == "complete" and "error" not in after
    assert after["stage"] == "01_train_classifier" and after["seed"] == 7 and after["process"] == os.getpid()
    assert after["versions"]["torch"] == version("torch") and {"python", "numpy"} <= set(after["versions"])
    assert "threads" in after["device"] and after["revision"] and after["platform"]
    assert after["started"][:19] <= after["ended"] and after["seconds"] >= 0
    assert read_json(run.path / "parameters.json") == PARAMETERS


@pytest.mark.parametrize(
    "error, status, text",
    [
        (ValueError("wrong"), "failed", "ValueError: wrong"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt: "),
        (SystemExit(1), "failed", "SystemExit: 1"),
    ],
)
def test_a_run_that_did_not_end_well_says_how_and_hands_the_error_on(tmp_path, error, status, text):
    with pytest.raises(type(error)), open_run(tmp_path, "01", PARAMETERS, device=CPU) as run:
        raise error
    manifest = read_json(run.path / "manifest.json")
    assert (manifest["status"], manifest["error"]) == (status, text)
    assert finished_runs(tmp_path, "01") == []


def test_earlier_metrics_and_results_survive_until_new_ones_come(tmp_path):
    with open_run(tmp_path, "01", PARAMETERS, device=CPU) as run:
        run.record(accuracy=0.9, history=[{"loss": 1.0}])
        run.state_path.write_bytes(b"state")
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, "01", PARAMETERS, device=CPU) as again:
        assert again.path == run.path and again.metrics["accuracy"] == 0.9
        again.record(seconds=3)
        raise KeyboardInterrupt
    assert read_json(run.path / "metrics.json") == {"accuracy": 0.9, "history": [{"loss": 1.0}], "seconds": 3}
    assert run.state_path.read_bytes() == b"state"
    assert read_json(run.path / "manifest.json")["status"] == "interrupted"


def test_a_new_run_in_the_same_directory_forgets_the_old_error(tmp_path):
    with pytest.raises(ValueError), open_run(tmp_path, "01", PARAMETERS, device=CPU):
        raise ValueError
    assert "error" not in read_json(make_run(tmp_path, "01") / "manifest.json")


def test_inputs_are_kept_with_their_hashes(tmp_path):
    weights = tmp_path / "01-abc" / "weights"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    with open_run(tmp_path, "02", PARAMETERS, device=CPU) as run:
        run.input(classifier=weights)
    kept = read_json(run.path / "manifest.json")["inputs"]
    assert kept == {"classifier": {"file": "01-abc/weights", "sha256": hashlib.sha256(b"weights").hexdigest()}}


def test_the_line_of_progress_is_there_to_read_and_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    with open_run(tmp_path, "01", PARAMETERS, device=CPU) as run:
        run.progress("half")
        assert (run.path / "progress.txt").read_text() == "half\n"

        def full(*_):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            run.progress("more")
    assert read_json(run.path / "manifest.json")["status"] == "complete"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_damaged_json_counts_as_none(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read_json(tmp_path / "a.json") is None and read_json(tmp_path / "b.json") is None


def test_the_latest_run_is_the_one_that_ended_last(tmp_path):
    made = [make_run(tmp_path, seed=seed) for seed in range(5)]
    assert finished_runs(tmp_path, "01_train_classifier") == made
    assert find_run(tmp_path, "01_train_classifier") == made[-1]
    again = make_run(tmp_path, seed=2)
    assert find_run(tmp_path, "01_train_classifier") == again == made[2]


def test_the_latest_run_is_complete_of_its_stage_and_as_wanted(tmp_path):
    wanted = make_run(tmp_path)
    make_run(tmp_path, adversarial=True)
    make_run(tmp_path, "01_train_classifier_too")
    with pytest.raises(ValueError), open_run(tmp_path, "01_train_classifier", {**PARAMETERS, "seed": 1}, device=CPU):
        raise ValueError
    (tmp_path / "01_train_classifier-damaged").mkdir()
    (tmp_path / "01_train_classifier-damaged" / "manifest.json").write_text("{")
    assert find_run(tmp_path, "01_train_classifier", adversarial=False) == wanted
    assert find_run(tmp_path, "01_train_classifier", "latest", adversarial=False, seed=7) == wanted


def test_a_run_is_found_by_its_name_and_by_its_path(tmp_path):
    older, _ = make_run(tmp_path, seed=1), make_run(tmp_path, seed=2)
    assert find_run(tmp_path, "01_train_classifier", older.name) == older
    assert find_run(tmp_path / "nowhere", "01_train_classifier", str(older)) == older


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_missing_run_names_the_notebook_to_run_first(tmp_path, folder):
    make_run(tmp_path, "02_pretrain_purifier")
    message = r"no complete run of 01_train_classifier, adversarial = False: run the notebook 01_train_classifier\.ipynb"
    with pytest.raises(FileNotFoundError, match=message):
        find_run(tmp_path / folder, "01_train_classifier", adversarial=False)


def test_where_a_run_is_no_match_the_message_says_in_what_it_differs(tmp_path):
    make_run(tmp_path, dataset="a", image_size=64, seed=0)
    last = make_run(tmp_path, dataset="a", image_size=32, seed=1)
    said = re.escape(f"dataset = 'b' ({last.name} has dataset = 'a', not 'b'; image_size = 32, not None): run the notebook")
    with pytest.raises(FileNotFoundError, match=f"{said}.*or name a run in place of 'latest'"):
        find_run(tmp_path, "01_train_classifier", dataset="b", image_size=None)


@pytest.mark.parametrize("which", ["01_train_classifier-00000000", "", ".."])
def test_a_name_that_is_no_run_is_refused(tmp_path, which):
    make_run(tmp_path / "experiment")
    with pytest.raises(FileNotFoundError, match="there is no run .*; give 'latest' or a name"):
        find_run(tmp_path / "experiment", "01_train_classifier", which)


def test_the_revision_tells_whether_the_source_was_edited(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert source_revision(tmp_path) == "unknown"
    git("init")
    assert source_revision(tmp_path) == "unknown"  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    revision = git("rev-parse", "HEAD")
    assert source_revision(tmp_path) == revision
    (tmp_path / "a").write_text("2")
    assert source_revision(tmp_path) == f"{revision}+changes"
    recorded = read_json(make_run(tmp_path / "runs") / "manifest.json")["revision"]
    assert recorded == source_revision(Path(runs.__file__).parent)


def test_a_machine_without_git_can_run_too(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert source_revision(tmp_path) == "unknown"


def test_the_workspace_is_the_project_wherever_in_it_the_notebook_runs(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "notebooks" / "recipes").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    for folder in (project, project / "notebooks", project / "notebooks" / "recipes"):
        monkeypatch.chdir(folder)
        assert workspace_dir() == project
    monkeypatch.chdir(tmp_path)
    assert workspace_dir() == Path(__file__).resolve().parents[1], "where the kit itself lies"
    assert workspace_dir("elsewhere") == tmp_path / "elsewhere"


def test_every_file_of_a_run_is_json_that_any_reader_takes(tmp_path):
    with open_run(tmp_path, "01", PARAMETERS, device=CPU) as run:
        with pytest.raises(ValueError):
            run.record(loss=float("nan"))
    for path in run.path.glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name, path=path: pytest.fail(f"{path} holds {name}"))


# Holds a lock until it is killed, in another process.
HOLDER = """
import sys, time
from pathlib import Path
from atoplib.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_on_a_run_stops_with_a_sentence_and_goes_on_once_the_first_was_killed(tmp_path):
    path = make_run(tmp_path)
    before = {file: file.read_bytes() for file in path.iterdir() if file.name != "run.lock"}
    with held_elsewhere(path / "run.lock") as other:
        with pytest.raises(
            RunInUse, match=f"{re.escape(str(path))} is in use by process {other.pid} on .*Wait until it ends"
        ):
            make_run(tmp_path)
        assert {file: file.read_bytes() for file in path.iterdir() if file.name != "run.lock"} == before
        other.kill()  # -9: it cannot clean up
        other.wait()
        assert make_run(tmp_path) == path


def test_a_run_can_be_opened_again_by_the_same_process_after_it_ended_but_not_inside(tmp_path):
    with open_run(tmp_path, "01", PARAMETERS, device=CPU):
        with pytest.raises(RunInUse, match=f"in use by process {os.getpid()} on"):
            make_run(tmp_path, "01")
    assert make_run(tmp_path, "01")


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", unknown)
    assert read_json(make_run(tmp_path) / "manifest.json")["status"] == "complete"


def test_what_a_killed_process_left_half_written_is_removed_when_the_run_goes_on(tmp_path):
    path = make_run(tmp_path)
    (path / ".state.pt.newest.abc.part").write_bytes(b"half")
    (path / "state.pt").write_bytes(b"whole")
    make_run(tmp_path)
    assert not list(path.glob("*.part")) and (path / "state.pt").read_bytes() == b"whole"


@contextmanager
def read_only(folder):
    """A folder that this user may not write; root, who may, becomes nobody meanwhile."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("existing", [False, True])
def test_a_read_only_directory_is_refused_with_what_to_do(tmp_path, monkeypatch, existing):
    monkeypatch.chdir(tmp_path)  # a relative path needs no rights on the folders above
    where = Path(".")
    folder = make_run(where) if existing else where
    with (
        read_only(folder),
        pytest.raises(OSError, match="could not (make|write) .*: Permission denied. Choose another workspace"),
    ):
        make_run(where)


@pytest.mark.parametrize("year", [1970, 2200])
def test_the_latest_run_is_the_last_one_even_if_the_clock_jumps(tmp_path, monkeypatch, year):
    first = make_run(tmp_path, seed=1)

    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime(year, 1, 1, tzinfo=UTC)

    with monkeypatch.context() as jumped:
        jumped.setattr(runs, "datetime", Clock)
        second = make_run(tmp_path, seed=2)
    assert find_run(tmp_path, "01_train_classifier") == second
    third = make_run(tmp_path, seed=3)
    assert finished_runs(tmp_path, "01_train_classifier") == [first, second, third]


def test_runs_of_an_earlier_version_come_before_those_that_are_numbered(tmp_path):
    numbered, old = make_run(tmp_path, seed=1), make_run(tmp_path, seed=2)
    manifest = read_json(old / "manifest.json")
    del manifest["number"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert finished_runs(tmp_path, "01_train_classifier") == [old, numbered]


def test_a_lock_names_its_holder_only(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on a machine with a very long name indeed\n")
    with locked(tmp_path / "run.lock"):
        assert re.fullmatch(rf"process {os.getpid()} on \S+\n", (tmp_path / "run.lock").read_text())
