"""DeepFillV2 agrees with the reference, keeps the public names, and refuses in clear words what it cannot load."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from atoplib.purifiers.deepfill import (
    ContextualAttention,
    DeepFillV2,
    WeightsError,
    load_deepfill_weights,
    read_atop_classifier,
)
from atoplib.purifiers.discriminator import PatchDiscriminator
from atoplib.purifiers.gated import GatedConv2d, GatedUpConv2d

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
        image, mask, coarse, fine = (torch.from_numpy(arrays[name + suffix]) for name in ("image", "mask", "coarse", "fine"))
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


def test_a_batch_gives_what_each_image_gives_alone(model):
    x, _, _ = parity_case("_wide")
    assert not torch.equal(x[0, 4], x[1, 4])
    with torch.no_grad():
        together = model(x)
        alone = [model(image[None]) for image in x]
    for stage in range(2):
        torch.testing.assert_close(together[stage], torch.cat([outputs[stage] for outputs in alone]), rtol=0, atol=1e-5)


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
    # Patches of columns 6 and 7 of the 4 x 8 grid are not masked, but the window of column 6 touches the mask: only
    # column 7 is valid (its window leaves the image), and its 4x4 patches begin at feature column 13.
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


def test_attention_copes_with_empty_features():
    features = torch.zeros(1, 4, 8, 8, requires_grad=True)
    ContextualAttention()(features, torch.zeros(1, 1, 32, 32)).sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("stage", [0, 1], ids=["coarse", "fine"])
def test_gradients_reach_every_parameter_the_loss_depends_on(stage):
    torch.manual_seed(0)
    model = DeepFillV2(width=8)
    x = random_input(2, 32, 32).requires_grad_()
    model(x)[stage].square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    # The fine stage reads the coarse output inside the mask, so its loss trains both.
    expected = {name for name, _ in model.named_parameters() if stage == 1 or name.startswith("stage1.")}
    assert with_gradient == expected
    assert x.grad.isfinite().all() and x.grad[:, :3].abs().max() > 0


def test_a_fresh_generator_lets_the_image_through():
    torch.manual_seed(0)
    model = DeepFillV2(width=8)
    with torch.no_grad():
        outputs = model(random_input(4, 64, 64))
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


def test_outputs_have_the_size_of_the_input_down_to_8_px(model):
    with torch.no_grad():
        assert [output.shape for output in model(random_input(1, 8, 24))] == [(1, 3, 8, 24)] * 2


@pytest.mark.parametrize("size", [(60, 64), (64, 33)])
def test_a_size_not_divisible_by_8_is_refused(model, size):
    with pytest.raises(ValueError, match="divisible by 8"):
        model(torch.zeros(1, 5, *size))


@pytest.mark.parametrize("width", [0, 6, -4])
def test_a_width_not_divisible_by_4_is_refused(width):
    with pytest.raises(ValueError, match=f"multiple of 4 .*got {width}"):
        DeepFillV2(width)


def test_the_public_width_has_its_size_and_cost():
    with FakeTensorMode():  # shapes only, nothing is computed
        model = DeepFillV2(width=48)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 5, 256, 256))
    assert sum(p.numel() for p in model.parameters()) == 4_052_478
    # Two for a multiply-add.
    assert counter.get_total_flops() == pytest.approx(55.4e9, rel=0.01)


# Names


def names_under(state, prefix):
    return sorted(name.removeprefix(prefix) for name in state if name.startswith(prefix))


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("stage1.conv1.", ["conv.bias", "conv.weight"]),
        (
            "stage1.down_block1.",
            ["conv1_downsample.conv.bias", "conv1_downsample.conv.weight", "conv2.conv.bias", "conv2.conv.weight"],
        ),
        (
            "stage1.up_block2.",
            [
                "conv1_upsample.conv.conv.bias",
                "conv1_upsample.conv.conv.weight",
                "conv2.conv.bias",
                "conv2.conv.weight",
            ],
        ),
        ("stage1.conv_to_rgb.", ["conv.bias", "conv.weight"]),
        ("stage2.contextual_attention.", ["fuse_weight"]),
        ("stage2.conv_conv_bn3.", ["conv.bias", "conv.weight"]),
    ],
)
def test_blocks_have_the_public_names(prefix, names):
    assert names_under(DeepFillV2(8).state_dict(), prefix) == names


def test_stages_have_the_public_blocks():
    model = DeepFillV2(8)
    blocks = ["up_block1", "up_block2", "conv_to_rgb", "conv_bn6", "conv_bn7"]
    assert sorted(name for name, _ in model.named_children()) == ["stage1", "stage2"]
    assert sorted(name for name, _ in model.stage1.named_children()) == sorted(
        blocks + ["conv1", "down_block1", "down_block2"] + [f"conv_bn{i}" for i in range(1, 6)]
    )
    assert sorted(name for name, _ in model.stage2.named_children()) == sorted(
        blocks
        + ["conv_conv1", "conv_down_block1", "conv_down_block2"]
        + [f"conv_conv_bn{i}" for i in range(1, 6)]
        + ["ca_conv1", "ca_down_block1", "ca_down_block2", "ca_conv_bn1", "contextual_attention"]
        + ["ca_conv_bn4", "ca_conv_bn5"]
    )


def test_the_only_buffer_is_the_3x3_identity():
    buffers = dict(DeepFillV2(8).named_buffers())
    assert list(buffers) == [FUSE_WEIGHT]
    assert torch.equal(buffers[FUSE_WEIGHT], torch.eye(3)[None, None])


# Files


def with_prefix(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


CLASSIFIER = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}

FORMATS = {
    "public": lambda state: {"G": state, "D": {"conv1.weight": torch.zeros(1)}, "G_optim": {"state": {}}, "n_iter": 7},
    "atop": lambda state: with_prefix(state, "generator.") | with_prefix(CLASSIFIER, "res."),
    "atop-under-G": lambda state: {"G": with_prefix(state, "generator.") | with_prefix(CLASSIFIER, "res.")},
    "bare": lambda state: state,
    "half": lambda state: {"G": {name: tensor.half() for name, tensor in state.items()}},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("width", [None, 8])
def test_each_kind_of_file_loads(model, tmp_path, name, width):
    torch.save(FORMATS[name](model.state_dict()), tmp_path / "weights.pth")
    loaded = load_deepfill_weights(tmp_path / "weights.pth", width=width)
    tolerance = 1e-2 if name == "half" else 0
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=tolerance, atol=tolerance / 100)


def test_the_old_torch_format_loads(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"G": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_deepfill_weights(path).stage1.conv1.conv.weight, model.stage1.conv1.conv.weight)


@pytest.mark.parametrize("name", ["atop", "atop-under-G"])
def test_the_classifier_of_an_atop_checkpoint_is_read(model, tmp_path, name):
    torch.save(FORMATS[name](model.state_dict()), tmp_path / "weights.pth")
    state = read_atop_classifier(str(tmp_path / "weights.pth"))
    torch.testing.assert_close(state, CLASSIFIER, rtol=0, atol=0)


def test_a_file_without_classifier_says_so(model, tmp_path):
    torch.save({"G": model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="no names that begin with 'res.'"):
        read_atop_classifier(tmp_path / "weights.pth")


BAD_STATES = {
    "missing": (
        lambda s: {k: v for k, v in s.items() if k != "stage1.conv_bn3.conv.bias"},
        "missing (1): stage1.conv_bn3.conv.bias; unexpected (0)",
    ),
    "unexpected": (lambda s: s | {"stage3.x": torch.ones(1)}, "missing (0): none; unexpected (1): stage3.x"),
    "empty": (lambda s: {}, "missing (85): "),
    "not-a-tensor": (lambda s: s | {"stage1.conv1.conv.bias": 3}, "missing (1): stage1.conv1.conv.bias"),
    "shape": (
        lambda s: s | {"stage2.conv_bn6.conv.bias": torch.zeros(30)},
        "a generator of width 8: wrong shapes (1): stage2.conv_bn6.conv.bias (30,) instead of (32,)",
    ),
    "input-channels": (
        lambda s: s | {"stage1.conv1.conv.weight": torch.zeros(8, 4, 5, 5)},
        "stage1.conv1.conv.weight has shape (8, 4, 5, 5)",
    ),
    "scalar": (lambda s: s | {"stage1.conv1.conv.weight": torch.tensor(1.0)}, "has shape ()"),
    "fuse": (lambda s: s | {FUSE_WEIGHT: torch.ones(1, 1, 3, 3)}, "fuse_weight is not the 3x3 identity"),
    "tensorflow": (
        lambda s: {"conv1.conv.weight": torch.zeros(48, 5, 5, 5), "conv2_downsample.conv.weight": torch.zeros(1)},
        "weights for the TensorFlow arithmetic",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_with_the_reason(model, tmp_path, name):
    change, message = BAD_STATES[name]
    torch.save({"G": change(dict(model.state_dict()))}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_deepfill_weights(tmp_path / "weights.pth")


def test_another_width_is_named(model, tmp_path):
    torch.save({"G": model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="holds a generator of width 8, not 48: pass width=8"):
        load_deepfill_weights(tmp_path / "weights.pth", width=48)


@pytest.mark.parametrize("path", ["nothing.pth", "."])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / path))):
        load_deepfill_weights(tmp_path / path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(model, tmp_path, share, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"G": model.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match="truncated or was not written by torch.save"):
        load_deepfill_weights(path)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"0000", b"\x80\x02", bytes(range(256))])
def test_a_file_that_torch_did_not_write_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="truncated or was not written by torch.save"):
        load_deepfill_weights(path)


class RunsCode:
    """Unpickled without care, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))], ids=["torch", "pickle"]
)
def test_a_malicious_file_is_refused_and_not_run(tmp_path, save):
    path, trace = tmp_path / "weights.pth", tmp_path / "was-run"
    save({"G": {"stage1.conv1.conv.weight": RunsCode(trace)}}, path)
    with pytest.raises(WeightsError, match="nothing in it was run: it holds a Python object .*mkdir"):
        load_deepfill_weights(path)
    assert not trace.exists()
    with open(path, "rb") as file:  # the same file does run where nobody takes care, so the test can fail
        torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert trace.exists()


