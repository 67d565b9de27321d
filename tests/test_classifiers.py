"""Classifiers have the published sizes and shapes, and normalise by themselves."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from atoplib import classifiers
from atoplib.classifiers import CLASSIFIERS, Normalize, SmallResNet, WideBlock, WideResNet, _pooled_relu
from atoplib.freezing import freeze
from atoplib.training import flops

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def build(name, num_classes=10, **options):
    return classifiers.build(name, num_classes=num_classes, mean=MEAN, std=STD, **options)


def on_meta(name, num_classes=10, **options):
    """Shapes and sizes without memory or time."""
    with torch.device("meta"):
        return build(name, num_classes, **options).eval()


@pytest.mark.parametrize(
    "name, millions",
    [
        ("wide_resnet_28_10", 36.479194),
        ("wide_resnet_70_16", 266.796506),
        ("resnet18", 11.173962),
        ("resnet34", 21.282122),
        ("resnet50", 23.520842),
        ("resnet18_large", 11.181642),
        ("resnet50_large", 23.528522),
    ],
)
def test_a_published_architecture_has_the_published_number_of_weights_for_10_classes(name, millions):
    assert sum(p.numel() for p in on_meta(name).parameters()) == round(millions * 1e6)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_gives_one_row_of_logits_an_image(name):
    size = 128 if name.endswith("_large") else 32
    assert on_meta(name, 7)(torch.empty(3, 3, size, size, device="meta")).shape == (3, 7)


def test_the_small_resnet_costs_what_it_says():
    image = torch.empty(1, 3, 32, 32, device="meta")
    cost = flops(on_meta("small_resnet"), image)
    assert cost / 1e9 == pytest.approx(0.107, abs=0.001)
    assert flops(on_meta("small_resnet", stem_stride=2), image) < 0.5 * cost


@pytest.mark.parametrize(
    "build", [partial(SmallResNet, 4, width=4), partial(WideResNet, 4, depth=10, widen_factor=1)]
)
def test_every_weight_takes_part_in_training(build):
    model = build()
    F.cross_entropy(model(torch.rand(16, 3, 32, 32)), torch.arange(16) % 4).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("channels, stride", [(4, 1), (8, 1), (4, 2)])
def test_the_shortcut_of_a_wide_block_is_the_identity_or_a_convolution_of_the_activated_input(
    channels, stride
):
    block, x = WideBlock(4, channels, stride).eval(), torch.randn(2, 4, 8, 8)
    nn.init.normal_(block.norm1.bias)
    nn.init.zeros_(block.conv2.weight)
    expected = x if (channels, stride) == (4, 1) else block.shortcut(block.norm1(x).relu())
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Normalize((0.5,) * 3, (0.5, 0.0, 0.5)), "std must be above 0"),
        (
            lambda: build("resnet19"),
            "unknown classifier 'resnet19'; allowed: small_resnet, .*package.module:f",
        ),
        (lambda: build("resnet18", width=8), "resnet18 cannot build a network with the options"),
        (lambda: build("small_resnet", depth=3), "small_resnet cannot build a network with the options"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_folded_batch_norms_leave_the_function_and_the_model_as_they_are():
    model = build("small_resnet", width=4).train()
    for _ in range(3):
        model(torch.rand(16, 3, 32, 32))  # statistics unlike those of a fresh model
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, images = freeze(model), torch.rand(4, 3, 32, 32)
    assert not any(p.requires_grad for p in folded.parameters()) and all(
        p.requires_grad for p in model.parameters()
    )
    assert not any(part.training for part in folded.modules()), "it is attacked as it is"
    torch.testing.assert_close(folded(images), model(images), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"]
)
def test_a_relu_behind_the_pooling_is_the_relu_before_it_bit_by_bit_gradients_included(form):
    # Ties, zeros, and squares below zero.
    values = torch.randint(-2, 3, (4, 3, 8, 8)).float().contiguous(memory_format=form)
    weight = torch.rand(4, 3, 4, 4)
    before, after = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected, result = F.max_pool2d(F.relu(before), 2), _pooled_relu(after)
    assert torch.equal(result, expected)
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    assert torch.equal(after.grad, before.grad)


@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"]
)
def test_normalisation_is_the_difference_over_the_deviation_bit_by_bit_in_every_layout(form):
    images = torch.rand(3, 3, 8, 12).contiguous(memory_format=form)
    expected = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    result = Normalize(MEAN, STD)(images)
    assert torch.equal(result, expected) and result.is_contiguous(memory_format=form)
