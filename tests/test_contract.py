"""Anybody's network works at every public entry, or is refused at the border with one sentence: a zoo of odd networks."""

import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from atoplib.attacks import check_attack
from atoplib.attacks.suite import ATTACKS
from atoplib.checkpoints import CheckpointError, check_saveable, load_foreign, load_own, save_checkpoint
from atoplib.classifiers import build_classifier, fold_batch_norms, to_channels_last
from atoplib.contract import adapt, prepare
from atoplib.defences import load_classifier
from atoplib.pipeline import AToPPipeline, for_attacks
from atoplib.purifiers import FrozenGatedUNet, GatedUNet
from atoplib.transforms import TransformSettings
from atoplib.verdicts import Verdict, draw_logits, is_random, judge, reseed


class NormAct(nn.BatchNorm2d):
    """As timm's norm layers: an activation inside."""

    def forward(self, x):
        return F.relu(super().forward(x))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Residual(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x):
        for part in self:
            x = part(x) * 0.5
        return x


class Net(nn.Module):
    """Body, pooling to 2 x 2, flattened by ``view``, head; ``out`` wraps the logits, ``before`` treats the images."""

    def __init__(self, *body, classes=4, out=None, before=None, channels=6):
        super().__init__()
        self.body = nn.Sequential(*(body or (nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())))
        self.head = nn.Linear(4 * channels, classes)
        self.out, self.before = out, before

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        logits = self.head(F.adaptive_avg_pool2d(self.body(x), 2).contiguous().view(len(x), -1))
        return logits if self.out is None else self.out(logits)


class LeNet(nn.Module):
    """Flattens by ``view`` what its convolution returns, in the layout in which it comes."""

    def __init__(self, size=(16, 16), classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, 1, 1)
        self.head = nn.Linear(2 * size[0] * size[1], classes)

    def forward(self, x):
        return self.head(self.conv(x).view(x.size(0), -1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 4))
        self.fc = self.backbone[-1]
        self.again = nn.Linear(16, 16)
        self.again.weight = self.backbone[2].weight

    def forward(self, x):
        return self.fc(self.again(self.backbone[:3](x)).relu())


class ExtraState(Net):
    def __init__(self, kept=None):
        super().__init__()
        self.kept = {"scale": 2.0, "shift": torch.ones(4)} if kept is None else kept

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.kept = state


class Constants(Net):
    """Constants in a list, a tuple, a dict, a plain tensor and a closure."""

    def __init__(self):
        super().__init__()
        self.parts = [0.1], (0.9,), {"a": 0.2}
        self.plain = torch.full((3, 1, 1), 0.3)
        shift = 0.05
        self.before = lambda x: (x - self.parts[0][0]) * self.parts[1][0] + self.parts[2]["a"] * self.plain - shift


