"""BPDA is the defence on the way forward, bit by bit, and the identity on the way back."""

import pytest
import torch
from torch import nn

from atoplib.attacks import PGDSettings, input_gradient, pgd
from atoplib.attacks.bpda import BPDA, HILL_PGD, HILL_VERDICT, THROUGH, IdentityBackward, straight_through
from atoplib.pipeline import AToPPipeline, AveragedPipeline
from atoplib.transforms import TransformSettings

TRANSFORMS = ["none", "rt1", "rt2", "rt3"]
ALLOWED = [(name, through) for name in TRANSFORMS for through in THROUGH if (name, through) != ("rt3", "purifier")]


def images_of(count=4, low=0.0, high=1.0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)) * (high - low) + low


def classifier_of(classes=5):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, classes)).eval()


def pipeline_of(name="rt2", purifier=None, seed=0):
    if purifier is None:
        purifier = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Tanh())
    return AToPPipeline(TransformSettings(name, noise_std=0.1, grid_size=4), purifier, classifier_of(), seed=seed).eval()


def gradient_of(function, images):
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(images), images)
    return gradient


@pytest.mark.parametrize("name, through", ALLOWED)
def test_forward_it_is_the_pipeline_bit_by_bit_with_the_same_sequence_of_dice(name, through):
    pipeline, images = pipeline_of(name), images_of()
    wrapper = BPDA(pipeline, through)
    pipeline.reseed(3)
    plain = [pipeline(images) for _ in range(2)]
    wrapper.reseed(3)
    wrapped = [wrapper(images) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(plain, wrapped, strict=True))
    assert name == "none" or not torch.equal(*wrapped)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_through_both_the_gradient_is_the_classifiers_at_the_purified_image(name):
    pipeline, images = pipeline_of(name), images_of()
    purified = pipeline.purify(images).detach()
    pipeline.reseed(0)
    found = gradient_of(lambda x: BPDA(pipeline)(x)[:, 1].sum(), images)
    expected = gradient_of(lambda x: pipeline.classifier(x)[:, 1].sum(), purified)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_through_the_transform_the_gradient_is_the_purifiers_at_the_corrupted_image(name):
    """By hand: what the purifier was given, as a leaf; its gradient on [-1, 1] is halved by the scale of [0, 1]."""
    pipeline, images = pipeline_of(name), images_of()
    given = []
    pipeline.purifier.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].detach()))
    draw = pipeline.draw(images)
    pipeline.purify(images, draw)

    def rest(visible):
        output = pipeline.purifier(torch.cat([visible, given[0][:, 3:]], dim=1)).unflatten(0, (-1, len(images)))
        chosen = (output * draw.masks).sum(dim=0) if name == "rt3" else output[0]
        return pipeline.classifier((chosen + 1) / 2)[:, 1].sum()

    by_copy = gradient_of(rest, given[0][:, :3])
    pipeline.reseed(0)
    found = gradient_of(lambda x: BPDA(pipeline, "transform")(x)[:, 1].sum(), images)
    torch.testing.assert_close(found, 2 * by_copy.unflatten(0, (-1, len(images))).sum(dim=0))
    true = gradient_of(lambda x: pipeline(x, draw)[:, 1].sum(), images)
    assert torch.equal(found, true) == (name == "none"), "only without a transform is there nothing to skip"


@pytest.mark.parametrize("name", ["rt1", "rt2"])
def test_through_the_purifier_missing_and_clipped_pixels_get_no_gradient_and_all_others_the_classifiers(name):
    pipeline, images = pipeline_of(name), images_of()
    draw = pipeline.draw(images)
    purified = pipeline.purify(images, draw).detach()
    at_classifier = gradient_of(lambda x: pipeline.classifier(x)[:, 1].sum(), purified)
    noisy = images if draw.noise is None else images + draw.noise
    open_pixels = (1 - draw.masks[0]) * (noisy >= 0) * (noisy <= 1)
    assert 0 < open_pixels.mean() < 1
    pipeline.reseed(0)
    found = gradient_of(lambda x: BPDA(pipeline, "purifier")(x)[:, 1].sum(), images)
    torch.testing.assert_close(found, at_classifier * open_pixels)


class Rounding(nn.Module):
    """A purifier whose true gradient is zero nearly everywhere."""

    def forward(self, given):
        return (given[:, :3] * 4).round() / 4