def test_a_whole_pickled_model_is_refused(model, tmp_path):
    torch.save(model, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="Python object .*DeepFillV2"):
        load_deepfill_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"G": torch.zeros(3)}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="not a state dict"):
        load_deepfill_weights(tmp_path / "weights.pth")


# Building blocks


@pytest.mark.parametrize(("activation", "function"), [("elu", torch.nn.functional.elu), ("relu", torch.relu)])
def test_gated_convolution_multiplies_the_first_half_by_the_gate(activation, function):
    layer = GatedConv2d(3, 4, 5, stride=2, dilation=2, activation=activation)
    x = torch.randn(2, 3, 9, 12)
    both = torch.nn.functional.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=4, dilation=2)
    a, b = both[:, :4], both[:, 4:]
    torch.testing.assert_close(layer(x), function(a) * torch.sigmoid(b))
    assert layer(x).shape == (2, 4, 5, 6)


@pytest.mark.parametrize("activation", ["elu", "relu"])
def test_fresh_gated_convolution_keeps_the_mean_square(activation):
    torch.manual_seed(0)
    layer, x = GatedConv2d(64, 64, 1, activation=activation), torch.randn(1, 64, 64, 64)
    assert layer(x).square().mean().item() == pytest.approx(1, rel=0.15)


def test_gated_upsampling_doubles_the_size_and_has_the_public_names():
    layer = GatedUpConv2d(3, 4)
    assert layer(torch.randn(1, 3, 5, 6)).shape == (1, 4, 10, 12)
    assert sorted(layer.state_dict()) == ["conv.conv.bias", "conv.conv.weight"]


