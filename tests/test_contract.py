"""Anybody's network works at every public entry, or is refused at the border with one sentence: a zoo of odd
networks."""

from contextlib import nullcontext
from functools import partial
from random import SystemRandom

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import REFUSED, WORKS, LeNet, Net, NotDifferentiable, Visible, images_of, made

from atoplib import classifiers
from atoplib.attacks import ATTACKS
from atoplib.contract import adapt, prepare
from atoplib.data import Split
from atoplib.decisions import correct, is_random, reseed, sample_logits
from atoplib.evaluation import evaluate
from atoplib.explorer import make_explorer
from atoplib.freezing import freeze
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import GatedUNet
from atoplib.training import fit
from atoplib.transforms import Transform

LONG = [pytest.mark.long]
EVERY = [
    pytest.param(make, id=name, marks=LONG if name == "compiled" else []) for name, make in WORKS.items()
]
QUICK = ["in place on the input", "half", "scripted", "hook"]
SOME = [pytest.param(make, id=name, marks=[] if name in QUICK else LONG) for name, make in WORKS.items()]
ATTACKED = {  # cheap options of each
    "fgsm": {},
    "pgd": {"steps": 2, "eot_samples": 2},
    "apgd": {"steps": 2},
    "square": {"queries": 3},
    "flow": {"steps": 2},
}


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


def without_purifier(model):
    return AToPPipeline(Transform("none"), Visible(), model).eval()


@pytest.mark.parametrize("make", EVERY)
def test_a_network_adapted_or_frozen_for_attacks_is_the_same_function_and_leaves_the_images_alone(make):
    model = made(make)
    adapted = adapt(model)
    assert adapt(adapted) is adapted and not any(part.training for part in adapted.modules())
    ready = adapt(freeze(made(make))), without_purifier(model).freeze_for_attack()
    for images in (images_of(), 0.1 * images_of(), 1 - 0.1 * images_of()):
        channels_last = images.clone().contiguous(memory_format=torch.channels_last)
        expected, logits = own_call(model, images), seeded_call(adapted, channels_last)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(channels_last, images), "the images were written into"
        for network in ready:
            tolerance = 2e-3 * float(expected.abs().max())
            torch.testing.assert_close(seeded_call(network, images), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attack", ATTACKED)
@pytest.mark.parametrize("make", EVERY)
def test_every_attack_runs_on_every_network_within_its_bound(make, attack):
    model, images = made(make), images_of(2)
    labels, before, row = labels_of(model, images), images.clone(), ATTACKS[attack]
    adversarial = row.function(model, images, labels, eps=0.1, norm=row.norms[0], **ATTACKED[attack])
    assert adversarial.shape == images.shape and adversarial.dtype == torch.float32
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert torch.equal(images, before), "the images were written into"
    if row.norms[0] == "linf":
        assert (adversarial - images).abs().max() <= 0.1 + 1e-6


def purified_by(model):
    """Behind a random transform and a small purifier."""
    torch.manual_seed(0)
    return AToPPipeline(Transform("rt2", grid_size=2), nn.Conv2d(5, 3, 1), model).eval()


@pytest.mark.parametrize("make", EVERY)
def test_every_network_is_evaluated_and_defended(make):
    model, images = made(make), images_of()
    labels, logits = labels_of(model, images), sample_logits(model, images, num_samples=2)
    assert logits.dtype == torch.float32
    if not is_random(model, images):
        assert correct(logits, labels, "worst_of_n").all()
    pipeline = purified_by(model)
    for defence in (pipeline, pipeline.freeze_for_attack()):
        moving = images.clone().requires_grad_()
        defence(moving).square().sum().backward()
        assert moving.grad.isfinite().all() and moving.grad.abs().sum() > 0


UNTRAINED = {  # with which decays of the average
    "half": (0.0, 0.9, "network.float"),
    "pruned": (0.9, "prune.remove"),
    "weight norm, old form": (0.9, "remove_weight_norm"),
}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("make", EVERY)
def test_every_network_is_trained_as_a_classifier_or_refused_with_a_sentence(make, ema_decay, request):
    *refused, sentence = UNTRAINED.get(request.node.callspec.id.rpartition("-")[0], ("",))
    network, sentence = made(make), sentence if ema_decay in refused else ""
    data = Split((images_of(4) * 255).to(torch.uint8), torch.arange(4) % 2)
    settings = {"epochs": 1, "batch_size": 2, "learning_rate": 0.01, "dtype": "float32"}
    before = [weight.clone() for weight in network.parameters()]
    with pytest.raises(ValueError, match=sentence) if sentence else nullcontext():
        fit(
            lambda x, y, epoch: F.cross_entropy(adapt(network)(x), y), network, data, ema_decay=ema_decay,
            **settings,
        )  # fmt: skip
    moved = [not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)]
    assert any(moved) != bool(sentence)


