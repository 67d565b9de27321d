"""Ablation and quality: a row says what a call by hand would; PSNR and SSIM follow from known errors."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from atoplib.attacks import pgd
from atoplib.decisions import reseed, sample_logits, wilson_interval
from atoplib.evaluation import measure
from atoplib.evaluation.ablation import Setting, ablate, equal_cost, mask_grid, purified_distance, vote_curve
from atoplib.evaluation.quality import purification_quality
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

RT2 = Transform("rt2", missing_rate=0.25, noise_std=0.2)
ATTACK = {"eps": 0.1, "steps": 3, "eot_samples": 4, "early_stop": 3}
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(6) % 4


class By(nn.Module):
    """What a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def shifted(shift=0.0):
    """A purifier that adds a constant, on the scale [-1, 1]."""
    return By(lambda given: given[:, :3] + shift)


def make_pipeline(transform=RT2, purifier=None, copies=1):
    torch.manual_seed(1)
    classifier = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    )
    own = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh())
    return AToPPipeline(transform, purifier or own, classifier, copies=copies).eval()


# settings


def test_the_grid_crosses_rates_and_masks_and_ends_with_the_partitions():
    grid = mask_grid(RT2, missing_rates=[0.1, 0.5], mask_counts=[1, 4], partitions=[2, 8])
    rows = [tuple(setting.describe().values()) for setting in grid]
    assert rows == [
        ("rt2", 0.1, 0.2, 1),
        ("rt2", 0.1, 0.2, 4),
        ("rt2", 0.5, 0.2, 1),
        ("rt2", 0.5, 0.2, 4),
        ("rt3", 1 / 2, 0.2, 2),
        ("rt3", 1 / 8, 0.2, 8),
    ]
    assert Setting(replace(RT2, name="rt1")).describe()["noise_std"] == 0
    assert Setting(Transform("none")).describe()["missing_rate"] == 0


@pytest.mark.parametrize("masks, samples, patience", [(1, 8, 3), (2, 4, 6), (4, 2, 12), (8, 2, 12)])
def test_an_average_gets_fewer_samples_and_as_much_patience(masks, samples, patience):
    assert equal_cost(masks, 8, 3) == (samples, patience)
    assert equal_cost(masks, 8, 0)[1] == 0 and equal_cost(masks, 1, 3)[0] == 1


# rows


def test_a_row_says_what_a_call_by_hand_says():
    setting = Setting(RT2, 2)
    (row,) = ablate({"mine": make_pipeline()}, [setting], IMAGES, LABELS, **ATTACK, num_samples=3).to_dict(
        "records"
    )
    model = make_pipeline(copies=2)
    samples, patience = equal_cost(2, 4, 3)
    adversarial = pgd(model, IMAGES, LABELS, eps=0.1, steps=3, eot_samples=samples, early_stop=patience)
    for shown, accuracy in ((IMAGES, row["clean"]), (adversarial, row["robust"])):
        reseed(model, 1)
        right = sample_logits(model, shown, num_samples=3).argmax(dim=2) == LABELS
        assert accuracy == pytest.approx(100 * float(right.float().mean()))
    expected = [100 * end for end in wilson_interval(row["robust"] * 6 / 100, 6)]
    assert [row["robust_low"], row["robust_high"]] == pytest.approx(expected)
    assert row["distance"] == pytest.approx(purified_distance(model, IMAGES, adversarial, seed=1))
    assert (row["defence"], row["num_masks"], row["num_samples"]) == ("mine", 2, 3)


def test_a_setting_that_is_not_random_needs_one_sample_and_the_pipeline_stays_as_it_is():
    pipeline = make_pipeline()
    before = pipeline(IMAGES)
    reseed(pipeline, 0)
    settings = [Setting(Transform("none")), Setting(replace(RT2, noise_std=0.9), 2)]
    frame = ablate({"mine": pipeline}, settings, IMAGES, LABELS, **ATTACK)
    assert frame.num_samples.tolist() == [1, 5] and 1 <= frame.passes[0] <= 3 * 1 + 1 < frame.passes[1]
    assert pipeline.transform == RT2 and torch.equal(pipeline(IMAGES), before)


def run(run_dir=None, pipeline=None, **options):
    settings = [Setting(RT2), Setting(RT2, 2), Setting(RT2, 2)]
    pipelines = {"mine": pipeline or make_pipeline()}
    return ablate(pipelines, settings, IMAGES, LABELS, **ATTACK, **options, run_dir=run_dir)


