"""The denoising autoencoder: a purifier like any other, whose output has all gone through its bottleneck."""

import pytest
import torch

from atoplib.checkpoints import load_checkpoint, save_checkpoint
from atoplib.purifiers import DenoisingAutoencoder, build_purifier
from atoplib.transforms import TransformSettings, corrupt, sample_draw

NOISE_ALONE = TransformSettings("rt2", missing_rate=0, noise_std=0.3)


def given_for(shape=(2, 3, 16, 16)):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return corrupt(images, sample_draw(NOISE_ALONE, images.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("levels, size", [(1, (8, 8)), (2, (32, 32)), (2, (16, 24)), (3, (32, 8))], ids=str)
def test_the_output_is_an_image_of_the_inputs_size(levels, size):
    result = DenoisingAutoencoder(width=4, levels=levels)(given_for((2, 3, *size)))
    assert result.shape == (2, 3, *size) and result.isfinite().all() and result.abs().max() <= 1.2


def test_a_transform_without_missing_patches_leaves_noise_alone():
    draw = sample_draw(NOISE_ALONE, (2, 3, 16, 16))
    assert draw.masks.sum() == 0 and draw.noise.std() == pytest.approx(0.3, rel=0.1)


def test_nothing_goes_around_the_bottleneck():
    model = DenoisingAutoencoder(width=4, levels=2)
    torch.nn.init.zeros_(model.bottleneck.weight)
    torch.nn.init.zeros_(model.bottleneck.bias)
    one, other = model(given_for()).clone(), model(torch.zeros(2, 5, 16, 16))
    assert torch.equal(one, other), "the output still depends on the image"


def test_every_weight_and_the_input_get_a_gradient():
    model, given = DenoisingAutoencoder(width=4), given_for().requires_grad_()
    model(given).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert given.grad[:, :3].abs().sum() > 0


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    model = DenoisingAutoencoder(width=2, levels=1).double()
    given = given_for((1, 3, 8, 8)).double().requires_grad_()
    assert torch.autograd.gradcheck(model, (given,))


@pytest.mark.parametrize("options", [{"width": 0}, {"levels": 0}, {"levels": 9}], ids=str)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="width must be at least 1 and levels lie in 1..8, got"):
        build_purifier("denoising_autoencoder", **options)


def test_a_size_that_it_cannot_halve_is_refused():
    with pytest.raises(ValueError, match="divisible by 8, got 32 x 12"):
        DenoisingAutoencoder(width=4, levels=3)(torch.zeros(1, 5, 32, 12))


def test_a_checkpoint_gives_the_same_images_again(tmp_path):
    options = {"width": 4, "levels": 2}
    model = build_purifier("denoising_autoencoder", **options).eval()
    save_checkpoint(
        tmp_path / "p.safetensors", model, kind="purifier", architecture="denoising_autoencoder", options=options
    )
    again, _ = load_checkpoint(tmp_path / "p.safetensors", kind="purifier")
    given = given_for()
    assert torch.equal(model(given), again(given))
