"""The certificate meets the linear classifier's known radius; its bound covers; what certifies nothing is
refused."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, norm
from test_attacks import seeded
from torch import nn
from zoo import Visible

from atoplib.certification import (
    Certificates,
    NoisyInput,
    certified_accuracy,
    certify,
    input_noise,
    lower_bound,
)
from atoplib.decisions import fixed_sample, wilson_interval
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

SIGMA = 0.25
FEW = {"n0": 20, "n": 200, "max_batch": 1000}
RADII = [-0.6, -0.3, -0.1, 0.05, 0.2, 0.4]


class Linear(nn.Module):
    """Class 1 where w . x > b; smoothed it is the same, with the radius |w . x - b| / |w| exactly (Cohen,
    appendix B)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 4, 4, generator=seeded(1))
        self.bias = float(self.weight.sum() / 2)

    def margin(self, images):
        return ((images * self.weight).flatten(1).sum(dim=1) - self.bias) / self.weight.norm()

    def forward(self, images):
        margin = self.margin(images)
        return torch.stack([-margin, margin], dim=1)


def images_at(radii, model):
    """Images whose exact radius is given; the sign is the side."""
    return 0.5 + torch.tensor(radii).view(-1, 1, 1, 1) * model.weight / model.weight.norm()


def pipeline_of(name="rt2", noise_std=SIGMA, **settings):
    return AToPPipeline(
        Transform(name, noise_std=noise_std, grid_size=4, **settings), Visible(), Linear().eval()
    ).eval()


def noisy(seed=0, noise_std=SIGMA):
    return NoisyInput(Linear().eval(), noise_std, seed=seed)


# Clopper-Pearson