def weight_norm_old(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def folded_beside(layer):
    """A layer in the place of the convolution that folding would take up."""
    return Net(layer, nn.BatchNorm2d(6), nn.ReLU())


def conv():
    return nn.Conv2d(3, 6, 3, 2)


def data_parallel():
    return nn.DataParallel(Net())


def grey():
    return Net(nn.Conv2d(1, 6, 3, 2), nn.ReLU())


def random_by_dropout():
    return Net(before=lambda x: F.dropout(x, 0.2, training=True))


class NotDifferentiable(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward((x * 15).round() / 15)


# Name, what makes it, and size; every row works at every entry.
WORKS = {
    "norm with an activation inside": lambda: Net(conv(), NormAct(6)),
    "weight-standardised convolution": lambda: folded_beside(StandardisedConv(3, 6, 3, 2)),
    "Sequential with its own forward": lambda: Net(Residual(conv(), nn.BatchNorm2d(6))),
    "spectral norm, old form": lambda: folded_beside(nn.utils.spectral_norm(conv())),
    "spectral norm": lambda: folded_beside(parametrizations.spectral_norm(conv())),
    "weight norm, old form": lambda: folded_beside(weight_norm_old(conv())),
    "weight norm": lambda: folded_beside(parametrizations.weight_norm(conv())),
    "pruned": lambda: folded_beside(prune.l1_unstructured(conv(), "weight", 0.5)),
    "batch norm without running statistics": lambda: Net(conv(), nn.BatchNorm2d(6, track_running_stats=False)),
    "group norm": lambda: Net(conv(), nn.GroupNorm(2, 6)),
    "view": LeNet,
    "in place on the input": lambda: Net(before=lambda x: x.sub_(0.5)),
    "in place by its first layer": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(768, 4)),
    "tied and aliased weights": Tied,
    "extra state": ExtraState,
    "constants": Constants,
    "half": lambda: Net().half(),
    "bfloat16": lambda: Net().bfloat16(),
    "float64": lambda: Net().double(),
    "tuple": lambda: Net(out=lambda z: (z, z.mean())),
    "dict": lambda: Net(out=lambda z: {"logits": z, "aux": z.mean()}),
    "object with logits": lambda: Net(out=lambda z: SimpleNamespace(logits=z)),
    "2 classes": lambda: Net(classes=2),
    "3 classes": lambda: Net(classes=3),
    "200 classes": lambda: Net(classes=200),
    "DataParallel": data_parallel,
    "scripted": lambda: torch.jit.script(LeNet().eval()),
    "random by dropout": random_by_dropout,
}
REFUSED = {  # what makes it, and what the sentence says
    "1 logit": (lambda: Net(classes=1), "one logit an image.*torch.cat"),
    "1 logit, flat": (lambda: Net(classes=1, out=lambda z: z.squeeze(1)), "one logit an image.*torch.cat"),
    "1 channel": (grey, r"cannot take images of shape \(3, 16, 16\).*single channel needs a layer in front"),
    "dict without logits": (lambda: Net(out=lambda z: {"a": z, "b": z}), "none is called logits"),
    "a text": (lambda: Net(out=str), "returns a str; allowed are logits"),
    "probabilities": (lambda: Net(out=lambda z: z.softmax(1)), "probabilities"),
    "not finite": (lambda: Net(out=lambda z: z / 0), "not finite"),
}
EVERY = [pytest.param(make, id=name) for name, make in WORKS.items()]
ATTACKED = ["fgsm", "pgd", "apgd", "square", "spsa", "stadv"]


def made(make):
    torch.manual_seed(0)
    model = make()
    if "norm" in str(model):  # statistics unlike those of a fresh model
        model.train()
        dtype = next(model.parameters()).dtype
        for _ in range(2):
            model(torch.rand(8, 3, 16, 16).to(dtype))
    return model.eval()


def images_of(count=3, size=(16, 16)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def own_call(model, images):
    """The logits as its author calls it, in its own dtype and layout; from fixed random numbers."""
    torch.manual_seed(3)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        logits = model(images.clone().to(dtype))
    logits = logits["logits"] if isinstance(logits, dict) else getattr(logits, "logits", logits)
    return (logits[0] if isinstance(logits, tuple) else logits).float()


def seeded_call(model, images):
    torch.manual_seed(3)
    with torch.no_grad():
        return model(images)


def labels_of(model, images):
    return seeded_call(adapt(model), images).argmax(1)


@pytest.mark.parametrize("make", EVERY)
def test_an_adapted_network_returns_its_own_logits_in_float32_and_leaves_the_images_alone(make):
    model, images = made(make), images_of()
    channels_last = images.clone().contiguous(memory_format=torch.channels_last)
    adapted = adapt(model)
    assert adapt(adapted) is adapted
    logits = seeded_call(adapted, channels_last)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, own_call(model, images), atol=1e-5, rtol=1e-5)
    assert torch.equal(channels_last, images), "the images were written into"
    assert not any(part.training for part in adapted.modules())


@pytest.mark.parametrize("make", EVERY)
def test_a_network_made_ready_for_attacks_is_the_same_function(make):
    model, images = made(make), images_of()
    expected = own_call(model, images)
    for ready in (adapt(to_channels_last(fold_batch_norms(model))), _without_purifier(model)):
        torch.testing.assert_close(seeded_call(ready, images), expected, atol=2e-3 * float(expected.abs().max()), rtol=0)


class Visible(nn.Module):
    def forward(self, given):
        return given[:, :3]


def _without_purifier(model):
    pipeline = AToPPipeline(TransformSettings("none"), Visible(), model).eval()
    return for_attacks(pipeline)


@pytest.mark.parametrize("attack", ATTACKED)
@pytest.mark.parametrize("make", EVERY)
def test_every_attack_runs_on_every_network_within_its_bound(make, attack):
    model, images = made(make), images_of(2)
    labels, before = labels_of(model, images), images.clone()
    found = ATTACKS[attack]
    budget = {"steps": 2, "queries": 3, "eot_samples": 1, "samples": 2}
    if attack == "apgd":
        budget["verdict"] = Verdict("majority", 3)
    options = {name: value for name, value in budget.items() if name in found.options}
    adversarial = found.function(model, images, labels, found.settings(0.1, **options))
    assert adversarial.shape == images.shape and adversarial.dtype == torch.float32
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert torch.equal(images, before), "the images were written into"
    if attack != "stadv":
        assert (adversarial - images).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("make", EVERY)
def test_every_network_is_judged_and_defended(make):
    model, images = made(make), images_of()
    labels = labels_of(model, images)
    assert draw_logits(model, images).dtype == torch.float32
    if not is_random(model, images):
        assert judge(model, images, labels).all()
    pipeline = AToPPipeline(TransformSettings("rt2", grid_size=2), nn.Conv2d(5, 3, 1), model).eval()
    for defence in (pipeline, for_attacks(pipeline)):
        moving = images.clone().requires_grad_()
        defence(moving).square().sum().backward()
        assert moving.grad.isfinite().all() and moving.grad.abs().sum() > 0


@pytest.mark.parametrize("make, sentence", [pytest.param(*row, id=name) for name, row in REFUSED.items()])
def test_what_cannot_be_attacked_is_refused_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(made(make), images_of(), torch.zeros(3, dtype=torch.int64))


def test_a_network_that_passes_no_gradient_is_refused_where_one_is_needed_and_elsewhere_used():
    model, images, labels = made(NotDifferentiable), images_of(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="not differentiable.*BPDA"):
        prepare(model, images, labels, differentiable=True)
    check_attack(model, images, labels)
    prepare(made(Net), images, labels, differentiable=True)


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (torch.zeros(3, 1, dtype=torch.int64), r"of shape \(3,\), got \(3, 1\): use labels\.squeeze"),
        (torch.zeros(3, 4, dtype=torch.int64), "argmax"),
        (np.zeros((3, 1), dtype=np.int64), "squeeze"),
        (torch.zeros(2, dtype=torch.int64), "3 images, but 2 labels"),
        (np.zeros(3), "int64"),
        (torch.full((3,), 4), r"0\.\.3"),
    ],
)
def test_labels_of_another_form_are_refused(labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(made(Net), images_of(), labels)


def test_accuracy_by_labels_of_one_column_is_no_number(without_shape_checks):
    model, images = made(Net), images_of()
    with pytest.raises(ValueError, match="one class an image"):
        judge(model, images, labels_of(model, images)[:, None])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_numpy_images_and_labels_are_taken(dtype):
    _, images, labels = prepare(made(Net), images_of().double().numpy(), np.arange(3).astype(dtype))
    assert torch.equal(images, images_of()) and torch.equal(labels, torch.arange(3))
    with pytest.raises(ValueError, match="images.float.*255"):
        prepare(made(Net), np.zeros((3, 3, 16, 16), np.uint8), np.arange(3))


@pytest.mark.parametrize("size", [(24, 40), (224, 224)], ids=str)
def test_images_of_other_sizes_are_taken(size):
    model, images = made(lambda: LeNet(size)), images_of(2, size)
    labels = labels_of(model, images)
    pgd = ATTACKS["pgd"]
    adversarial = pgd.function(model, images, labels, pgd.settings(0.1, steps=1))
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    pipeline = for_attacks(AToPPipeline(TransformSettings("none"), Visible(), model).eval())
    torch.testing.assert_close(pipeline(images), own_call(model, images), atol=1e-4, rtol=1e-4)


def test_a_network_in_train_mode_is_refused_and_stays_as_it_is():
    model = Net().train()
    statistics = model.body[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"train mode; call model\.eval"):
        prepare(model, images_of(), torch.zeros(3, dtype=torch.int64))
    assert model.training and torch.equal(model.body[1].running_mean, statistics)


def test_the_mode_and_the_random_numbers_are_those_of_the_network():
    model = Net()
    adapted = adapt(model)
    assert adapted.training
    model.eval()
    assert not adapted.training
    seeds = []
    model.reseed = seeds.append
    reseed(adapted, 5)
    assert set(seeds) == {5}


def test_the_kits_own_networks_come_back_as_they_are_and_are_still_made_fast():
    own = build_classifier("small_resnet", num_classes=4, mean=(0.5,) * 3, std=(0.2,) * 3, width=4).eval()
    pipeline = AToPPipeline(TransformSettings("rt2", grid_size=2), GatedUNet(width=4).eval(), own).eval()
    assert adapt(own) is own and adapt(pipeline) is pipeline and pipeline.classifier is own
    ready = for_attacks(pipeline)
    assert isinstance(ready.purifier, FrozenGatedUNet)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in ready.classifier.modules())