def test_what_is_done_is_not_done_again_and_what_depends_on_a_change_is(tmp_path, monkeypatch):
    seen = []
    first = run(tmp_path, progress=lambda done, total, unit: seen.append((done, total)))
    assert first["num_masks"].tolist() == [1, 2], "a setting that is there twice is measured once"
    assert seen == sorted(seen) and seen[-1] == (6, 6)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure", None)
        pd.testing.assert_frame_equal(run(tmp_path), first)
    other = make_pipeline()
    with torch.no_grad():
        other.purifier[0].weight.mul_(1.5)
    found = run(tmp_path, other)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), run(None, other).drop(columns="seconds"))
    assert not found["distance"].equals(first["distance"])


# numbers


def test_the_distance_is_that_of_the_perturbation_where_nothing_is_purified_and_0_under_the_same_sample():
    pipeline = make_pipeline(Transform("none"), shifted())
    moved = (IMAGES + 3 / 255).where(IMAGES < 0.5, IMAGES - 3 / 255)
    assert purified_distance(pipeline, IMAGES, moved, max_batch=4) == pytest.approx(3, rel=1e-4)
    assert purified_distance(make_pipeline(), IMAGES, IMAGES) == 0
    assert purified_distance(make_pipeline(copies=3), IMAGES, IMAGES) == 0


def test_votes_are_counted_over_every_group_of_samples():
    right, wrong = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])
    logits = torch.stack([right, wrong, right, right, wrong, right]).unsqueeze(1)  # 6 samples of one image
    votes = vote_curve(logits, torch.tensor([0]), [1, 3])
    found = votes.set_index(["rule", "num_samples"])["accuracy"]
    assert found["majority", 1] == found["worst_of_n", 1] == pytest.approx(400 / 6)
    assert (found["majority", 3], found["worst_of_n", 3]) == (100, 0)
    assert votes.loc[0, ["low", "high"]].tolist() == pytest.approx(
        [100 * end for end in wilson_interval(4 / 6, 1)]
    )
    with pytest.raises(ValueError, match="a vote takes 1 to 6 samples here"):
        vote_curve(logits, torch.tensor([0]), [7])


# quality


NONE = Transform("none")
CLEAN = IMAGES * 0.5 + 0.2  # mean 0.45
SHADES = torch.tensor([0, 0, 0, 0, 1, 1])


def quality(shift, shown=CLEAN, transform=NONE, threshold=0.5, **options):
    pipeline = make_pipeline(transform, shifted(shift))
    # class 1 where an image is brighter on average than the threshold
    bright = By(lambda x: torch.stack([torch.full((len(x),), threshold), x.mean(dim=(1, 2, 3))], dim=1))
    classifiers = {"other": bright}
    return purification_quality(
        pipeline, shown, CLEAN, SHADES, classifiers=classifiers, max_batch=4, **options
    )


def test_psnr_follows_from_a_known_error_ssim_falls_with_noise_and_both_are_means_over_images():
    """An error of 0.1 everywhere is 20 dB; the mean is not that of the mean error."""
    assert [quality(shift)["psnr"] for shift in (0.2, 0.02)] == pytest.approx([20.0, 40.0], abs=1e-2)
    shown = torch.cat([CLEAN[:3] + 0.1, CLEAN[3:] + 0.01])
    assert quality(0.0, shown)["psnr"] == pytest.approx(30.0, abs=1e-3)
    noise = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(1))
    mild, harsh = (quality(0.0, (CLEAN + size * noise).clamp(0, 1))["ssim"] for size in (0.02, 0.2))
    assert harsh < mild < quality(0.0)["ssim"] == pytest.approx(1.0, abs=1e-5)
    results = [quality(0.0, transform=replace(RT2, grid_size=4), seed=seed)["psnr"] for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_classifiers_see_the_purified_image_also_beyond_the_range():
    """A clip would hide from the classifier what the attack was made against."""
    dark, bright = quality(0.0), quality(0.4)
    low, high = wilson_interval(4, 6)
    assert [dark[name] for name in ("other", "other_low", "other_high")] == pytest.approx(
        [400 / 6, 100 * low, 100 * high]
    )
    assert bright["other"] == pytest.approx(200 / 6)
    shown = torch.zeros_like(CLEAN)
    shown[:, 0] = 0.6  # purified: 0.6 + 1.1, 1.1, 1.1 in place of 1, 1, 1
    assert quality(2.2, shown, threshold=1.2)["other"] == pytest.approx(200 / 6), "class 1 for all"
