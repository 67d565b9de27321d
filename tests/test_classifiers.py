"""Classifiers have the published sizes and shapes, and normalise by themselves."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from atoplib.classifiers import (
    CLASSIFIERS,
    Normalize,
    SmallResNet,
    WideBlock,
    WideResNet,
    _pooled_relu,
    build_classifier,
    fold_batch_norms,
)

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def build(name, num_classes=10, **options):
    return build_classifier(name, num_classes=num_classes, mean=MEAN, std=STD, **options)


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


@pytest.mark.parametrize("name, expected", [("resnet18", 4), ("wide_resnet_28_10", 8), ("resnet18_large", 8)])
def test_the_last_feature_map_has_the_published_size(name, expected):
    model = on_meta(name)
    sizes = []
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _part, _given, result: sizes.append(result.shape[-1]))
    size = 256 if name.endswith("_large") else 32
    model(torch.empty(1, 3, size, size, device="meta"))
    assert sizes[-1] == expected
    assert sizes[0] == (128 if name.endswith("_large") else 32)


@pytest.mark.parametrize(
    "options, size", [({}, 32), ({"stem_stride": 2}, 32), ({"width": 8}, 64), ({"width": 4}, 36)], ids=str
)
def test_the_small_resnet_takes_its_options_and_other_sizes(options, size):
    model = build("small_resnet", 7, **options).eval()
    logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert model[1].stem[0].out_channels == options.get("width", 24)


def test_the_small_resnet_costs_what_it_says():
    with FlopCounterMode(display=False) as flops:
        on_meta("small_resnet")(torch.empty(1, 3, 32, 32, device="meta"))
    assert flops.get_total_flops() / 1e9 == pytest.approx(0.107, abs=0.001)
    with FlopCounterMode(display=False) as strided:
        on_meta("small_resnet", stem_stride=2)(torch.empty(1, 3, 32, 32, device="meta"))
    assert strided.get_total_flops() < 0.5 * flops.get_total_flops()


@pytest.mark.parametrize("build", [partial(SmallResNet, 4, width=4), partial(WideResNet, 4, depth=10, widen_factor=1)])
def test_every_weight_takes_part_and_the_loss_falls_in_training(build):
    model = build()
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    images[torch.arange(16), :, :8, :8] = (labels / 4).view(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("channels, stride", [(4, 1), (8, 1), (4, 2)])
def test_the_shortcut_of_a_wide_block_is_the_identity_or_reads_the_activated_input(channels, stride):
    block, x = WideBlock(4, channels, stride).eval(), torch.randn(2, 4, 8, 8)
    nn.init.normal_(block.norm1.bias)
    nn.init.zeros_(block.conv2.weight)
    expected = x if (channels, stride) == (4, 1) else block.shortcut(block.norm1(x).relu())
    torch.testing.assert_close(block(x), expected)


def test_the_first_layer_normalises_as_one_does_by_hand():
    model = build("small_resnet", width=4).eval()
    images = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model[0](images), by_hand)
    torch.testing.assert_close(model(images), model[1](by_hand))


def test_normalisation_is_saved_with_the_weights_but_not_trained():
    model = build("small_resnet", width=4)
    assert {"0.mean", "0.std"} <= set(model.state_dict())
    assert not list(model[0].parameters())
    other = build_classifier("small_resnet", num_classes=10, mean=(0.0,) * 3, std=(1.0,) * 3, width=4)
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    "mean, std",
    [((0.5,), (0.5,)), ((0.5,) * 3, (0.5, 0.0, 0.5)), ((0.5,) * 3, (0.5, -1.0, 0.5)), ((0.5,) * 4, (0.5,) * 3)],
    ids=str,
)
def test_an_impossible_normalisation_is_refused(mean, std):
    with pytest.raises(ValueError, match="mean and std need 3 values each, std above 0"):
        Normalize(mean, std)


def test_an_unknown_name_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="unknown classifier 'resnet19'; allowed: small_resnet, resnet18"):
        build("resnet19")


@pytest.mark.parametrize("name, options", [("resnet18", {"width": 8}), ("small_resnet", {"depth": 3})], ids=str)
def test_an_option_that_the_architecture_lacks_is_refused(name, options):
    with pytest.raises(ValueError, match=f"classifier '{name}' does not take the options"):
        build(name, **options)


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(num_classes):
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        build("small_resnet", num_classes)


@pytest.mark.parametrize("options", [{"width": 0}, {"width": -4}, {"stem_stride": 0}], ids=str)
def test_an_impossible_width_or_stride_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        build("small_resnet", **options)


@pytest.mark.parametrize("depth", [4, 9, 11, 27])
def test_an_impossible_depth_of_a_wide_resnet_is_refused(depth):
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4"):
        WideResNet(10, depth=depth, widen_factor=1)


def test_folded_batch_norms_leave_the_function_and_the_model_as_they_are():
    model = build("small_resnet", width=4).train()
    for _ in range(3):
        model(torch.rand(16, 3, 32, 32))  # statistics unlike those of a fresh model
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, images = fold_batch_norms(model), torch.rand(4, 3, 32, 32)
    assert not any(part.training for part in folded.modules()), "it is attacked as it is"
    torch.testing.assert_close(folded(images), model(images), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_folding_leaves_alone_what_is_not_a_convolution_and_its_norm_in_sequence():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert [type(part) for part in fold_batch_norms(model)] == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.BatchNorm2d]


def test_a_model_in_train_mode_is_not_folded():
    with pytest.raises(ValueError, match=r"eval mode can be folded; call model\.eval"):
        fold_batch_norms(build("small_resnet", width=4).train())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_a_relu_behind_the_pooling_is_the_relu_before_it_bit_by_bit_gradients_included(form):
    values = torch.randint(-2, 3, (4, 3, 8, 8)).float().contiguous(memory_format=form)  # ties, zeros, and squares below zero
    weight = torch.rand(4, 3, 4, 4)
    before, after = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected, result = F.max_pool2d(F.relu(before), 2), _pooled_relu(after)
    assert torch.equal(result, expected)
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    assert torch.equal(after.grad, before.grad)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_normalisation_is_the_difference_over_the_deviation_bit_by_bit_in_every_layout(form):
    images = torch.rand(3, 3, 8, 12).contiguous(memory_format=form)
    expected = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    result = Normalize(MEAN, STD)(images)
    assert torch.equal(result, expected) and result.is_contiguous(memory_format=form)
