"""The short version of benchmarks/kill_and_resume.py: a training that is killed again and again ends as one that was not."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kill_and_resume

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "stage, signals, options",
    [
        ("finetune", "KILL", ("--epochs", "2", "--images", "96", "--spread", "0.05")),
        ("classifier", "TERM,INT", ("--epochs", "2", "--images", "160", "--spread", "0.02")),
        ("evaluation", "KILL", ("--images", "64", "--spread", "0.1")),
    ],
)
def test_what_is_killed_ends_with_the_same_bits(stage, signals, options):
    """In a process of its own, because this one has had threads, which a fork does not take along."""
    arguments = ["--kills", "3", "--stages", stage, "--signals", signals, *options]
    command = [sys.executable, kill_and_resume.__file__, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
    assert f"| {stage} | 3 | " in ended.stdout and "equal, bit by bit" in ended.stdout


def test_a_result_with_other_bits_is_reported(monkeypatch, capsys):
    """What the comparison would say if resuming lost something."""
    monkeypatch.setattr(kill_and_resume, "finish", lambda stage, folder, options: {"peace": "peace" in folder.name})
    monkeypatch.setattr(kill_and_resume, "kill_once", lambda *_, while_saving: while_saving)
    assert kill_and_resume.main(["--kills", "3", "--stages", "classifier"]) == 1
    assert "| classifier | 3 | 1 | DIFFERENT |" in capsys.readouterr().out


def test_a_save_that_is_renamed_while_it_is_looked_at_counts_as_none(tmp_path):
    """As state.pt is, between the listing of the directory and the look at its time."""
    (tmp_path / "classifier-0").mkdir()
    (tmp_path / "classifier-0" / "state.pt").symlink_to(tmp_path / "gone")
    assert kill_and_resume.steps_saved(tmp_path) == 0.0
    (tmp_path / "gone").touch()
    assert kill_and_resume.steps_saved(tmp_path) > 0.0


def test_equality_is_bit_by_bit():
    first = {"weights": {"a": torch.zeros(2)}, "history": [{"loss": 1.0}]}
    second = copy.deepcopy(first)
    assert kill_and_resume.same(first, second)
    second["weights"]["a"][0] = 1e-30
    assert not kill_and_resume.same(first, second)
    assert not kill_and_resume.same(first, {**first, "history": []}) and not kill_and_resume.same(first, {"weights": {}})


def test_what_does_not_end_within_ten_seconds_of_sigterm_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_and_resume, "MOST_SECONDS_TO_END", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(TimeoutError, match="it went on for 0 s after SIGTERM"):
            kill_and_resume.struck(process.pid, tmp_path, "TERM")


@pytest.mark.parametrize(
    "option, message",
    [
        ("--stages", "unknown stage 'nothing'; allowed: classifier, "),
        ("--signals", "unknown signal 'nothing'; allowed: KILL"),
    ],
)
def test_an_unknown_stage_or_signal_is_refused(option, message, capsys):
    with pytest.raises(SystemExit):
        kill_and_resume.main([option, "nothing"])
    assert message in capsys.readouterr().err
