"""What the steps of notebooks 1 and 3 do."""

from types import SimpleNamespace

import pytest
import torch
from tiny_trainings import RT2, tiny_classifier
from torch import nn
from torch.nn import functional as F

from atoplib import losses as loss_functions
from atoplib import purifiers
from atoplib.data import Split
from atoplib.pipeline import AToPPipeline
from atoplib.training import fit
from atoplib.transforms import Transform
from tests.training_cells import STAGES, step_of


class Recorder(nn.Module):
    """A classifier that notes in which mode and on which images it was called."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = tiny_classifier(100), []

    def forward(self, images):
        self.calls.append((self.training, images.detach().clone()))
        return self.inner(images)


class RecordingPipeline(AToPPipeline):
    """A pipeline that notes the images and the sample of each use of its purifier."""

    def outputs(self, images, sample=None):
        self.__dict__.setdefault("used", []).append(
            (images.detach().clone(), sample, torch.is_grad_enabled())
        )
        return super().outputs(images, sample)


@pytest.fixture
def batch():
    """8 images of 16 px whose class can be seen in their colour."""
    labels = torch.arange(8) % 3
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    images[torch.arange(8), labels] += 0.5
    return images, labels


def recording(transform=RT2, purifier="gated_unet", classifier=None, **options):
    torch.manual_seed(1)
    network = purifiers.build(purifier, **(options or dict(width=4, blocks=0, fold=4)))
    return RecordingPipeline(transform, network, classifier or tiny_classifier(100), seed=None)


# --- notebook 1


CLASSIFY = dict(
    adversarial=False, eps=0.1, norm="linf", attack_steps=3, alpha=None, label_smoothing=0.0, noise_std=0.0,
    inner_attack="pgd",
)  # fmt: skip


def classifying(network, purifier=None, **changes):
    """The step of notebook 1."""
    p = SimpleNamespace(**CLASSIFY | changes)
    return step_of(STAGES[0], network=network, purifier=purifier, p=p).step


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_adversarial_training_attacks_in_eval_mode_and_learns_in_train_mode_within_eps(batch, norm, eps):
    network = Recorder().train()
    statistics = network.inner[1].stem[1].running_mean.clone()
    losses = classifying(network, adversarial=True, norm=norm, eps=eps)(*batch, 0.0)
    assert [mode for mode, _ in network.calls] == [False, False, False, True]
    assert all(part.training for part in network.modules())
    assert network.inner[1].stem[1].num_batches_tracked == 1
    assert not torch.equal(network.inner[1].stem[1].running_mean, statistics)
    learned = network.calls[-1][1]
    distance = (learned - batch[0]).flatten(1)
    size = distance.abs().amax(dim=1) if norm == "linf" else distance.norm(dim=1)
    assert size.max() <= eps + 1e-6 and size.min() > eps / 10 and learned.min() >= 0 and learned.max() <= 1
    assert set(losses) == {"loss", "accuracy"}


def test_normal_training_sees_the_images_as_they_are_with_the_label_smoothing_that_is_asked_for(batch):
    network = Recorder().train()
    loss = classifying(network, label_smoothing=0.2)(*batch, 0.0)["loss"]
    ((mode, images),) = network.calls
    assert mode and torch.equal(images, batch[0])
    logs = network.inner(images).log_softmax(dim=1)
    by_hand = -(0.8 * logs[torch.arange(8), batch[1]].mean() + 0.2 * logs.mean())
    assert float(loss.detach()) == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_classifier_behind_a_purifier_is_attacked_and_trained_on_one_sample_of_it(batch):
    pipeline, network = recording(classifier=nn.Identity()).eval(), Recorder().train()
    step, samples = classifying(network, pipeline, adversarial=True), []
    for _ in range(2):
        pipeline.used = []
        network.calls.clear()
        step(*batch, 0.0)
        assert len(pipeline.used) == 4 and all(t is pipeline.used[0][1] for _, t, _ in pipeline.used)
        assert 0.01 < (pipeline.used[-1][0] - batch[0]).abs().max() <= 0.1 + 1e-6
        for (images, t, _), (_, classified) in zip(list(pipeline.used), network.calls, strict=True):
            assert torch.equal(pipeline.purify(images, t), classified)
        samples.append(pipeline.used[0][1])
    assert not torch.equal(samples[0].noise, samples[1].noise), "another step samples anew"


# --- notebook 3


FINETUNE = dict(
    variant="ft_adv", target="clean", threat_model="white-box", eps=0.1, norm="linf", attack_steps=3,
    alpha=None, eot_samples=1, ramp_epochs=0.0, classification_weight=1.0, warmup_epochs=0.0, gan_weight=0.0,
    gan_loss="hinge", inner_attack="pgd", temperature=1.0, shake=0, psnr_weight=0.0, psnr_floor=22.5,
)  # fmt: skip


def finetuning(pipeline, discriminator=None, frozen_ones=None, **changes):
    """The step of notebook 3."""
    names = dict(
        pipeline=pipeline, discriminator=discriminator, frozen_ones=frozen_ones or [pipeline.classifier]
    )
    return step_of(STAGES[2], p=SimpleNamespace(**FINETUNE | changes), **names).step


def finetuned(batch, pipeline, epoch=0.0, discriminator=None, **changes):
    """What one step of notebook 3 returns; how its parts were used is in the pipeline."""
    torch.manual_seed(0)
    return finetuning(pipeline, discriminator, **changes)(*batch, epoch)


def test_the_white_box_attack_hits_the_very_sample_of_the_loss(batch):
    finetuned(batch, pipeline := recording())
    assert len(pipeline.used) == 4 and all(sample is pipeline.used[0][1] for _, sample, _ in pipeline.used)
    assert 0.05 < (pipeline.used[-1][0] - batch[0]).abs().max() <= 0.1 + 1e-6


def test_an_attack_with_eot_averages_over_samples_of_its_own(batch):
    finetuned(batch, pipeline := recording(), eot_samples=4, attack_steps=2)
    assert [sample is None for _, sample, _ in pipeline.used] == [True, True, False]
    assert len(pipeline.used[0][0]) == 4 * len(batch[0])


def test_the_papers_attack_is_fgsm_on_the_classifier_and_never_touches_the_pipeline(batch):
    finetuned(batch, pipeline := recording(), threat_model="transfer", attack_steps=1)
    ((images, _, _),) = pipeline.used
    clean = batch[0].clone().requires_grad_()
    F.cross_entropy(pipeline.classifier(clean), batch[1]).backward()
    assert torch.allclose(images, (batch[0] + 0.1 * clean.grad.sign()).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("ramp, epoch, share", [(4, 0, 0.01), (4, 1, 0.25), (4, 4, 1), (4, 40, 1), (0, 0, 1)])
def test_eps_and_step_size_grow_together_along_the_ramp(batch, ramp, epoch, share):
    for alpha in (None, 0.1):
        shown = finetuned(batch, pipeline := recording(), epoch, ramp_epochs=ramp, eps=0.2, alpha=alpha)
        size = (pipeline.used[-1][0] - batch[0]).abs().max()
        assert 0.5 * share * 0.2 < size <= shown["eps"] + 1e-6 == share * 0.2 + 1e-6


def test_the_classification_term_joins_in_after_the_warm_up_and_what_is_rebuilt_is_the_target(batch):
    pipeline = recording()
    assert set(finetuned(batch, pipeline, 0.9, warmup_epochs=1.0)) == {"loss", "eps", "reconstruction"}
    losses = {target: finetuned(batch, pipeline, 1.0, target=target) for target in ("clean", "adversarial")}
    assert set(losses["clean"]) == {"loss", "eps", "reconstruction", "classification", "accuracy"}
    (x_adv, t, _) = pipeline.used[-1]
    by_hand = loss_functions.reconstruction_loss(AToPPipeline.outputs(pipeline, x_adv, t), 2 * x_adv - 1)
    assert torch.allclose(losses["adversarial"]["reconstruction"], by_hand)
    assert not torch.allclose(losses["clean"]["reconstruction"], by_hand)


@pytest.mark.parametrize("variant, attacked", [("ap", False), ("ft_clean", False), ("ft_adv", True)])
def test_what_goes_in_is_what_the_variant_says(batch, variant, attacked):
    losses = finetuned(batch, pipeline := recording(), variant=variant, classification_weight=2.0)
    assert torch.equal(pipeline.used[-1][0], batch[0]) != attacked and ("classification" in losses) == (
        variant != "ap"
    )
    assert torch.allclose(losses["loss"], losses["reconstruction"] + 2 * losses.get("classification", 0))


def test_the_temperature_divides_the_logits_and_the_floor_has_its_price(batch):
    changes = dict(variant="ft_clean", temperature=4.0, psnr_weight=0.5, psnr_floor=60.0)
    losses = finetuned(batch, pipeline := recording(), **changes)
    ((images, t, _),) = pipeline.used
    logits = pipeline(images, t)
    assert torch.allclose(losses["classification"], F.cross_entropy(logits / 4, batch[1]))
    assert not torch.allclose(losses["classification"], F.cross_entropy(logits, batch[1]))
    below = loss_functions.psnr_floor_loss(pipeline.outputs(images, t)[-1], 2 * images - 1, 60.0)
    assert below > 1 and torch.allclose(losses["dB_below_floor"], below)
    assert torch.allclose(losses["loss"], losses["reconstruction"] + losses["classification"] + 0.5 * below)


def test_each_step_shows_attack_and_loss_to_one_of_the_frozen_classifiers(batch):
    ones, chosen = [Recorder().eval(), Recorder().eval()], set()
    for seed in range(12):
        for one in ones:
            one.calls.clear()
        step = finetuning(pipeline := recording(), frozen_ones=ones, inner_attack="n_fgsm")
        torch.manual_seed(seed)
        step(*batch, 0.0)
        assert sorted(len(one.calls) for one in ones) == [0, 2]
        chosen |= {number for number, one in enumerate(ones) if one.calls}
        assert 0.1 + 1e-6 < (pipeline.used[-1][0] - batch[0]).abs().max() <= 0.3 + 1e-6
    assert chosen == {0, 1}


@pytest.mark.parametrize("shake", [0, 2])
def test_a_shake_moves_what_the_frozen_classifier_sees_and_nothing_else(batch, shake):
    one, pipeline = Recorder().eval(), recording()
    finetuned(batch, pipeline, frozen_ones=[one], variant="ft_clean", shake=shake)
    ((images, t, _),), ((_, seen),) = pipeline.used, one.calls
    assert torch.equal(images, batch[0]) and seen.shape == images.shape
    assert torch.equal(seen, pipeline.purify(images, t)) == (shake == 0)


@pytest.mark.parametrize("name", ["none", "rt1", "rt2", "rt3"])
@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_the_gan_term_has_a_gradient_at_the_purifier_and_the_discriminator_a_loss_of_its_own(
    batch, name, kind
):
    pipeline = recording(Transform(name, missing_rate=0.25, noise_std=0.1, grid_size=4))
    discriminator = purifiers.PatchDiscriminator(2)
    losses = finetuned(
        batch, pipeline, discriminator=discriminator, variant="ap", gan_weight=0.5, gan_loss=kind
    )
    assert torch.allclose(losses["loss"], losses["reconstruction"] + 0.5 * losses["gan"])
    weights = list(pipeline.purifier.parameters())
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(losses["gan"], weights, retain_graph=True))
    reached = torch.autograd.grad(losses["discriminator"], weights, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in reached)
    own = torch.autograd.grad(losses["discriminator"], list(discriminator.parameters()))
    assert any(gradient.abs().max() > 0 for gradient in own)


DEEPFILL = pytest.param("deepfill_v2", {"width": 8}, marks=pytest.mark.long)


@pytest.mark.parametrize("variant, gan_weight", [("ap", 0.05), ("ft_clean", 0.0), ("ft_adv", 0.05)])
@pytest.mark.parametrize(
    "purifier, options", [("gated_unet", {"width": 4, "blocks": 0, "fold": 4}), DEEPFILL]
)
def test_every_variant_is_learned_on_a_small_fixed_batch_and_the_classifier_stays(
    batch, purifier, options, variant, gan_weight
):
    network, classifier = purifiers.build(purifier, **options), tiny_classifier(100)
    pipeline = AToPPipeline(Transform("rt2", 0.25, 0.02, grid_size=4), network, classifier)
    discriminator = purifiers.PatchDiscriminator(4)
    networks = {"purifier": network} | ({"discriminator": discriminator} if gan_weight else {})
    changes = dict(gan_weight=gan_weight, classification_weight=0.5, eps=0.05, attack_steps=1)
    step = finetuning(pipeline, discriminator, variant=variant, **changes)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    images = Split((batch[0] * 255).to(torch.uint8), batch[1])
    settings = dict(epochs=36, batch_size=8, learning_rate=0.003, schedule="constant", dtype="float32")
    history = fit(step, networks, images, **settings)
    first, last = (sum(entry["reconstruction"] for entry in part) for part in (history[:3], history[-3:]))
    assert last < 0.95 * first
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())
