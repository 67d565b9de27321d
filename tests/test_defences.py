"""Which weights a notebook's parameters mean, and the defences that they make."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from atoplib import checkpoints, classifiers, data, defences, purifiers
from atoplib.checkpoints import CheckpointError, read_header, save
from atoplib.decisions import sample_logits, vote
from atoplib.parameters import Parameters, run_of
from atoplib.pipeline import AToPPipeline
from atoplib.pretrained import FOLDER, available, load_pretrained, pretrained_path
from atoplib.purifiers import GatedUNet
from atoplib.runs import open_run

FIELDS = {
    "classifier_run": run_of("01_train_classifier", adversarial=False, purifier_run=""),
    "at_run": run_of("01_train_classifier", adversarial=True, purifier_run=""),
    "ap_run": run_of("02_pretrain_purifier"),
    "atop_run": run_of("03_finetune_atop"),
}


def parameters(folder, **changes):
    values = dict(experiment="test", dataset="mnist5k", image_size=None, smoke=False, device="cpu", seed=0)
    return Parameters(values | {"workspace": str(folder)} | dict.fromkeys(FIELDS, "latest") | changes, FIELDS)


def run_with(folder, stage, weights, **values):
    """A complete run that holds some of the kit's weights."""
    kind = "classifier" if stage.startswith("01") else "purifier"
    with open_run(parameters(folder, **values), stage) as run:
        shutil.copy(weights, run.path / f"{kind}.safetensors")
    return run.path


def test_before_there_is_a_run_latest_is_what_the_kit_has_and_that_is_said(tmp_path):
    said = []
    p = defences.resolve(parameters(tmp_path), said.append)
    assert {p.classifier_run, p.at_run, p.ap_run, p.atop_run} == {"pretrained"} and len(said) == 4
    assert "no run of 01_train_classifier, so the kit's" in said[0]
    assert defences.find_weights(p, p.atop_run, "AToP") == pretrained_path("mnist5k", "atop")
    for other in (dict(dataset="imagenette"), dict(image_size=64)):
        p = defences.resolve(parameters(tmp_path, **other), lambda sentence: pytest.fail(sentence))
        assert p.classifier_run == "latest"
        with pytest.raises(FileNotFoundError, match="run the notebook 01_train_classifier.ipynb first"):
            defences.load_defences(p)


