"""GatedUNet is cheap, takes the sizes it promises, and learns digits instead of painting black."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from atoplib.data import load_dataset, to_float
from atoplib.purifiers import PURIFIERS, DeepFillV2, FrozenGatedUNet, GatedUNet, build_purifier, stage_outputs
from atoplib.purifiers.frozen import folded, unfolded
from atoplib.transforms import TransformSettings, corrupt, sample_draw


def given_for(shape=(2, 5, 32, 32)):
    given = torch.rand(shape) * 2 - 1
    given[:, 3] = 1
    given[:, 4] = 0
    return given


def test_at_its_default_width_an_image_of_32_px_costs_at_most_half_a_gflop():
    with torch.device("meta"):
        model, given = GatedUNet(), torch.empty(1, 5, 32, 32)
    with FlopCounterMode(display=False) as flops:
        model(given)
    gflop = flops.get_total_flops() / 1e9
    assert 0.05 < gflop <= 0.5
    assert gflop == pytest.approx(0.17, abs=0.005), "its docstring says 0.17"


@pytest.mark.parametrize(
    "fold, size",
    [(2, (32, 32)), (2, (64, 32)), (2, (8, 8)), (2, (40, 56)), (4, (32, 32)), (4, (48, 16)), (1, (4, 12))],
    ids=str,
)
def test_the_output_is_an_image_of_the_inputs_size(fold, size):
    result = GatedUNet(width=4, fold=fold)(given_for((2, 5, *size)))
    assert result.shape == (2, 3, *size) and result.isfinite().all()


@pytest.mark.parametrize("fold, size", [(2, (36, 32)), (2, (32, 28)), (4, (24, 32)), (4, (32, 8))], ids=str)
def test_a_size_that_it_cannot_halve_twice_is_refused(fold, size):
    with pytest.raises(ValueError, match=f"divisible by {4 * fold}, got {size[0]} x {size[1]}"):
        GatedUNet(width=4, fold=fold)(given_for((1, 5, *size)))


@pytest.mark.parametrize("options", [{"width": 0}, {"blocks": -1}, {"fold": 0}, {"pixel_width": -1}], ids=str)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="width and fold must be at least 1, blocks in 0..100"):
        GatedUNet(**options)


def test_fresh_weights_hand_on_a_visible_image_and_mid_grey_where_it_is_missing():
    given = given_for()
    given[:, 4, 8:16, 8:16] = 1
    given[:, :3, 8:16, 8:16] = 0
    result = GatedUNet(width=8)(given)
    assert (result - given[:, :3]).abs().mean() < 0.25
    assert result[:, :, 8:16, 8:16].mean().abs() < 0.1


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
    model = GatedUNet(width=4)
    model(given_for()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_mask_and_image_of_the_whole_of_32_px_reach_the_centre():
    given = given_for((1, 5, 32, 32)).requires_grad_()
    (gradient,) = torch.autograd.grad(GatedUNet(width=4)(given)[0, :, 16, 16].sum(), given)
    reach = gradient[0, [0, 1, 2, 4]].abs().sum(dim=0)
    assert all(reach[row, column] > 0 for row in (0, 31) for column in (0, 31))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    split = load_dataset("mnist5k", data_dir=tmp_path_factory.mktemp("data"), max_train=512).train
    return to_float(split.images)


def test_trained_by_l1_on_sparse_digits_it_does_not_collapse_to_black(digits):
    torch.manual_seed(0)
    model = GatedUNet(width=8, fold=4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    settings = TransformSettings("rt2", missing_rate=0.25, noise_std=0.25)
    for step in range(40):
        images = digits[64 * (step % 8) : 64 * (step % 8 + 1)]
        draw = sample_draw(settings, images.shape, generator=generator)
        result = model(corrupt(images, draw))
        loss = (result - (2 * images - 1)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target = 2 * images - 1
    black = (-1 - target).abs().mean().item()
    assert loss.item() < 0.85 * black, f"loss {loss.item():.3f}, an all-black output has {black:.3f}"
    stroke = target > 0.5
    assert result[stroke].mean() > 0, "the strokes of the digits are gone"
    assert result[target < -0.99].mean() < -0.8


def loss_of_thresholding(pixel_width):
    """What is left after a short training to cut pixels, each drawn alone, to black or white."""
    torch.manual_seed(0)
    model = GatedUNet(width=4, blocks=0, fold=4, pixel_width=pixel_width)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        given = given_for((8, 5, 16, 16))
        given[:, :3] = torch.rand(8, 1, 16, 16) * 2 - 1
        loss = (model(given) - given[:, :3].sign()).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_only_with_a_pixel_width_it_puts_each_pixel_right_by_its_own_value():
    assert loss_of_thresholding(8) < 0.6 * loss_of_thresholding(0)


def test_weights_without_a_pixel_width_fit_as_before():
    old, new = GatedUNet(width=4), GatedUNet(width=4, pixel_width=2)
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"pixel"}
    assert not any(name.startswith("pixel") for name in old.state_dict())


def test_the_purifiers_are_built_by_name_with_their_options():
    assert set(PURIFIERS) == {"gated_unet", "deepfill_v2", "denoising_autoencoder", "diffusion"}
    model = build_purifier("gated_unet", width=4, blocks=1, fold=4)
    assert isinstance(model, GatedUNet) and model.fold == 4 and len(model.bottleneck) == 1
    assert isinstance(build_purifier("deepfill_v2", width=4), DeepFillV2)


def test_an_unknown_purifier_or_option_is_refused():
    with pytest.raises(ValueError, match="unknown purifier 'unet'; allowed: gated_unet, deepfill_v2, denoising"):
        build_purifier("unet")
    with pytest.raises(ValueError, match="purifier 'gated_unet' does not take the options {'depth': 3}"):
        build_purifier("gated_unet", depth=3)


def test_any_number_of_stages_becomes_a_tuple_with_the_result_last():
    coarse, fine = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert stage_outputs(fine) == (fine,)
    first, last = stage_outputs((coarse, fine))
    assert first is coarse and last is fine


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(
    "options",
    [{"fold": 1, "blocks": 0}, {"fold": 2}, {"fold": 4, "pixel_width": 3}, {"fold": 2, "pixel_width": 2, "blocks": 1}],
    ids=str,
)
def test_frozen_it_computes_the_same_and_the_same_gradients_to_the_visible_pixels(options, form):
    torch.manual_seed(0)
    model = GatedUNet(width=4, **options).double().eval()  # in double precision no rounding hides a difference
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases too, and outputs on both sides of the range
    frozen = FrozenGatedUNet(model)
    given = given_for((2, 5, 48, 32)).double().contiguous(memory_format=form)
    given[:, 4, 8:20, 4:16] = 1
    first, second = given.clone().requires_grad_(), given.clone().requires_grad_()
    expected, result = model(first), frozen(second)
    assert (expected.abs() > 1).any() and (expected.abs() < 1).any()
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    weight = torch.rand_like(expected)
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    torch.testing.assert_close(second.grad[:, :3], first.grad[:, :3], atol=1e-10, rtol=1e-10)


def test_frozen_it_trains_no_weight_and_shares_none():
    model = GatedUNet(width=4, pixel_width=2).eval()
    frozen = FrozenGatedUNet(model)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is left as it is"
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    given = given_for()
    expected = frozen(given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(given), expected)


def test_a_purifier_in_train_mode_or_a_size_that_cannot_be_halved_is_not_frozen():
    with pytest.raises(ValueError, match=r"eval mode can be frozen; call purifier\.eval"):
        FrozenGatedUNet(GatedUNet(width=4))
    with pytest.raises(ValueError, match="divisible by 8, got 36 x 32"):
        FrozenGatedUNet(GatedUNet(width=4).eval())(given_for((1, 5, 36, 32)))


@pytest.mark.parametrize("fold, planes", [(1, 3), (2, 3), (4, 1), (2, 5)])
def test_folding_is_a_pixel_unshuffle_of_another_order_and_unfolding_undoes_it(fold, planes):
    values = torch.rand(2, planes, 8, 16)
    known = F.pixel_unshuffle(values, fold).unflatten(1, (planes, fold**2)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(folded(values, fold), known)
    assert torch.equal(unfolded(folded(values, fold), fold), values)
