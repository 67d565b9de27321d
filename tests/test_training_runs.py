"""The runs of notebooks 1 to 3: how they find each other, and what makes a run another run."""

import json

import pytest
import torch
from torch import nn

from atoplib import checkpoints, defences, figures, freezing
from atoplib.data import load_images
from tests.training_cells import STAGES, execute


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    for name in ("image_grid", "purification_grid"):
        monkeypatch.setattr(figures, name, lambda *_, **__: None)


def test_notebooks_find_each_others_runs_and_load_them_however_they_are_named(tmp_path):
    _, first = execute(STAGES[0], tmp_path)
    said, second = execute(STAGES[1], tmp_path)
    assert second.p.classifier_run == first.run.path.name and not said
    _, third = execute(
        STAGES[2], tmp_path, classifier_run=first.run.path.name, purifier_run=second.run.path.name
    )
    said, by_hand = execute(STAGES[2], tmp_path)  # "latest"
    assert said[0].startswith("Loaded, not trained again") and by_hand.run.path == third.run.path
    assert by_hand.metrics == third.metrics
    header = checkpoints.read_header(third.run.path / "purifier.safetensors")
    assert header["classifier"] == first.run.path.name and str(tmp_path) not in json.dumps(header)
    assert header["metrics"]["classifier_flops"] == first.run.metrics["train_flops"] > 0
    manifest = json.loads((third.run.path / "manifest.json").read_text())
    assert manifest["status"] == "complete" and set(manifest["inputs"]) == {"classifier", "purifier"}


def test_a_purifier_reads_the_features_of_the_run_that_it_is_given_and_its_cost_holds_theirs(tmp_path):
    small = {
        "purifier": "robust_encoder",
        "purifier_options": {"encoder_width": 8, "stem_stride": 2, "width": 4},
    }
    _, at = execute(STAGES[0], tmp_path, adversarial=True, attack_steps=1)
    _, first = execute(STAGES[1], tmp_path, classifier_run="pretrained", **small)
    assert first.inputs["encoder"].parent == at.run.path
    expected, encoder = freezing.freeze(at.network).state_dict(), first.network.encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.items())
    with pytest.raises(ValueError, match="gated_unet reads no encoder_run: leave it empty"):
        execute(STAGES[1], tmp_path, classifier_run="pretrained", encoder_run="pretrained")
    _, atop = execute(STAGES[2], tmp_path, classifier_run="pretrained")
    assert (
        atop.header["architecture"] == small["purifier"]
        and atop.metrics["pretrain_flops"] == first.metrics["train_flops"] + at.run.metrics["train_flops"]
    )


@pytest.mark.parametrize(
    "stage, old, new",
    [
        (STAGES[0], "logits = model(x).float()", "logits = 2 * model(x).float()"),
        (STAGES[1], "network = network.to(", "network.front = None; network = network.to("),
        (STAGES[2], '{"reconstruction": reconstruction', '{"reconstruction": 0 * reconstruction'),
        (STAGES[2], 'white_box = p.threat_model == "white-box"', "white_box = False"),
    ],
)
def test_an_edit_of_a_step_an_attack_or_a_network_is_another_training(tmp_path, stage, old, new):
    _, first = execute(stage, tmp_path)
    said, _ = execute(stage, tmp_path)
    assert any(sentence.startswith("Loaded") for sentence in said)
    said, second = execute(stage, tmp_path, [(old, new)])
    assert any(sentence.startswith("Trained anew, not loaded (changed:") for sentence in said)
    assert second.run.path == first.run.path and (first.run.path / "superseded-1" / ".state.pt").is_file()
    said, third = execute(stage, tmp_path)  # the edit is taken back
    assert any("comes back" in sentence for sentence in said) and any("Loaded" in each for each in said)
    assert third.metrics["test_accuracy"] == first.metrics["test_accuracy"]