def test_a_gated_unet_with_a_parametrised_or_hooked_part_is_used_as_it_is():
    for change in (lambda unet: parametrizations.weight_norm(unet.to_rgb), _doubling):
        unet = GatedUNet(width=4).eval()
        change(unet)
        pipeline = AToPPipeline(TransformSettings("rt2", grid_size=2), unet, made(Net)).eval()
        ready = for_attacks(pipeline)
        assert not isinstance(ready.purifier, FrozenGatedUNet)
        torch.testing.assert_close(ready(images_of()), pipeline(images_of()), atol=1e-5, rtol=1e-4)


def _doubling(unet):
    unet.to_rgb.register_forward_hook(lambda part, given, result: 2 * result)


@pytest.mark.parametrize("make", [Tied, ExtraState], ids=["tied", "extra state"])
def test_tied_weights_and_extra_state_are_saved_and_loaded(tmp_path, make):
    model, images = made(make), images_of()
    check_saveable(model)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, model, kind="classifier", architecture="own: Net", options={})
    torch.manual_seed(9)
    loaded = load_own(path, make, kind="classifier")
    assert torch.equal(loaded(images), model(images))
    if make is ExtraState:
        other = load_own(path, lambda: ExtraState({"scale": 0.0}), kind="classifier")
        assert other.kept["scale"] == 2.0 and torch.equal(other.kept["shift"], torch.ones(4))


