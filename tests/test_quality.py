"""Quality of purification: PSNR and SSIM follow from known errors, the distance from a known perturbation."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from atoplib.decisions import RULES, wilson_interval
from atoplib.evaluation import Evaluation, compare_attacks, compare_defences, masked_gradients, mcnemar
from atoplib.evaluation.quality import purification_quality, purified_distance
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


# quality


NONE = Transform("none")
CLEAN = IMAGES * 0.5 + 0.2  # mean 0.45
SHADES = torch.tensor([0, 0, 0, 0, 1, 1])


def quality(shift, shown=CLEAN, transform=NONE, threshold=0.5, **options):
    pipeline = make_pipeline(transform, shifted(shift))
    # class 1 where an image is brighter on average than the threshold
    bright = By(lambda x: torch.stack([torch.full((len(x),), threshold), x.mean(dim=(1, 2, 3))], dim=1))
    return purification_quality(
        pipeline, shown, CLEAN, SHADES, classifiers={"other": bright}, max_batch=4, **options
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


def remaining(broken: range) -> np.ndarray:
    right = np.ones(128, dtype=bool)
    right[list(broken)] = False
    return right


def outcome(right, attack="PGD", threat_model="white-box", norm="linf", defence="a") -> pd.DataFrame:
    """What became of each image, by every rule the same."""
    what = {"defence": defence, "attack": attack, "threat_model": threat_model, "norm": norm, "eps": 0.1}
    by_rule = dict.fromkeys(RULES, np.array(right, dtype=bool))
    return pd.DataFrame({**what, "image": range(len(right)), **by_rule})


def evaluation(*outcomes, **facts) -> Evaluation:
    return Evaluation(pd.concat(outcomes, ignore_index=True), np.zeros(len(outcomes[0])), facts)


def test_five_images_more_are_significant_and_four_may_be_chance():
    """0.5^5 < 0.05 < 0.5^4."""
    found = compare_attacks(
        {"ours": remaining(range(0)), "five": remaining(range(5)), "four": remaining(range(4))}, "ours"
    )
    assert found.p.tolist() == pytest.approx([1 / 32, 1 / 16]) and found.significant.tolist() == [True, False]
    assert found.attack.tolist() == ["five", "four"] and found.remaining.tolist() == [123, 124]


def test_only_images_on_which_the_two_differ_count():
    few, many = remaining(range(10)), remaining(range(5, 40))
    assert mcnemar(few, many, alternative="less") == (30, 5, pytest.approx(1, abs=0.01))
    assert mcnemar(many, few, alternative="less")[2] < 0.01
    assert mcnemar(few, few) == mcnemar(few, few, alternative="less") == (0, 0, 1)
    one, other = [1] * 8 + [0] * 2 + [1] * 90, [0] * 8 + [1] * 2 + [1] * 90
    p = pytest.approx(2 * (1 + 10 + 45) / 2**10)  # 2 or fewer of 10, to either side
    assert mcnemar(one, other) == (8, 2, p) and mcnemar(other, one) == (2, 8, p)


def test_a_defence_is_paired_with_every_other_under_every_attack_that_both_met():
    found = compare_defences(
        evaluation(
            outcome([1, 1], "x", defence="AToP"),
            outcome([1, 0], "y", defence="AToP"),
            outcome([0, 1], "x", defence="AT"),
            outcome([0, 0], "y", defence="AP"),
        ),
        "AToP",
    )
    assert found[["attack", "other", "only_first", "only_other"]].values.tolist() == [
        ["x", "AT", 1, 0],
        ["y", "AP", 1, 0],
    ]
    with pytest.raises(ValueError, match="first must be one of a, got 'AToPP'"):
        compare_defences(evaluation(outcome([1])), "AToPP")


def test_a_weaker_attack_that_wins_is_told():
    ours, square = outcome([1] * 20), outcome([0] * 6 + [1] * 14, "Square")
    flow = outcome([0] * 20, "flow", norm="flow")
    (sentence,) = masked_gradients(evaluation(ours, square, flow, gradient_free=["Square"]))
    assert (
        sentence.startswith("a: Square breaks 6 images that the white-box attacks miss")
        and "p 0.016" in sentence
    )
    assert masked_gradients(evaluation(ours, outcome([0] * 4 + [1] * 16, "T", "transfer"))) == []
    assert len(masked_gradients(evaluation(ours, outcome([0] * 6 + [1] * 14, "T", "transfer")))) == 1
    known, strong = outcome([0] * 20, "fixed", "known sample"), outcome([0] * 20, "strong")
    assert len(masked_gradients(evaluation(ours, square, known, gradient_free=["Square"]))) == 1
    assert masked_gradients(evaluation(strong, square, gradient_free=["Square"])) == []
