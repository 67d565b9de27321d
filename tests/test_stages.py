"""What notebooks 1 to 3 train: counted once, and honest about a training that failed."""

import json

import pytest

from atoplib import stages
from atoplib.batch import Job, cli
from atoplib.data import load_dataset
from atoplib.parameters import TrainClassifier
from atoplib.runs import run_name

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
    monkeypatch.setattr(stages, "training_flops", lambda *_, **__: pytest.fail("counted again"))
    again = train(parameters(tmp_path))
    assert again.train_flops == first.train_flops > 0 and again.history == first.history


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
