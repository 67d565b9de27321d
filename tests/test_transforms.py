"""RT1, RT2 and RT3 hide exactly what they should, from each image anew, and let gradients through."""

from math import floor

import pytest
import torch
from test_attacks import seeded

from atoplib.losses import discriminator_loss, generator_loss, psnr_floor_loss, reconstruction_loss
from atoplib.purifiers import GatedUNet, PatchDiscriminator
from atoplib.transforms import Transform, assemble, corrupt, patch_size, sample_transform

SHAPE = (3, 3, 32, 32)
NAMES = ["none", "rt1", "rt2", "rt3"]


def sample_of(name, shape=SHAPE, seed=0, **settings):
    return sample_transform(Transform(name, **settings), shape, generator=seeded(seed))


def images_of(shape=SHAPE, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(99), dtype=dtype)


def patches_of(masks, grid=8):
    """Masks over pixels to masks over patches, (..., patches); fails unless each patch has one value."""
    *lead, _, height, width = masks.shape
    cells = masks.reshape(*lead, grid, height // grid, grid, width // grid).transpose(-3, -2)
    cells = cells.reshape(*lead, grid * grid, -1)
    assert torch.equal(cells.amin(-1), cells.amax(-1)), "a patch is only partly missing"
    return cells[..., 0]


@pytest.mark.parametrize("name", ["rt1", "rt2"])
@pytest.mark.parametrize(
    "rate, grid", [(0.0, 8), (0.1, 8), (0.25, 8), (0.99, 8), (0.5, 2), (0.5, 16), (0.5, 32)]
)
def test_each_image_misses_exactly_floor_of_r_times_all_whole_patches(name, rate, grid):
    masks = sample_of(name, (5, 3, 32, 32), missing_rate=rate, grid_size=grid).masks
    assert masks.shape == (1, 5, 1, 32, 32) and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert patches_of(masks, grid)[0].sum(dim=1).tolist() == [floor(rate * grid**2)] * 5


@pytest.mark.parametrize("name", ["rt1", "rt2", "rt3"])
def test_images_calls_and_seeds_get_samples_of_their_own_and_a_seed_gives_its_own_again(name):
    masks = sample_of(name, (4, 3, 32, 32)).masks
    assert not any(torch.equal(masks[:, i], masks[:, j]) for i in range(4) for j in range(i))
    before, generator = torch.get_rng_state(), seeded(1)
    first, second = (sample_transform(Transform(name), SHAPE, generator=generator) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    again, other = sample_of(name, seed=1), sample_of(name, seed=2)
    for part in ("masks",) if name == "rt1" else ("masks", "noise"):
        one, two, three, four = (getattr(s, part) for s in (first, second, again, other))
        assert torch.equal(one, three) and not torch.equal(one, two) and not torch.equal(one, four)


def test_the_dtype_does_not_change_the_sample():
    single = sample_of("rt2")
    double = sample_transform(Transform("rt2"), SHAPE, generator=seeded(), dtype=torch.float64)
    assert double.masks.dtype == double.noise.dtype == torch.float64
    assert torch.equal(single.masks.double(), double.masks)
    torch.testing.assert_close(single.noise.double(), double.noise)


def test_masks_are_uniform_and_noise_is_normal_independent_and_of_the_asked_standard_deviation():
    missing = patches_of(sample_of("rt1", (1600, 3, 8, 8)).masks)[0].mean(dim=0)
    assert (missing - 0.25).abs().max() < 5 * (0.25 * 0.75 / 1600) ** 0.5, "every patch equally often"
    noise = sample_of("rt2", (50, 3, 32, 32), noise_std=0.2).noise
    assert noise.mean().abs() < 0.003 and noise.std() == pytest.approx(0.2, rel=0.01)
    assert (noise.abs() < 0.2).float().mean() == pytest.approx(0.6827, abs=0.01)
    planes = noise[:3].flatten(2).flatten(0, 1)
    assert (torch.corrcoef(planes) - torch.eye(9)).abs().max() < 0.15  # 1024 pixels: 5 standard deviations


@pytest.mark.parametrize("name, noisy", [("none", False), ("rt1", False), ("rt2", True), ("rt3", True)])
def test_only_rt2_and_rt3_add_noise_and_none_with_sigma_zero(name, noisy):
    assert (sample_of(name).noise is not None) == noisy
    assert sample_of(name, noise_std=0.0).noise is None


@pytest.mark.parametrize(
    "form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"]
)
@pytest.mark.parametrize("name, copies", [("none", 1), ("rt1", 1), ("rt2", 1), ("rt3", 4)])
def test_the_purifier_gets_the_clipped_noisy_image_grey_where_missing_ones_and_the_mask(name, copies, form):
    sample = sample_of(name, noise_std=0.6)
    images, twin = (images_of().contiguous(memory_format=form).requires_grad_() for _ in range(2))
    given = corrupt(images, sample)
    assert given.shape == (copies * 3, 5, 32, 32) and (given[:, 3] == 1).all()
    assert torch.equal(given[:, 4], sample.masks.reshape(-1, 32, 32))
    noisy = twin if sample.noise is None else (twin + sample.noise).clamp(0, 1)
    clipped = ((noisy == 0) | (noisy == 1)).float().mean()
    assert sample.noise is None or clipped > 0.2, "nothing is clipped here"
    expected = ((noisy * 2 - 1) * (1 - sample.masks)).flatten(0, 1)
    assert torch.equal(given[:, :3], expected)
    weight = torch.rand_like(expected)
    (given[:, :3] * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(images.grad, twin.grad, rtol=0, atol=1e-6 if copies > 1 else 0)
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("num_masks", [2, 3, 7, 64])
def test_the_masks_of_rt3_are_disjoint_and_cover_the_image_in_equal_parts(num_masks):
    masks = sample_of("rt3", num_masks=num_masks).masks
    assert masks.shape == (num_masks, 3, 1, 32, 32) and (masks.sum(dim=0) == 1).all()
    sizes = patches_of(masks).sum(dim=-1)
    assert sizes.min() >= 64 // num_masks and sizes.max() <= -(-64 // num_masks)


def test_rt3_keeps_only_what_was_filled_in():
    images, sample = images_of(), sample_of("rt3")
    assert (assemble(corrupt(images, sample)[:, :3], sample) == 0).all(), "a visible pixel survived"
    filled = torch.rand(12, 3, 32, 32)
    result, copies = assemble(filled, sample), filled.unflatten(0, (4, 3))
    for number in range(4):
        inside = (sample.masks[number] == 1).expand(-1, 3, -1, -1)
        assert torch.equal(result[inside], copies[number][inside])
    torch.testing.assert_close(assemble(torch.full((12, 3, 32, 32), 0.3), sample), torch.full(SHAPE, 0.3))


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (2, 3, 64, 24), (1, 3, 256, 256)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_size_that_the_grid_divides_works(name, shape):
    sample = sample_of(name, shape)
    given = corrupt(images_of(shape), sample)
    assert given.shape == (len(sample.masks) * shape[0], 5, *shape[2:])
    outputs = given[:, :3]
    assert assemble(outputs, sample).shape == shape
    assert name == "rt3" or assemble(outputs, sample) is outputs, "the others keep the whole output"
    assert (patches_of(sample.masks).sum(dim=-1) == (0 if name == "none" else 16)).all()


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (4, 32)], ids=str)
def test_a_grid_that_does_not_divide_the_image_is_refused(size):
    assert patch_size(256, 512, 8) == (32, 64)
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} px cannot be cut into 8 x 8"):
        sample_of("rt1", (1, 3, *size))


