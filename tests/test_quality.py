"""Quality of purification: PSNR and SSIM follow from known errors, the distance from a known perturbation."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.decisions import wilson_interval
from atoplib.evaluation.quality import purification_quality, purified_distance, vote_curve
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

RT2 = Transform("rt2", missing_rate=0.25, noise_std=0.2)
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))


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
