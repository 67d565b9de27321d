"""RT1, RT2 and RT3 hide exactly what they should, from each image anew, and let gradients through."""

from math import floor

import pytest
import torch

from atoplib.transforms import TransformSettings, add_noise, assemble, corrupt, patch_size, sample_draw, visible_part

SHAPE = (3, 3, 32, 32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_for(name, shape=SHAPE, seed=0, **settings):
    return sample_draw(TransformSettings(name, **settings), shape, generator=seeded(seed))


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
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.4, 0.5, 0.99])
def test_each_image_misses_exactly_floor_of_r_times_64_whole_patches(name, rate):
    masks = draw_for(name, (5, 3, 32, 32), missing_rate=rate).masks
    assert masks.shape == (1, 5, 1, 32, 32)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert patches_of(masks)[0].sum(dim=1).tolist() == [floor(rate * 64)] * 5


@pytest.mark.parametrize("grid", [1, 2, 4, 16, 32])
def test_another_grid_misses_its_own_share_of_patches(grid):
    masks = draw_for("rt1", missing_rate=0.5, grid_size=grid, num_masks=2).masks
    assert patches_of(masks, grid)[0].sum(dim=1).tolist() == [floor(0.5 * grid**2)] * 3


@pytest.mark.parametrize("name", ["rt1", "rt2", "rt3"])
def test_images_of_a_batch_get_different_masks(name):
    masks = draw_for(name, (4, 3, 32, 32)).masks
    assert not any(torch.equal(masks[:, i], masks[:, j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", ["rt2", "rt3"])
def test_images_and_channels_get_different_noise(name):
    noise = draw_for(name).noise.flatten(2).flatten(0, 1)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.15  # 1024 pixels: 5 standard deviations


@pytest.mark.parametrize("name", ["rt1", "rt2", "rt3"])
def test_one_generator_throws_new_dice_at_every_call(name):
    generator = seeded()
    first, second = (sample_draw(TransformSettings(name), SHAPE, generator=generator) for _ in range(2))
    assert not torch.equal(first.masks, second.masks)
    assert name == "rt1" or not torch.equal(first.noise, second.noise)


@pytest.mark.parametrize("name", ["rt1", "rt2", "rt3"])
def test_the_same_seed_gives_the_same_draw_and_another_seed_another(name):
    first, second, third = draw_for(name, seed=1), draw_for(name, seed=1), draw_for(name, seed=2)
    assert torch.equal(first.masks, second.masks) and not torch.equal(first.masks, third.masks)
    if name != "rt1":
        assert torch.equal(first.noise, second.noise) and not torch.equal(first.noise, third.noise)


def test_a_generator_of_its_own_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    draw_for("rt3")
    assert torch.equal(before, torch.get_rng_state())


def test_the_dtype_does_not_change_the_draw():
    single = draw_for("rt2")
    double = sample_draw(TransformSettings("rt2"), SHAPE, generator=seeded(), dtype=torch.float64)
    assert double.masks.dtype == double.noise.dtype == torch.float64
    assert torch.equal(single.masks.double(), double.masks)
    torch.testing.assert_close(single.noise.double(), double.noise)


def test_every_patch_is_missing_equally_often():
    share = patches_of(draw_for("rt1", (1600, 3, 8, 8)).masks)[0].mean(dim=0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 1600) ** 0.5


def test_the_noise_is_normal_with_the_asked_standard_deviation():
    noise = draw_for("rt2", (50, 3, 32, 32), noise_std=0.2).noise
    assert noise.mean().abs() < 0.003
    assert noise.std() == pytest.approx(0.2, rel=0.01)
    assert (noise.abs() < 0.2).float().mean() == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize("name, noisy", [("none", False), ("rt1", False), ("rt2", True), ("rt3", True)])
def test_only_rt2_and_rt3_add_noise_and_none_with_sigma_zero(name, noisy):
    assert (draw_for(name).noise is not None) == noisy
    assert draw_for(name, noise_std=0.0).noise is None


@pytest.mark.parametrize("name", ["rt1", "rt2", "rt3"])
def test_a_missing_pixel_is_mid_grey_and_a_visible_one_is_the_clipped_noisy_image(name):
    images, draw = images_of(), draw_for(name, noise_std=0.6)
    given = corrupt(images, draw).unflatten(0, draw.masks.shape[:2])
    noisy = images if draw.noise is None else (images + draw.noise).clamp(0, 1)
    if draw.noise is not None:
        assert ((noisy == 0) | (noisy == 1)).float().mean() > 0.2, "nothing is clipped here"
    missing = (draw.masks == 1).expand(-1, -1, 3, -1, -1)
    assert missing.any() and not missing.all()
    assert (given[:, :, :3][missing] == 0).all()
    expected = (2 * noisy - 1).expand(len(draw.masks), *SHAPE)
    torch.testing.assert_close(given[:, :, :3][~missing], expected[~missing])


@pytest.mark.parametrize("name, copies", [("none", 1), ("rt1", 1), ("rt2", 1), ("rt3", 4)])
def test_the_purifier_gets_five_planes_the_last_two_ones_and_mask(name, copies):
    draw = draw_for(name)
    given = corrupt(images_of(), draw)
    assert given.shape == (copies * 3, 5, 32, 32)
    assert (given[:, 3] == 1).all()
    assert torch.equal(given[:, 4], draw.masks.reshape(-1, 32, 32))


def test_the_transform_none_hands_on_the_whole_image():
    images, draw = images_of(), draw_for("none")
    given = corrupt(images, draw)
    torch.testing.assert_close(given[:, :3], 2 * images - 1)
    assert (given[:, 4] == 0).all()
    assert torch.equal(assemble(given[:, :3], draw), given[:, :3])


def test_add_noise_clips_to_the_range_of_images():
    images, draw = images_of(), draw_for("rt2", noise_std=1.0)
    result = add_noise(images, draw)
    assert torch.equal(result, (images + draw.noise).clamp(0, 1))
    assert result.min() == 0 and result.max() == 1
    assert add_noise(images, draw_for("rt1")) is images


@pytest.mark.parametrize("num_masks", [2, 3, 4, 7, 64])
def test_the_masks_of_rt3_are_disjoint_and_cover_the_image_in_equal_parts(num_masks):
    masks = draw_for("rt3", num_masks=num_masks).masks
    assert masks.shape == (num_masks, 3, 1, 32, 32)
    assert (masks.sum(dim=0) == 1).all()
    sizes = patches_of(masks).sum(dim=-1)
    assert sizes.min() >= 64 // num_masks and sizes.max() <= -(-64 // num_masks)


def test_the_copies_of_rt3_share_one_noise():
    images, draw = images_of(), draw_for("rt3")
    given = corrupt(images, draw).unflatten(0, (4, 3))[:, :, :3]
    # each pixel is visible in exactly three of the four copies; with one noise they add up to three times one image
    torch.testing.assert_close(given.sum(dim=0), 3 * (2 * (images + draw.noise).clamp(0, 1) - 1))
    largest, smallest = given.amax(dim=0), given.amin(dim=0)
    assert ((largest == 0) | (smallest == 0)).all(), "the visible copies of a pixel differ"


def test_rt3_keeps_only_what_was_filled_in():
    images, draw = images_of(), draw_for("rt3")
    identity = corrupt(images, draw)[:, :3]
    assert (assemble(identity, draw) == 0).all(), "a visible pixel of the input survived"
    filled = torch.rand(12, 3, 32, 32)
    result = assemble(filled, draw)
    copies = filled.unflatten(0, (4, 3))
    for number in range(4):
        inside = (draw.masks[number] == 1).expand(-1, 3, -1, -1)
        assert torch.equal(result[inside], copies[number][inside])


def test_a_constant_purifier_gives_a_constant_image_through_rt3():
    torch.testing.assert_close(assemble(torch.full((12, 3, 32, 32), 0.3), draw_for("rt3")), torch.full(SHAPE, 0.3))


@pytest.mark.parametrize("name", ["rt1", "rt2"])
def test_rt1_and_rt2_hand_on_the_whole_output_not_a_composite(name):
    draw = draw_for(name)
    outputs = torch.rand(SHAPE)
    assert torch.equal(assemble(outputs, draw), outputs)
    visible = corrupt(images_of(), draw)[:, :3]
    assert torch.equal(assemble(visible, draw), visible)


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (2, 3, 64, 24), (1, 3, 256, 256)], ids=str)
@pytest.mark.parametrize("name", ["none", "rt1", "rt2", "rt3"])
def test_any_size_that_the_grid_divides_works(name, shape):
    draw = draw_for(name, shape)
    given = corrupt(images_of(shape), draw)
    assert given.shape == (len(draw.masks) * shape[0], 5, *shape[2:])
    assert assemble(given[:, :3], draw).shape == shape
    missing = {"none": 0, "rt1": 16, "rt2": 16, "rt3": 16}[name]
    assert (patches_of(draw.masks).sum(dim=-1) == missing).all()


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (28, 28), (4, 32)], ids=str)
@pytest.mark.parametrize("name", ["rt1", "rt2", "rt3"])
def test_a_grid_that_does_not_divide_the_image_is_refused(name, size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} px cannot be cut into 8 x 8"):
        draw_for(name, (1, 3, *size))