@pytest.mark.parametrize("make", SOME)
def test_every_network_has_a_purifier_trained_in_front_of_it_is_evaluated_and_explored(make):
    model, images = made(make), images_of(4)
    pipeline = AToPPipeline(Transform("rt2", grid_size=2), GatedUNet(width=2), model, seed=None)
    data = Split((images * 255).to(torch.uint8), torch.arange(4) % 2)
    settings = {"epochs": 1, "batch_size": 2, "learning_rate": 0.01, "dtype": "float32"}
    history = fit(lambda x, y, epoch: F.cross_entropy(pipeline(x), y), pipeline.purifier, data, **settings)
    assert 0 < history[-1]["loss"] < 20
    labels = labels_of(model, images)
    frame = evaluate({"net": model}, images, labels, protocol="demo", eps=0.1, steps=2, eot_samples=1).frame
    clean = frame[(frame.attack == "clean") & (frame.rule == "single")].accuracy.item()
    assert set(frame.attack) == {"clean", "white-box"} and (clean == 100 or is_random(model, images))
    explorer = make_explorer({"net": model}, images, labels, eps=0.1)
    explorer.refresh()
    explorer.worker.wait()
    assert explorer.shown and not explorer.shown.get("problem")


@pytest.mark.parametrize("make, sentence", [pytest.param(*row, id=name) for name, row in REFUSED.items()])
def test_what_cannot_be_attacked_is_refused_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(made(make), images_of(), torch.zeros(3, dtype=torch.int64))


def test_a_network_that_passes_no_gradient_is_refused_where_one_is_needed_and_elsewhere_used():
    model, images, labels = made(NotDifferentiable), images_of(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="not differentiable.*BPDA"):
        prepare(model, images, labels, differentiable=True)
    prepare(model, images, labels)
    with torch.no_grad():
        prepare(made(Net), images, labels, differentiable=True)


def test_whether_logits_depend_on_the_batch_is_asked_without_a_trace_and_not_of_what_no_seed_repeats():
    images, labels = images_of(), torch.zeros(3, dtype=torch.int64)
    prepare(made(lambda: Net(before=lambda x: x * SystemRandom().random())), images, labels)
    first, second = (purified_by(made(Net)) for _ in range(2))
    second(images[:1])  # all that preparing takes of the random numbers
    prepare(first, images, labels)
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (torch.zeros(3, 1, dtype=torch.int64), r"\(3,\), got \(3, 1\): use labels\.squeeze"),
        (torch.zeros(3, 4, dtype=torch.int64), "argmax"),
        (np.zeros((3, 1), dtype=np.int64), "squeeze"),
        (torch.zeros(2, dtype=torch.int64), r"\(3,\), got \(2,\)"),
        (np.zeros(3), "int64"),
        (torch.full((3,), 4), r"0\.\.3"),
    ],
)
def test_labels_of_another_form_are_refused(labels, sentence, without_shape_checks):
    with pytest.raises(ValueError, match=sentence):
        prepare(made(Net), images_of(), labels)
    if isinstance(labels, torch.Tensor) and labels.ndim == 2:
        with pytest.raises(ValueError, match="one class an image"):
            correct(torch.zeros(1, 3, 4), labels)


