"""The weights that come with the kit are what their headers say."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from atoplib import classifiers, data
from atoplib.checkpoints import read_header, save
from atoplib.decisions import sample_logits, vote
from atoplib.pipeline import AToPPipeline
from atoplib.pretrained import FOLDER, available, load_pretrained
from atoplib.purifiers import GatedUNet

OPTIONS = {"num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3, "width": 4}
PIPELINES = [pair for pair in available() if pair[1] in ("ap", "atop")]


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


@pytest.mark.parametrize("dataset, defence", PIPELINES)
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
