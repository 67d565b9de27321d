"""The pipeline is differentiable, random as asked, and leaves its classifier alone."""

import pytest
import torch
from torch import nn

from atoplib.checkpoints import CheckpointError, save_checkpoint
from atoplib.classifiers import build_classifier
from atoplib.pipeline import AToPPipeline, AveragedPipeline, for_attacks, load_pipeline, to_unit
from atoplib.purifiers import FrozenGatedUNet, GatedUNet
from atoplib.transforms import TransformSettings, add_noise

RANDOM = ["rt1", "rt2", "rt3"]


class Visible(nn.Module):
    """A purifier that hands on the masked image as it is, and keeps what it was given."""

    def forward(self, given):
        self.given = given
        return given[:, :3]


class Constant(nn.Module):
    def forward(self, given):
        return torch.full_like(given[:, :3], 0.5)


class TwoStages(nn.Module):
    def forward(self, given):
        return torch.zeros_like(given[:, :3]), given[:, :3]


def smooth_purifier(dtype=torch.float32):
    return nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()).to(dtype)


def classifier_of(size=16, classes=5):
    """A classifier with every part that train mode would change."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * (size - 2) ** 2, classes),
    )


def pipeline_of(name="rt2", purifier=None, classifier=None, seed=0, **settings):
    settings = {"noise_std": 0.1} | settings
    classifier = classifier_of() if classifier is None else classifier
    purifier = smooth_purifier() if purifier is None else purifier
    return AToPPipeline(TransformSettings(name, **settings), purifier, classifier, seed=seed).eval()


def images_of(batch=4, size=16, dtype=torch.float32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype)


def test_the_classifier_is_frozen_and_the_purifier_is_not():
    pipeline = pipeline_of().train()
    before = {name: value.clone() for name, value in pipeline.classifier.state_dict().items()}
    pipeline(images_of()).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in pipeline.classifier.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.purifier.parameters())
    for name, value in pipeline.classifier.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_classifier_stays_in_eval_mode_in_every_mode_of_the_pipeline():
    pipeline = pipeline_of(purifier=nn.Sequential(nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3)), classifier=classifier_of().train())
    for mode in (True, False, True):
        assert pipeline.train(mode) is pipeline
        assert pipeline.training == mode
        assert all(part.training == mode for part in pipeline.purifier.modules())
        assert not any(part.training for part in pipeline.classifier.modules())


@pytest.mark.parametrize("name", ["none", *RANDOM])
def test_the_logits_are_those_of_the_classifier_on_the_purified_images(name):
    pipeline, images = pipeline_of(name), images_of()
    logits = pipeline(images)
    pipeline.reseed(0)
    purified = pipeline.purify(images)
    assert purified.shape == images.shape
    assert logits.shape == (4, 5)
    torch.testing.assert_close(logits, pipeline.classifier(purified))


def test_purified_images_are_on_the_scale_from_0_to_1():
    torch.testing.assert_close(pipeline_of(purifier=Constant()).purify(images_of()), torch.full((4, 3, 16, 16), 0.75))
    values = torch.tensor([-1.0, 0.0, 1.0, 1.2]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    torch.testing.assert_close(to_unit(values)[0, 0, 0], torch.tensor([0.0, 0.5, 1.0, 1.1]))


def test_without_a_transform_the_purifier_sees_the_image_itself():
    images = images_of()
    torch.testing.assert_close(pipeline_of("none", Visible()).purify(images), images)


def test_rt3_keeps_no_pixel_of_the_input():
    pipeline, images = pipeline_of("rt3", Visible()), images_of().requires_grad_()
    purified = pipeline.purify(images)
    assert torch.equal(purified, torch.full_like(purified, 0.5))
    purified.sum().backward()
    assert images.grad.abs().sum() == 0


def test_rt2_hands_on_visible_noisy_pixels_and_mid_grey_where_they_are_missing():
    pipeline, images = pipeline_of("rt2", Visible()), images_of()
    draw = pipeline.draw(images)
    expected = torch.where(draw.masks[0] == 1, torch.tensor(0.5), add_noise(images, draw))
    torch.testing.assert_close(pipeline.purify(images, draw), expected)


@pytest.mark.parametrize("name", RANDOM)
def test_every_stage_is_put_together_and_the_last_is_the_result(name):
    pipeline, images = pipeline_of(name, TwoStages()), images_of()
    draw = pipeline.draw(images)
    coarse, fine = pipeline.purify_stages(images, draw)
    assert coarse.shape == fine.shape == images.shape
    assert (coarse == 0).all()
    assert torch.equal(pipeline.purify(images, draw), to_unit(fine))
    assert torch.equal(fine, pipeline_of(name, Visible()).purify_stages(images, draw)[0])


@pytest.mark.parametrize("name", RANDOM)
def test_an_image_repeated_in_a_batch_gets_independent_draws(name):
    pipeline = pipeline_of(name, Visible(), noise_std=0.1)
    pipeline.purify(images_of(1).expand(6, -1, -1, -1))
    given = pipeline.purifier.given.unflatten(0, (-1, 6))[0]
    for i in range(6):
        for j in range(i):
            assert not torch.equal(given[i, 4], given[j, 4]), "the same mask twice"
            seen_twice = (given[i, 4] + given[j, 4] == 0).expand(3, -1, -1)
            if name != "rt1":
                assert (given[i, :3][seen_twice] != given[j, :3][seen_twice]).float().mean() > 0.8, "the same noise twice"


@pytest.mark.parametrize("name", RANDOM)
def test_every_forward_pass_throws_new_dice(name):
    pipeline, images = pipeline_of(name), images_of()
    assert not torch.equal(pipeline(images), pipeline(images))


def test_a_seed_gives_the_same_sequence_of_draws_and_reseeding_starts_it_anew():
    images = images_of()
    pipeline, twin, other = pipeline_of(seed=3), pipeline_of(seed=3), pipeline_of(seed=4)
    for twin_like in (twin, other):
        twin_like.load_state_dict(pipeline.state_dict())
    first = [pipeline(images) for _ in range(3)]
    for a, b, c in zip(first, [twin(images) for _ in range(3)], [other(images) for _ in range(3)], strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    pipeline.reseed(4)
    other.reseed(4)
    assert torch.equal(pipeline(images), other(images))
    pipeline.reseed(3)
    assert torch.equal(pipeline(images), first[0])


def test_the_dice_never_touch_the_global_generator_nor_depend_on_it():
    pipeline, images = pipeline_of(), images_of()
    before = torch.get_rng_state()
    first = pipeline(images)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12345)
    pipeline.reseed(0)
    assert torch.equal(pipeline(images), first)


def test_a_given_draw_is_used_and_costs_no_dice():
    pipeline, images = pipeline_of(), images_of()
    draw = pipeline.draw(images)
    assert torch.equal(pipeline(images, draw), pipeline(images, draw))
    following = pipeline(images)
    pipeline.reseed(0)
    pipeline.draw(images)
    assert torch.equal(pipeline(images), following)


@pytest.mark.parametrize("name", RANDOM)
def test_fixed_draws_are_the_same_at_every_call_and_a_function_of_the_seed(name):
    pipeline, images = pipeline_of(name), images_of()
    with pipeline.fixed_draws(5):
        first, second = pipeline(images), pipeline(images)
        other_batch = pipeline(images_of(2))
    pipeline(images)
    with pipeline.fixed_draws(5):
        third = pipeline(images)
        assert torch.equal(pipeline(images_of(2)), other_batch)
    with pipeline.fixed_draws(6):
        fourth = pipeline(images)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert not torch.equal(first, fourth)


def test_a_block_of_fixed_draws_does_not_disturb_the_sequence_around_it():
    pipeline, images = pipeline_of(), images_of()
    undisturbed = [pipeline(images) for _ in range(2)]
    pipeline.reseed(0)
    disturbed = [pipeline(images)]
    with pytest.raises(RuntimeError, match="inside"), pipeline.fixed_draws(1):
        pipeline(images)
        raise RuntimeError("inside")
    disturbed.append(pipeline(images))
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert torch.equal(before, after)


def test_an_inner_block_of_fixed_draws_gives_way_to_the_outer_one_again():
    pipeline, images = pipeline_of(), images_of()
    with pipeline.fixed_draws(1):
        outer = pipeline(images)
        with pipeline.fixed_draws(2):
            assert not torch.equal(pipeline(images), outer)
        assert torch.equal(pipeline(images), outer)


@pytest.mark.parametrize("name", ["none", *RANDOM])
def test_the_gradient_at_the_input_agrees_with_finite_differences(name):
    purifier = smooth_purifier(torch.float64)
    classifier = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)).to(torch.float64)
    pipeline = pipeline_of(name, purifier, classifier, noise_std=0.05, grid_size=2, num_masks=2)
    images = (images_of(1, 4, torch.float64) * 0.2 + 0.4).requires_grad_()  # no pixel near the clip at 0 and 1
    with pipeline.fixed_draws(0):
        logits = pipeline(images)
        assert logits.dtype == torch.float64
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        assert gradient.abs().max() > 1e-5
        assert torch.autograd.gradcheck(pipeline, images)


@pytest.mark.parametrize("name", RANDOM)
def test_every_image_has_a_gradient_of_its_own_and_none_of_the_others(name):
    pipeline, images = pipeline_of(name), images_of().requires_grad_()
    (gradient,) = torch.autograd.grad(pipeline(images)[1].sum(), images)
    sizes = gradient.abs().flatten(1).sum(dim=1)
    assert sizes[1] > 0 and sizes[[0, 2, 3]].sum() == 0


def test_stages_in_half_precision_reach_the_classifier_in_float32():
    class Half(nn.Module):
        def forward(self, given):
            return given[:, :3].bfloat16()

    assert pipeline_of(purifier=Half())(images_of()).dtype == torch.float32


def test_the_weights_are_saved_without_the_dice():
    pipeline = pipeline_of()
    keys = set(pipeline.state_dict())
    pipeline(images_of())
    assert set(pipeline.state_dict()) == keys
    assert all(name.startswith(("purifier.", "classifier.")) for name in keys)


def test_a_grid_that_does_not_divide_the_images_is_refused():
    with pytest.raises(ValueError, match="20 x 20 px cannot be cut into 8 x 8"):
        pipeline_of()(images_of(size=20))


def saved_purifier(path, **header):
    purifier = GatedUNet(width=4, blocks=0)
    save_checkpoint(path, purifier, kind="purifier", architecture="gated_unet", options={"width": 4, "blocks": 0}, **header)
    return purifier


def test_a_saved_purifier_comes_back_with_its_transform(tmp_path):
    transform = {"name": "rt3", "missing_rate": 0.5, "noise_std": 0.07, "num_masks": 2, "grid_size": 4}
    purifier = saved_purifier(tmp_path / "purifier.safetensors", transform=transform)
    classifier = build_classifier("small_resnet", num_classes=3, mean=(0.5,) * 3, std=(0.2,) * 3, width=4)
    loaded = load_pipeline(tmp_path / "purifier.safetensors", classifier, seed=9)
    original = AToPPipeline(TransformSettings(**transform), purifier, classifier, seed=9).eval()
    assert loaded.transform == TransformSettings(**transform)
    assert not any(part.training for part in loaded.modules())
    torch.testing.assert_close(loaded(images_of()), original(images_of()))


@pytest.mark.parametrize(
    "header", [{}, {"transform": None}, {"transform": {"name": "rt9"}}, {"transform": {"rate": 1}}], ids=str
)
def test_a_purifier_that_does_not_say_its_transform_is_refused(tmp_path, header):
    saved_purifier(tmp_path / "purifier.safetensors", **header)
    with pytest.raises(CheckpointError, match="which random transform"):
        load_pipeline(tmp_path / "purifier.safetensors", classifier_of())


def small_defence(name="rt2", average=None, **settings):
    torch.manual_seed(3)
    classifier = build_classifier("small_resnet", num_classes=10, mean=(0.5,) * 3, std=(0.25, 0.2, 0.3), width=4).train()
    for _ in range(3):
        classifier(torch.rand(16, 3, 32, 32))  # statistics unlike those of a fresh model
    purifier = GatedUNet(width=4, blocks=1, fold=4, pixel_width=3)
    nn.init.normal_(purifier.to_rgb.weight, std=0.2)
    transform = TransformSettings(name, noise_std=0.1, **settings)
    if average:
        return AveragedPipeline(transform, purifier, classifier, copies=3, average=average, seed=5).eval()
    return AToPPipeline(transform, purifier, classifier, seed=5).eval()


@pytest.mark.parametrize("average", [None, "images", "logits"])
@pytest.mark.parametrize("name", ["none", *RANDOM])
def test_prepared_for_attacks_it_throws_the_same_dice_and_has_the_same_logits_and_gradients(name, average):
    pipeline = small_defence(name, average).double()  # in double precision no rounding hides a difference
    prepared = for_attacks(pipeline)
    assert isinstance(prepared.purifier, FrozenGatedUNet) and type(prepared) is type(pipeline) and not prepared.training
    for _ in range(2):
        first, second = (images_of(4, 32, torch.float64).requires_grad_() for _ in range(2))
        expected, result = pipeline(first), prepared(second)
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
        (gradient,), (found,) = (
            torch.autograd.grad(logits.square().sum(), x) for logits, x in [(expected, first), (result, second)]
        )
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found, gradient, atol=1e-10, rtol=1e-8)


def test_prepared_for_attacks_is_a_copy_that_trains_nothing():
    pipeline = small_defence()
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    prepared = for_attacks(pipeline)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert isinstance(pipeline.purifier, GatedUNet) and all(p.requires_grad for p in pipeline.purifier.parameters())
    prepared.transform = TransformSettings("none")
    prepared.reseed(9)
    prepared(images_of(2, 32))
    assert pipeline.transform.name == "rt2" and pipeline.seed == 5 and not pipeline._generators
    assert all(torch.equal(value, before[name]) for name, value in pipeline.state_dict().items())


def test_a_purifier_of_any_other_class_is_prepared_as_it_is():
    class Inverted(GatedUNet):
        def forward(self, inputs):
            return -super().forward(inputs)

    for purifier in (smooth_purifier(), Inverted(width=2, blocks=0, fold=2)):
        pipeline = pipeline_of("rt3", purifier)
        prepared = for_attacks(pipeline)
        assert type(prepared.purifier) is type(purifier) and prepared.purifier is not purifier
        torch.testing.assert_close(prepared(images_of()), pipeline(images_of()))


def test_prepared_for_attacks_in_bfloat16_it_is_as_near_to_float32_as_the_pipeline_itself():
    pipeline, images = small_defence(), images_of(4, 32)
    prepared = for_attacks(pipeline)
    with torch.no_grad(), pipeline.fixed_draws(1), prepared.fixed_draws(1):
        exact = pipeline(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, found = pipeline(images), prepared(images)
    assert (found - exact).abs().mean() < 2 * (rounded - exact).abs().mean() + 1e-3


def test_a_pipeline_in_train_mode_is_not_prepared():
    with pytest.raises(ValueError, match=r"eval mode can be prepared for attacks; call pipeline\.eval"):
        for_attacks(small_defence().train())
