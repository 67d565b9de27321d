"""Purifiers are cheap, take the sizes they promise, and learn digits instead of painting black."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atoplib import classifiers, freezing
from atoplib.checkpoints import CheckpointError, load, read_header, save
from atoplib.data import Split
from atoplib.purifiers import PURIFIERS, DeepFillV2, GatedUNet, ResidualPurifier, RobustEncoderPurifier, build
from atoplib.training import fit
from atoplib.transforms import Transform, corrupt, sample_transform

OUT_OF_RANGE = [("width", 0), ("blocks", -1), ("fold", 0), ("pixel_width", -1)]


def given_for(shape=(2, 5, 32, 32)):
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given[:, 3:] = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    return given


@pytest.mark.parametrize(
    "make, expected", [(GatedUNet, 0.17), (ResidualPurifier, 0.29), (RobustEncoderPurifier, 0.52)]
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
        ("unet", {}, "purifier must be one of gated_unet, residual, robust_encoder"),
        ("gated_unet", {"depth": 3}, "does not take the options {'depth': 3}"),
        *(("gated_unet", {k: v}, f"{k} must .*, got {v}") for k, v in OUT_OF_RANGE),
        *(("residual", {k: v}, f"{k} must .*, got {v}") for k, v in OUT_OF_RANGE[:3]),
        *(
            ("robust_encoder", {k: v}, f"{k} must .*, got {v}")
            for k, v in [("encoder_width", 0), *OUT_OF_RANGE[:2]]
        ),
    ],
)
def test_impossible_purifiers_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    "make, factor",
    [
        (lambda: GatedUNet(4, fold=2), 8),
        (lambda: GatedUNet(4, fold=4), 16),
        (lambda: ResidualPurifier(4), 4),
        (lambda: RobustEncoderPurifier(4), 8),
        (lambda: RobustEncoderPurifier(4, stem_stride=2), 16),
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
        "residual": {"width": 4, "blocks": 1},
        "robust_encoder": {"encoder_width": 2, "width": 4},
    }.items():
        model = build(name, **options).eval()
        assert isinstance(model, PURIFIERS[name])
        save(tmp_path / name, model, kind="purifier", architecture=name, options=options)
        again, header = load(tmp_path / name, kind="purifier")
        assert header["architecture"] == name and str(again(given_for())) == str(model(given_for()))


@pytest.mark.parametrize(
    "make, only_way",
    [
        (lambda: ResidualPurifier(width=4, blocks=1), "up"),
        (lambda: RobustEncoderPurifier(4), "encoder.1.stem.0"),
    ],
)
def test_nothing_goes_around_a_bottleneck_nor_a_low_resolution(make, only_way):
    model = make()
    nn.init.zeros_(model.get_submodule(only_way).weight)
    assert torch.equal(model(given_for()), model(torch.zeros(2, 5, 32, 32))), "it still depends on the image"


# The residual purifier


def test_every_weight_of_a_residual_purifier_learns_and_its_gradient_is_the_true_one():
    model = ResidualPurifier(width=4, blocks=1, fold=1).double()
    for parameter in model.parameters():  # what starts at 0, too
        nn.init.normal_(parameter, std=0.5)
    given = given_for((1, 5, 4, 6)).double().requires_grad_()
    result = model(given)
    assert result.shape == (1, 3, 4, 6) and result.abs().max() <= 1
    result.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.autograd.gradcheck(model, given, fast_mode=True)


# The robust encoder


AT = {"num_classes": 4, "mean": (0.5,) * 3, "std": (0.2,) * 3, "width": 3}


def at_classifier(path=None, seed=0):
    torch.manual_seed(seed)
    network = classifiers.build("small_resnet", **AT)
    network(torch.rand(8, 3, 16, 16))  # batch statistics unlike those of a fresh one
    if path:
        save(path, network, kind="classifier", architecture="small_resnet", options=AT)
    return network.eval()


def test_a_robust_encoder_sees_what_its_classifier_sees_and_only_the_decoder_learns():
    classifier, purifier = at_classifier(), RobustEncoderPurifier(encoder_width=3, width=4)
    purifier.take_encoder(freezing.freeze(classifier))
    (normalize, encoder), x = purifier.encoder, torch.rand(4, 3, 16, 16)
    logits = classifier[1].head(encoder.features(normalize(x))[-1].mean(dim=(2, 3)))
    torch.testing.assert_close(logits, classifier(x), atol=1e-5, rtol=1e-4)
    before = {name: weight.clone() for name, weight in purifier.state_dict().items()}
    data = Split((255 * x).byte(), torch.zeros(4, dtype=torch.long))
    fit(
        lambda x, y, epoch: purifier(given_for((4, 5, 16, 16))).square().mean(),
        purifier, data, epochs=2, batch_size=4, learning_rate=0.1, ema_decay=0.5,
    )  # fmt: skip
    moved = {name for name, weight in purifier.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if not name.startswith("encoder.")}
    other = RobustEncoderPurifier(2), RobustEncoderPurifier(3, stem_stride=2), RobustEncoderPurifier(3)
    for network, given in zip(other, [*2 * [freezing.freeze(classifier)], classifier], strict=True):
        with pytest.raises(ValueError, match=r"must be a small_resnet of the width.*without its batch norm"):
            network.take_encoder(given)


def test_a_purifier_leaves_its_encoder_to_the_classifiers_file_and_notices_another_one(tmp_path):
    at, file, options = tmp_path / "at", tmp_path / "purifier", {"encoder_width": 3, "width": 4}
    purifier = RobustEncoderPurifier(**options).eval()
    purifier.take_encoder(freezing.freeze(at_classifier(at)))
    facts = {"encoder_file": "at", "encoder_sha256": read_header(at)["sha256"]}
    save(file, purifier, kind="purifier", architecture="robust_encoder", options=options, **facts)
    assert not any(name.startswith("encoder") for name in load_file(file))
    again, _ = load(file, kind="purifier")
    torch.testing.assert_close(again(given_for()), purifier(given_for()), atol=1e-6, rtol=1e-6)
    at_classifier(at, seed=1)
    with pytest.raises(CheckpointError, match="its encoder, at, is another one"):
        load(file, kind="purifier")
