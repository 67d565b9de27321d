"""What notebooks 1 to 3 train: counted once, and honest about a training that failed."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from atoplib import stages
from atoplib.batch import Job, cli
from atoplib.checkpoints import load_checkpoint, read_header
from atoplib.data import load_dataset
from atoplib.defences import load_classifier, load_pipelines
from atoplib.evaluation import training_costs
from atoplib.flops import training_total
from atoplib.parameters import Attack, FinetuneAtop, PretrainPurifier, TrainClassifier
from atoplib.pipeline import load_pipeline
from atoplib.runs import run_name
from atoplib.training import accuracy
from atoplib.verdicts import reseed

SMALL = {
    "max_train": 64,
    "max_test": 20,
    "batch_size": 16,
    "epochs": 1,
    "classifier_options": {"width": 4, "stem_stride": 2},
}


def parameters(folder, **others):
    return TrainClassifier(workspace=str(folder), **{**SMALL, **others})


def train(p, notify=None):
    dataset = load_dataset("mnist5k", data_dir=p.experiment_dir, max_train=p.max_train, max_test=p.max_test)
    return stages.train(p, stages.classifier_stage(p, dataset), dataset, notify=notify)


def test_the_flops_of_a_training_are_counted_once(tmp_path, monkeypatch):
    first = train(parameters(tmp_path))
    monkeypatch.setattr(stages.run, "training_flops", lambda *_, **__: pytest.fail("counted again"))
    again = train(parameters(tmp_path))
    assert again.train_flops == first.train_flops > 0 and again.history == first.history


def test_a_training_starts_from_the_weights_of_another_run_and_owes_its_cost(tmp_path):
    first = train(parameters(tmp_path))
    asked = {"adversarial": True, "attack_steps": 1, "learning_rate": 1e-12}
    second = train(parameters(tmp_path, start_run=first.run.path.name, **asked))
    (weights, header), (start, before) = (
        load_checkpoint(trained.run.path / "classifier.safetensors", kind="classifier") for trained in (second, first)
    )
    moved = [float((a - b).detach().abs().max()) for a, b in zip(weights.parameters(), start.parameters(), strict=True)]
    assert second.run.path != first.run.path and max(moved) < 1e-6, "at no learning rate they stay what they were"
    assert header["metrics"]["start_flops"] == first.train_flops and header["options"] == before["options"]
    assert training_total(header["metrics"]) == first.train_flops + second.train_flops
    manifest = json.loads((second.run.path / "manifest.json").read_text())
    assert manifest["inputs"]["start"]["file"] == f"{first.run.path.name}/classifier.safetensors"


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"start_run": "01_train_classifier-00000000"}, "there is no run '01_train_classifier-00000000'"),
        ({"start_run": "weights.safetensors"}, "there is no file weights.safetensors"),
        ({"start_run": "pretrained"}, "'pretrained' has width 8, and 4 is asked for: let them agree"),
        (
            {"start_run": "pretrained", "classifier": "resnet18", "classifier_options": {}},
            "'pretrained' has architecture small_resnet, and resnet18 is asked for",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, asked, said):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        train(parameters(tmp_path, **asked))


def test_atop_stands_before_the_classifier_that_it_was_tuned_for(tmp_path):
    plain = train(parameters(tmp_path))
    robust = train(parameters(tmp_path, adversarial=True, attack_steps=1, start_run=plain.run.path.name))
    shared = {"workspace": str(tmp_path), "max_train": 32, "max_test": 8, "batch_size": 16, "max_steps": 1}
    for p, build in (
        (PretrainPurifier(purifier_options={"width": 4, "blocks": 0}, **shared), stages.pretraining_stage),
        (FinetuneAtop(classifier_run=robust.run.path.name, **shared), stages.finetuning_stage),
    ):
        dataset = load_dataset("mnist5k", data_dir=tmp_path, max_train=32, max_test=8)
        tuned = stages.train(p, build(p, dataset), dataset)
    asked = Attack(workspace=str(tmp_path))
    assert asked.weights("undefended").parent == asked.classifier_of("ap").parent == plain.run.path
    assert asked.weights("atop").parent == tuned.run.path and asked.classifier_of("atop").parent == robust.run.path
    assert replace(asked, atop_classifier_run=plain.run.path.name).classifier_of("atop").parent == plain.run.path
    pipelines, images = load_pipelines(asked), torch.rand(2, 3, 32, 32)
    for name, its in {"AP": plain, "AToP": robust}.items():
        alone = load_classifier(its.run.path / "classifier.safetensors")
        assert torch.equal(pipelines[name].classifier(images), alone(images))
    costs = training_costs({name: read_header(asked.weights(name.lower())) for name in ("undefended", "AToP")})
    assert costs["AToP"][0] == plain.train_flops + robust.train_flops + tuned.train_flops
    shutil.rmtree(robust.run.path)
    with pytest.raises(FileNotFoundError, match="does not hold any more; name another by atop_classifier_run"):
        asked.classifier_of("atop")


def test_a_training_whose_start_is_another_one_by_now_starts_anew_and_keeps_what_was_there(tmp_path):
    said = []
    one, two = (train(parameters(tmp_path, seed=seed)).run.path / "classifier.safetensors" for seed in (1, 2))
    asked = {"start_run": two.parent.name, "learning_rate": 1e-12, "attack_steps": 1, "adversarial": True}
    first = train(parameters(tmp_path, **asked), said.append)
    kept = (first.run.path / "classifier.safetensors").read_bytes()
    assert train(parameters(tmp_path, **asked), said.append).history == first.history, "it is only loaded"
    assert not any("has changed" in sentence for sentence in said)
    shutil.copy(one, two)  # as if that run had been made anew
    second = train(parameters(tmp_path, **asked), said.append)
    assert second.run.path == first.run.path and "has changed since it was begun (start): it starts anew" in "".join(said)
    assert (first.run.path / "other-inputs-1" / "classifier.safetensors").read_bytes() == kept
    (trained, _), (start, _) = (
        load_checkpoint(path, kind="classifier") for path in (second.run.path / "classifier.safetensors", one)
    )
    moved = [float((a - b).detach().abs().max()) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert max(moved) < 1e-6, "at no learning rate it stays what it starts from now"


def test_a_purifier_that_never_sees_the_classifier_is_not_trained_anew_for_another(tmp_path):
    said, histories = [], []
    one, two = (train(parameters(tmp_path, seed=seed)).run.path / "classifier.safetensors" for seed in (1, 2))
    small = {"max_train": 32, "max_test": 8, "batch_size": 16, "purifier_options": {"width": 4}}
    p = PretrainPurifier(workspace=str(tmp_path), classifier_run=one.parent.name, **small)
    for _ in range(2):
        dataset = load_dataset("mnist5k", data_dir=tmp_path, max_train=32, max_test=8)
        histories.append(stages.train(p, stages.pretraining_stage(p, dataset), dataset, notify=said.append).history)
        shutil.copy(two, one)  # as if that run had been made anew
    assert histories[0] == histories[1] and not any("starts anew" in sentence for sentence in said)


def test_a_classifier_learns_to_read_what_the_purifier_of_another_run_makes_of_images(tmp_path):
    plain = train(parameters(tmp_path))
    shared = {"workspace": str(tmp_path), "max_train": 32, "max_test": 8, "batch_size": 16, "max_steps": 1}
    dataset = load_dataset("mnist5k", data_dir=tmp_path, max_train=32, max_test=8)
    p = PretrainPurifier(purifier_options={"width": 4, "blocks": 0}, **shared)
    purifier = stages.train(p, stages.pretraining_stage(p, dataset), dataset).run.path
    asked = {"start_run": plain.run.path.name, "purifier_run": "latest", "learning_rate": 1e-12}
    seeing = train(parameters(tmp_path, **asked))
    path = seeing.run.path / "classifier.safetensors"
    classifier, header = load_checkpoint(path, kind="classifier")
    assert header["reads_through"] == purifier.name
    assert seeing.train_flops > plain.train_flops, "the purifier's passes count"
    manifest = json.loads((seeing.run.path / "manifest.json").read_text())
    assert manifest["inputs"]["purifier"]["file"] == f"{purifier.name}/purifier.safetensors"
    pipeline = load_pipeline(purifier / "purifier.safetensors", classifier)
    test = load_dataset("mnist5k", data_dir=tmp_path, max_train=64, max_test=20).test
    reseed(pipeline, 0)
    assert seeing.test_accuracy == seeing.history[-1]["test_accuracy"] == accuracy(pipeline, test)
    notebook = Attack(workspace=str(tmp_path))
    assert notebook.weights("undefended").parent == plain.run.path, "latest is a classifier that reads images as they are"


@pytest.mark.parametrize(
    ("shares", "classes", "said"),
    [
        (
            [0.43, 0.07, 0.05],
            10,
            "it read 5.0 % of its training images correctly, and guessing reads 10.0 % (43.0 % in epoch 1)",
        ),
        ([0.02, 0.011], 100, "it read 1.1 % of its training images"),
        ([0.05, 0.16], 10, ""),
        ([0.7], 2, ""),
        ([0.02, 0.016], 100, ""),
        ([None, None], 10, ""),
    ],
)
def test_a_training_that_ends_no_better_than_guessing_is_said_to_have_collapsed(shares, classes, said):
    history = [{"loss": 2.0} if share is None else {"loss": 2.0, "accuracy": share} for share in shares]
    warning = stages.warning_of(history, classes)
    assert said in warning and bool(warning) == bool(said)


def test_the_sentence_reaches_the_notebook_and_the_end_of_the_batch(tmp_path):
    p, heard = parameters(tmp_path, learning_rate=1e-9), []  # it learns nothing
    run = train(p, heard.append).run
    (warning,) = heard
    assert warning.startswith("This training has collapsed") and json.loads((run.path / "metrics.json").read_text())
    job = Job("01_train_classifier", tmp_path / "01_train_classifier.ipynb", p, {}, run.path, label="01_train_classifier")
    assert run.path.name == run_name(p.STAGE, p.as_dict())
    assert list(cli.warnings([job])) == [f"01_train_classifier: {warning}"]
    heard.clear()
    train(parameters(tmp_path, learning_rate=1e-9, smoke=True), heard.append)
    assert not heard, "a few steps teach nothing, which is no news"