@pytest.mark.parametrize(("options", "message"), [({"kernel_size": 4}, "odd"), ({"activation": "gelu"}, "elu, relu")])
def test_gated_convolution_refuses_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        GatedConv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3} | options)


# Discriminator


@pytest.mark.parametrize(("size", "scores"), [((32, 32), 32), ((256, 128), 32 * 8)])
def test_discriminator_scores_patches_of_any_size(size, scores):
    assert PatchDiscriminator(width=8)(torch.randn(2, 4, *size)).shape == (2, scores)


def test_discriminator_has_the_published_layers():
    discriminator = PatchDiscriminator()
    assert [tuple(conv.weight.shape) for conv in discriminator.convs] == [
        (64, 4, 5, 5),
        (128, 64, 5, 5),
        *[(256, channels, 5, 5) for channels in (128, 256, 256, 256)],
    ]


def test_discriminator_weights_have_spectral_norm_one():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    with torch.no_grad():
        for conv in discriminator.convs:
            conv.parametrizations.weight.original.mul_(7)
        for _ in range(30):  # each call in training is one step of the power iteration
            discriminator(torch.zeros(1, 4, 32, 32))
    norms = [torch.linalg.matrix_norm(conv.weight.detach().flatten(1), ord=2) for conv in discriminator.convs]
    torch.testing.assert_close(torch.stack(norms), torch.ones(6), rtol=0.05, atol=0)


def test_discriminator_applies_the_leaky_relu_after_every_convolution():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8).eval()
    x = torch.randn(2, 4, 32, 32)
    scores = discriminator(x)
    for conv in discriminator.convs:
        x = conv(x)
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(scores, x.reshape(2, -1))


def test_discriminator_gradients_reach_the_image_and_every_parameter():
    torch.manual_seed(0)
    discriminator, x = PatchDiscriminator(width=8), torch.randn(2, 4, 32, 32, requires_grad=True)
    # Real and fake in turn before one backward pass, as a GAN's step does.
    (discriminator(x).sum() - discriminator(-x).sum()).backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in discriminator.parameters())
