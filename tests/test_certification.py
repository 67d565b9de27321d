"""The certificate meets the linear classifier's known radius; its bound covers; what certifies nothing is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, binomtest, norm
from torch import nn

from atoplib.certification import (
    Certificates,
    NoisyInput,
    SmoothingSettings,
    certified_accuracy,
    certify,
    count_votes,
    input_noise,
    lower_bound,
)
from atoplib.pipeline import AToPPipeline, AveragedPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import reseed, wilson_interval

SIGMA = 0.25


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Class 1 where w . x > b; smoothed it is the same, with the radius |w . x - b| / |w| exactly (Cohen, appendix B)."""

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
    middle = torch.full((len(radii), 3, 4, 4), 0.5)
    return middle + torch.tensor(radii).view(-1, 1, 1, 1) * model.weight / model.weight.norm()


class Identity(nn.Module):
    """A purifier that hands on what it sees."""

    def forward(self, given):
        return given[:, :3]


def pipeline_of(name="rt2", noise_std=SIGMA, classifier=None, **settings):
    transform = TransformSettings(name, noise_std=noise_std, grid_size=4, **settings)
    return AToPPipeline(transform, Identity(), classifier or Linear()).eval()


SETTINGS = SmoothingSettings(noise_std=SIGMA, n0=20, n=200, max_batch=1000)


# Clopper-Pearson


