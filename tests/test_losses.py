"""Every loss has the value that one computes by hand, and the GAN's gradient arrives at the purifier."""

import pytest
import torch

from atoplib.losses import discriminator_loss, generator_loss, psnr_floor_loss, reconstruction_loss
from atoplib.purifiers import GatedUNet, PatchDiscriminator

REAL = torch.tensor([[2.0, 0.5], [1.0, -1.0]])
FAKE = torch.tensor([[-2.0, -0.5], [0.0, 2.0]])
KINDS = ["hinge", "least_squares"]


def flat_image(value):
    return torch.full((2, 3, 4, 4), value)


def test_reconstruction_is_the_mean_absolute_difference_summed_over_outputs():
    target = flat_image(0.25)
    assert reconstruction_loss((flat_image(1.0),), target).item() == pytest.approx(0.75)
    outputs = flat_image(1.0), flat_image(-0.25)
    assert reconstruction_loss(outputs, target).item() == pytest.approx(0.75 + 0.5)


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


@pytest.mark.parametrize("kind", KINDS)
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
