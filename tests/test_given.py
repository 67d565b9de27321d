"""Networks of one's own in the training notebooks: another network is another training, and its result is found again."""

import json
import os

import pytest
import torch
from torch import nn

from atoplib import stages
from atoplib.checkpoints import CheckpointError, holds, load_checkpoint, load_own, read_header, save_checkpoint
from atoplib.data import load_dataset
from atoplib.parameters import Attack, FinetuneAtop, PretrainPurifier, TrainClassifier
from atoplib.stages.given import fingerprint_of

SMALL = {"max_train": 32, "max_test": 8, "batch_size": 16, "max_steps": 1}


class Reader(nn.Module):
    """A classifier that is none of ours."""

    def __init__(self, seed: int = 0, slope: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.slope = slope
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, 10))

    def forward(self, images):
        return self.layers(images) + self.slope


class Painter(nn.Module):
    """A purifier that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, given):
        return torch.tanh(self.layer(given))


def run_stage(kind, build, folder, said=None, settings=None, **networks):
    p = kind(workspace=str(folder), **SMALL, **(settings or {}))
    dataset = load_dataset("mnist5k", data_dir=folder, max_train=32, max_test=8)
    return stages.train(p, build(p, dataset, **networks), dataset, notify=lambda text: said is None or text.startswith("Loaded, ") or said.append(text))


def classifier(folder, network, said=None):
    return run_stage(TrainClassifier, stages.classifier_stage, folder, said, classifier=network)


def pretrained(folder, **networks):
    return run_stage(PretrainPurifier, stages.pretraining_stage, folder, **networks)


def finetuned(folder, said=None, **networks):
    return run_stage(FinetuneAtop, stages.finetuning_stage, folder, said, **networks)


@pytest.mark.parametrize("other", [lambda: Reader(seed=1), lambda: Reader(slope=0.5), None])
def test_another_network_is_another_training_and_the_first_is_kept(tmp_path, other):
    said = []
    first = classifier(tmp_path, Reader(), said)
    path = first.run.path / "classifier.safetensors"
    kept = path.read_bytes()
    assert classifier(tmp_path, Reader(), said).history == first.history and path.read_bytes() == kept, "only loaded"
    assert not said
    second = classifier(tmp_path, None if other is None else other(), said)
    assert second.run.path == first.run.path and path.read_bytes() != kept
    assert "has changed since it was begun (your own classifier): it starts anew" in said[0]
    assert (first.run.path / "other-inputs-1" / "classifier.safetensors").read_bytes() == kept


def test_an_object_that_was_trained_is_still_the_one_that_was_given(tmp_path):
    network, said = Reader(), []
    before = fingerprint_of(network)
    first = classifier(tmp_path, network, said)
    assert classifier(tmp_path, network, said).history == first.history and not said, "the same cell once more"
    assert fingerprint_of(network) == before == fingerprint_of(Reader()) != fingerprint_of(Reader(seed=1))
    network.load_state_dict(Reader(seed=1).state_dict())
    again = classifier(tmp_path, network, said)
    assert "has changed since it was begun (your own classifier)" in said[0] and again.history != first.history


def test_a_training_of_ones_own_network_that_was_cut_off_goes_on_with_the_same_object(tmp_path, monkeypatch):
    network, before, said = Reader(), fingerprint_of(Reader()), []

    def cut_off(*_, **__):
        with torch.no_grad():
            network.layers[0].weight.add_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages.run, "fit_stage", cut_off)
        with pytest.raises(KeyboardInterrupt):
            classifier(tmp_path, network)
    assert fingerprint_of(network) == before
    classifier(tmp_path, network, said)
    assert not said


def test_in_front_of_another_classifier_the_purifier_is_tuned_anew(tmp_path):
    run_stage(TrainClassifier, stages.classifier_stage, tmp_path, settings={"classifier_options": {"width": 4}})
    pretrained(tmp_path)
    usual = finetuned(tmp_path)
    weights = (usual.run.path / "purifier.safetensors").read_bytes()
    said = []
    own = finetuned(tmp_path, said, classifier=Reader())
    assert own.run.path == usual.run.path and "(classifier, your own classifier)" in said[0]
    assert (own.run.path / "purifier.safetensors").read_bytes() != weights
    asked = Attack(workspace=str(tmp_path))
    with pytest.raises(ValueError, match="fine-tuned for a classifier of one's own .Reader., which no notebook can build"):
        asked.classifier_of("atop")
    assert Attack(workspace=str(tmp_path), atop_classifier_run="latest").classifier_of("atop").is_file()


def test_from_notebook_to_notebook_ones_own_networks_are_given_again(tmp_path):
    path = classifier(tmp_path, Reader()).run.path / "classifier.safetensors"
    assert read_header(path)["architecture"] == "own: Reader"
    with pytest.raises(CheckpointError, match=r"holds a classifier of one's own .Reader., which only its author can build"):
        pretrained(tmp_path, purifier=Painter())
    reader = load_own(path, Reader, kind="classifier")
    painted = pretrained(tmp_path, purifier=Painter(), classifier=reader).run.path / "purifier.safetensors"
    with pytest.raises(CheckpointError, match=r"holds a purifier of one's own .Painter."):
        finetuned(tmp_path, classifier=reader)
    painter = load_own(painted, Painter, kind="purifier")
    before = painter.layer.weight.detach().clone()
    tuned = finetuned(tmp_path, classifier=reader, purifier=painter).run.path / "purifier.safetensors"
    again = load_own(tuned, Painter, kind="purifier")
    assert not torch.equal(again.layer.weight, before) and torch.equal(again.layer.weight, painter.layer.weight)
    with pytest.raises(CheckpointError, match="belong to another architecture"):
        load_own(tuned, Reader, kind="purifier")


def test_a_run_that_is_only_loaded_leaves_its_file_as_it_was_wherever_it_is_called_from(tmp_path):
    settings = {"classifier_options": {"width": 4}}
    first = run_stage(TrainClassifier, stages.classifier_stage, tmp_path, settings=settings)
    path = first.run.path / "classifier.safetensors"
    content, stamp = path.read_bytes(), path.stat().st_mtime_ns
    other = {"data_dir": str(tmp_path / "data"), "keep_every": 5, "device": "cpu", **settings}
    run_stage(TrainClassifier, stages.classifier_stage, f"{tmp_path}{os.sep}", settings=other)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, stamp)
    assert str(tmp_path) not in json.dumps(read_header(path))
    path.write_bytes(content[:-3])
    run_stage(TrainClassifier, stages.classifier_stage, tmp_path, settings=settings)
    assert path.read_bytes() == content, "a damaged one is written again"


def test_a_file_holds_a_network_only_if_every_weight_is_the_same(tmp_path):
    path, network = tmp_path / "c.safetensors", Reader()
    assert not holds(path, network)
    save_checkpoint(path, network, kind="classifier", architecture="own: Reader", options={})
    assert holds(path, network) and not holds(path, Reader(seed=1)) and not holds(path, Painter())
    with pytest.raises(CheckpointError, match="load it by checkpoints.load_own"):
        load_checkpoint(path, kind="classifier")