@pytest.mark.parametrize("trials", [1, 10, 1000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_the_bound_is_that_of_two_independent_implementations(trials, alpha):
    successes = np.unique([0, 1, trials // 2, trials - 1, trials])
    found = lower_bound(successes, trials, alpha)
    for count, bound in zip(successes, found, strict=True):
        exact = binomtest(int(count), trials, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        assert bound == pytest.approx(exact, abs=1e-9)
        if count:
            assert bound == pytest.approx(beta.ppf(alpha, count, trials - count + 1), abs=1e-9)
            assert binom.sf(count - 1, trials, bound) == pytest.approx(alpha, rel=1e-6)
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("share", [0.03, 0.4, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("trials", [20, 500])
def test_the_bound_exceeds_the_true_share_with_probability_alpha_at_most(trials, share):
    alpha = 0.05
    counts = np.arange(trials + 1)
    above = lower_bound(counts, trials, alpha) > share
    assert binom.pmf(counts, trials, share)[above].sum() <= alpha + 1e-12


@pytest.mark.parametrize("successes, trials, alpha", [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (2, 5, 0.0), (2, 5, 1.0)])
def test_an_impossible_bound_is_refused(successes, trials, alpha):
    with pytest.raises(ValueError, match="must lie in"):
        lower_bound(successes, trials, alpha)


# the closed form


RADII = [-0.6, -0.3, -0.1, 0.05, 0.2, 0.4]


def test_the_radius_of_a_linear_classifier_is_approached_from_below():
    model = Linear()
    images = images_at(RADII, model)
    exact = model.margin(images).abs().double()
    torch.testing.assert_close(exact, torch.tensor(RADII).abs().double(), atol=1e-5, rtol=0)
    gaps = []
    for n in (100, 10_000):
        found = certify(NoisyInput(model, SIGMA, seed=3).eval(), images, replace(SETTINGS, n=n, max_batch=4000))
        assert found.classes.tolist() == [0, 0, 0, 1, 1, 1]
        assert (found.radii <= exact).all()
        gaps.append(exact - found.radii)
    assert not found.abstained.any()
    assert (gaps[1] < 0.25 * gaps[0]).all()
    probability = norm.cdf(exact / SIGMA)
    spread = 4.5 * SIGMA * np.sqrt(probability * (1 - probability) / 10_000) / norm.pdf(exact / SIGMA)
    assert (gaps[1].numpy() < 1.6 * spread + 1e-3).all(), "the radius stays further below than the draws explain"


def test_the_radius_exceeds_the_true_one_in_a_share_alpha_of_repetitions_at_most():
    model, alpha = Linear(), 0.1
    images = images_at([0.15], model).expand(2000, 3, 4, 4)
    found = certify(NoisyInput(model, SIGMA).eval(), images, replace(SETTINGS, n=60, alpha=alpha, max_batch=4000))
    beyond = int((found.radii > 0.15).sum())
    assert binomtest(beyond, 2000, alpha, alternative="greater").pvalue > 1e-3
    assert beyond > 0.2 * alpha * 2000, "the bound is far from tight: alpha is not used"


def test_all_draws_right_certify_the_most_that_so_many_draws_can():
    model = Linear()
    found = certify(NoisyInput(model, SIGMA).eval(), images_at([5.0], model).clamp(0, 1), replace(SETTINGS, n=1000))
    assert found.radii.item() == pytest.approx(SIGMA * norm.ppf(0.001 ** (1 / 1000)))
    assert found.radii.item() == pytest.approx(2.46 * SIGMA, abs=0.01 * SIGMA)


def test_on_the_boundary_the_model_abstains():
    model = Linear()
    found = certify(NoisyInput(model, SIGMA).eval(), images_at([0.0] * 200, model), replace(SETTINGS, alpha=0.01))
    assert found.abstained.float().mean() > 0.97
    assert (found.radii[found.abstained] == 0).all() and (found.radii[~found.abstained] > 0).all()


# the pipeline


def test_noise_of_rt2_comes_first_and_clip_and_mask_after_it():
    pipeline = pipeline_of("rt2", missing_rate=0.25)
    images = torch.rand(6, 3, 16, 16, generator=seeded())
    draw = pipeline.draw(images)
    expected = (images + draw.noise).clamp(0, 1) * (1 - draw.masks[0]) + 0.5 * draw.masks[0]
    torch.testing.assert_close(pipeline.purify(images, draw), expected)


def test_noise_of_rt3_is_one_for_all_masked_copies():
    pipeline = pipeline_of("rt3")
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    draw = pipeline.draw(images)
    seen = []
    pipeline.purifier.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    pipeline.purify(images, draw)
    copies = seen[0].unflatten(0, (4, 2))
    noisy = (images + draw.noise).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(copies[:, :, :3], noisy * (1 - copies[:, :, 4:]))


@pytest.mark.parametrize("name", ["rt2", "rt3"])
def test_noise_is_normal_with_sigma_and_independent_between_draws_pixels_and_masks(name):
    pipeline = pipeline_of(name)
    images = torch.full((400, 3, 8, 8), 0.5)
    first, second = pipeline.draw(images), pipeline.draw(images)
    noise = first.noise
    assert noise.std().item() == pytest.approx(SIGMA, rel=0.01) and abs(noise.mean().item()) < 0.01 * SIGMA * 3
    assert abs((noise > SIGMA).float().mean().item() - norm.sf(1)) < 0.005
    masked = (noise * first.masks[0]).mean().item()
    for other in (second.noise, noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 3)):
        assert abs((noise * other).mean().item()) < 4 * SIGMA**2 / math.sqrt(noise.numel())
    assert abs(masked) < 4 * SIGMA / math.sqrt(noise.numel())


@pytest.mark.parametrize("name, settings", [("rt2", {"missing_rate": 0.0}), ("rt2", {"missing_rate": 0.5}), ("rt3", {})])
def test_the_certificate_of_a_pipeline_is_that_of_its_probabilities(name, settings):
    """Against a count of our own over many draws; the true radius of such a model is at least sigma * Phi^-1(p)."""
    pipeline = pipeline_of(name, **settings)
    model = pipeline.classifier
    if name == "rt3":  # g's filled-in pixels must tell something of the image
        pipeline.purifier = nn.Conv2d(5, 3, 3, padding=1, bias=False).eval()
    images = images_at([0.6, -0.6, 0.3], model).clamp(0, 1)
    with torch.no_grad():
        classes = torch.cat([pipeline(images.repeat(500, 1, 1, 1)).argmax(dim=1) for _ in range(4)])
    share = (classes.view(2000, 3) == 1).double().mean(dim=0).numpy()
    top = np.maximum(share, 1 - share)
    found = certify(pipeline, images, replace(SETTINGS, n=2000))
    assert found.classes.tolist() == (share > 0.5).astype(int).tolist()
    assert (top > 0.6).all()
    low = top - 8 * np.sqrt(top * (1 - top) / 2000) - 0.008
    assert (found.radii.numpy() >= SIGMA * norm.ppf(np.maximum(low, 0.5))).all()
    assert (found.radii.numpy() < SIGMA * norm.ppf(np.minimum(0.9999, top + 0.01))).all()


@pytest.mark.parametrize("max_batch", [1, 7, 64, 1000])
def test_draws_and_images_share_batches_no_larger_than_asked_and_every_draw_counts(max_batch):
    model = NoisyInput(Linear(), SIGMA).eval()
    sizes = []
    model.register_forward_pre_hook(lambda _model, given: sizes.append(len(given[0])))
    images = images_at(RADII, model.classifier)
    votes = count_votes(model, images, 9, max_batch=max_batch)
    assert votes.shape == (6, 2) and (votes.sum(dim=1) == 9).all() and votes[0, 0] > 7 and votes[5, 1] > 7
    assert max(sizes) <= max_batch and sum(sizes) == 54
    sizes.clear()
    certify(model, images, replace(SETTINGS, n0=5, n=20, max_batch=max_batch, stop_hopeless=False))
    assert max(sizes) <= max_batch and sum(sizes) == 6 * 25


def test_an_image_without_hope_is_left_and_its_result_is_the_same():
    images = images_at([0.0, 0.01, 0.5, -0.6], Linear())  # the first two lie next to the boundary
    results, cost = [], []
    for stop in (True, False):
        model = NoisyInput(Linear(), SIGMA, seed=1).eval()
        seen = []
        model.register_forward_pre_hook(lambda _model, given, seen=seen: seen.append(len(given[0])))
        results.append(certify(model, images, replace(SETTINGS, n=400, max_batch=8, stop_hopeless=stop)))
        cost.append(sum(seen))
    assert results[0].abstained.tolist() == results[1].abstained.tolist() == [True, True, False, False]
    assert results[0].classes[2:].tolist() == results[1].classes[2:].tolist() == [1, 0]
    assert cost[1] == 4 * 420 and cost[0] < 0.95 * cost[1]


class Scripted(nn.Module):
    """An image of grey value k / 100 is given class 1 in its first k draws, then class 0."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, images):
        rows = []
        for value in (100 * images[:, 0, 0, 0]).round().tolist():
            self.seen[value] = self.seen.get(value, 0) + 1
            rows.append([0.0, 1.0] if self.seen[value] <= value else [1.0, 0.0])
        return torch.tensor(rows)


class ScriptedNoise(NoisyInput):
    def forward(self, images):
        return self.classifier(images)


@pytest.mark.parametrize("max_batch", [3, 50])
def test_an_image_is_left_only_where_no_rest_of_its_draws_could_certify_it(max_batch):
    fewest = int(next(k for k in range(51) if lower_bound(k, 50, 0.001) > 0.5))
    values = [10 + fewest - 1, 10 + fewest, 10 + fewest + 1]  # the first ten choose the class
    images = torch.tensor(values).div(100).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    model = ScriptedNoise(Scripted(), SIGMA).eval()
    found = certify(model, images, SmoothingSettings(SIGMA, n0=10, n=50, max_batch=max_batch))
    assert found.abstained.tolist() == [True, False, False]
    expected = [SIGMA * norm.ppf(lower_bound(count, 50, 0.001)) for count in (fewest, fewest + 1)]
    assert found.radii[1:].tolist() == pytest.approx(expected)


def test_the_same_seed_gives_the_same_certificates_and_spares_the_global_generator():
    pipeline = pipeline_of()
    images = images_at(RADII, pipeline.classifier)
    before = torch.get_rng_state()
    results = []
    for seed in (4, 4, 5):
        reseed(pipeline, seed)
        results.append(certify(pipeline, images, SETTINGS))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0].radii, results[1].radii) and not torch.equal(results[0].radii, results[2].radii)


def test_progress_counts_the_draws_up_to_the_last():
    calls = []
    model = NoisyInput(Linear(), SIGMA, seed=1).eval()
    certify(
        model,
        images_at([0.0, 0.5], model.classifier),
        replace(SETTINGS, max_batch=20),
        progress=lambda *call: calls.append(call),
    )
    done = [call[0] for call in calls]
    assert done == sorted(set(done)) and done[-1] == 200
    assert {call[1:3] for call in calls} == {(200, "draws")}
    assert calls[-1][3] == {"certifiable": 0.5}


# certified accuracy


def certificates_of(classes, radii):
    radii = torch.tensor(radii, dtype=torch.float64)
    return Certificates(torch.tensor(classes), radii, radii == 0)


def test_certified_accuracy_counts_right_images_whose_radius_is_larger():
    certificates = certificates_of([1, 1, 0, 2, 2], [0.5, 0.0, 0.9, 0.2, 0.7])
    points = certified_accuracy(certificates, torch.tensor([1, 1, 1, 2, 2]), [0.0, 0.2, 0.5, 0.69, 0.8])
    assert [point.accuracy for point in points] == [3 / 5, 2 / 5, 1 / 5, 1 / 5, 0.0]
    assert [point.radius for point in points] == [0.0, 0.2, 0.5, 0.69, 0.8]
    assert [(point.low, point.high) for point in points] == [wilson_interval(k, 5) for k in (3, 2, 1, 1, 0)]


@pytest.mark.parametrize("labels, radii", [([1], [0.1]), ([1, 0], []), ([1, 0], [-0.1]), ([1, 0], [float("nan")])], ids=str)
def test_a_curve_that_cannot_be_counted_is_refused(labels, radii, without_shape_checks):
    with pytest.raises(ValueError, match="must|give one each"):
        certified_accuracy(certificates_of([1, 0], [0.1, 0.2]), torch.tensor(labels), radii)


# what certifies nothing


@pytest.mark.parametrize(
    "values, message",
    [
        ({"noise_std": 0.0}, "noise_std must be above 0"),
        ({"noise_std": float("nan")}, "noise_std must be above 0"),
        ({"n0": 0}, "n0 must be at least 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"alpha": 0.5}, "alpha must lie"),
        ({"alpha": 0.0}, "alpha must lie"),
        ({"n": 9}, "n must be at least 10"),
    ],
)
def test_settings_that_certify_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SmoothingSettings(**{"noise_std": SIGMA, **values})


def test_the_fewest_draws_that_the_settings_allow_can_certify():
    for alpha in (0.001, 0.05, 0.124):
        fewest = next(n for n in range(1, 100) if lower_bound(n, n, alpha) > 0.5)
        SmoothingSettings(SIGMA, n=fewest, alpha=alpha)
        with pytest.raises(ValueError, match=f"at least {fewest}$"):
            SmoothingSettings(SIGMA, n=max(1, fewest - 1), alpha=alpha)


@pytest.mark.parametrize(
    "model, message",
    [
        (pipeline_of("rt1"), "only rt2 and rt3"),
        (pipeline_of("none"), "only rt2 and rt3"),
        (pipeline_of("rt2", noise_std=0.0), "only rt2 and rt3"),
        (pipeline_of("rt2", noise_std=0.2), "the settings say 0.25"),
        (Linear().eval(), "does not say how much noise"),
        (nn.Sequential(pipeline_of()).eval(), "does not say how much noise"),
        (NoisyInput(Linear(), 0.1).eval(), "the settings say 0.25"),
        (NoisyInput(Linear(), SIGMA), "train mode"),
        (pipeline_of().train(), "train mode"),
        (NoisyInput(nn.Sequential(Linear(), nn.Threshold(0.0, math.nan)), SIGMA).eval(), "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_model_that_cannot_be_certified_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        certify(model, images_at(RADII, Linear()), SETTINGS)


def test_fixed_draws_are_refused_and_leave_the_pipeline_certifiable():
    pipeline = pipeline_of()
    images = images_at(RADII, pipeline.classifier)
    with pipeline.fixed_draws(0), pytest.raises(ValueError, match="draws are fixed"):
        certify(pipeline, images, SETTINGS)
    certify(pipeline, images, SETTINGS)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 4, 4) + 1, torch.full((2, 3, 4, 4), math.nan), torch.rand(0, 3, 4, 4)])
def test_images_outside_0_and_1_and_none_at_all_are_refused(images):
    with pytest.raises(ValueError, match="images"):
        certify(pipeline_of(), images, SETTINGS)


def test_noise_must_be_above_0():
    assert input_noise(pipeline_of("rt3", noise_std=0.4)) == 0.4
    with pytest.raises(ValueError, match="must be above 0"):
        NoisyInput(Linear(), 0.0)


@pytest.mark.parametrize("average", ["images", "logits"])
def test_a_pipeline_that_averages_k_draws_is_certified_with_a_kth_of_the_noise_s_energy(average):
    """It reads k noises, and so k times a perturbation, which together is sqrt(k) times as long."""
    plain = pipeline_of()
    averaged = AveragedPipeline(plain.transform, plain.purifier, plain.classifier, copies=4, average=average).eval()
    assert input_noise(averaged) == pytest.approx(input_noise(plain) / 2)
