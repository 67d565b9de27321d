"""Several processes train as one does: the same numbers up to rounding, saved by one of them, stopped together."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import KINDS, SETTINGS, Training, colourful, same, tiny_classifier, tiny_pipeline, without_times
from torch import Tensor, nn

from atoplib import stages
from atoplib.attacks import PGDSettings
from atoplib.checkpoints import load_checkpoint, load_state
from atoplib.losses import Objective
from atoplib.parameters import PretrainPurifier, TrainClassifier
from atoplib.runs import locked, read_json, run_name
from atoplib.shares import WHOLE, Share
from atoplib.stages.__main__ import main
from atoplib.training import FineTuningAttack, classifier_step, fit, purifier_step
from atoplib.training.processes import begin_together, joined, share_of
from atoplib.transforms import TransformSettings, sample_draw

TOLERANCE = 2e-4  # of weights of about 0.1 after 10 steps of 0.01; another split of a batch rounds otherwise
EOT = "fine-tuning against an l2 attack that averages over draws"

# Every training on two processes; the last one is stopped by a signal to the second process, and goes on.
PROGRAM = """
import os, signal, sys, torch
from pathlib import Path
from test_processes import ALL, make
from test_training import KINDS
from atoplib.training.processes import joined

folder = Path(sys.argv[1])
with joined(8, device=torch.device("cpu")) as share:
    for number, kind in enumerate(ALL):
        training = make(kind, seed=1 + share.rank)  # the first process's weights count
        history = training.run(share=share, validate=lambda model: {"training": float(model.training)})
        torch.save((training.weights, history), folder / f"{number}-{share.rank}.pt")
    training, steps = make(KINDS[2], seed=1), []
    whole = training.step

    def step(batch, updater):
        steps.append(batch)
        if len(steps) == 4 and share.rank == 1:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                os.kill(os.getpid(), number)
        return whole(batch, updater)

    training.step = step
    try:
        training.run(folder / "state.pt", share=share)
    except KeyboardInterrupt:
        torch.save(len(steps), folder / f"steps-{share.rank}.pt")
    training = make(KINDS[2], seed=5)
    history = training.run(folder / "state.pt", share=share)
    torch.save((training.weights, history), folder / f"resumed-{share.rank}.pt")
