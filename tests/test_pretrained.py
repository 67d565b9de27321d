"""The weights that come with the kit are what their headers say."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import atoplib
from atoplib import data
from atoplib.checkpoints import read_header, save_checkpoint
from atoplib.classifiers import build_classifier
from atoplib.pipeline import AToPPipeline, for_attacks
from atoplib.pretrained import FOLDER, available, load_pretrained, save_pretrained
from atoplib.purifiers import GatedUNet
from atoplib.verdicts import predict

OPTIONS = {"num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3, "width": 4}


@pytest.fixture
def folder(tmp_path):
    """Weights of a small classifier and a small purifier, put among others."""
    classifier = build_classifier("small_resnet", **OPTIONS)
    source = tmp_path / "classifier.safetensors"
    save_checkpoint(
        source,
        classifier,
        kind="classifier",
        architecture="small_resnet",
        options=OPTIONS,
        seed=3,
        dataset="folder:/me",
        parameters={"epochs": 2, "workspace": "/home/me", "start_run": "/me/f.safetensors", "dataset": "folder:/me"},
    )
    save_pretrained(source, "shapes", "undefended", folder=tmp_path / "weights", test_accuracy=0.5, dataset="shapes")
    purifier = tmp_path / "purifier.safetensors"
    options, transform = {"width": 4, "blocks": 0}, {"name": "rt1", "missing_rate": 0.5}
    save_checkpoint(
        purifier, GatedUNet(**options), kind="purifier", architecture="gated_unet", options=options, transform=transform
    )
    save_pretrained(purifier, "shapes", "ap", folder=tmp_path / "weights")
    return tmp_path / "weights"


def test_a_run_becomes_a_defence_in_one_line(folder):
    assert available(folder) == {"shapes": ("undefended", "ap")}
    defence = load_pretrained("shapes", "ap", folder=folder)
    assert isinstance(defence, AToPPipeline) and not defence.training and defence.transform.name == "rt1"
    assert defence(torch.rand(2, 3, 32, 32)).dtype == torch.float32
    header = read_header(folder / "shapes-undefended.safetensors")
    assert header["seed"] == 3 and header["test_accuracy"] == 0.5
    assert header["parameters"] == {"epochs": 2, "dataset": "shapes"} and header["dataset"] == "shapes", "no one's folders"


def test_atop_stands_before_the_classifier_that_its_header_names(folder):
    torch.manual_seed(5)
    source = folder.parent / "classifier.safetensors"
    save_checkpoint(
        source, build_classifier("small_resnet", **OPTIONS), kind="classifier", architecture="small_resnet", options=OPTIONS
    )
    save_pretrained(source, "shapes", "frozen", folder=folder)
    save_pretrained(folder.parent / "purifier.safetensors", "shapes", "atop", folder=folder, classifier="frozen")
    assert available(folder) == {"shapes": ("undefended", "ap", "atop", "frozen")}
    images = torch.rand(2, 3, 32, 32)
    frozen, undefended = (load_pretrained("shapes", name, folder=folder) for name in ("frozen", "undefended"))
    atop, ap = (load_pretrained("shapes", name, folder=folder).classifier for name in ("atop", "ap"))
    assert torch.equal(atop(images), frozen(images)) and torch.equal(ap(images), undefended(images))
    assert not torch.equal(atop(images), ap(images))


@pytest.mark.parametrize("dataset, defence", [("shapes", "atop"), ("forms", "ap")])
def test_weights_that_are_not_there_are_named_with_those_that_are(folder, dataset, defence):
    with pytest.raises(ValueError, match=f"no weights of '{defence}' for '{dataset}'.*shapes: undefended, ap"):
        load_pretrained(dataset, defence, folder=folder)


def test_the_kit_comes_with_weights_and_they_are_not_too_many():
    assert {"undefended", "ap", "atop", "at"} <= set(available()["mnist"])
    assert {"undefended", "ap", "atop", "at", "frozen", "at_pgd2"} == set(available()["cifar10"])
    assert not any("/tmp" in str(read_header(path)) or "/home" in str(read_header(path)) for path in FOLDER.iterdir())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 30e6


@pytest.mark.parametrize("defence", available().get("mnist", ()))
def test_the_digits_are_read_as_well_as_the_header_says(defence, tmp_path):
    digits = data.load_dataset("mnist5k", data_dir=tmp_path, max_test=300).test
    right = predict(load_pretrained("mnist", defence), data.to_float(digits.images)) == digits.labels
    measured = read_header(FOLDER / f"mnist-{defence}.safetensors")["test_accuracy"]
    assert float(right.float().mean()) == pytest.approx(measured, abs=0.04), "300 of the 1,000 images"


@pytest.mark.parametrize("defence", available().get("cifar10", ()))
def test_every_defence_of_cifar_is_whole(defence):
    logits = load_pretrained("cifar10", defence)(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10) and torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "dataset, defence", [(d, n) for d, names in available().items() for n in names if n in ("ap", "atop")]
)
def test_prepared_for_attacks_the_weights_give_the_same_logits_and_gradients(dataset, defence):
    pipeline = load_pretrained(dataset, defence)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prepared = for_attacks(pipeline)(images)
        torch.testing.assert_close(prepared, load_pretrained(dataset, defence)(images), atol=1e-5, rtol=0)
    # gradients in double precision, where no unit lies so near its kink that rounding puts it on the other side
    pipeline = pipeline.double()
    prepared = for_attacks(pipeline)
    first, second = (images.double().requires_grad_() for _ in range(2))
    expected, result = pipeline(first), prepared(second)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=0)
    (gradient,), (found,) = (
        torch.autograd.grad(logits.logsumexp(1).sum(), x) for logits, x in [(expected, first), (result, second)]
    )
    assert (found - gradient).abs().max() < 1e-9 * gradient.abs().max()


def test_one_line_gives_a_working_pipeline_and_the_package_alone_imports_no_torch():
    line = "import atoplib, sys; assert 'torch' not in sys.modules; print(atoplib.load_pretrained('mnist', 'atop').training)"
    assert subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="module 'atoplib' has no attribute 'load_all'"):
        getattr(atoplib, "load_all")  # noqa: B009


def waves():
    """Two pictures that need no data set and no dice."""
    angles = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37
    return (0.5 + 0.5 * torch.sin(angles)).float().view(2, 3, 32, 32)


@pytest.mark.parametrize("dataset, defence", [(name, defence) for name, found in available().items() for defence in found])
def test_the_weights_are_those_that_were_measured(dataset, defence):
    """What each makes of two pictures, noted when its header's numbers were: data sets are not at hand everywhere."""
    noted = json.loads((Path(__file__).parent / "data" / "pretrained_logits.json").read_text())[f"{dataset}-{defence}"]
    model = load_pretrained(dataset, defence)
    with torch.no_grad(), model.fixed_draws(0) if hasattr(model, "fixed_draws") else nullcontext():
        torch.testing.assert_close(model(waves()), torch.tensor(noted), rtol=1e-2, atol=1e-2)


ROWS = {
    "undefended": "undefended",
    "at": "AT (FGSM, 5.6 epochs)",
    "at_pgd2": "AT by PGD-2 (4 epochs)",
    "ap": "AP",
    "atop": "AToP",
    "frozen": "*f of AToP*, alone",
}


@pytest.mark.parametrize("defence", available().get("cifar10", ()))
def test_the_published_table_says_what_the_headers_say(defence):
    section = (FOLDER.parents[1] / "docs" / "results.md").read_text().partition("## CIFAR-10 (JPEG)")[2]
    table = section[section.index("| % [95 % interval] | clean") :].partition("\n\n")[0]
    heads, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    cells = dict(zip(heads, next(row for row in rows if row[0] == ROWS[defence]), strict=True))
    metrics = read_header(FOLDER / f"cifar10-{defence}.safetensors")["metrics"]
    image = 100 / 128  # the header's draws are another throw
    assert float(cells["known: l_inf PGD"].split()[0]) == pytest.approx(100 * metrics["white_box"], abs=image + 0.05)
