"""Every loss has the value that one computes by hand, and the GAN's gradient arrives at the purifier."""

from itertools import product
from math import log

import pytest
import torch

from atoplib.losses import (
    TARGETS,
    VARIANTS,
    Objective,
    atop_loss,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from atoplib.purifiers import GatedUNet, PatchDiscriminator

REAL = torch.tensor([[2.0, 0.5], [1.0, -1.0]])
FAKE = torch.tensor([[-2.0, -0.5], [0.0, 2.0]])


def scores(values=FAKE):
    return values.clone().requires_grad_()


def flat_image(value, batch=2):
    return torch.full((batch, 3, 4, 4), value)


def test_reconstruction_is_the_mean_absolute_difference_summed_over_stages():
    target = flat_image(0.25)
    assert reconstruction_loss((flat_image(1.0),), target).item() == pytest.approx(0.75)
    assert reconstruction_loss((flat_image(1.0), flat_image(-0.25)), target).item() == pytest.approx(0.75 + 0.5)


def test_hinge_losses_agree_with_hand_computed_values():
    # relu(1 - real): 0, 0.5, 0, 2; relu(1 + fake): 0, 0.5, 1, 3; mean of fake: -0.125
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(2.5 / 4 + 4.5 / 4)
    assert generator_loss(scores(), "hinge").item() == pytest.approx(0.125)


def test_least_squares_losses_agree_with_hand_computed_values():
    # (real - 1)^2: 1, 0.25, 0, 4; fake^2: 4, 0.25, 0, 4; (fake - 1)^2: 9, 2.25, 1, 1
    assert discriminator_loss(REAL, FAKE, "least_squares").item() == pytest.approx((5.25 / 4 + 8.25 / 4) / 2)
    assert generator_loss(scores(), "least_squares").item() == pytest.approx(13.25 / 4 / 2)


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_a_perfect_discriminator_has_no_loss(kind):
    real, fake = torch.ones(2, 3), torch.full((2, 3), -1.0 if kind == "hinge" else 0.0)
    assert discriminator_loss(real, fake, kind).item() == 0


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_generator_and_discriminator_pull_the_scores_apart(kind):
    low = torch.zeros(1, 1, requires_grad=True)
    (toward_real,) = torch.autograd.grad(generator_loss(low, kind), low)
    high = torch.full((1, 1), 0.5, requires_grad=True)
    (away_from_real,) = torch.autograd.grad(discriminator_loss(torch.ones(1, 1), high, kind), high)
    assert toward_real < 0 < away_from_real


def test_the_gan_term_of_the_generator_refuses_scores_without_a_graph():
    with pytest.raises(ValueError, match="detached"):
        generator_loss(FAKE)
    with torch.no_grad():  # a validation wants the number only
        assert generator_loss(FAKE).item() == pytest.approx(0.125)


def gan_setting():
    torch.manual_seed(0)
    purifier, discriminator = GatedUNet(width=4, blocks=0), PatchDiscriminator(width=2)
    given, mask = torch.rand(2, 5, 16, 16), torch.ones(2, 1, 16, 16)
    output = purifier(given)
    return purifier, output, lambda image: discriminator(torch.cat([image, mask], dim=1))


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_the_gradient_of_the_gan_term_alone_reaches_every_weight_of_the_purifier(kind):
    purifier, output, discriminate = gan_setting()
    objective = Objective("ap", gan_weight=1.0, gan_loss=kind)
    terms = atop_loss(objective, stages=(output,), clean=torch.rand(2, 3, 16, 16), discriminate=discriminate)
    terms["gan"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in purifier.parameters())


def test_a_step_along_the_gan_gradient_raises_the_scores():
    purifier, output, discriminate = gan_setting()
    before = discriminate(output).mean()
    (gradient,) = torch.autograd.grad(generator_loss(discriminate(output)), output)
    after = discriminate(output.detach() - 0.1 * gradient / gradient.norm()).mean()
    assert after > before


def test_a_detached_image_is_refused_although_the_discriminator_keeps_its_own_graph():
    _, output, discriminate = gan_setting()
    assert discriminate(output.detach()).requires_grad, "the discriminator's weights give the scores a graph"
    given = {"clean": torch.rand(2, 3, 16, 16), "discriminate": discriminate}
    with pytest.raises(ValueError, match="output is detached"):
        atop_loss(Objective("ap", gan_weight=1.0), stages=(output.detach(),), **given)


def test_the_gan_term_scores_the_last_stage():
    coarse, fine = (flat_image(value).requires_grad_() for value in (0.0, 0.5))
    seen = []

    def discriminate(image):
        seen.append(image)
        return image.mean(dim=(1, 2, 3))[:, None]

    terms = atop_loss(
        Objective("ap", gan_weight=1.0), stages=(coarse, fine), clean=flat_image(0.5), discriminate=discriminate
    )
    assert seen == [fine] and terms["gan"].item() == -0.5


CLEAN, ADVERSARIAL, OUTPUT = 0.75, 0.25, 0.0  # on [-1, 1]: 0.5, -0.5, 0
LOGITS = torch.tensor([[0.0, 0.0], [log(3.0), 0.0]])  # cross-entropy of the labels 0, 1: log 2, log 4
LABELS = torch.tensor([0, 1])
CROSS_ENTROPY = (log(2.0) + log(4.0)) / 2


def terms_of(objective, stages=None, **given):
    return atop_loss(objective, stages=stages or (flat_image(OUTPUT),), clean=flat_image(CLEAN), **given)


@pytest.mark.parametrize("variant, target, gan_weight", list(product(VARIANTS, TARGETS, [0.0, 2.0])))
def test_each_variant_adds_up_its_own_terms(variant, target, gan_weight):
    objective = Objective(variant, target, classification_weight=0.05, gan_weight=gan_weight)
    # unlike distances to the two targets, so that a mix-up shows
    stages = (flat_image(0.25).requires_grad_(),)
    terms = terms_of(
        objective,
        stages,
        adversarial=flat_image(ADVERSARIAL),
        logits=LOGITS,
        labels=LABELS,
        discriminate=lambda image: scores(),
    )
    adversarial_target = variant == "ft_adv" and target == "adversarial"
    reconstruction = 0.75 if adversarial_target else 0.25
    expected = {"reconstruction": reconstruction}
    loss = reconstruction
    if variant != "ap":
        expected["classification"] = CROSS_ENTROPY
        loss += 0.05 * CROSS_ENTROPY
    if gan_weight:
        expected["gan"] = 0.125
        loss += gan_weight * 0.125
    assert {name: value.item() for name, value in terms.items()} == pytest.approx({"loss": loss, **expected})


@pytest.mark.parametrize("kind, value", [("hinge", 0.125), ("least_squares", 13.25 / 8)])
def test_the_gan_term_is_of_the_asked_kind(kind, value):
    stages = (flat_image(OUTPUT).requires_grad_(),)
    terms = terms_of(Objective("ap", gan_weight=2.0, gan_loss=kind), stages, discriminate=lambda image: scores())
    assert terms["gan"].item() == pytest.approx(value)
    assert terms["loss"].item() == pytest.approx(0.5 + 2 * value)


def test_only_ft_adv_needs_adversarial_images():
    assert [Objective(variant).needs_adversarial for variant in VARIANTS] == [False, False, True]


def test_coarse_and_fine_stage_count_alike():
    terms = terms_of(Objective("ap"), (flat_image(0.0), flat_image(1.0)))
    assert terms["reconstruction"].item() == pytest.approx(0.5 + 0.5)
    terms = terms_of(Objective("ap"), (flat_image(0.0), flat_image(0.5)))
    assert terms["reconstruction"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("variant", ["ft_clean", "ft_adv"])
def test_the_classification_term_starts_after_the_warm_up(variant):
    objective = Objective(variant, classification_weight=0.1, warmup_epochs=3)
    weights = [objective.weight_of_classification(epoch) for epoch in (0, 1, 2.99, 3, 4.5)]
    assert weights == [0, 0, 0, 0.1, 0.1]
    assert "classification" not in terms_of(objective, logits=LOGITS, labels=LABELS, epoch=2.9)
    terms = terms_of(objective, logits=LOGITS, labels=LABELS, epoch=3.0)
    assert terms["loss"].item() == pytest.approx(0.5 + 0.1 * CROSS_ENTROPY)


def test_ap_never_has_a_classification_term():
    assert Objective("ap", classification_weight=5.0).weight_of_classification(100) == 0


def test_reported_terms_are_not_weighted_and_the_loss_has_a_gradient():
    logits = LOGITS.clone().requires_grad_()
    image = flat_image(OUTPUT).requires_grad_()
    terms = terms_of(Objective("ft_clean", classification_weight=0.25), (image,), logits=logits, labels=LABELS)
    terms["loss"].backward()
    torch.testing.assert_close(logits.grad, 0.25 * torch.tensor([[-0.5, 0.5], [0.75, -0.75]]) / 2)
    torch.testing.assert_close(image.grad, torch.full_like(image, -1 / image.numel()))


@pytest.mark.parametrize(
    "objective, given, message",
    [
        (Objective("ft_adv", "adversarial", classification_weight=0.0), {}, "needs the adversarial images"),
        (Objective("ft_clean"), {"labels": LABELS}, "logits or labels are missing"),
        (Objective("ft_clean"), {"logits": LOGITS}, "logits or labels are missing"),
        (Objective("ap", gan_weight=1.0), {}, "there is no discriminator"),
    ],
    ids=["adversarial", "logits", "labels", "scores"],
)
def test_a_term_without_its_input_is_refused(objective, given, message):
    with pytest.raises(ValueError, match=message):
        terms_of(objective, **given)


@pytest.mark.parametrize("loss", [discriminator_loss, lambda _, fake, kind: generator_loss(fake, kind)])
def test_an_unknown_gan_loss_is_refused_with_the_allowed_ones(loss):
    with pytest.raises(ValueError, match="unknown GAN loss 'wasserstein'; allowed: hinge, least_squares"):
        loss(REAL, scores(), "wasserstein")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"variant": "ft"}, "unknown variant 'ft'; allowed: ap, ft_clean, ft_adv"),
        ({"target": "noisy"}, "unknown target 'noisy'; allowed: clean, adversarial"),
        ({"gan_loss": "wgan"}, "unknown gan_loss 'wgan'"),
        ({"classification_weight": -0.1}, "classification_weight must be 0 or more"),
        ({"classification_weight": float("nan")}, "classification_weight must be 0 or more"),
        ({"warmup_epochs": -1}, "warmup_epochs must be 0 or more"),
        ({"gan_weight": float("inf")}, "gan_weight must be 0 or more and finite"),
    ],
    ids=str,
)
def test_impossible_objectives_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)