def test_the_size_of_a_patch_in_pixels():
    assert patch_size(32, 32, 8) == (4, 4)
    assert patch_size(256, 512, 8) == (32, 64)


@pytest.mark.parametrize("other", [(2, 3, 32, 32), (3, 3, 64, 64), (3, 3, 32, 64)], ids=str)
def test_a_draw_of_another_batch_or_size_is_refused(other, without_shape_checks):
    with pytest.raises(ValueError, match="the draw was thrown for"):
        corrupt(images_of(), draw_for("rt1", other))


@pytest.mark.parametrize("name", ["none", "rt1", "rt2", "rt3"])
def test_the_gradient_is_that_of_the_visible_unclipped_pixels(name):
    images = images_of().requires_grad_()
    draw = draw_for(name, noise_std=0.6)
    corrupt(images, draw)[:, :3].sum().backward()
    noisy = images.detach() + (0 if draw.noise is None else draw.noise)
    inside = ((noisy >= 0) & (noisy <= 1)).float()
    visible_copies = (1 - draw.masks).sum(dim=0)
    torch.testing.assert_close(images.grad, 2 * inside * visible_copies)
    assert images.grad.abs().sum() > 0


def test_gradients_agree_with_finite_differences():
    settings = TransformSettings("rt3", noise_std=0.1, grid_size=2, num_masks=2)
    draw = sample_draw(settings, (1, 3, 4, 4), generator=seeded(), dtype=torch.float64)
    images = (images_of((1, 3, 4, 4), torch.float64) * 0.2 + 0.4).requires_grad_()

    def purified(x):  # by a purifier that mixes the pixels, so that a missing one is filled in from the others
        given = corrupt(x, draw)
        return assemble(torch.tanh(given[:, :3] + given.mean(dim=(1, 2, 3), keepdim=True)), draw)

    assert torch.autograd.gradcheck(purified, images)
    (gradient,) = torch.autograd.grad(purified(images).sum(), images)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "rt4"}, "unknown transform 'rt4'; allowed: none, rt1, rt2, rt3"),
        ({"name": ""}, "unknown transform"),
        ({"missing_rate": 1.0}, "missing_rate must lie in"),
        ({"missing_rate": -0.1}, "missing_rate must lie in"),
        ({"missing_rate": float("nan")}, "missing_rate must lie in"),
        ({"noise_std": -1.0}, "noise_std must lie in"),
        ({"noise_std": 64.0}, "noise_std must lie in"),
        ({"noise_std": float("nan")}, "noise_std must lie in"),
        ({"grid_size": 0}, "grid_size must be at least 1"),
        ({"num_masks": 1}, "num_masks must lie in"),
        ({"num_masks": 65}, r"num_masks must lie in \[2, 64\]"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformSettings(**wrong)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("name", ["none", "rt1", "rt2", "rt3"])
def test_what_is_visible_is_noisy_rgb_from_minus_one_to_one_bit_by_bit_gradients_included(name, form):
    settings = TransformSettings(name, noise_std=0.5, num_masks=3)
    draw = sample_draw(settings, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    first, second = (torch.linspace(0, 1, 4 * 768).view(4, 3, 16, 16).contiguous(memory_format=form) for _ in range(2))
    first.requires_grad_(), second.requires_grad_()
    expected = ((add_noise(first, draw) * 2 - 1) * (1 - draw.masks)).flatten(0, 1)
    result = visible_part(second, draw)
    assert torch.equal(result, expected)
    weight = torch.rand_like(expected)
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=0, atol=1e-6 if len(draw.masks) > 1 else 0)
