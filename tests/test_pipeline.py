"""The pipeline is differentiable, random as asked, and leaves its classifier alone."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import Visible

from atoplib import classifiers, purifiers
from atoplib.checkpoints import CheckpointError, save
from atoplib.pipeline import AToPPipeline, Mixed, load_pipeline, to_unit
from atoplib.purifiers import GatedUNet
from atoplib.transforms import Transform

RANDOM = ["rt1", "rt2", "rt3"]


class TwoOutputs(nn.Module):
    def forward(self, given):
        return torch.zeros_like(given[:, :3]), given[:, :3]


def smooth_purifier(dtype=torch.float32):
    return nn.Sequential(
        nn.Conv2d(5, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()
    ).to(dtype)


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
    return AToPPipeline(Transform(name, **settings), purifier, classifier, seed=seed).eval()


def images_of(batch=4, size=16, dtype=torch.float32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype)


def test_the_classifier_is_frozen_and_the_purifier_is_not():
    pipeline = pipeline_of(classifier=classifier_of().train())
    for mode in (False, True):
        assert pipeline.train(mode) is pipeline and pipeline.purifier.training == mode
        assert not any(part.training for part in pipeline.classifier.modules())
    before = {name: value.clone() for name, value in pipeline.classifier.state_dict().items()}
    pipeline(images_of()).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in pipeline.classifier.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.purifier.parameters())
    for name, value in pipeline.classifier.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["none", *RANDOM])
def test_every_output_is_put_together_and_the_last_is_classified(name):
    pipeline, images = pipeline_of(name, TwoOutputs()), images_of()
    sample = pipeline.sample(images)
    coarse, fine = pipeline.outputs(images, sample)
    assert coarse.shape == fine.shape == images.shape
    assert (coarse == 0).all()
    assert torch.equal(pipeline.purify(images, sample), to_unit(fine))
    torch.testing.assert_close(pipeline(images, sample), pipeline.classifier(to_unit(fine)))
    assert torch.equal(fine, pipeline_of(name, Visible()).outputs(images, sample)[0])


def test_a_seed_gives_the_same_sequence_of_samples_and_reseeding_starts_it_anew():
    images = images_of()
    pipeline, twin, other = pipeline_of(seed=3), pipeline_of(seed=3), pipeline_of(seed=4)
    for module in (twin, other):
        module.load_state_dict(pipeline.state_dict())
    state = torch.get_rng_state()
    first = [pipeline(images) for _ in range(3)]
    assert not torch.equal(first[0], first[1]) and torch.equal(state, torch.get_rng_state())
    for a, b, c in zip(
        first, [twin(images) for _ in range(3)], [other(images) for _ in range(3)], strict=True
    ):
        assert torch.equal(a, b) and not torch.equal(a, c)
    pipeline.reseed(4)
    other.reseed(4)
    assert torch.equal(pipeline(images), other(images))


def test_without_a_seed_the_random_numbers_are_torchs_global_ones():
    pipeline, images = pipeline_of(seed=None), images_of()
    torch.manual_seed(5)
    first, second = pipeline(images), pipeline(images)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(pipeline(images), first)
    pipeline.reseed(0)  # an evaluation in between
    pipeline(images)
    pipeline.reseed(None)
    assert torch.equal(pipeline(images), second)


def test_a_sample_that_is_given_is_used_and_moves_no_random_number():
    pipeline, images = pipeline_of(), images_of()
    sample = pipeline.sample(images)
    assert torch.equal(pipeline(images, sample), pipeline(images, sample))
    following = pipeline(images)
    pipeline.reseed(0)
    pipeline.sample(images)
    assert torch.equal(pipeline(images), following)


@pytest.mark.parametrize("name", RANDOM)
def test_fixed_samples_are_the_same_at_every_call_a_function_of_the_seed_and_disturb_nothing(name):
    pipeline, images = pipeline_of(name), images_of()
    undisturbed = [pipeline(images) for _ in range(2)]
    pipeline.reseed(0)
    disturbed = [pipeline(images)]
    with pytest.raises(RuntimeError, match="inside"), pipeline.fixed_sample(5):
        first, other_batch = pipeline(images), pipeline(images_of(2))
        assert torch.equal(pipeline(images), first)
        with pipeline.fixed_sample(6):
            assert not torch.equal(pipeline(images), first)
        assert torch.equal(pipeline(images), first)
        raise RuntimeError("inside")
    disturbed.append(pipeline(images))
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, disturbed, strict=True))
    with pipeline.fixed_sample(5):
        assert torch.equal(pipeline(images_of(2)), other_batch) and torch.equal(pipeline(images), first)


@pytest.mark.parametrize("name", ["rt2", "rt3"])
def test_the_gradient_at_the_input_agrees_with_finite_differences(name):
    purifier = smooth_purifier(torch.float64)
    classifier = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)).to(
        torch.float64
    )
    pipeline = pipeline_of(name, purifier, classifier, noise_std=0.05, grid_size=2, num_masks=2)
    # No pixel near the clip at 0 and 1.
    images = (images_of(1, 4, torch.float64) * 0.2 + 0.4).requires_grad_()
    with pipeline.fixed_sample(0):
        logits = pipeline(images)
        assert logits.dtype == torch.float64
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        assert gradient.abs().max() > 1e-5
        assert torch.autograd.gradcheck(pipeline, images, fast_mode=True)


@pytest.mark.parametrize("name", RANDOM)
def test_every_image_has_a_gradient_of_its_own_and_none_of_the_others(name):
    pipeline, images = pipeline_of(name), images_of().requires_grad_()
    (gradient,) = torch.autograd.grad(pipeline(images)[1].sum(), images)
    sizes = gradient.abs().flatten(1).sum(dim=1)
    assert sizes[1] > 0 and sizes[[0, 2, 3]].sum() == 0


def saved_purifier(path, **header):
    purifier = GatedUNet(width=4, blocks=0)
    save(
        path,
        purifier,
        kind="purifier",
        architecture="gated_unet",
        options={"width": 4, "blocks": 0},
        **header,
    )
    return purifier


def test_a_saved_purifier_comes_back_with_its_transform(tmp_path):
    transform = {"name": "rt3", "missing_rate": 0.5, "noise_std": 0.07, "num_masks": 2, "grid_size": 4}
    purifier = saved_purifier(tmp_path / "purifier.safetensors", transform=transform)
    classifier = classifiers.build("small_resnet", num_classes=3, mean=(0.5,) * 3, std=(0.2,) * 3, width=4)
    loaded = load_pipeline(tmp_path / "purifier.safetensors", classifier, seed=9)
    original = AToPPipeline(Transform(**transform), purifier, classifier, seed=9).eval()
    assert loaded.transform == Transform(**transform)
    assert not any(part.training for part in loaded.modules())
    torch.testing.assert_close(loaded(images_of()), original(images_of()))


@pytest.mark.parametrize(
    "header", [{}, {"transform": None}, {"transform": {"name": "rt9"}}, {"transform": {"rate": 1}}], ids=str
)
def test_a_purifier_that_does_not_say_its_transform_is_refused(tmp_path, header):
    saved_purifier(tmp_path / "purifier.safetensors", **header)
    with pytest.raises(CheckpointError, match="which random transform"):
        load_pipeline(tmp_path / "purifier.safetensors", classifier_of())


# Averages over samples


def averaged(copies, average="images", seed=0):
    torch.manual_seed(1)
    parts = Transform("rt2", noise_std=0.1, grid_size=4), smooth_purifier(), classifier_of()
    return AToPPipeline(*parts, copies=copies, average=average, seed=seed).eval()


@pytest.mark.parametrize("average", ["images", "logits"])
def test_an_average_is_the_mean_over_samples_of_their_own_with_gradients_through_all(average):
    images, plain, model = images_of(6), averaged(1), averaged(3, average)
    torch.testing.assert_close(averaged(1, average)(images), plain(images))
    sample, copies = model.sample(images), images.repeat(3, 1, 1, 1).requires_grad_()
    each = plain.purify(copies, sample).unflatten(0, (3, 6))
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(model.purify(images, sample), each.mean(dim=0))
    assert model.outputs(images, sample)[-1].shape == images.shape
    if average == "images":  # f of the mean, or the mean of f
        expected = plain.classifier(each.mean(dim=0))
    else:
        expected = plain.classifier(each.flatten(0, 1)).unflatten(0, (3, 6)).mean(dim=0)
    moving = images.clone().requires_grad_()
    logits = model(moving, sample)
    torch.testing.assert_close(logits, expected)
    (gradient,) = torch.autograd.grad(logits.square().sum(), moving)
    (parts,) = torch.autograd.grad(expected.square().sum(), copies)
    assert all(float(part.abs().sum()) > 0 for part in parts.unflatten(0, (3, 6)))
    torch.testing.assert_close(gradient, parts.unflatten(0, (3, 6)).sum(dim=0))
    single = plain.sample(images)  # one row an image: no average
    torch.testing.assert_close(model(images, single), plain(images, single))


def test_another_transform_shares_the_weights_and_nothing_else():
    pipeline, images = pipeline_of("rt2"), images_of()
    changed = pipeline.with_transform(name="rt1", missing_rate=0.5)
    assert changed.transform == Transform("rt1", missing_rate=0.5, noise_std=0.1)
    assert pipeline.transform == Transform("rt2", noise_std=0.1)
    assert changed.purifier is pipeline.purifier and changed.classifier is pipeline.classifier
    first = pipeline(images)
    pipeline.reseed(0)
    changed(images), changed.reseed(9)
    assert torch.equal(pipeline(images), first) and not changed.training
    assert torch.equal(deepcopy(pipeline)(images), first), "a copy starts from the seed"
    with pytest.raises(ValueError, match="missing_rate"):
        pipeline.with_transform(missing_rate=2)


# Mixing


def affine(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).to(dtype).eval()


@pytest.mark.parametrize("alpha, scale", [(0.3, 2.0), (0.0, 1.0), (1.0, 0.5)])
def test_a_mixture_is_the_log_of_the_mixed_probabilities_with_gradients_through_both(alpha, scale):
    natural, defended, images = affine(1), affine(2), images_of(dtype=torch.float64).requires_grad_()
    mixed = Mixed(natural, defended, alpha, scale)
    by_hand = (1 - alpha) * natural(images).softmax(1) + alpha * (scale * defended(images)).softmax(1)
    torch.testing.assert_close(mixed(images).exp(), by_hand)
    (gradient,) = torch.autograd.grad(mixed(images)[:, 1].sum(), images)
    (expected,) = torch.autograd.grad(by_hand.log()[:, 1].sum(), images)
    torch.testing.assert_close(gradient, expected)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_mixture_of_very_sure_models_keeps_a_finite_loss_and_gradient():
    images = images_of().requires_grad_()
    natural, defended = affine(1, torch.float32), affine(2, torch.float32)
    with torch.no_grad():
        natural[1].weight.mul_(1e4), defended[1].weight.mul_(1e4)
    loss = F.cross_entropy(Mixed(natural, defended, 0.5)(images), torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, images)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_mixture_is_random_and_frozen_as_its_branches_are():
    pipeline = small_defence()
    mixed, images = Mixed(pipeline.classifier, pipeline, 0.4, 3.0), images_of(2, 32)
    assert not mixed.training and not torch.equal(mixed(images), mixed(images))
    pipeline.reseed(0)
    expected = mixed(images)
    pipeline.reseed(0)
    torch.testing.assert_close(mixed.freeze_for_attack()(images), expected, atol=1e-4, rtol=1e-4)


IMPOSSIBLE = {
    "copies must be at least 1, got 0": lambda: averaged(0),
    "average must be one of images, logits, got 'masks'": lambda: averaged(2, "masks"),
    "alpha must lie in 0..1": lambda: Mixed(affine(1), affine(2), float("nan"), 1),
    "scale must be above 0": lambda: Mixed(affine(1), affine(2), 0.5, float("inf")),
    "only two of the same classes": lambda: Mixed(affine(1), nn.Flatten())(images_of(2, 16)),
    r"call model\.eval": lambda: small_defence().train().freeze_for_attack(),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_averages_mixtures_and_modes_are_refused(message):
    with pytest.raises(ValueError, match=message):
        IMPOSSIBLE[message]()


# Frozen for attacks


def small_defence(name="rt2", copies=1, average="images"):
    torch.manual_seed(3)
    classifier = classifiers.build(
        "small_resnet", num_classes=10, mean=(0.5,) * 3, std=(0.25, 0.2, 0.3), width=4
    ).train()
    for _ in range(3):
        classifier(torch.rand(16, 3, 32, 32))  # statistics unlike those of a fresh model
    purifier = GatedUNet(width=4, blocks=1, fold=4, pixel_width=3)
    nn.init.normal_(purifier.to_rgb.weight, std=0.2)
    parts = Transform(name, noise_std=0.1), purifier, classifier
    return AToPPipeline(*parts, copies=copies, average=average, seed=5).eval()


@pytest.mark.parametrize("copies, average", [(1, "images"), (3, "images"), (3, "logits")])
@pytest.mark.parametrize("name", ["none", *RANDOM])
def test_frozen_it_takes_the_same_samples_and_has_the_same_logits_and_gradients(name, copies, average):
    # In double precision no rounding hides a difference.
    pipeline = small_defence(name, copies, average).double()
    frozen = pipeline.freeze_for_attack()
    assert not frozen.training and not any(weight.requires_grad for weight in frozen.parameters())
    for _ in range(2):
        first, second = (images_of(4, 32, torch.float64).requires_grad_() for _ in range(2))
        expected, result = pipeline(first), frozen(second)
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
        (gradient,) = torch.autograd.grad(expected.square().sum(), first)
        (same,) = torch.autograd.grad(result.square().sum(), second)
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(same, gradient, atol=1e-10, rtol=1e-8)


def test_frozen_for_attacks_is_a_copy_that_trains_nothing():
    pipeline = small_defence()
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    frozen = pipeline.freeze_for_attack()
    assert all(p.requires_grad for p in pipeline.purifier.parameters())
    frozen.transform = Transform("none")
    frozen.reseed(9)
    frozen(images_of(2, 32))
    assert pipeline.transform.name == "rt2" and pipeline.seed == 5 and not pipeline._generators
    assert all(torch.equal(value, before[name]) for name, value in pipeline.state_dict().items())


def test_a_new_pipeline_has_the_mode_of_its_purifier_and_can_be_attacked_at_once():
    purifier, classifier = purifiers.build("gated_unet"), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    assert AToPPipeline(Transform(), purifier, classifier).training
    assert not AToPPipeline(Transform(), purifier.eval(), classifier).training
