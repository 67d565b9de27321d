"""Planted gradient masking is caught, honest models are not accused, and verdicts follow from their numbers."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from scipy.stats import binomtest, kruskal, permutation_test
from torch import nn
from torch.nn import functional as F

from atoplib.attacks import PGDSettings, ascend
from atoplib.attacks.eot import cross_entropy
from atoplib.data import load_dataset, to_float
from atoplib.masking import (
    Check,
    MaskingSettings,
    check_agreement,
    check_challenger,
    check_draws,
    check_effort,
    check_gradients,
    check_modes,
    check_unbounded,
    format_checks,
    masking_checklist,
    outcome_of,
    paired_p_value,
    smooth_margin,
    stamp,
    trustworthy,
)
from atoplib.pipeline import AToPPipeline
from atoplib.pretrained import load_pretrained
from atoplib.transforms import TransformSettings

EPS = 0.05
SETTINGS = MaskingSettings(eps=EPS, steps=6, eot_samples=4, num_draws=4, queries=20, noise_samples=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(count, seed):
    """Four coarse patterns under noise: a small network reads 94 % of them, and an attack of EPS breaks most of them."""
    patterns = F.interpolate(torch.randn(4, 3, 4, 4, generator=seeded(99)).sign(), scale_factor=2.0)
    generator = seeded(seed)
    labels = torch.randint(4, (count,), generator=generator)
    images = 0.5 + 0.05 * patterns[labels] + 0.2 * torch.randn(count, 3, 8, 8, generator=generator)
    return images.clamp(0, 1), labels


IMAGES, LABELS = task(64, seed=2)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 4),
    )


def trained(model, eps=0.0, steps=150):
    """``model`` after a few seconds of training, on attacks of ``eps`` if that is above 0."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = task(2048, seed=1)
    for _ in range(steps):
        chosen = torch.randint(2048, (128,))
        shown = images[chosen]
        if eps:
            shown = ascend(model, shown, labels[chosen], PGDSettings(eps=eps, steps=3))
        optimizer.zero_grad()
        F.cross_entropy(model(shown), labels[chosen]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plain():
    return trained(network())


@pytest.fixture(scope="module")
def hardened():
    return trained(network(), eps=0.04)


class Blur(nn.Module):
    """A purifier (B, 5, H, W) -> (B, 3, H, W): the mean over 3 x 3 pixels of what it sees."""

    def forward(self, given):
        return F.avg_pool2d(given[:, :3], 3, stride=1, padding=1, count_include_pad=False)


def pipeline_of(classifier, purifier=None, name="rt2"):
    transform = TransformSettings(name, noise_std=0.05, missing_rate=0.1, grid_size=4)
    return AToPPipeline(transform, purifier or Blur(), classifier).eval()


def names_of(checks, verdict):
    return {check.name for check in checks if check.verdict == verdict}


# planted cases


class Before(nn.Module):
    """A function of the images in front of a classifier."""

    def __init__(self, function, inner):
        super().__init__()
        self.function, self.inner = function, inner

    def forward(self, images):
        return self.inner(self.function(images))


class After(Before):
    """A function of the logits behind a classifier."""

    def forward(self, images):
        return self.function(self.inner(images))


class Detached(nn.Module):
    """A purifier whose result is cut off."""

    def forward(self, given):
        return Blur()(given).detach()


class Resized(nn.Module):
    """The image at a random smaller size and place, the rest grey: for each image, or one for the whole batch."""

    def __init__(self, inner, each):
        super().__init__()
        self.inner, self.each = inner, each

    def forward(self, images):
        batch = len(images)
        dice = torch.rand(batch if self.each else 1, 3, device=images.device).expand(batch, 3)
        scale = 1 + dice[:, 0]
        shift = (dice[:, 1:] * 2 - 1) * (scale - 1).unsqueeze(1)
        matrix = torch.zeros(batch, 2, 3)
        matrix[:, 0, 0] = matrix[:, 1, 1] = scale
        matrix[:, :, 2] = shift
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return self.inner(F.grid_sample(images - 0.5, grid, align_corners=False) + 0.5)


def blur_of_what_stays(images):
    """A residual purifier whose correction is detached: the gradient that remains is not that of the loss."""
    return images + (F.avg_pool2d(images.flip(3), 3, stride=1, padding=1) - images).detach()


def shattered(images):
    """A ripple too small to matter and steep enough to turn every gradient."""
    return images + 0.002 * torch.sin(5000 * images)


def backward_by(change, forward=lambda images: images):
    """``forward``, whose gradient becomes ``change(images, gradient)``."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images):
            ctx.save_for_backward(images)
            return forward(images).clone()

        @staticmethod
        def backward(ctx, gradient):
            return change(ctx.saved_tensors[0], gradient)

    return Changed.apply


def biased(images, gradient):
    """Beside the gradient a fixed direction, as long as itself: their cosine is 0.71."""
    direction = torch.randn(gradient.shape[1:], generator=seeded(7))
    return gradient + gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * direction / direction.norm()


def biased_off_the_images(images, gradient):
    """The same, but only where no clean image is within half of eps."""
    distance = (images[:, None] - IMAGES).abs().flatten(2).amax(dim=2).amin(dim=1)
    return torch.where((distance > EPS / 2).view(-1, 1, 1, 1), biased(images, gradient), gradient)


def with_random_signs(images, gradient):
    signs = torch.randn(gradient.shape[1:], generator=seeded(7)).sign()
    return gradient * torch.where(torch.rand(gradient.shape[1:], generator=seeded(8)) < 0.5, signs, 1.0)


class HashOffset(nn.Module):
    """Logits moved by as much as an unrelated image's differ, by a number that every bit of the image decides."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        logits = self.inner(images)
        keys = images.detach().double().flatten(1) @ torch.rand(images[0].numel(), generator=seeded(5)).double() * 1e7
        return logits + 0.3 * torch.sin(keys.unsqueeze(1) * torch.arange(1, 5)).float()


class QuietUnderAttack(nn.Module):
    """Noise on the image, much less of it where a gradient is asked for."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        noise = torch.randn(images.shape)
        return self.inner(images + (0.01 if images.requires_grad else 0.1) * noise)


class Coin(nn.Module):
    """One of two models for each image (or for the whole batch), by a fair coin."""

    def __init__(self, one, other, each=True):
        super().__init__()
        self.one, self.other, self.each = one, other, each

    def forward(self, images):
        heads = (torch.rand(len(images) if self.each else 1, 1) < 0.5).expand(len(images), 1)
        return torch.where(heads, self.one(images), self.other(images))


def not_a_number(images):
    """sqrt has no derivative at 0: the gradient becomes NaN, the value stays."""
    return images + (0 * images).sqrt()


PLANTED = {
    "rounding": (lambda inner: Before(lambda x: (x * 255).round() / 255, inner), {"gradients", "unbounded, eps 0.95"}),
    "coarse rounding": (lambda inner: Before(lambda x: (x * 8).round() / 8, inner), {"gradients", "transfer"}),
    "detached": (lambda inner: Before(torch.detach, inner), {"gradients", "finite differences", "black box", "transfer"}),
    "no_grad": (lambda inner: Before(lambda x: x, torch.no_grad()(inner.forward)), {"gradients", "black box"}),
    "partly detached": (lambda inner: Before(blur_of_what_stays, inner), {"finite differences"}),
    "shattered": (lambda inner: Before(shattered, inner), {"finite differences"}),
    "not a number": (lambda inner: Before(not_a_number, inner), {"gradients"}),
    "resized, one draw a batch": (lambda inner: Resized(inner, each=False), {"draws"}),
    "detached purifier": (lambda inner: pipeline_of(inner, Detached()), {"gradients", "straight-through", "transfer"}),
    "biased everywhere": (lambda inner: Before(backward_by(biased), inner), {"finite differences"}),
    "biased off the images": (
        lambda inner: Before(backward_by(biased_off_the_images), inner),
        {"finite differences, attacked"},
    ),
    "signs at random on half of the pixels": (
        lambda inner: Before(backward_by(with_random_signs), inner),
        {"finite differences", "finite differences, attacked"},
    ),
    "rounded, passed back with the wrong sign": (
        lambda inner: Before(backward_by(lambda _, gradient: -gradient, lambda x: (x * 255).round() / 255), inner),
        {"finite differences", "finite differences, attacked"},
    ),
    "offset by the image's hash": (HashOffset, {"finite differences"}),
    "quiet where a gradient is asked for": (QuietUnderAttack, {"same answers"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_case_is_caught(name, plain):
    plant, expected = PLANTED[name]
    checks = masking_checklist(plant(plain).eval(), IMAGES, LABELS, SETTINGS, classifier=plain)
    assert expected <= names_of(checks, "failed"), format_checks(checks)
    assert not trustworthy(checks)


def test_steps_that_are_too_small_are_caught(plain):
    """The number they would print is not that of masked gradients, but as wrong: larger steps break what they leave."""
    checks = masking_checklist(plain, IMAGES, LABELS, replace(SETTINGS, alpha=EPS / 30))
    assert "larger steps" in names_of(checks, "failed"), format_checks(checks)


def test_a_random_resize_attacked_without_eot_is_caught_and_with_eot_it_is_said_to_matter():
    model = trained(Resized(network(), each=True), steps=200)
    settings = replace(SETTINGS, eps=0.03, steps=3)
    checks = masking_checklist(model, IMAGES, LABELS, replace(settings, eot_samples=1))
    assert "EOT" in names_of(checks, "failed"), format_checks(checks)
    checks = masking_checklist(model, IMAGES, LABELS, replace(settings, eot_samples=8))
    assert trustworthy(checks), format_checks(checks)
    (line,) = [check.evidence for check in checks if check.name == "EOT"]
    assert "more than one draw matters: p < 0.0" in line or "p = 0.00" in line


# honest models


def test_honest_models_pass(plain, hardened):
    for model in (plain, hardened):
        checks = masking_checklist(model, IMAGES, LABELS, SETTINGS)
        assert trustworthy(checks), format_checks(checks)
        assert len(names_of(checks, "suspicious")) <= 1, format_checks(checks)


@pytest.mark.parametrize("name", ["none", "rt1", "rt2"])
def test_an_honest_pipeline_passes(name, plain):
    model = pipeline_of(plain, name=name)
    checks = masking_checklist(model, IMAGES, LABELS, SETTINGS)
    assert trustworthy(checks), format_checks(checks)
    assert {"transfer", "straight-through"} <= {check.name for check in checks}
    assert ({"draws", "EOT"} <= {check.name for check in checks}) == (name != "none")


def test_a_fair_coin_between_two_honest_models_is_an_honest_random_defence(plain, hardened):
    """0.1.0 ranked equal values by their order in memory, and called 69 % of such coins not trustworthy."""
    model = Coin(plain, hardened).eval()
    settings = replace(SETTINGS, steps=3, queries=5, noise_samples=1, directions=4)
    found = [masking_checklist(model, IMAGES[:16], LABELS[:16], settings, seed=seed) for seed in range(20)]
    failed = [names_of(checks, "failed") for checks in found if not trustworthy(checks)]
    assert len(failed) <= 1, failed
    assert not any("draws" in names for names in failed), failed


def test_a_coin_for_the_whole_batch_is_caught(plain, hardened):
    checks = masking_checklist(Coin(plain, hardened, each=False).eval(), IMAGES, LABELS, SETTINGS)
    assert "draws" in names_of(checks, "failed"), format_checks(checks)


@pytest.mark.parametrize("make", [lambda inner: inner, pipeline_of], ids=["deterministic", "random"])
def test_the_scale_of_the_logits_changes_no_check(make, plain):
    def checked(factor):
        model = make(After(lambda logits: logits * factor, plain)).eval()
        return masking_checklist(model, IMAGES[:16], LABELS[:16], settings)

    settings = replace(SETTINGS, steps=3, queries=5, noise_samples=1)
    expected = checked(1.0)
    for factor in (2.0**-7, 2.0**10):  # exact in floating point
        assert checked(factor) == expected
    for factor in (0.01, 1000.0):
        assert [check.verdict for check in checked(factor)] == [check.verdict for check in expected]


@pytest.mark.parametrize("defence", ["at", "atop"])
def test_the_kits_own_defences_pass(defence, tmp_path):
    test = load_dataset("mnist5k", data_dir=tmp_path, max_train=10, max_test=24).test
    model = load_pretrained("mnist", defence)
    settings = MaskingSettings(eps=0.3, steps=4, eot_samples=2, num_draws=4, queries=10, noise_samples=2)
    checks = masking_checklist(model, to_float(test.images), test.labels, settings)
    assert trustworthy(checks), format_checks(checks)


def test_the_l2_norm_is_checked_alike(plain):
    settings = replace(SETTINGS, eps=0.6, norm="l2")
    assert trustworthy(masking_checklist(plain, IMAGES, LABELS, settings))
    rounded = Before(lambda x: (x * 255).round() / 255, plain).eval()
    failed = names_of(masking_checklist(rounded, IMAGES, LABELS, settings), "failed")
    assert {"gradients", "finite differences", "unbounded, eps 0.95"} <= failed


def test_a_checklist_repeats_itself_and_leaves_the_global_generator_alone(plain):
    model = Resized(plain, each=True).eval()  # its dice are the global ones
    settings = replace(SETTINGS, steps=2, queries=2)
    before = torch.get_rng_state()
    first = masking_checklist(model, IMAGES[:16], LABELS[:16], settings, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert masking_checklist(model, IMAGES[:16], LABELS[:16], settings, seed=3) == first


def test_dice_that_cannot_be_fixed_are_said_to_hide_the_comparison(plain):
    generator = seeded()
    model = Before(lambda x: x + 0.01 * torch.randn(x.shape, generator=generator), plain).eval()
    checks = {c.name: c for c in masking_checklist(model, IMAGES[:16], LABELS[:16], replace(SETTINGS, steps=2, queries=2))}
    assert checks["finite differences"].verdict == "suspicious"
    assert "reseed" in checks["finite differences"].evidence


def test_a_black_box_of_ones_own_takes_the_place_of_the_search_and_keeps_the_budget(plain):
    model = Before(torch.detach, plain).eval()

    def oracle(target, images, labels):
        assert target is model
        return ascend(plain, images, labels, PGDSettings(eps=EPS, steps=8))

    checks = {check.name: check for check in masking_checklist(model, IMAGES, LABELS, SETTINGS, black_box=oracle)}
    assert checks["black box"].verdict == "failed"
    with pytest.raises(AssertionError, match="left its budget"):
        masking_checklist(model, IMAGES, LABELS, SETTINGS, black_box=lambda _model, images, _labels: 1 - images)


def test_progress_counts_the_checks(plain):
    calls = []
    settings = replace(SETTINGS, steps=2, queries=2)
    checks = masking_checklist(plain, IMAGES[:8], LABELS[:8], settings, progress=lambda *call: calls.append(call))
    assert [call[:3] for call in calls] == [(k, len(checks), "checks") for k in range(1, len(checks) + 1)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, x, y: (m.train(), x, y), "train mode"),
        (lambda m, x, y: (m, x * 2, y), r"images must lie in \[0, 1\]"),
        (lambda m, x, y: (m, x, y + 4), "labels must lie"),
        (lambda m, x, y: (m, x[:7], y[:7]), "at least 8 images, got 7"),
    ],
)
def test_what_cannot_be_checked_is_refused(change, message):
    model, images, labels = change(network().eval(), IMAGES, LABELS)
    with pytest.raises(ValueError, match=message):
        masking_checklist(model, images, labels, SETTINGS)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": 8.0}, "at most 1"),
        ({"norm": "l1"}, "unknown norm"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"eot_samples": 0}, "eot_samples must be at least 1"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"queries": -1}, "queries must be 0"),
        ({"unbounded_eps": ()}, "unbounded_eps"),
        ({"unbounded_eps": (2.0,)}, "unbounded_eps"),
        ({"significance": 0.0}, "significance must lie"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MaskingSettings(**{"eps": EPS, **values})


# the comparison


@pytest.mark.parametrize("more, less", [(0, 0), (5, 0), (8, 1), (3, 3), (0, 6), (40, 20)])
def test_with_counts_of_0_and_1_the_comparison_is_mcnemars_exact_test(more, less):
    challenger = torch.tensor([1] * more + [0] * less + [1, 0] * 4)
    incumbent = torch.tensor([0] * more + [1] * less + [1, 0] * 4)
    exact = binomtest(more, more + less, alternative="greater").pvalue if more + less else 1.0
    assert paired_p_value(challenger, incumbent) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_with_counts_of_draws_it_is_the_exact_permutation_test(seed):
    one, other = torch.randint(0, 9, (2, 10), generator=seeded(seed))
    exact = permutation_test(
        (one.numpy(), other.numpy()),
        lambda x, y: (x - y).sum(),
        permutation_type="samples",
        alternative="greater",
        n_resamples=inf,
    ).pvalue
    assert paired_p_value(one, other) == pytest.approx(exact, abs=1e-12)


def test_the_comparison_stays_exact_for_many_images_and_draws():
    one, other = torch.randint(0, 21, (2, 512), generator=seeded())
    flips = torch.rand(20_000, 512, generator=seeded(1)) < 0.5
    differences = (one - other).double()
    sums = torch.where(flips, differences, -differences).sum(dim=1)
    expected = (sums >= differences.sum()).double().mean().item()
    assert paired_p_value(one, other) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    "p_value, verdict", [(0.05, "passed"), (0.0499, "suspicious"), (0.005, "suspicious"), (0.0049, "failed")]
)
def test_a_verdict_follows_from_the_p_value(p_value, verdict):
    assert outcome_of(p_value, 0.05) == verdict


def counts(*values):
    return torch.cat([torch.full((number,), value) for number, value in values])


COMMON = {"num_draws": 4, "significance": 0.05}


@pytest.mark.parametrize(
    "challenger, attack, restart, verdict",
    [
        (counts((20, 4), (44, 0)), counts((40, 4), (24, 0)), counts((40, 4), (24, 0)), "passed"),
        (counts((40, 4), (24, 0)), counts((20, 4), (44, 0)), counts((20, 4), (44, 0)), "failed"),
        # weaker in all, yet it breaks twelve images that the attack misses and a restart does not
        (counts((24, 0), (28, 0), (12, 4)), counts((24, 4), (28, 4), (12, 0)), counts((52, 4), (12, 0)), "failed"),
        (counts((24, 0), (28, 0), (12, 4)), counts((24, 4), (28, 4), (12, 0)), counts((64, 4)), "passed"),
        (counts((8, 4), (56, 0)), counts((64, 0)), counts((64, 0)), "suspicious"),
        (counts((10, 4), (54, 0)), counts((64, 0)), counts((64, 0)), "failed"),
        (counts((5, 4), (59, 0)), counts((64, 0)), counts((64, 0)), "passed"),
    ],
)
def test_a_challenger_must_neither_win_nor_break_what_the_attack_misses(challenger, attack, restart, verdict):
    assert check_challenger("noise", challenger, attack, restart, **COMMON).verdict == verdict


def test_the_evidence_of_a_challenger_holds_its_numbers():
    check = check_challenger("noise", counts((9, 4), (1, 2)), counts((6, 4), (4, 0)), counts((7, 4), (3, 0)), **COMMON)
    assert check.evidence.startswith(
        "it finds 9.5 errors, the white-box attack 6; of the 4 images which that misses it breaks 3, a restart 1"
    )


@pytest.mark.parametrize(
    "wrong, verdict, words",
    [
        ((20, 30, 30), "passed", "more do not help"),
        ((20, 30, 45), "passed", "too high"),
        ((30, 20, 20), "failed", "weaker"),
        ((20, 30, 15), "failed", "weaker"),
        ((20, 20, 19), "passed", "more do not help"),
    ],
)
def test_more_effort_must_not_weaken_the_attack(wrong, verdict, words):
    efforts = {2**k: counts((number, 4), (64 - number, 0)) for k, number in enumerate(wrong)}
    check = check_effort("steps", "steps", efforts, **COMMON)
    assert check.verdict == verdict and words in check.evidence
    assert f"1: {wrong[0]}, 2: {wrong[1]}, 4: {wrong[2]}" in check.evidence
    assert "converged" not in check.evidence  # one schedule alone never shows it


@pytest.mark.parametrize("more, converged", [(0, True), (1, False), (7, False)])
def test_only_attacks_of_other_kinds_show_that_one_has_converged(more, converged):
    """MNIST AT: "converged" at 85 % said 0.1.0, where steps that fall leave 78.5."""
    efforts = {steps: counts((20, 1), (44, 0)) for steps in (10, 20)}
    others = {"another start": efforts[20], "falling steps": counts((20 + more, 1), (44 - more, 0))}
    check = check_effort("steps", "steps", efforts, 1, 0.05, others=others)
    assert check.verdict == "passed" and ("converged" in check.evidence) == converged
    assert converged or f"({more} of 44: another start 0, falling steps {more})" in check.evidence


def test_steps_that_never_fall_have_not_converged(tmp_path):
    test = load_dataset("mnist5k", data_dir=tmp_path, max_train=10, max_test=64).test
    settings = MaskingSettings(eps=2.0, norm="l2", steps=20, queries=0, noise_samples=1, directions=1)
    checks = masking_checklist(load_pretrained("mnist", "at"), to_float(test.images), test.labels, settings)
    (steps,) = [check for check in checks if check.name == "steps"]
    assert "too high" in steps.evidence and "converged" not in steps.evidence


@pytest.mark.parametrize("off, verdict", [(0, "passed"), (1, "suspicious"), (14, "failed")])
def test_logits_must_not_depend_on_whether_a_gradient_is_asked_for(off, verdict):
    logits = torch.randn(64, 4, generator=seeded())
    other = logits * (1 + 1e-6)
    other[:off, 2] += 0.01
    if off:
        other[0] = nan
    check = check_modes(other, logits, 1.0)
    assert check.verdict == verdict and f"{off} of 64" in check.evidence


@pytest.mark.parametrize(
    "zero, broken, verdict", [(0, 0, "passed"), (1, 0, "suspicious"), (0, 1, "suspicious"), (7, 7, "failed")]
)
def test_gradients_that_are_zero_or_not_finite_are_counted(zero, broken, verdict):
    gradients = torch.ones(64, 3, 4, 4)
    gradients[:zero] = 0
    gradients[zero : zero + broken, 0, 1, 1] = nan
    gradients[60:, :, 2:] = 0  # a part of an image may be masked
    check = check_gradients(gradients)
    assert check.verdict == verdict
    assert f"zero for {zero} and not finite for {broken} of 64" in check.evidence


@pytest.mark.parametrize(
    "share, verdict",
    [(1.0, "passed"), (0.97, "passed"), (0.92, "suspicious"), (0.7, "failed"), (0.2, "failed"), (-1.0, "failed")],
)
def test_the_gradient_must_agree_with_the_loss(share, verdict):
    one, other = torch.randn(2, 8, 64, generator=seeded())
    assert check_agreement(3 * one, share * one + (1 - share**2) ** 0.5 * other).verdict == verdict


def test_a_gradient_of_zero_or_nan_agrees_with_nothing():
    values = torch.randn(8, 64, generator=seeded())
    assert check_agreement(torch.zeros(8, 64), values).verdict == "failed"
    assert check_agreement(torch.full((8, 64), nan), values).verdict == "failed"


@pytest.mark.parametrize(
    "right, verdict", [(0, "passed"), (6, "passed"), (10, "passed"), (13, "suspicious"), (16, "failed")]
)
def test_accuracy_must_fall_to_chance_without_a_bound(right, verdict):
    check = check_unbounded(torch.arange(64) < right, 10, 0.95, 0.05)
    exact = binomtest(right, 64, 0.1, alternative="greater").pvalue
    assert check.verdict == verdict == outcome_of(exact, 0.05)
    assert check.evidence.startswith(f"{right} of 64")


def test_draws_shared_in_a_batch_are_found_by_the_test_of_kruskal_and_wallis():
    generator = seeded()
    own, shared = torch.randn(12, 12, 1, generator=generator), torch.randn(12, 1, 1, generator=generator)
    for share in (0.0, 0.3, 1.0):
        values = own * (1 - share) + shared * share
        check = check_draws(values, 0.05)
        exact = float(kruskal(*values.squeeze(2).numpy()).pvalue)
        assert check.verdict == outcome_of(exact, 0.05)
        assert exact < 1e-4 or f"{exact:.2g}" in check.evidence
    assert check.verdict == "failed"


def test_independent_draws_are_accused_as_rarely_as_the_significance_says():
    verdicts = [check_draws(torch.randn(6, 6, 2, generator=seeded(k)) ** 3, 0.05).verdict for k in range(300)]
    assert verdicts.count("passed") >= 270


# what the measurements stand on


def test_the_margin_is_positive_where_the_label_loses_to_the_rest_and_never_saturates():
    logits = torch.tensor([[2.0, 1.0, 1.0], [5000.0, 0.0, 0.0], [0.0, 3.0, 0.0]]).requires_grad_()
    values = smooth_margin(logits, torch.tensor([0, 0, 0]))
    expected = cross_entropy(logits[[0, 2]], torch.tensor([0, 0])).expm1().log()  # log((1 - p) / p)
    torch.testing.assert_close(values[[0, 2]], expected)
    values.sum().backward()
    assert (logits.grad[:, 0] == -1).all()


# the table


CHECKS = (Check("gradients", "passed", "fine"), Check("a|b", "suspicious", "odd"), Check("noise", "failed", "bad"))


def test_only_a_failed_check_costs_the_trust():
    assert trustworthy(CHECKS[:2]) and not trustworthy(CHECKS)


def test_a_defence_that_failed_stamps_the_table_and_a_suspicious_one_does_not():
    assert stamp({"AP": CHECKS[:2], "AToP": CHECKS}) == "NOT TRUSTWORTHY, gradients may be masked in: AToP."
    assert stamp({"AP": CHECKS[:2]}) == stamp({}) == ""


def test_the_table_is_markdown_with_a_stamp():
    lines = format_checks(CHECKS).splitlines()
    assert lines[:5] == [
        "| check     | verdict    | evidence |",
        "| --------- | ---------- | -------- |",
        "| gradients | passed     | fine |",
        "| a\\|b      | suspicious | odd |",
        "| noise     | failed     | bad |",
    ]
    assert lines[-1].startswith("**Not trustworthy**: failed noise.")
    assert format_checks(CHECKS[:2]).endswith("look into a|b.")
    assert format_checks(CHECKS[:1]).splitlines()[-1].startswith("Trustworthy as far as")
    with pytest.raises(ValueError, match="no checks"):
        format_checks(())


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="unknown verdict 'good'"):
        Check("noise", "good", "")
