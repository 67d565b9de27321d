"""DeepFillV2 agrees with the reference, keeps the public names, and refuses in clear words what it cannot
load."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from atoplib.checkpoints import CheckpointError, load_deepfill
from atoplib.purifiers import DeepFillV2, PatchDiscriminator
from atoplib.purifiers.deepfill import ContextualAttention
from atoplib.purifiers.gated import GatedConv2d

# Random inputs and the outputs of another implementation, for the weights of seeded_state, width 8.
PARITY = Path(__file__).parent / "data" / "deepfill-parity.npz"
FUSE_WEIGHT = "stage2.contextual_attention.fuse_weight"


def seeded_state(model):
    random = np.random.RandomState(0)
    state = model.state_dict()
    for name in sorted(state.keys() - {FUSE_WEIGHT}):
        shape = tuple(state[name].shape)
        scale = 0.1 if name.endswith("bias") else 2.2 / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy((random.standard_normal(shape) * scale).astype(np.float32))
    return state


def purifier_input(images, masks):
    return torch.cat((images * (1 - masks), torch.ones_like(masks), masks), dim=1)


def random_input(batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    cells = (torch.rand(batch, 1, height // 8, width // 8, generator=generator) < 0.25).float()
    return purifier_input(images, cells.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3))


def parity_case(suffix):
    with np.load(PARITY) as arrays:
        image, mask, coarse, fine = (
            torch.from_numpy(arrays[name + suffix]) for name in ("image", "mask", "coarse", "fine")
        )
    return purifier_input(image, mask.expand(len(image), -1, -1, -1)), coarse, fine


@pytest.fixture(scope="module")
def model():
    model = DeepFillV2(width=8)
    model.load_state_dict(seeded_state(model))
    return model


# Arithmetic


@pytest.mark.parametrize("suffix", ["", "_wide"], ids=["one-mask-64x64", "mask-per-image-64x96"])
def test_outputs_agree_with_the_reference(model, suffix):
    x, coarse, fine = parity_case(suffix)
    with torch.no_grad():
        outputs = model(x)
    torch.testing.assert_close(outputs, (coarse, fine), rtol=0, atol=1e-4)


def test_the_fine_stage_reads_the_coarse_output_where_pixels_are_missing_and_the_input_elsewhere(model):
    x, seen = random_input(1, 32, 32), []
    x[:, :3] += 0.1  # not zero under the mask, as a careless caller may have it
    hook = model.stage2.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.no_grad():
        coarse, _ = model(x)
    hook.remove()
    assert 0 < x[:, 4:].mean() < 1
    torch.testing.assert_close(seen, [torch.where(x[:, 4:] == 1, coarse, x[:, :3]), x[:, 4:]])


def test_attention_pastes_only_patches_whose_window_is_not_masked():
    # Patches of columns 6 and 7 of the 4 x 8 grid are not masked, but the window of column 6 touches the
    # mask: only column 7 is valid (its window leaves the image), and its 4x4 patches begin at feature column
    # 13.
    torch.manual_seed(0)
    features, mask = torch.rand(1, 2, 8, 16), torch.ones(1, 1, 32, 64)
    mask[..., 48:] = 0
    features[:, 0, :, 13:] = 0
    pasted = ContextualAttention()(features, mask)
    assert pasted[:, 0].abs().max() == 0
    assert pasted[:, 1].min() > 0
    assert ContextualAttention()(features, torch.zeros_like(mask))[:, 0].max() > 0


def test_attention_without_any_valid_patch_gives_zeros():
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    mask = torch.zeros(2, 1, 32, 32)
    mask[0] = 1
    pasted = ContextualAttention()(features, mask)
    assert pasted[0].abs().max() == 0 and pasted[1].abs().max() > 0
    pasted.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("stage", [0, 1], ids=["coarse", "fine"])
def test_gradients_reach_every_parameter_the_loss_depends_on(stage):
    torch.manual_seed(0)
    model = DeepFillV2(width=8)
    x = random_input(2, 32, 32).requires_grad_()
    model(x)[stage].square().sum().backward()
    with_gradient = {
        name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    # The fine stage reads the coarse output inside the mask, so its loss trains both.
    expected = {name for name, _ in model.named_parameters() if stage == 1 or name.startswith("stage1.")}
    assert with_gradient == expected
    assert x.grad.isfinite().all() and x.grad[:, :3].abs().max() > 0


def test_a_fresh_generator_lets_the_image_through():
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = DeepFillV2(width=8)(random_input(4, 64, 64))
    for output in outputs:
        assert output.std(dim=0).mean() > 0.005  # torch's own initialisation gives 1e-8


def test_bfloat16_autocast_stays_close_and_returns_float32(model):
    x = random_input(2, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)
        assert not torch.equal(a, b)


def test_the_public_width_has_its_size_and_cost():
    with FakeTensorMode():  # shapes only, nothing is computed
        model = DeepFillV2(width=48)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 5, 256, 256))
    assert sum(p.numel() for p in model.parameters()) == 4_052_478
    # Two for a multiply-add.
    assert counter.get_total_flops() == pytest.approx(55.4e9, rel=0.01)


# Names


def test_the_generator_has_the_public_names():
    names = set(DeepFillV2(8).state_dict())
    blocks = ["conv1", "down_block1.conv1_downsample", "down_block1.conv2", "down_block2.conv1_downsample"]
    blocks += ["down_block2.conv2", *(f"conv_bn{i}" for i in range(1, 8)), "conv_to_rgb"]
    up = [
        "up_block1.conv1_upsample.conv",
        "up_block1.conv2",
        "up_block2.conv1_upsample.conv",
        "up_block2.conv2",
    ]
    fine = [f"{branch}_{name}" for branch in ("conv", "ca") for name in blocks[:5]]
    fine += [f"conv_conv_bn{i}" for i in range(1, 6)] + ["ca_conv_bn1", "ca_conv_bn4", "ca_conv_bn5"]
    fine += ["conv_bn6", "conv_bn7", "conv_to_rgb", *up]
    convolutions = [f"stage1.{name}" for name in blocks + up] + [f"stage2.{name}" for name in fine]
    assert names == {f"{name}.conv.{part}" for name in convolutions for part in ("weight", "bias")} | {
        FUSE_WEIGHT
    }


# Files


def with_prefix(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


CLASSIFIER = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}

FORMATS = {
    "public": lambda state: {"G": state, "D": {"conv1.weight": torch.zeros(1)}, "n_iter": 7},
    "atop": lambda state: with_prefix(state, "generator.") | with_prefix(CLASSIFIER, "res."),
    "atop-under-G": lambda state: {"G": with_prefix(state, "generator.") | with_prefix(CLASSIFIER, "res.")},
    "bare": lambda state: state,
    "half": lambda state: {"G": {name: tensor.half() for name, tensor in state.items()}},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_kind_of_file_loads(model, tmp_path, name, zipped):
    path = tmp_path / "weights.pth"
    torch.save(FORMATS[name](model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    loaded, tolerance = load_deepfill(path).state_dict(), 1e-2 if name == "half" else 0
    torch.testing.assert_close(dict(loaded), dict(model.state_dict()), rtol=tolerance, atol=tolerance / 100)


BAD_STATES = {
    "missing": (
        lambda s: {k: v for k, v in s.items() if k != "stage1.conv_bn3.conv.bias"},
        "1 missing, 0 unknown, 0 of another shape (for example 'stage1.conv_bn3.conv.bias')",
    ),
    "unexpected": (lambda s: s | {"stage3.x": torch.ones(1)}, "0 missing, 1 unknown"),
    "shape": (
        lambda s: s | {"stage2.conv_bn6.conv.bias": torch.zeros(30)},
        "1 of another shape (for example 'stage2.conv_bn6.conv.bias')",
    ),
    "input-channels": (
        lambda s: s | {"stage1.conv1.conv.weight": torch.zeros(8, 4, 5, 5)},
        "holds no DeepFillv2 generator",
    ),
    "scalar": (
        lambda s: s | {"stage1.conv1.conv.weight": torch.tensor(1.0)},
        "holds no DeepFillv2 generator",
    ),
    "fuse": (lambda s: s | {FUSE_WEIGHT: torch.ones(1, 1, 3, 3)}, "fuse_weight is not the 3x3 identity"),
    "tensorflow": (
        lambda s: {"conv1.conv.weight": torch.zeros(48, 5, 5, 5)},
        "states_tf_*.pth pads differently",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_with_the_reason(model, tmp_path, name):
    change, message = BAD_STATES[name]
    torch.save({"G": change(dict(model.state_dict()))}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_deepfill(tmp_path / "weights.pth")


# Building blocks


@pytest.mark.parametrize(("activation", "function"), [("elu", torch.nn.functional.elu), ("relu", torch.relu)])
def test_gated_convolution_multiplies_the_first_half_by_the_gate(activation, function):
    layer = GatedConv2d(3, 4, 5, stride=2, dilation=2, activation=activation)
    x = torch.randn(2, 3, 9, 12)
    both = torch.nn.functional.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=4, dilation=2)
    a, b = both[:, :4], both[:, 4:]
    torch.testing.assert_close(layer(x), function(a) * torch.sigmoid(b))
    assert layer(x).shape == (2, 4, 5, 6)


# Discriminator


def test_discriminator_applies_the_leaky_relu_after_every_convolution():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8).eval()
    x = torch.randn(2, 4, 32, 32)
    scores = discriminator(x)
    for stage in list(discriminator)[:-1]:
        x = stage[0](x)
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(scores, x.reshape(2, -1))
