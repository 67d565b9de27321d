"""Purifiers are cheap, take the sizes they promise, and learn digits instead of painting black."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from atoplib.checkpoints import load, save
from atoplib.purifiers import (
    PURIFIERS,
    DeepFillV2,
    DenoisingAutoencoder,
    FrozenGatedUNet,
    GatedUNet,
    ResidualPurifier,
    build,
)
from atoplib.purifiers.gated import folded, unfolded
from atoplib.transforms import Transform, corrupt, sample_transform

OUT_OF_RANGE = [("width", 0), ("blocks", -1), ("fold", 0), ("pixel_width", -1)]


def given_for(shape=(2, 5, 32, 32)):
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given[:, 3] = 1
    given[:, 4] = 0
    return given


@pytest.mark.parametrize(
    "make, expected", [(GatedUNet, 0.17), (lambda: ResidualPurifier(context=False), 0.25)]
)
def test_an_image_of_32_px_costs_what_the_docstring_says(make, expected):
    with torch.device("meta"):
        model, given = make(), torch.empty(1, 5, 32, 32)
    with FlopCounterMode(display=False) as flops:
        model(given)
    assert flops.get_total_flops() / 1e9 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("unet", {}, "purifier must be one of gated_unet, residual, deepfill_v2"),
        ("gated_unet", {"depth": 3}, "does not take the options {'depth': 3}"),
        *(("gated_unet", {k: v}, f"{k} must .*, got {v}") for k, v in OUT_OF_RANGE),
        *(("residual", {k: v}, f"{k} must .*, got {v}") for k, v in OUT_OF_RANGE[:3]),
        *(("denoising_autoencoder", {"levels": v}, f"levels must lie in 1..8, got {v}") for v in (0, 9)),
    ],
)
def test_impossible_purifiers_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    "make, factor",
    [
        (lambda: GatedUNet(4, fold=2), 8),
        (lambda: FrozenGatedUNet(GatedUNet(4, fold=4).eval()), 16),
        (lambda: DenoisingAutoencoder(4, levels=3), 8),
        (lambda: ResidualPurifier(4), 4),
        (lambda: DeepFillV2(4), 8),
    ],
)
def test_a_size_that_cannot_be_halved_is_refused(make, factor):
    for height, width in ((32, 18), (32 + factor // 2, 32)):
        with pytest.raises(ValueError, match=f"divisible by {factor}, got {height} x {width}"):
            make()(given_for((1, 5, height, width)))


@pytest.mark.parametrize(
    "fold, size",
    [(2, (32, 32)), (2, (64, 32)), (2, (8, 8)), (2, (40, 56)), (4, (32, 32)), (4, (48, 16)), (1, (4, 12))],
    ids=str,
)
def test_the_output_is_an_image_of_the_inputs_size(fold, size):
    result = GatedUNet(width=4, fold=fold)(given_for((2, 5, *size)))
    assert result.shape == (2, 3, *size) and result.isfinite().all()


def test_the_output_is_the_identity_within_the_range_and_has_slope_a_tenth_outside():
    model = GatedUNet(width=4)
    nn.init.zeros_(model.to_rgb.weight)
    nn.init.constant_(model.to_rgb.bias, 1.0)
    given = torch.zeros(1, 5, 8, 8)
    given[:, 0], given[:, 1], given[:, 2] = -0.75, 0.5, -2.5
    given.requires_grad_()
    result = model(given)
    expected = torch.tensor([0.25, 0.9 + 0.1 * 1.5, -0.9 - 0.1 * 1.5]).view(1, 3, 1, 1).expand_as(result)
    torch.testing.assert_close(result, expected)
    (slope,) = torch.autograd.grad(result.sum(), given)
    torch.testing.assert_close(slope[0, :3, 0, 0], torch.tensor([1.0, 0.1, 0.1]))


def test_every_weight_gets_a_gradient():
    model = GatedUNet(width=4, front_width=2, pixel_width=2)
    model(given_for()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_mask_and_image_of_the_whole_of_32_px_reach_the_centre():
    given = given_for((1, 5, 32, 32)).requires_grad_()
    (gradient,) = torch.autograd.grad(GatedUNet(width=4)(given)[0, :, 16, 16].sum(), given)
    assert all((gradient[0, [0, 1, 2, 4], row, column] != 0).any() for row in (0, 31) for column in (0, 31))


def test_trained_by_l1_on_sparse_digits_it_does_not_collapse_to_black(digits):
    model, generator = GatedUNet(width=8, fold=4), torch.Generator().manual_seed(0)
    optimizer, (images, _) = torch.optim.Adam(model.parameters(), 3e-3), digits
    for _ in range(50):
        sample = sample_transform(Transform("rt2"), images.shape, generator=generator)
        result, target = model(corrupt(images, sample)), 2 * images - 1
        loss = (result - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    black = (-1 - target).abs().mean().item()
    assert loss.item() < 0.85 * black, f"loss {loss.item():.3f}, an all-black output has {black:.3f}"
    assert result[target > 0.5].mean() > 0, "the strokes of the digits are gone"
    assert result[target < -0.99].mean() < -0.8


def test_every_purifier_is_built_by_name_and_comes_back_from_a_checkpoint(tmp_path):
    for name, options in {
        "gated_unet": {"width": 4, "blocks": 1, "fold": 2, "front_width": 2, "pixel_width": 2},
        "denoising_autoencoder": {"width": 4, "levels": 2},
        "residual": {"width": 4, "blocks": 1},
    }.items():
        model = build(name, **options).eval()
        assert isinstance(model, PURIFIERS[name])
        save(tmp_path / name, model, kind="purifier", architecture=name, options=options)
        again, header = load(tmp_path / name, kind="purifier")
        assert header["architecture"] == name and str(again(given_for())) == str(model(given_for()))


@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"fold": 1, "blocks": 0},
        {"fold": 2},
        {"fold": 4, "pixel_width": 3},
        {"fold": 2, "pixel_width": 2, "blocks": 1},
    ],
    ids=str,
)
def test_frozen_it_computes_the_same_and_the_same_gradients_to_the_visible_pixels(options, form):
    torch.manual_seed(0)
    # In double precision no rounding hides a difference.
    model = GatedUNet(width=4, **options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases too, and outputs on both sides of the range
    given = given_for((2, 5, 48, 32)).double().contiguous(memory_format=form)
    given[:, 4, 8:20, 4:16] = 1
    first, second = given.clone().requires_grad_(), given.clone().requires_grad_()
    expected, result = model(first), FrozenGatedUNet(model)(second)
    assert (expected.abs() > 1).any() and (expected.abs() < 1).any()
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    weight = torch.rand_like(expected)
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    torch.testing.assert_close(second.grad[:, :3], first.grad[:, :3], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fold, planes", [(1, 3), (2, 3), (4, 1), (2, 5)])
def test_folding_is_a_pixel_unshuffle_of_another_order_and_unfolding_undoes_it(fold, planes):
    values = torch.rand(2, planes, 8, 16)
    known = F.pixel_unshuffle(values, fold).unflatten(1, (planes, fold**2)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(folded(values, fold), known)
    assert torch.equal(unfolded(folded(values, fold), fold), values)


@pytest.mark.parametrize(
    "make, only_way",
    [
        (lambda: DenoisingAutoencoder(width=4, levels=2), "bottleneck.0"),
        (lambda: ResidualPurifier(width=4, blocks=1), "up"),
    ],
)
def test_nothing_goes_around_a_bottleneck_nor_a_low_resolution(make, only_way):
    model = make()
    nn.init.zeros_(model.get_submodule(only_way).weight)
    assert torch.equal(model(given_for()), model(torch.zeros(2, 5, 32, 32))), "it still depends on the image"


# The residual purifier


@pytest.mark.parametrize("context", [True, False])
def test_every_weight_of_a_residual_purifier_learns_and_its_gradient_is_the_true_one(context):
    model = ResidualPurifier(width=4, blocks=1, fold=1, context=context).double()
    for parameter in model.parameters():  # what starts at 0, too
        nn.init.normal_(parameter, std=0.5)
    given = given_for((1, 5, 4, 6)).double().requires_grad_()
    result = model(given)
    assert result.shape == (1, 3, 4, 6) and result.abs().max() <= 1
    result.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.autograd.gradcheck(model, given, fast_mode=True)
