"""Anybody's networks and weights: saved and loaded again, built by the name of a function, refused with a
sentence."""

import sys
import types
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ExtraState, Tied, images_of, made

from atoplib import classifiers
from atoplib.checkpoints import CheckpointError, load, load_foreign, read_header, save, tensors_of


@pytest.mark.parametrize("make", [Tied, ExtraState], ids=["tied", "extra state"])
def test_tied_weights_and_extra_state_are_saved_and_loaded(tmp_path, make):
    model, images = made(make), images_of()
    tensors_of(model)
    path = tmp_path / "c.safetensors"
    save(path, model, kind="classifier", architecture="small_resnet", options={"num_classes": 4})
    assert read_header(path)["architecture"] == f"custom: {make.__name__}"
    with pytest.raises(CheckpointError, match=rf"custom classifier \({make.__name__}\).*build=MAKE"):
        load(path, kind="classifier")
    torch.manual_seed(9)
    assert torch.equal(load(path, kind="classifier", build=make)[0](images), model(images))
    if make is ExtraState:
        other = load(path, kind="classifier", build=lambda: ExtraState({"scale": 0.0}))[0]
        assert other.kept["scale"] == 2.0 and torch.equal(other.kept["shift"], torch.ones(4))


def test_what_cannot_be_saved_is_known_before_a_training():
    with pytest.raises(CheckpointError, match=r"get_extra_state\) is a object, which cannot be saved"):
        tensors_of(ExtraState(object()))
    with pytest.raises(CheckpointError, match="no dense tensor of known shape"):
        tensors_of(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(CheckpointError, match="only such can be saved"):
        tensors_of(sparse)


# Somebody's weights


class ForeignNet(nn.Module):
    """As others write it: named layers, flattened by ``view``."""

    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


@pytest.fixture
def foreign_package(monkeypatch):
    package = types.ModuleType("somebodys_models")
    package.resnet = ForeignNet
    monkeypatch.setitem(sys.modules, "somebodys_models", package)


def written(path, model, form):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if "parallel" in form:
        state = {f"module.{name}": value for name, value in state.items()}
    if "compiled" in form:
        state = {f"_orig_mod.{name}": value for name, value in state.items()}
    if "old" in form:
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for key in ("model_state_dict", "state_dict", "model", "net"):
        if form.endswith(f" {key}") or form == key:
            state = {key: state, "epoch": 3}
    if path.suffix.lower() == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "name, form",
    [
        ("w.pth", "plain"),
        ("w.pt", "parallel"),
        ("w.pth", "parallel state_dict"),
        ("w.pth", "model"),
        ("w.pth", "net"),
        ("w.pth", "parallel compiled"),
        ("w.pt", "compiled model_state_dict"),
        ("w.pth", "old"),
        ("w.safetensors", "plain"),
        ("w.SAFETENSORS", "parallel"),
    ],
)
def test_somebodys_weights_are_loaded_by_parameters_alone(tmp_path, foreign_package, name, form):
    model, images = made(lambda: ForeignNet(5)), images_of(size=(32, 32))
    path = written(tmp_path / name, model, form)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = model((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    loaded = load_foreign(path, "somebodys_models:resnet", {"num_classes": 5}, mean=mean, std=std)
    torch.testing.assert_close(loaded(images), expected)
    assert not any(part.training for part in loaded.modules())
    torch.testing.assert_close(load_foreign(path, lambda: ForeignNet(5))(images), model(images))


def test_a_network_that_has_a_part_named_module_keeps_that_name(tmp_path):
    model, path = nn.ModuleDict({"module": nn.Linear(2, 3)}), tmp_path / "w.pth"
    written(path, model, "plain")
    loaded = load_foreign(path, lambda: nn.ModuleDict({"module": nn.Linear(2, 3)}))
    assert torch.equal(loaded["module"].weight, model["module"].weight)


def test_a_classifier_is_built_by_the_name_of_anybodys_function(foreign_package, tmp_path):
    options = {"num_classes": 5, "mean": (0.5,) * 3, "std": (0.2,) * 3, "width": 3}
    model = classifiers.build("somebodys_models:resnet", **options).eval()
    assert isinstance(model[0], classifiers.Normalize) and model[1].linear.weight.shape == (5, 6)
    assert isinstance(
        classifiers.build("somebodys_models:resnet", num_classes=4, mean=None, std=None), ForeignNet
    )
    path = tmp_path / "c.safetensors"
    save(path, model, kind="classifier", architecture="somebodys_models:resnet", options=options)
    with pytest.raises(CheckpointError, match=r"custom classifier \(somebodys_models:resnet\)"):
        load(path, kind="classifier")  # a file must not choose what code is run
    make = partial(classifiers.build, "somebodys_models:resnet", **options)
    images = images_of(size=(32, 32))
    assert torch.equal(load(path, kind="classifier", build=make)[0](images), model(images))


def test_somebodys_weights_that_cannot_be_used_say_so(tmp_path, foreign_package):
    path = written(tmp_path / "w.pth", ForeignNet(5), "plain")
    whole = tmp_path / "whole.pth"
    torch.save(nn.Linear(2, 2), whole)
    for wrong, sentence in [
        ((path, "resnet"), "No module.*'package.module:function'"),
        ((path, "no_such_package:resnet"), "No module named"),
        ((path, "somebodys_models:other"), "no attribute 'other'"),
        ((path, "somebodys_models:resnet"), "another architecture.*of another shape"),
        ((path, "somebodys_models:resnet", {"depth": 3}), "cannot build a network"),
        ((path, partial(nn.LazyLinear, 5)), "give a lazy network one batch first"),
        ((whole, "somebodys_models:resnet"), "cannot be read as weights.*run code"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            load_foreign(*wrong)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_foreign(tmp_path / "none.pth", "somebodys_models:resnet")