@pytest.mark.parametrize(
    "images, sentence",
    [
        (torch.rand(3, 3, 16, 16) * 255, "must lie in .0, 1. without NaN, got values from"),
        (torch.full((3, 3, 16, 16), float("nan")), "without NaN"),
        (torch.rand(3, 3, 16), "must have the shape"),
        (torch.rand(0, 3, 16, 16), "no images"),
        (torch.rand(3, 3, 16, 16).half(), "images.float"),
        (np.zeros((3, 3, 16, 16), np.uint8), "images.float.*255"),
    ],
    ids=["bytes as floats", "nan", "3 axes", "none", "half", "uint8"],
)
def test_images_of_another_form_are_refused(images, sentence, without_shape_checks):
    with pytest.raises(ValueError, match=sentence):
        prepare(made(Net), images, np.zeros(len(images), np.int64))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_numpy_images_and_labels_are_taken(dtype):
    _, images, labels = prepare(made(Net), images_of().double().numpy(), np.arange(3).astype(dtype))
    assert torch.equal(images, images_of()) and torch.equal(labels, torch.arange(3))


def test_a_function_is_called_as_it_is_and_not_probed(without_shape_checks):
    calls, images, labels = [], images_of(), torch.zeros(3, dtype=torch.int64)

    def function(x, scale=1):
        calls.append(x)
        return scale * x.mean(dim=(2, 3))

    model, same, _ = prepare(partial(function, scale=2), images, labels, differentiable=True)
    assert not calls and same is images
    assert torch.equal(model(images), 2 * images.mean(dim=(2, 3))) and calls[0] is images
    with pytest.raises(ValueError, match="must be a module or a function"):
        adapt(3)


@pytest.mark.parametrize("size", [(24, 40), (224, 224)], ids=str)
def test_images_of_other_sizes_are_taken(size):
    model, images = made(lambda: LeNet(size)), images_of(2, size)
    adversarial = ATTACKS["pgd"].function(model, images, labels_of(model, images), eps=0.1, steps=1)
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    logits = without_purifier(model).freeze_for_attack()(images)
    torch.testing.assert_close(logits, own_call(model, images), atol=1e-4, rtol=1e-4)


def test_a_network_in_train_mode_is_refused_and_stays_as_it_is():
    model = Net().train()
    statistics = model.body[1].running_mean.clone()
    for use in (
        lambda: prepare(model, images_of(), torch.zeros(3, dtype=torch.int64)),
        lambda: freeze(model),
    ):
        with pytest.raises(ValueError, match=r"call model\.eval"):
            use()
    assert model.training and torch.equal(model.body[1].running_mean, statistics)


def test_the_mode_and_the_random_numbers_are_those_of_the_network():
    model = Net()
    adapted, seeds = adapt(model), []
    assert adapted.training
    model.eval()
    assert not adapted.training
    model.reseed = seeds.append
    reseed(adapted, 5)
    assert set(seeds) == {5}


def test_the_kits_own_networks_come_back_as_they_are_and_are_made_fast_unless_they_were_changed():
    def small_resnet():
        return classifiers.build(
            "small_resnet", num_classes=4, mean=(0.5,) * 3, std=(0.2,) * 3, width=4
        ).eval()

    own = small_resnet()
    pipeline = AToPPipeline(Transform("rt2", grid_size=2), GatedUNet(width=4).eval(), own).eval()
    assert adapt(own) is own and adapt(pipeline) is pipeline and pipeline.classifier is own
    assert not any(isinstance(part, nn.BatchNorm2d) for part in pipeline.freeze_for_attack().modules())
    changed, hooked = small_resnet(), small_resnet()
    changed.forward = lambda images: (own(images), None)
    hooked.register_forward_hook(lambda part, given, result: {"logits": result})
    for network in (changed, hooked):
        assert adapt(network) is not network and adapt(network)(images_of(size=(32, 32))).shape == (3, 4)
