"""The short version of benchmarks/kill_and_resume.py: a training that is killed again and again ends as one that was not."""

import copy
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import kill_and_resume


def test_a_training_that_is_killed_ends_with_the_same_bits(capsys):
    arguments = ["--kills", "2", "--stages", "finetune", "--epochs", "2", "--images", "96", "--spread", "0.05"]
    assert kill_and_resume.main(arguments) == 0
    assert "| finetune | 2 | " in capsys.readouterr().out


def test_a_result_with_other_bits_is_reported(monkeypatch, capsys):
    """What the comparison would say if resuming lost something."""

    def train(command: list[str], **_: object) -> None:
        folder = Path(command[command.index("--folder") + 1])
        folder.mkdir()
        torch.save({"weights": {"a": torch.full((2,), float("peace" in folder.name))}, "history": []}, folder / "result.pt")

    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(kill_and_resume, "kill_once", lambda *_, while_saving: while_saving)
    assert kill_and_resume.main(["--kills", "3", "--stages", "classifier"]) == 1
    assert "| classifier | 3 | 1 | DIFFERENT |" in capsys.readouterr().out


def test_equality_is_bit_by_bit():
    first = {"weights": {"a": torch.zeros(2)}, "history": [{"loss": 1.0}]}
    second = copy.deepcopy(first)
    assert kill_and_resume.same(first, second)
    second["weights"]["a"][0] = 1e-30
    assert not kill_and_resume.same(first, second)
    assert not kill_and_resume.same(first, {**first, "history": []}) and not kill_and_resume.same(first, {"weights": {}})


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit):
        kill_and_resume.main(["--stages", "nothing"])
    assert "unknown stage 'nothing'; allowed: classifier" in capsys.readouterr().err