def test_a_training_that_is_only_loaded_keeps_the_time_that_it_took(tmp_path):
    _, first = execute(STAGES[0], tmp_path)
    first.run.finish()
    path = first.run.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1234, "ended": "once"}))
    _, again = execute(STAGES[0], tmp_path)
    again.run.finish()
    assert {**json.loads(path.read_text()), "seconds": 1234, "ended": "once"} == json.loads(path.read_text())


def test_a_classifier_starts_from_another_runs_weights_and_owes_its_cost(tmp_path):
    _, first = execute(STAGES[0], tmp_path)
    name, small = first.run.path.name, dict(learning_rate=1e-12, adversarial=True, attack_steps=1)
    _, second = execute(STAGES[0], tmp_path, start_run=name, **small)
    moved = [
        (a - b).abs().max()
        for a, b in zip(second.network.parameters(), first.network.parameters(), strict=True)
    ]
    assert second.run.path != first.run.path and max(moved) < 1e-6, (
        "at no learning rate they stay what they were"
    )
    spent = defences.training_flops(second.run.path / "classifier.safetensors")
    assert spent == first.metrics["train_flops"] + second.metrics["train_flops"]
    with pytest.raises(checkpoints.CheckpointError, match="belong to another architecture"):
        execute(STAGES[0], tmp_path, start_run=name, classifier_options={"width": 4})


def test_a_classifier_learns_on_purified_images_and_is_measured_behind_the_purifier(tmp_path):
    _, run = execute(STAGES[0], tmp_path, purifier_run="pretrained", adversarial=True, attack_steps=1)
    assert checkpoints.read_header(run.run.path / "classifier.safetensors")["purifier"] == "pretrained"
    assert run.history[-1]["test_accuracy"] == run.metrics["test_accuracy"]
    with pytest.raises(FileNotFoundError, match="run the notebook 01_train_classifier"):
        defences.find_weights(run.p, "latest")  # of a classifier that is given images as they are


def test_networks_of_ones_own_are_a_line_each_and_their_files_say_so(tmp_path):
    own = [
        (
            "frozen = defences.load_classifier(p)",
            "frozen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))",
        ),
        (
            "network, header = defences.load_purifier(p)",
            "network, header = torch.nn.Conv2d(5, 3, 1), {'architecture': 'gated_unet', 'options': {}}",
        ),
    ]
    _, run = execute(STAGES[2], tmp_path, own)
    path = run.run.path / "purifier.safetensors"
    header = checkpoints.read_header(path)
    assert header["architecture"] == "custom: Conv2d" and header["classifier"] == "custom: Sequential"
    again, _ = checkpoints.load(path, kind="purifier", build=lambda: nn.Conv2d(5, 3, 1))
    assert torch.equal(again.weight, run.network.weight)
    with pytest.raises(checkpoints.CheckpointError, match="custom purifier"):
        defences.load_purifier(run.p.replace(purifier_run=run.run.path.name))


def foreign_resnet(planes=4):
    """Somebody's network: images normalised elsewhere."""
    return nn.Sequential(
        nn.Conv2d(3, planes, 3, 4),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(planes * 64, 10),
    )


def test_somebodys_weights_need_parameters_alone(tmp_path):
    torch.manual_seed(3)
    network, path = foreign_resnet(), tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    given = dict(
        classifier_run=str(path), mean=[0.1] * 3, std=[0.3] * 3, classifier=f"{__name__}:foreign_resnet"
    )
    _, run = execute(STAGES[2], tmp_path, classifier_options={"planes": 4}, **given)
    images = load_images("mnist5k", 4)[0]
    assert torch.allclose(run.pipeline.classifier(images), network.eval()((images - 0.1) / 0.3), atol=1e-4)
    assert checkpoints.read_header(run.run.path / "purifier.safetensors")["classifier"] == str(path)
    with pytest.raises(checkpoints.CheckpointError, match="was not written by atoplib"):
        defences.load_classifier(run.p.replace(classifier=""))
    plain = defences.load_classifier(run.p.replace(mean=None, std=None))
    assert torch.allclose(plain(images), network(images), atol=1e-4)
