"""The adaptive attack is PGD + EOT where none of its turns is taken, and each turn does what it says."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.attacks import PGDSettings, check_budget, pgd
from atoplib.attacks.adaptive import AdaptiveSettings, adaptive
from atoplib.attacks.eot import cross_entropy
from atoplib.attacks.losses import margin
from atoplib.pipeline import AToPPipeline, AveragedPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import draw_logits

BASE = PGDSettings(eps=0.1, steps=5, alpha=0.03, eot_samples=3)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count=6):
    return torch.rand(count, 3, 8, 8, generator=seeded(count))


def classifier_of(classes=4):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 36, classes)).eval()


def pipeline_of(name="rt2", noise_std=0.1):
    purifier = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 1), nn.Tanh())
    return AToPPipeline(TransformSettings(name, noise_std=noise_std, grid_size=4), purifier, classifier_of()).eval()


@pytest.mark.parametrize("start", ["random", "clean"])
@pytest.mark.parametrize("base", [BASE, replace(BASE, norm="l2", eps=0.5, alpha=None)], ids=["linf", "l2"])
def test_without_any_turn_it_is_pgd_with_eot_bit_by_bit(base, start):
    pipeline, images, base = pipeline_of(), images_of(), replace(base, start=start)
    expected = pgd(pipeline, images, LABELS, base, generator=seeded(1), max_batch=7)
    pipeline.reseed(0)
    found = adaptive(pipeline, images, LABELS, AdaptiveSettings(base), generator=seeded(1), max_batch=7)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name, loss", [("margin", margin), ("cross_entropy", cross_entropy)])
def test_each_weight_raises_its_own_loss(name, loss):
    pipeline, images = pipeline_of(), images_of()
    weights = {"cross_entropy": 0.0, "margin": 0.0} | {name: 2.0}
    expected = pgd(pipeline, images, LABELS, BASE, generator=seeded(1), loss=loss)
    pipeline.reseed(0)
    found = adaptive(pipeline, images, LABELS, AdaptiveSettings(BASE, **weights), generator=seeded(1))
    torch.testing.assert_close(found, expected)


def test_mixed_losses_are_summed_with_their_weights():
    pipeline, images = pipeline_of(), images_of()

    def mixed(logits, labels):
        return 0.5 * cross_entropy(logits, labels) + 3 * margin(logits, labels)

    base = replace(BASE, norm="l2", eps=0.5)  # here the weights show in the direction, not in signs alone
    expected = pgd(pipeline, images, LABELS, base, generator=seeded(1), loss=mixed)
    pipeline.reseed(0)
    found = adaptive(pipeline, images, LABELS, AdaptiveSettings(base, 0.5, 3.0), generator=seeded(1))
    torch.testing.assert_close(found, expected)


def distance_between(pipeline, images, others):
    with torch.no_grad():
        one, other = (torch.stack([pipeline.purify(x) for _ in range(50)]).mean(dim=0) for x in (images, others))
    return (one - other).square().mean(dim=(1, 2, 3))


def test_the_distance_loss_drives_the_purified_image_away_from_the_purified_clean_one():
    pipeline, images = pipeline_of(), images_of()
    settings = AdaptiveSettings(replace(BASE, steps=10, eot_samples=8), cross_entropy=0.0, distance=1.0)
    seen = []
    found = adaptive(
        pipeline, images, LABELS, settings, generator=seeded(), callback=lambda *given: seen.append(given[3].mean().item())
    )
    by_class = adaptive(pipeline, images, LABELS, replace(settings, cross_entropy=1.0, distance=0.0), generator=seeded())
    away = distance_between(pipeline, found, images)
    assert away.mean() > 1.1 * distance_between(pipeline, by_class, images).mean()
    assert seen[-1] > seen[0] > 0


class Recorder(nn.Module):
    """A purifier that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, given):
        self.given.append(given.detach())
        return given[:, :3]


@pytest.mark.parametrize("max_batch", [6, 4, 512])
@pytest.mark.parametrize("fixed_for", [0, 1, 2])
def test_draws_stay_fixed_for_as_long_as_asked_and_differ_from_one_another(fixed_for, max_batch):
    pipeline = AToPPipeline(TransformSettings("rt1", grid_size=8), Recorder(), classifier_of()).eval()
    settings = AdaptiveSettings(replace(BASE, steps=5, eot_samples=4), fixed_for=fixed_for)
    adaptive(pipeline, images_of(), LABELS, settings, generator=seeded(), max_batch=max_batch)
    masks = torch.cat([given[:, 4] for given in pipeline.purifier.given[1:]])  # the first is the check's
    by_step = masks.unflatten(0, (5, 24))
    assert len({tuple(mask.flatten().tolist()) for mask in by_step[0]}) == 24, "every copy of every image has its own"
    same = [bool(torch.equal(by_step[step], by_step[step + 1])) for step in range(4)]
    assert same == {0: [True] * 4, 1: [False] * 4, 2: [True, False, True, False]}[fixed_for]


