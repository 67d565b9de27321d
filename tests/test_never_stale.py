"""What a result depends on decides on its reuse: code, versions, other networks; and `latest` is what it means."""

from pathlib import Path

import pytest
import torch
from torch import nn

from atoplib import fingerprints, stages
from atoplib.data import load_dataset
from atoplib.evaluation import Budget, PlannedAttack, Protocol, evaluate
from atoplib.fingerprints import code_hash, imported_by, model_fingerprint
from atoplib.parameters import FinetuneAtop, PretrainPurifier, TrainClassifier
from atoplib.runs import run_name, workspace_dir

SMALL = {"max_train": 32, "max_test": 8, "batch_size": 16, "max_steps": 1}
BUILDERS = {
    TrainClassifier: stages.classifier_stage,
    PretrainPurifier: stages.pretraining_stage,
    FinetuneAtop: stages.finetuning_stage,
}


def trained(kind, folder, **parameters):
    """A run of a notebook's stage, and what it said."""
    said = []
    p = kind(workspace=str(folder), **SMALL, **parameters)
    dataset = load_dataset("mnist5k", data_dir=folder, max_train=32, max_test=8)
    return stages.train(p, BUILDERS[kind](p, dataset), dataset, notify=said.append), said


@pytest.fixture
def other_code(monkeypatch):
    """As if the sources of atoplib had been edited since."""
    monkeypatch.setattr(stages.run, "code_hash", lambda module: "edited")
    monkeypatch.setattr("atoplib.evaluation.measure.code_hash", lambda module: "edited")


def test_the_code_of_a_module_is_that_of_all_it_imports_and_an_edit_anywhere_in_it_changes_its_hash(tmp_path, monkeypatch):
    package = tmp_path / "atoplib"
    (package / "figures").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "a.py": "from atoplib.b import f\nimport atoplib.figures",
        "b.py": "def g():\n    from atoplib import c",
        "c.py": "x = 1",
        "d.py": "",
        "figures/__init__.py": "",
    }
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.setattr(fingerprints, "PACKAGE", package)
    assert set(imported_by("atoplib.a")) == {"atoplib", "atoplib.a", "atoplib.b", "atoplib.c"}, "what only shows is left out"
    before = code_hash.__wrapped__("atoplib.a")
    (package / "d.py").write_text("unused = 1")
    assert code_hash.__wrapped__("atoplib.a") == before
    (package / "c.py").write_text("x = 2")
    assert code_hash.__wrapped__("atoplib.a") != before


@pytest.mark.parametrize("needed", ["training.classifier", "training.loop", "losses", "attacks.pgd", "data.batches", "classifiers"])
def test_the_code_of_a_training_holds_what_trains(needed):
    assert f"atoplib.{needed}" in imported_by("atoplib.stages")


@pytest.mark.parametrize("needed", ["attacks.pgd", "attacks.stadv", "verdicts", "evaluation.scores", "pipeline"])
def test_the_code_of_an_evaluation_holds_what_measures(needed):
    assert f"atoplib.{needed}" in imported_by("atoplib.evaluation.measure")


def test_edited_code_trains_anew_says_so_and_keeps_what_was_there(tmp_path, other_code, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stages.run, "code_hash", code_hash)
        first, said = trained(TrainClassifier, tmp_path)
        assert not said
        _, said = trained(TrainClassifier, tmp_path)
        assert [text.partition(":")[0] for text in said] == ["Loaded, not trained again"]
    second, said = trained(TrainClassifier, tmp_path)
    assert second.run.path == first.run.path and "the code of atoplib" in said[0] and len(said) == 1
    assert (first.run.path / "other-inputs-1" / "classifier.safetensors").is_file()
    assert (first.run.path / "classifier.safetensors").is_file()


def test_a_training_by_another_torch_or_on_another_device_is_another(tmp_path, monkeypatch):
    trained(TrainClassifier, tmp_path)
    monkeypatch.setattr(stages.run, "environment", lambda device: "torch 9 on abacus")
    _, said = trained(TrainClassifier, tmp_path)
    assert "torch or the device" in said[0] and "starts anew" in said[0]