def test_a_run_comes_before_the_kit_and_of_the_kind_that_is_meant(tmp_path):
    plain = run_with(
        tmp_path,
        "01_train_classifier",
        pretrained_path("mnist", "undefended"),
        adversarial=False,
        purifier_run="",
    )
    robust = run_with(
        tmp_path, "01_train_classifier", pretrained_path("mnist", "at"), adversarial=True, purifier_run=""
    )
    p = defences.resolve(parameters(tmp_path))
    assert (p.classifier_run, p.at_run, p.ap_run) == (plain.name, robust.name, "pretrained")
    assert defences.find_weights(p, p.at_run, "AT").parent == robust
    assert defences.find_weights(p, str(plain / "classifier.safetensors")).parent == plain
    for error, message, call in (
        (FileNotFoundError, "there is no file weights.pth", lambda: defences.find_weights(p, "weights.pth")),
        (ValueError, "'imagenette' come with", lambda: defences.find_weights(p, "pretrained:imagenette")),
        (FileNotFoundError, "'mistyped'", lambda: defences.load_defences(p.replace(atop_run="mistyped"))),
        (ValueError, "no data set 'mnits'", lambda: defences.resolve(p.replace(dataset="mnits"))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_kits_defences_are_loaded_as_pretrained_gives_them(tmp_path, digits):
    found = defences.load_defences(defences.resolve(parameters(tmp_path)))
    assert list(found) == ["undefended", "AT", "AP", "AToP"] and not found.missing
    for name, defence in found.items():
        images, expected = digits[0][:4], load_pretrained("mnist", name)
        for model in (defence, expected):
            if isinstance(model, AToPPipeline):
                model.reseed(3)
        with torch.no_grad():
            assert torch.allclose(defence(images), expected(images), atol=2e-2), name
        assert not any(weight.requires_grad for weight in defence.parameters()) and not defence.training
        assert found.sources[name] == pretrained_path("mnist", name)


def purifier_for(folder, classifier):
    """A run of notebook 3 whose purifier was fine-tuned for a classifier."""
    network, header = checkpoints.load(pretrained_path("mnist", "atop"), kind="purifier")
    facts = {name: value for name, value in header.items() if name not in ("format", "sha256")}
    path = folder / "tuned.safetensors"
    checkpoints.save(path, network, **facts | {"classifier": classifier})
    return run_with(folder, "03_finetune_atop", path)


def test_atop_is_composed_with_the_classifier_that_it_was_fine_tuned_for(tmp_path, digits):
    own = run_with(
        tmp_path, "01_train_classifier", pretrained_path("mnist", "at"), adversarial=True, purifier_run=""
    )
    tuned = purifier_for(tmp_path, own.name)
    p = defences.resolve(parameters(tmp_path))
    found = defences.load_defences(p, ("AToP", "AT"))
    images = digits[0][:4]
    assert found.sources["AToP"].parent == tuned
    assert torch.allclose(found["AToP"].classifier(images), found["AT"](images), atol=1e-5)
    other = defences.load_defences(
        parameters(tmp_path, atop_run=tuned.name, atop_classifier_run="pretrained"), ("AToP",)
    )
    assert not torch.allclose(other["AToP"].classifier(images), found["AT"](images), atol=1e-2)
    shutil.rmtree(own)
    left = defences.load_defences(
        p, ("undefended", "AToP") if p.classifier_run == "pretrained" else ("AToP",)
    )
    assert "does not hold any more" in left.missing["AToP"] and "AToP" not in left
    purifier_for(tmp_path, "custom: Net")
    found = defences.load_defences(defences.resolve(parameters(tmp_path)), ("AToP",))
    assert "fine-tuned for a custom classifier (Net)" in found.missing["AToP"]


def test_further_defences_are_a_purifier_a_classifier_or_both(tmp_path):
    others = {
        "AP 2": "pretrained",
        "robust": {"classifier": str(pretrained_path("mnist", "at"))},
        "AP, robust": {"purifier": "pretrained", "classifier": str(pretrained_path("mnist", "at"))},
    }
    found = defences.load_defences(defences.resolve(parameters(tmp_path, others=others)), ("undefended",))
    assert [isinstance(found[name], AToPPipeline) for name in others] == [True, False, True]
    p = parameters(tmp_path, classifier_run="pretrained", others={"x": "nothing"})
    with pytest.raises(FileNotFoundError, match="there is no run 'nothing'"):
        defences.load_defences(p, ("undefended",))
    with pytest.raises(ValueError, match="parts of x must be one of purifier, classifier, got 'purifer'"):
        defences.load_defences(p, ("undefended",), others={"x": {"purifer": "pretrained"}})


def test_what_is_left_out_says_which_notebook_makes_it(tmp_path):
    found = defences.load_defences(parameters(tmp_path, classifier_run="pretrained"))
    assert list(found) == ["undefended"] and set(found.missing) == {"AP", "AToP", "AT"}
    assert "run the notebook 02_pretrain_purifier.ipynb first" in found.missing["AP"]


def test_a_checkpoint_names_its_origin_without_places_and_somebodys_file_none(tmp_path):
    p = parameters(tmp_path, classifier_run="pretrained")
    facts = defences.facts(p)
    assert facts["dataset"] == "mnist5k" and str(tmp_path) not in json.dumps(facts)
    assert defences.source_of(defences.load_classifier(p)) == "pretrained"
    assert defences.source_of(nn.Linear(2, 2)) == "custom: Linear"
    assert defences.training_flops(pretrained_path("mnist", "undefended")) > 0
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    assert defences.training_flops(tmp_path / "net.pth") is None
    with pytest.raises(CheckpointError, match="holds a purifier, not a classifier"):
        defences.load_classifier(p, str(pretrained_path("mnist", "ap")))
    assert isinstance(defences.load_purifier(p, "pretrained")[0], purifiers.GatedUNet)


OPTIONS = {"num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3, "width": 4}


@pytest.fixture
def folder(tmp_path):
    """Two classifiers and two purifiers among the weights of a kit, in half precision."""
    for name in ("undefended", "at"):
        network, path = classifiers.build("small_resnet", **OPTIONS).half(), f"shapes-{name}.safetensors"
        save(tmp_path / path, network, kind="classifier", architecture="small_resnet", options=OPTIONS)
    options = {"width": 4, "blocks": 0}
    for name, facts in (("ap", {}), ("atop", {"classifier": "at"})):
        facts |= {"options": options, "transform": {"name": "rt1", "missing_rate": 0.5}}
        path, unet = tmp_path / f"shapes-{name}.safetensors", GatedUNet(**options).half()
        save(path, unet, kind="purifier", architecture="gated_unet", **facts)
    return tmp_path


def test_a_defence_is_composed_with_the_classifier_that_its_header_names(folder):
    assert available(folder) == [("shapes", name) for name in ("undefended", "ap", "atop", "at")]
    images, defences = torch.rand(2, 3, 32, 32), {}
    for name in ("undefended", "AP", "AToP", "At"):
        defences[name] = load_pretrained("Shapes", name, folder=folder)
        assert not defences[name].training and defences[name](images).dtype == torch.float32
    assert isinstance(defences["AP"], AToPPipeline) and defences["AP"].transform.name == "rt1"
    for name, beside in (("AP", "undefended"), ("AToP", "At")):
        assert torch.equal(defences[name].classifier(images), defences[beside](images))


def test_weights_that_are_not_there_are_named_with_those_that_are(folder):
    for dataset, defence in (("shapes", "other"), ("forms", "ap")):
        with pytest.raises(
            ValueError, match=f"no weights of '{defence}' for '{dataset}'.*shapes-undefended, sha"
        ):
            load_pretrained(dataset, defence, folder=folder)


def test_the_kit_comes_with_weights_and_they_are_not_too_many():
    assert {("mnist", name) for name in ("undefended", "ap", "atop", "at")} <= set(available())
    assert not any(
        "/tmp" in str(read_header(path)) or "/home" in str(read_header(path)) for path in FOLDER.iterdir()
    )
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 30e6


@pytest.mark.parametrize("defence", [name for dataset, name in available() if dataset == "mnist"])
def test_the_digits_are_classified_as_well_as_the_header_says(defence):
    images, labels = data.load_images("mnist5k", 300)
    right = vote(sample_logits(load_pretrained("mnist", defence), images), "single") == labels
    measured = read_header(FOLDER / f"mnist-{defence}.safetensors")["metrics"]["test_accuracy"]
    assert float(right.float().mean()) == pytest.approx(measured, abs=0.04), "300 of the 1,000 images"


@pytest.mark.parametrize("dataset, defence", available())
def test_the_weights_are_those_that_were_measured(dataset, defence):
    """Logits of two pictures, noted when its header's numbers were: data sets are not at hand everywhere."""
    noted = json.loads((Path(__file__).parent / "data" / "pretrained_logits.json").read_text())
    model = load_pretrained(dataset, defence)
    waves = 0.5 + 0.5 * torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37)
    with torch.no_grad(), model.fixed_sample(0) if isinstance(model, AToPPipeline) else nullcontext():
        logits = model(waves.float().view(2, 3, 32, 32))
    torch.testing.assert_close(logits, torch.tensor(noted[f"{dataset}-{defence}"]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dataset, defence", [pair for pair in available() if pair[1] in ("ap", "atop")])
def test_frozen_for_attacks_the_weights_give_the_same_logits_and_gradients(dataset, defence):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pipeline, frozen = (
        load_pretrained(dataset, defence),
        load_pretrained(dataset, defence).freeze_for_attack(),
    )
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), pipeline(images), atol=1e-5, rtol=0)
    # gradients in double precision, where no unit lies so near its kink that rounding puts it on the other
    # side
    pipeline = load_pretrained(dataset, defence).double()
    frozen = pipeline.freeze_for_attack()
    first, second = (images.double().requires_grad_() for _ in range(2))
    expected, result = pipeline(first), frozen(second)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(expected.logsumexp(1).sum(), first)
    (same,) = torch.autograd.grad(result.logsumexp(1).sum(), second)
    assert (same - gradient).abs().max() < 1e-9 * gradient.abs().max()