def test_what_cannot_be_saved_is_known_before_a_training():
    with pytest.raises(CheckpointError, match=r"get_extra_state\) is a object, which cannot be saved"):
        check_saveable(ExtraState(object()))
    with pytest.raises(CheckpointError, match="no shape yet"):
        check_saveable(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(CheckpointError, match="only dense tensors can be saved"):
        check_saveable(sparse)


# Somebody's weights


class BasicBlock(nn.Module):
    """Of a small ResNet for CIFAR as others write it."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ForeignResNet(nn.Module):
    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layers = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2))
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


@pytest.fixture
def foreign_package(monkeypatch):
    package = types.ModuleType("somebodys_models")
    package.resnet = ForeignResNet
    monkeypatch.setitem(sys.modules, "somebodys_models", package)


def written(path, model, form):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if "parallel" in form:
        state = {f"module.{name}": value for name, value in state.items()}
    for key in ("state_dict", "model", "net"):
        if form.endswith(key):
            state = {key: state, "epoch": 3}
    if path.suffix == ".safetensors":
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
        ("w.safetensors", "plain"),
        ("w.safetensors", "parallel"),
    ],
)
def test_somebodys_weights_are_loaded_by_parameters_alone(tmp_path, foreign_package, name, form):
    model, images = made(lambda: ForeignResNet(5)), images_of(size=(32, 32))
    path = written(tmp_path / name, model, form)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    arguments = {"factory": "somebodys_models:resnet", "options": {"num_classes": 5}, "mean": mean, "std": std}
    expected = model((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    loaded = load_foreign(path, **{"factory": "x"} | arguments)
    torch.testing.assert_close(loaded(images), expected)
    assert not any(part.training for part in loaded.modules())
    torch.testing.assert_close(load_classifier(path, **arguments)(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(load_foreign(path, lambda: ForeignResNet(5))(images), model(images))


def test_somebodys_weights_that_cannot_be_used_say_so(tmp_path, foreign_package):
    path = written(tmp_path / "w.pth", ForeignResNet(5), "plain")
    whole = tmp_path / "whole.pth"
    torch.save(nn.Linear(2, 2), whole)
    for wrong, sentence in [
        (lambda: load_classifier(path), "classifier: 'package.module:function'"),
        (lambda: load_foreign(path, "resnet"), "given as 'package.module:function'"),
        (lambda: load_foreign(path, "no_such_package:resnet"), "cannot be found"),
        (lambda: load_foreign(path, "somebodys_models:other"), "cannot be found"),
        (lambda: load_foreign(path, "somebodys_models:resnet"), "another architecture.*of another shape"),
        (lambda: load_foreign(path, "somebodys_models:resnet", {"depth": 3}), "cannot build a network"),
        (lambda: load_foreign(path, "somebodys_models:resnet", {"num_classes": 5}, mean=(0.5,) * 3), "belong together"),
        (lambda: load_foreign(whole, "somebodys_models:resnet"), "cannot be read as weights.*run code"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            wrong()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_foreign(tmp_path / "none.pth", "somebodys_models:resnet")