@pytest.mark.parametrize("through", ["both", "purifier"])
def test_it_breaks_a_defence_that_hides_its_gradient(through):
    pipeline, images = pipeline_of("rt2", Rounding()), images_of(32)
    labels = pipeline.classifier(images).argmax(dim=1)
    assert input_gradient(pipeline, images, labels).gradient.abs().max() == 0
    settings = PGDSettings(eps=0.2, steps=10, eot_samples=4)
    generator = torch.Generator().manual_seed(0)
    blind = pgd(pipeline, images, labels, settings, generator=generator)
    seeing = pgd(BPDA(pipeline, through), images, labels, settings, generator=generator)
    right = [(pipeline(x).argmax(dim=1) == labels).sum().item() for x in (blind, seeing)]
    assert right[1] < right[0] / 2


def test_rt3_through_the_purifier_alone_is_refused_for_it_has_no_gradient():
    with pytest.raises(ValueError, match="no gradient with rt3.*through='both' or 'transform'"):
        BPDA(pipeline_of("rt3"), "purifier")


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="unknown through 'classifier'; allowed: both, transform, purifier"):
        BPDA(pipeline_of(), "classifier")


def quantised(images):
    return (images * 7).round() / 7


def test_any_preprocessing_can_be_skipped_on_the_way_back():
    classifier, images = classifier_of(), images_of()
    wrapper = IdentityBackward(quantised, classifier)
    assert torch.equal(wrapper(images), classifier(quantised(images)))
    found = gradient_of(lambda x: wrapper(x)[:, 0].sum(), images)
    torch.testing.assert_close(found, gradient_of(lambda x: classifier(x)[:, 0].sum(), quantised(images)))


def test_the_general_wrapper_agrees_with_the_one_for_pipelines():
    pipeline, images = pipeline_of(), images_of()
    gradients = []
    for wrapper in (BPDA(pipeline), IdentityBackward(pipeline.purify, pipeline.classifier)):
        pipeline.reseed(5)
        gradients.append(gradient_of(lambda x, model=wrapper: model(x)[:, 2].sum(), images))
    assert torch.equal(*gradients)


class Dice(nn.Module):
    def reseed(self, seed):
        self.seed = seed

    def forward(self, images):
        return images


def test_the_dice_of_a_preprocessing_can_be_started_anew():
    wrapper = IdentityBackward(Dice().eval(), classifier_of())
    wrapper.reseed(11)
    assert wrapper.preprocess.seed == 11
    IdentityBackward(quantised, classifier_of()).reseed(11)


def test_a_preprocessing_that_changes_the_shape_is_refused(without_shape_checks):
    wrapper = IdentityBackward(lambda images: images[:, :, ::2], classifier_of())
    with pytest.raises(ValueError, match=r"keeps its shape only, but \(4, 3, 8, 8\) became \(4, 3, 4, 8\)"):
        wrapper(images_of())


def test_the_value_passes_and_the_gradient_goes_to_the_source_alone():
    source, value = images_of().requires_grad_(), images_of(5)[1:].requires_grad_()
    result = straight_through(source, value)
    assert torch.equal(result, value)
    result.square().sum().backward()
    torch.testing.assert_close(source.grad, 2 * value.detach())
    assert value.grad is None


@pytest.mark.parametrize("part", ["purifier", "classifier"])
def test_a_defence_in_train_mode_is_refused_through_the_wrapper(part):
    pipeline = pipeline_of()
    getattr(pipeline, part).train()
    labels = torch.zeros(4, dtype=torch.int64)
    for wrapper in (BPDA(pipeline), IdentityBackward(pipeline.purifier, pipeline.classifier)):
        with pytest.raises(ValueError, match=r"is in train mode; call model\.eval\(\)"):
            pgd(wrapper, images_of(), labels, PGDSettings(eps=0.1, steps=1))
    assert getattr(pipeline, part).training


def test_hills_setting_is_the_published_one():
    assert (HILL_PGD.steps, HILL_PGD.eot_samples, HILL_PGD.start, HILL_PGD.norm) == (50, 15, "random", "linf")
    assert (HILL_PGD.alpha, HILL_PGD.eps) == (2 / 255, 8 / 255)
    assert HILL_VERDICT.num_draws == 150


def test_a_pipeline_that_averages_draws_is_refused():
    averaged = AveragedPipeline(TransformSettings("rt2", noise_std=0.1, grid_size=4), nn.Identity(), nn.Identity(), copies=2)
    with pytest.raises(ValueError, match="for a pipeline of one draw a pass, but this one averages 2"):
        BPDA(averaged)