@pytest.mark.parametrize("other", [(2, 3, 32, 32), (3, 3, 64, 64), (3, 3, 32, 64)], ids=str)
def test_a_sample_of_another_batch_or_size_is_refused(other, without_shape_checks):
    with pytest.raises(ValueError, match="the sample is one for"):
        corrupt(images_of(), sample_of("rt1", other))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_sample_are_those_of_its_images(name):
    sample = sample_transform(Transform(name), SHAPE, generator=seeded(), noise_planes=2)
    assert sample.purifier_noise.shape == (len(sample.masks), 3, 2, 32, 32)
    images, part = images_of(), sample.rows(slice(1, 2))
    assert torch.equal(corrupt(images[1:2], part), corrupt(images, sample).unflatten(0, (-1, 3))[:, 1])
    assert torch.equal(part.purifier_noise, sample.purifier_noise[:, 1:2])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "rt4"}, "name must be one of none, rt1, rt2, rt3, got 'rt4'"),
        ({"missing_rate": 1.0}, "missing_rate must lie in"),
        ({"missing_rate": -0.1}, "missing_rate must lie in"),
        ({"missing_rate": float("nan")}, "missing_rate must lie in"),
        ({"noise_std": -1.0}, "noise_std must lie in"),
        ({"noise_std": 64.0}, "noise_std must lie in"),
        ({"grid_size": 0}, "grid_size must be at least 1"),
        ({"num_masks": 1}, "num_masks must lie in"),
        ({"num_masks": 65}, "num_masks must lie in 2..64"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Transform(**wrong)


REAL = torch.tensor([[2.0, 0.5], [1.0, -1.0]])
FAKE = torch.tensor([[-2.0, -0.5], [0.0, 2.0]])


def flat_image(value):
    return torch.full((2, 3, 4, 4), value)


def test_reconstruction_is_the_mean_absolute_difference_summed_over_outputs():
    target = flat_image(0.25)
    assert reconstruction_loss((flat_image(1.0),), target).item() == pytest.approx(0.75)
    assert reconstruction_loss((flat_image(1.0), flat_image(-0.25)), target).item() == pytest.approx(
        0.75 + 0.5
    )


@pytest.mark.parametrize("difference, missing", [(0.2, 2.5), (0.1, 0.0), (0.0, 0.0)])
def test_what_is_missing_to_a_psnr_is_counted_in_decibels_and_nothing_beyond(difference, missing):
    target, output = flat_image(0.25), flat_image(0.25 + difference).requires_grad_()
    loss = psnr_floor_loss(output, target, 22.5)  # of 0.2 on [-1, 1]: 20 dB
    loss.backward()
    assert loss.item() == pytest.approx(missing, abs=1e-4) and output.grad.isfinite().all()


@pytest.mark.parametrize(
    "kind, discriminator, generator",
    [
        # relu(1 - real): 0, 0.5, 0, 2; relu(1 + fake): 0, 0.5, 1, 3; mean of fake: -0.125
        ("hinge", 2.5 / 4 + 4.5 / 4, 0.125),
        # (real - 1)^2: 1, 0.25, 0, 4; fake^2: 4, 0.25, 0, 4; (fake - 1)^2: 9, 2.25, 1, 1
        ("least_squares", (5.25 / 4 + 8.25 / 4) / 2, 13.25 / 4 / 2),
    ],
)
def test_gan_losses_agree_with_hand_computed_values(kind, discriminator, generator):
    assert discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(discriminator)
    assert generator_loss(FAKE.clone().requires_grad_(), kind).item() == pytest.approx(generator)
    perfect = torch.full((2, 3), -1.0 if kind == "hinge" else 0.0)
    assert discriminator_loss(torch.ones(2, 3), perfect, kind).item() == 0


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_the_gradient_of_the_gan_term_reaches_every_weight_of_the_purifier_and_raises_the_scores(kind):
    purifier, discriminator = GatedUNet(width=4, blocks=0), PatchDiscriminator(width=2)
    mask, output = torch.ones(2, 1, 16, 16), purifier(torch.rand(2, 5, 16, 16))

    def score(image):
        return discriminator(torch.cat([image, mask], dim=1))

    before = generator_loss(score(output), kind)
    (gradient,) = torch.autograd.grad(before, output, retain_graph=True)
    before.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in purifier.parameters())
    with torch.no_grad():
        assert score(output - 0.1 * gradient / gradient.norm()).mean() > score(output).mean()


@pytest.mark.parametrize("loss", [discriminator_loss, lambda _, fake, kind: generator_loss(fake, kind)])
def test_an_unknown_gan_loss_is_refused_with_the_allowed_ones(loss):
    with pytest.raises(ValueError, match="kind must be one of hinge, least_squares, got 'wasserstein'"):
        loss(REAL, FAKE.clone().requires_grad_(), "wasserstein")