"""


def make(kind: str, seed: int) -> Training:
    """A training of ``test_training``, or the one whose attack averages over draws."""
    made = Training(KINDS[2] if kind == EOT else kind, colourful(), seed)
    if kind == EOT:
        pipeline = tiny_pipeline(seed, TransformSettings("rt3", noise_std=0.1, num_masks=2, grid_size=4))
        attack = FineTuningAttack(PGDSettings(0.5, "l2", steps=2, eot_samples=3))
        made.networks = {"purifier": pipeline.purifier}
        made.step = purifier_step(pipeline, Objective("ft_adv"), attack=attack)
    return made


ALL = (KINDS[0], KINDS[2], EOT)


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    here = Path(__file__).resolve().parent
    path = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every training."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "program.py").write_text(PROGRAM)
    ended = torchrun(str(folder / "program.py"), str(folder))
    assert ended.returncode == 0, ended.stderr[-5000:]
    return folder


def load(path: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", ALL)
def test_two_processes_train_what_one_does_up_to_rounding(kind, together):
    alone = make(kind, seed=1)
    before = alone.weights
    history = without_times(alone.run(validate=lambda model: {"training": float(model.training)}))
    weights, found = load(together / f"{ALL.index(kind)}-0.pt")
    assert same(weights, load(together / f"{ALL.index(kind)}-1.pt")[0])
    for name, wanted in alone.weights.items():
        torch.testing.assert_close(
            weights[name], wanted, atol=TOLERANCE, rtol=1e-3, msg=lambda text, at=name: f"{at}: {text}"
        )
    assert max(float((before[name] - alone.weights[name]).abs().max()) for name in before) > 50 * TOLERANCE
    for entry, wanted in zip(without_times(found), history, strict=True):
        assert entry == pytest.approx(wanted, abs=1e-3)


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_go_on_bit_by_bit(together):
    assert [torch.load(together / f"steps-{rank}.pt") for rank in (0, 1)] == [4, 4]
    weights, history = load(together / f"{ALL.index(KINDS[2])}-0.pt")
    resumed, again = load(together / "resumed-0.pt")
    assert same(resumed, weights) and same(load(together / "resumed-1.pt")[0], weights)
    assert without_times(again) == [{k: v for k, v in entry.items() if k != "training"} for entry in without_times(history)]
    assert load_state(together / "state.pt")[0]["step"] == 10


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("transform", ["rt1", "rt2", "rt3"])
def test_the_draws_of_all_shares_are_the_draw_of_the_whole_batch(transform, copies):
    """Rows are images, or several rounds of them, as an attack that averages over draws stacks them."""
    settings = TransformSettings(transform, num_masks=2, grid_size=4)

    def draw(rows: int, share: Share) -> Tensor:
        found = sample_draw(settings, (rows, 3, 8, 8), generator=torch.Generator().manual_seed(3), share=share)
        noise = torch.zeros(rows, 3, 8, 8) if found.noise is None else found.noise
        return torch.cat([found.masks.transpose(0, 1).flatten(1), noise.flatten(1)], dim=1)

    whole = draw(copies * 6, WHOLE).unflatten(0, (copies, 6))
    shares = [draw(copies * 2, Share(rank, 3, 2)).unflatten(0, (copies, 2)) for rank in range(3)]
    assert torch.equal(torch.cat(shares, dim=1), whole)


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared equally by 3 processes; choose a multiple of 3"):
        share_of(8, 0, 3)
    network = tiny_classifier()
    with pytest.raises(ValueError, match="2 processes with 3 images each do not share a batch of 8"):
        fit(classifier_step(network), {"classifier": network}, colourful(), SETTINGS, share=Share(0, 2, 3))


def test_a_normalisation_that_several_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="cannot train a BatchNorm1d"):
        begin_together([nn.BatchNorm1d(3)], Share(0, 2, 4))


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(7, device=torch.device("cpu")) as share:
        assert share is WHOLE


# --- the command, and the notebooks that start it


def parameters(workspace: Path, **changes: object) -> TrainClassifier:
    tiny = {"classifier_options": {"width": 2, "stem_stride": 2}, "max_train": 256, "max_test": 50, "epochs": 30}
    here = {"workspace": str(workspace), "device": "cpu", "dtype": "float32", "learning_rate": 0.02}
    return TrainClassifier.from_mapping({**tiny, **here, "batch_size": 32, **changes})


def test_a_notebook_starts_its_processes_and_reads_back_what_one_would_train(tmp_path):
    first = parameters(tmp_path, epochs=1)
    dataset = first.load_data()
    stages.train(first, stages.classifier_stage(first, dataset), dataset)
    tiny = {"purifier_options": {"width": 4, "blocks": 0, "fold": 4}, "max_train": 256, "max_test": 50, "epochs": 2}
    here = {"workspace": str(tmp_path), "device": "cpu", "dtype": "float32", "learning_rate": 0.01, "batch_size": 16}
    p = PretrainPurifier.from_mapping({**tiny, **here, "processes": 2})
    stage = stages.pretraining_stage(p, dataset)
    together = stages.train(p, stage, dataset)
    run_dir = p.experiment_dir / run_name(p.STAGE, p.as_dict())
    assert together.run.path == run_dir and read_json(run_dir / "manifest.json")["status"] == "complete"
    stage.model.reseed(p.seed)
    assert not stage.model.training and stages.run.accuracy(stage.model, dataset.test) == together.test_accuracy
    weights = {name: weight.clone() for name, weight in stage.result.state_dict().items()}
    run_dir.rename(tmp_path / "together")
    p = replace(p, processes=1)
    stage = stages.pretraining_stage(p, dataset)
    alone = stages.train(p, stage, dataset)
    assert alone.run.path == run_dir  # by how many a run is trained does not change what it is
    assert alone.test_accuracy == pytest.approx(together.test_accuracy, abs=0.05)
    for entry, wanted in zip(together.history, alone.history, strict=True):
        assert entry["loss"] == pytest.approx(wanted["loss"], rel=1e-4) and entry["epoch"] == wanted["epoch"]
    for name, wanted in stage.result.state_dict().items():
        off = (weights[name] - wanted).abs()  # Adam makes a whole step of a gradient that is nothing but rounding: a few may be off
        assert (off > TOLERANCE + 1e-3 * wanted.abs()).float().mean() <= 0.01 and off.max() < 1e-3, name


def test_a_ctrl_c_is_passed_on_to_the_processes_and_their_end_waited_for(tmp_path, monkeypatch):
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    script = f"#!/bin/sh\ntrap 'sleep 0.3; touch {ended}; exit 1' TERM\ntouch {begun}\nwhile :; do sleep 0.05; done\n"
    (tmp_path / "python").write_text(script)
    (tmp_path / "python").chmod(0o755)
    p = parameters(tmp_path, processes=2)
    stage = stages.classifier_stage(p, dataset := p.load_data())

    def press(run_dir: Path) -> str:
        if begun.exists():
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(stages.launch, "latest_line", press)
    with pytest.raises(KeyboardInterrupt):
        stages.train(p, stage, dataset)
    assert ended.exists()


def test_why_the_processes_failed_is_told_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho starting; echo 'atoplib.stages: no luck'; echo gone; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    p = parameters(tmp_path, processes=2)
    stage = stages.classifier_stage(p, dataset := p.load_data())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(stages.TrainingFailed, match=r"2 processes did not train 01_.* to its end: no luck\nlog: .*\.log"):
        stages.train(p, stage, dataset)
    with pytest.raises(ValueError, match="a network of your own cannot be built by 2 processes: choose processes = 1"):
        stages.train(p, replace(stage, given={"classifier": "0"}), dataset)


def test_the_command_trains_alone_as_a_notebook_does_and_complains_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    p = parameters(tmp_path, epochs=1)
    (tmp_path / "p.yaml").write_text(json.dumps({**p.as_dict(), "learning_rate": "1/50"}))
    main([p.STAGE, str(tmp_path / "p.yaml")])
    run_dir = p.experiment_dir / run_name(p.STAGE, p.as_dict())
    assert f"run directory: {run_dir}" in capsys.readouterr().out and (run_dir / "classifier.safetensors").is_file()
    with locked(run_dir / "run.lock"), pytest.raises(SystemExit, match="1"):
        main([p.STAGE, str(tmp_path / "p.yaml")])
    assert "atoplib.stages: " in (said := capsys.readouterr().err) and "is in use by process" in said
    (tmp_path / "p.yaml").write_text("epochz: 3")
    with pytest.raises(SystemExit, match="1"):
        main([p.STAGE, str(tmp_path / "p.yaml")])
    assert "atoplib.stages: 01_train_classifier has no parameter 'epochz'" in capsys.readouterr().err


def test_every_nth_epoch_keeps_a_checkpoint_of_its_own_and_the_last_one_is_the_result(tmp_path):
    p = parameters(tmp_path, epochs=5, max_train=32, batch_size=16, keep_every=2, ema_decay=0.5)
    stage = stages.classifier_stage(p, dataset := p.load_data())
    run, history, *_ = stages.train(p, stage, dataset)
    assert run.path.name == run_name(p.STAGE, replace(p, keep_every=0).as_dict())
    names = ["classifier-epoch0002.safetensors", "classifier-epoch0004.safetensors", "classifier.safetensors"]
    assert sorted(path.name for path in run.path.glob("*.safetensors")) == names
    for name, entry in zip(names, (history[1], history[3], history[4]), strict=True):
        kept, header = load_checkpoint(run.path / name, kind="classifier")
        assert stages.run.accuracy(kept, dataset.test) == entry["test_accuracy"] and header.get("epoch", 5) == entry["epoch"]
    with pytest.raises(ValueError, match="keep_every must be 0 .* or more, got -1"):
        parameters(tmp_path, keep_every=-1)
