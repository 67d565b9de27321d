"""PSNR and SSIM against their definitions, and readers of purified images counted."""

import pytest
import torch
from torch import nn

from atoplib.evaluation import purification_quality
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import wilson_interval


class Brighter(nn.Module):
    """A purifier that adds a constant, on the scale [-1, 1]."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, given):
        return given[:, :3] + self.shift


class Threshold(nn.Module):
    """Class 1 where the image is brighter than 0.5 on average."""

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


class Above(nn.Module):
    """Class 1 where the image is brighter than a value that no picture has."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return torch.stack([torch.full((len(images),), self.value), images.mean(dim=(1, 2, 3))], dim=1)


def pipeline(shift):
    return AToPPipeline(TransformSettings("none"), Brighter(shift), Threshold()).eval()


CLEAN = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2  # mean 0.45
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])


def quality(shift, shown=CLEAN):
    return purification_quality(pipeline(shift), shown, CLEAN, LABELS, readers={"threshold": Threshold()}, max_batch=4)


def test_psnr_follows_from_a_known_error():
    """An error of 0.1 everywhere is 20 dB."""
    assert quality(0.2).psnr == pytest.approx(20.0, abs=1e-3)
    assert quality(0.02).psnr == pytest.approx(40.0, abs=1e-2)


def test_psnr_is_the_mean_over_images_and_not_that_of_the_mean_error():
    shown = CLEAN.clone()
    shown[:3] += 0.1
    shown[3:] += 0.01
    assert quality(0.0, shown).psnr == pytest.approx(30.0, abs=1e-3)


def test_ssim_of_equal_images_is_one_and_falls_with_noise():
    noise = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(1))
    mild, harsh = (quality(0.0, (CLEAN + size * noise).clamp(0, 1)).ssim for size in (0.02, 0.2))
    assert quality(0.0).ssim == pytest.approx(1.0, abs=1e-5)
    assert harsh < mild < 1


def test_readers_read_the_purified_image():
    dark, bright = quality(0.0).accuracy["threshold"], quality(0.4).accuracy["threshold"]
    assert dark == (4 / 6, *wilson_interval(4, 6)) and bright == (2 / 6, *wilson_interval(2, 6))


def test_readers_read_what_the_pipeline_hands_to_its_classifier_also_beyond_the_range():
    """A clip would hide from the reader what the attack was made against."""
    shown = torch.zeros_like(CLEAN)
    shown[:, 0] = 0.6  # purified: 0.6 + 1.1, 1.1, 1.1 in place of 1, 1, 1
    read = purification_quality(pipeline(2.2), shown, CLEAN, LABELS, readers={"sum": Above(1.2)}).accuracy["sum"]
    assert read[0] == 2 / 6, "class 1 for all"


def test_the_draw_follows_from_the_seed():
    random = AToPPipeline(TransformSettings("rt2", 0.25, 0.2, grid_size=4), Brighter(0.0), Threshold()).eval()
    results = [purification_quality(random, CLEAN, CLEAN, LABELS, readers={}, seed=seed).psnr for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_images_of_other_shapes_are_refused(without_shape_checks):
    with pytest.raises(ValueError, match="differ in shape"):
        quality(0.0, CLEAN[:3])
