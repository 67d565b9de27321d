"""BPDA is the defence on the way forward, bit by bit, and the identity on the way back."""

import pytest
import torch
from torch import nn

from atoplib.attacks import IdentityBackward, bpda, eot_gradient, pgd
from atoplib.decisions import fixed_sample, reseed
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

TRANSFORMS = ["none", "rt1", "rt2", "rt3"]


def images_of(count=4):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def classifier_of(classes=5):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, classes)).eval()


def pipeline_of(name="rt2", purifier=None, **options):
    if purifier is None:
        purifier = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Tanh())
    transform = Transform(name, noise_std=0.1, grid_size=4)
    return AToPPipeline(transform, purifier, classifier_of(), **options).eval()


def gradient_of(function, images):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(function(images), images)[0]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("copies", [1, 2])
def test_forward_it_is_the_pipeline_bit_by_bit_with_the_same_sequence_of_random_numbers(name, copies):
    pipeline, images = pipeline_of(name, copies=copies), images_of()
    wrapper = bpda(pipeline)
    pipeline.reseed(3)
    plain = [pipeline(images) for _ in range(2)]
    reseed(wrapper, 3)
    wrapped = [wrapper(images) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(plain, wrapped, strict=True))
    assert name == "none" or not torch.equal(*wrapped)
    with fixed_sample(wrapper, 5):
        assert torch.equal(wrapper(images), wrapper(images))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_gradient_is_the_classifiers_at_the_purified_image(name):
    pipeline, images = pipeline_of(name), images_of()
    purified = pipeline.purify(images).detach()
    pipeline.reseed(0)
    found = gradient_of(lambda x: bpda(pipeline)(x)[:, 1].sum(), images)
    torch.testing.assert_close(found, gradient_of(lambda x: pipeline.classifier(x)[:, 1].sum(), purified))


class Rounding(nn.Module):
    """A purifier whose true gradient is zero nearly everywhere."""

    def forward(self, inputs):
        return (inputs[:, :3] * 4).round() / 4


def test_it_breaks_a_defence_that_hides_its_gradient():
    pipeline, images = pipeline_of("rt2", Rounding()), images_of(32)
    labels = pipeline.classifier(images).argmax(dim=1)
    assert eot_gradient(pipeline, images, labels).gradient.abs().max() == 0
    plain, through = (
        pgd(model, images, labels, eps=0.2, steps=10, eot_samples=4) for model in (pipeline, bpda(pipeline))
    )
    correct = [(pipeline(x).argmax(dim=1) == labels).sum().item() for x in (plain, through)]
    assert correct[1] < correct[0] / 2


def quantised(images):
    return (images * 7).round() / 7


def test_any_preprocessing_can_be_skipped_on_the_way_back():
    classifier, images = classifier_of(), images_of()
    wrapper = IdentityBackward(quantised, classifier)
    assert torch.equal(wrapper(images), classifier(quantised(images)))
    found = gradient_of(lambda x: wrapper(x)[:, 0].sum(), images)
    torch.testing.assert_close(found, gradient_of(lambda x: classifier(x)[:, 0].sum(), quantised(images)))


def test_a_preprocessing_that_changes_the_shape_is_refused(without_shape_checks):
    wrapper = IdentityBackward(lambda images: images[:, :, ::2], classifier_of())
    with pytest.raises(ValueError, match=r"keeps its shape only, but \(4, 3, 8, 8\) became \(4, 3, 4, 8\)"):
        wrapper(images_of())


def test_what_has_no_purified_image_is_refused():
    with pytest.raises(ValueError, match="needs an AToPPipeline .*not a Sequential"):
        bpda(classifier_of())
    with pytest.raises(ValueError, match="with average='images'"):
        bpda(pipeline_of(copies=2, average="logits"))