@pytest.mark.parametrize("trials", [1, 10, 1000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_the_bound_is_that_of_an_independent_implementation(trials, alpha):
    successes = np.unique([0, 1, trials // 2, trials - 1, trials])
    exact = [
        binomtest(int(count), trials, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        for count in successes
    ]
    assert lower_bound(successes, trials, alpha) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("share", [0.03, 0.4, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("trials", [20, 500])
def test_the_bound_exceeds_the_true_share_with_probability_alpha_at_most(trials, share):
    counts = np.arange(trials + 1)
    assert binom.pmf(counts, trials, share)[lower_bound(counts, trials, 0.05) > share].sum() <= 0.05 + 1e-12


# the closed form


def test_the_radius_of_a_linear_classifier_is_approached_from_below():
    model = Linear()
    images = images_at(RADII, model)
    exact = model.margin(images).abs().double()
    gaps = []
    for n in (100, 10_000):
        found = certify(noisy(), images, n0=20, n=n, max_batch=4000, seed=3)
        assert found.classes.tolist() == [0, 0, 0, 1, 1, 1]
        assert (found.radii <= exact).all()
        gaps.append(exact - found.radii)
    assert (found.radii > 0).all()
    assert (gaps[1] < 0.25 * gaps[0]).all()
    probability = norm.cdf(exact / SIGMA)
    spread = 4.5 * SIGMA * np.sqrt(probability * (1 - probability) / 10_000) / norm.pdf(exact / SIGMA)
    assert (gaps[1].numpy() < 1.6 * spread + 1e-3).all(), (
        "the radius stays further below than the samples explain"
    )


def test_the_radius_exceeds_the_true_one_in_a_share_alpha_of_repetitions_at_most():
    alpha = 0.1
    images = images_at([0.15], Linear()).expand(2000, 3, 4, 4)
    beyond = int((certify(noisy(), images, n0=20, n=60, alpha=alpha, max_batch=4000).radii > 0.15).sum())
    assert binomtest(beyond, 2000, alpha, alternative="greater").pvalue > 1e-3
    assert beyond > 0.2 * alpha * 2000, "the bound is far from tight: alpha is not used"


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.124])
def test_all_samples_correct_certify_the_most_that_so_many_samples_can(alpha):
    images = images_at([5.0], Linear()).clamp(0, 1)
    found = certify(noisy(), images, n0=20, n=1000, alpha=alpha)
    assert found.radii.item() == pytest.approx(SIGMA * norm.ppf(alpha ** (1 / 1000)))
    fewest = next(n for n in range(1, 100) if lower_bound(n, n, alpha) > 0.5)
    assert (certify(noisy(), images, n=fewest, alpha=alpha).radii > 0).all()
    with pytest.raises(ValueError, match=f"n at least {fewest} "):
        certify(noisy(), images, n=max(1, fewest - 1), alpha=alpha)


def test_on_the_boundary_the_model_abstains():
    found = certify(noisy(), images_at([0.0] * 200, Linear()), **FEW, alpha=0.01)
    assert (found.radii == 0).float().mean() > 0.97


# the pipeline


@pytest.mark.parametrize(
    "name, settings", [("rt2", {"missing_rate": 0.0}), ("rt2", {"missing_rate": 0.5}), ("rt3", {})]
)
def test_the_certificate_of_a_pipeline_is_that_of_its_probabilities(name, settings):
    """Against a count of our own over many samples; the true radius of such a model is at least sigma *
    Phi^-1(p)."""
    pipeline = pipeline_of(name, **settings)
    if name == "rt3":  # g's filled-in pixels must tell something of the image
        pipeline.purifier = nn.Conv2d(5, 3, 3, padding=1, bias=False).eval()
    images = images_at([0.6, -0.6, 0.3], Linear()).clamp(0, 1)
    with torch.no_grad():
        classes = torch.cat([pipeline(images.repeat(500, 1, 1, 1)).argmax(dim=1) for _ in range(4)])
    share = (classes.view(2000, 3) == 1).double().mean(dim=0).numpy()
    top = np.maximum(share, 1 - share)
    found = certify(pipeline, images, n0=20, n=2000, max_batch=1000, seed=1)
    assert found.classes.tolist() == (share > 0.5).astype(int).tolist()
    low = top - 8 * np.sqrt(top * (1 - top) / 2000) - 0.008
    assert (found.radii.numpy() >= SIGMA * norm.ppf(np.maximum(low, 0.5))).all()
    assert (found.radii.numpy() < SIGMA * norm.ppf(np.minimum(0.9999, top + 0.01))).all()


@pytest.mark.parametrize("average", ["images", "logits"])
def test_a_pipeline_that_averages_k_samples_is_certified_with_a_kth_of_the_noise_s_energy(average):
    """It gets k noises, and so k times a perturbation, which together is sqrt(k) times as long."""
    plain = pipeline_of()
    averaged = AToPPipeline(
        plain.transform, plain.purifier, plain.classifier, copies=4, average=average
    ).eval()
    assert input_noise(averaged) == pytest.approx(input_noise(plain) / 2)


# samples


class Scripted(NoisyInput):
    """An image of grey value k / 100 is given class 1 in its first k samples, then class 0."""

    def reseed(self, seed):
        self.passes = {}

    def forward(self, images):
        rows = []
        for value in (100 * images[:, 0, 0, 0]).round().tolist():
            self.passes[value] = self.passes.get(value, 0) + 1
            rows.append([0.0, 2.0] if self.passes[value] <= value else [2.0, 0.0])
        return torch.tensor(rows)


@pytest.mark.parametrize("max_batch", [3, 50])
def test_an_image_is_left_only_where_no_rest_of_its_samples_could_certify_it(max_batch):
    fewest = int(next(k for k in range(51) if lower_bound(k, 50, 0.001) > 0.5))
    values = [15, 10 + fewest - 1, 10 + fewest, 10 + fewest + 1]  # the first ten choose the class
    images = torch.tensor(values).div(100).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    model = Scripted(Linear().eval(), SIGMA)
    found = certify(model, images, n0=10, n=50, max_batch=max_batch)
    assert (found.radii == 0).tolist() == [True, True, False, False]
    expected = [SIGMA * norm.ppf(lower_bound(count, 50, 0.001)) for count in (fewest, fewest + 1)]
    assert found.radii[2:].tolist() == pytest.approx(expected)
    assert model.passes[15] < 60


def test_the_same_seed_gives_the_same_certificates_and_progress_ends_at_the_last_sample():
    pipeline, calls = pipeline_of(), []
    images = images_at(RADII, pipeline.classifier)
    before = torch.get_rng_state()
    first, again, other = (
        certify(pipeline, images, **FEW, seed=seed, progress=lambda *call: calls.append(call))
        for seed in (4, 4, 5)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.radii, again.radii) and not torch.equal(first.radii, other.radii)
    assert calls[-1][:3] == (200, 200, "samples") and 0 <= calls[-1][3]["certifiable"] <= 1


# certified accuracy


def test_certified_accuracy_counts_correct_images_whose_radius_is_larger(without_shape_checks):
    radii = torch.tensor([0.5, 0.0, 0.9, 0.2, 0.7], dtype=torch.float64)
    certificates = Certificates(torch.tensor([1, 1, 0, 2, 2]), radii)
    frame = certified_accuracy(certificates, torch.tensor([1, 1, 1, 2, 2]), [0.0, 0.2, 0.5, 0.69, 0.8])
    assert frame["accuracy"].tolist() == pytest.approx([60, 40, 20, 20, 0])
    expected = [tuple(100 * end for end in wilson_interval(k, 5)) for k in (3, 2, 1, 1, 0)]
    assert list(zip(frame["low"], frame["high"], strict=True)) == expected
    for wrong in ((torch.tensor([1]), [0.5]), (torch.ones(5), [-1.0]), (torch.ones(5), [float("nan")])):
        with pytest.raises(ValueError, match="one label for each of 5 certificates, and radii of at least 0"):
            certified_accuracy(certificates, *wrong)


# what certifies nothing


@pytest.mark.parametrize(
    "name, value", [("n0", 0), ("n", 0), ("n", 9), ("max_batch", 0), ("alpha", 0.5), ("alpha", 0.0)]
)
def test_numbers_that_certify_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=r"must .* samples certify nothing"):
        certify(noisy(), images_at(RADII, Linear()), **{name: value})


@pytest.mark.parametrize(
    "model, message",
    [
        (pipeline_of("rt1"), "rt2 or rt3 and noise_std above 0"),
        (pipeline_of("none"), "rt2 or rt3 and noise_std above 0"),
        (pipeline_of("rt2", noise_std=0.0), "rt2 or rt3 and noise_std above 0"),
        (Linear().eval(), "does not say how much noise"),
        (nn.Sequential(pipeline_of()).eval(), "does not say how much noise"),
        (NoisyInput(Linear(), SIGMA), "train mode"),
        (pipeline_of().train(), "train mode"),
        (NoisyInput(nn.Sequential(Linear(), nn.Threshold(0.0, math.nan)).eval(), SIGMA), "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_model_that_cannot_be_certified_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        certify(model, images_at(RADII, Linear()), **FEW)


def test_a_fixed_sample_images_outside_0_and_1_and_a_noise_of_0_are_refused():
    with pytest.raises(ValueError, match="image"):
        certify(pipeline_of(), torch.rand(2, 3, 4, 4) + 1, **FEW)
    with pytest.raises(ValueError, match="must be above 0"):
        NoisyInput(Linear(), 0.0)
    pipeline = pipeline_of()
    images = images_at(RADII, pipeline.classifier)
    with fixed_sample(pipeline, 0), pytest.raises(ValueError, match="sample is fixed"):
        certify(pipeline, images, **FEW)
    certify(pipeline, images, **FEW)