def test_with_one_set_of_draws_it_is_pgd_on_the_pipeline_that_these_draws_make():
    pipeline, images = pipeline_of(), images_of()
    base = replace(BASE, eot_samples=1, start="clean")
    with pipeline.fixed_draws(int(torch.randint(2**31, (), generator=seeded(2)))):
        expected = pgd(pipeline, images, LABELS, base)
    found = adaptive(pipeline, images, LABELS, AdaptiveSettings(base, fixed_for=0), generator=seeded(2))
    assert torch.equal(found, expected)
    assert not torch.equal(found, adaptive(pipeline, images, LABELS, AdaptiveSettings(base), generator=seeded(2)))


def test_the_pipelines_own_dice_go_on_after_an_attack_with_fixed_draws():
    pipeline, images = pipeline_of(), images_of()
    adaptive(pipeline, images, LABELS, AdaptiveSettings(BASE, fixed_for=0), generator=seeded())
    logits = draw_logits(pipeline, images, num_draws=2)
    assert not torch.equal(*logits)


def test_a_warm_start_begins_where_the_transfer_attack_ends():
    pipeline, images = pipeline_of(), images_of()
    warm = PGDSettings(BASE.eps, steps=7, start="clean")
    transfer = pgd(pipeline.classifier, images, LABELS, warm)
    settings = AdaptiveSettings(replace(BASE, steps=1, alpha=1e-6, start="clean"), warm_steps=7)
    found = adaptive(pipeline, images, LABELS, settings)
    torch.testing.assert_close(found, transfer, atol=2e-6, rtol=0)
    assert (found - images).abs().max() > 0.05


@pytest.mark.parametrize("turn", [{}, {"fixed_for": 0}, {"distance": 5.0}, {"margin": 1.0}, {"warm_steps": 3}], ids=str)
@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_a_generator_fixes_the_attack_and_every_iterate_keeps_the_budget(turn, norm, eps):
    pipeline, images = pipeline_of("rt3"), images_of()
    settings = AdaptiveSettings(PGDSettings(eps, norm, steps=3, eot_samples=2), **turn)
    seen = []

    def callback(step, steps, adversarial, losses):
        check_budget(adversarial, images, eps, norm)
        assert steps == 3 and losses.shape == (6,)
        seen.append(step)

    before = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        pipeline.reseed(0)
        results.append(adaptive(pipeline, images, LABELS, settings, generator=seeded(seed), callback=callback))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert seen == [1, 2, 3] * 3
    assert torch.equal(before, torch.get_rng_state())
    assert all(weight.grad is None for weight in pipeline.parameters())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cross_entropy": 0.0}, "must be at least 0 and one of them above"),
        ({"margin": -1.0}, "must be at least 0"),
        ({"distance": float("nan")}, "must be at least 0"),
        ({"fixed_for": -1}, "fixed_for and warm_steps must be at least 0, got -1 and 0"),
        ({"warm_steps": -1}, "fixed_for and warm_steps must be at least 0, got 1 and -1"),
        ({"base": replace(BASE, stop_after=2)}, "stop_after must be 0 here, got 2"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSettings(**{"base": BASE} | wrong)


def test_a_model_that_is_no_pipeline_is_refused():
    with pytest.raises(ValueError, match="needs an AToPPipeline; Sequential has no purify, classifier.*: use pgd"):
        adaptive(classifier_of(), images_of(), LABELS, AdaptiveSettings(BASE))


def test_a_pipeline_in_train_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        adaptive(pipeline_of().train(), images_of(), LABELS, AdaptiveSettings(BASE))


def test_a_pipeline_that_averages_logits_is_refused_and_one_that_averages_images_is_attacked():
    plain, images = pipeline_of(), images_of()
    parts = plain.transform, plain.purifier, plain.classifier
    with pytest.raises(ValueError, match="this pipeline averages logits; use pgd"):
        adaptive(AveragedPipeline(*parts, copies=2, average="logits").eval(), images, LABELS, AdaptiveSettings(BASE))
    check_budget(
        adaptive(AveragedPipeline(*parts, copies=2).eval(), images, LABELS, AdaptiveSettings(BASE)), images, 0.1, "linf"
    )