def test_an_edited_attack_measures_anew(tmp_path, tiny_digits, other_code, monkeypatch):
    model, images, labels = tiny_digits
    protocol = Protocol("one", "for a test", (PlannedAttack("PGD", "pgd", settings={"steps": 1}),), num_images=4)

    def measured():
        evaluate({"f": model}, images, labels, protocol, Budget(0.1, 0.5), classifier=model, directory=tmp_path, keep_others=True)
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.safetensors")}

    with monkeypatch.context() as patch:
        patch.setattr("atoplib.evaluation.measure.code_hash", code_hash)
        first = measured()
        assert measured() == first, "what is unchanged is taken from where it is"
    assert len(measured()) == 2 * len(first)


@pytest.fixture
def tiny_digits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)).eval()
    return model, torch.rand(4, 3, 8, 8), torch.arange(4)


class Shifted(nn.Module):
    """A network whose answers depend on what no state_dict and no printed form shows."""

    def __init__(self, where, shift):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.keep = {"list": [shift], "dict": {"s": shift}, "tensor": torch.tensor(shift)}.get(where)
        self.where, self.closure = where, (lambda: shift)

    def forward(self, images):
        shift = {"list": lambda k: k[0], "dict": lambda k: k["s"], "tensor": lambda k: k}.get(self.where, lambda k: self.closure())(
            self.keep
        )
        return self.layer(images.mean(dim=(2, 3)) + shift)


@pytest.mark.parametrize("where", ["list", "dict", "tensor", "closure"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a Sequential"])
def test_a_constant_anywhere_makes_another_network(where, inside):
    def network(shift):
        torch.manual_seed(0)
        made = Shifted(where, shift)
        return nn.Sequential(nn.Identity(), made) if inside else made

    assert model_fingerprint(network(0.9)) != model_fingerprint(network(0.0))
    assert model_fingerprint(network(0.9)) == model_fingerprint(network(0.9))


def test_asking_a_network_leaves_it_its_mode_its_statistics_and_the_global_random_numbers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout()

        def forward(self, images):
            return self.drop(self.norm(images)).mean(dim=(2, 3))

    network = Own().train()
    network.norm.eval()
    before, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    model_fingerprint(network)
    assert network.training and network.drop.training and not network.norm.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items()) and torch.equal(random, torch.get_rng_state())


def test_a_network_that_cannot_be_asked_is_never_taken_for_another():
    class Odd(nn.Module):
        def forward(self, images):
            raise RuntimeError("only images of 7 px")

    assert model_fingerprint(Odd()) != model_fingerprint(Odd())


def test_latest_is_what_it_means_so_a_notebook_by_hand_finds_what_a_recipe_made(tmp_path):
    classifier, _ = trained(TrainClassifier, tmp_path)
    ap, _ = trained(PretrainPurifier, tmp_path, classifier_run=classifier.run.path.name)  # as a recipe names it
    atop, _ = trained(FinetuneAtop, tmp_path, classifier_run=classifier.run.path.name, purifier_run=ap.run.path.name)
    for kind, made in ((PretrainPurifier, ap), (FinetuneAtop, atop)):
        by_hand, said = trained(kind, tmp_path)  # "latest", the default
        assert by_hand.run.path == made.run.path and by_hand.test_accuracy == made.test_accuracy
        assert said[0].startswith("Loaded, not trained again")
    assert len(list(classifier.run.path.parent.glob("0*"))) == 3


def test_before_there_is_a_run_latest_stays_as_it_is(tmp_path):
    p = FinetuneAtop(workspace=str(tmp_path))
    assert p.as_dict()["classifier_run"] == "latest" and run_name(p.STAGE, p.as_dict()).startswith("03_finetune_atop-")


def test_the_workspace_is_the_projects_wherever_papermill_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workspace_dir("") == Path(__file__).resolve().parents[1]
