"""Planted gradient masking is caught, honest models are not accused."""

import pytest
import torch
from test_attacks import seeded
from torch import nn
from torch.nn import functional as F

from atoplib.attacks import pgd
from atoplib.masking import format_checks, masking_checklist, warning
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

EPS = 0.05
SETTINGS = {"eps": EPS, "steps": 6, "eot_samples": 4, "num_samples": 4, "queries": 20}
FAST = {"eps": EPS, "steps": 2, "eot_samples": 2, "num_samples": 2, "queries": 2}


def task(count, seed):
    """Four coarse patterns under noise: a small network reads 94 % of them, and an attack of EPS breaks most
    of them."""
    patterns = F.interpolate(torch.randn(4, 3, 4, 4, generator=seeded(99)).sign(), scale_factor=2.0)
    generator = seeded(seed)
    labels = torch.randint(4, (count,), generator=generator)
    images = 0.5 + 0.05 * patterns[labels] + 0.2 * torch.randn(count, 3, 8, 8, generator=generator)
    return images.clamp(0, 1), labels


IMAGES, LABELS = task(64, seed=2)


def network():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 16, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))


def trained(model, eps=0.0, steps=100):
    """``model`` after a few seconds of training, on attacks of ``eps`` if that is above 0."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = task(1024, seed=1)
    for _ in range(steps):
        chosen = torch.randint(1024, (128,))
        shown = images[chosen]
        if eps:
            shown = pgd(model.forward, shown, labels[chosen], eps=eps, steps=3, seed=None)
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
    transform = Transform(name, noise_std=0.05, missing_rate=0.1, grid_size=4)
    return AToPPipeline(transform, purifier or Blur(), classifier).eval()


def failed(checks, outcome="failed"):
    return {check.name for check in checks if check.outcome == outcome}


# planted cases


class Before(nn.Module):
    """A function of the images in front of a classifier."""

    def __init__(self, function, inner):
        super().__init__()
        self.function, self.inner = function, inner

    def forward(self, images):
        return self.inner(self.function(images))


class Resized(nn.Module):
    """The image at a random smaller size and place, the rest grey: for each image, or one for the whole
    batch."""

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


class HashOffset(Before):
    """Logits moved by as much as an unrelated image's differ, by a number that every bit of the image
    decides."""

    def forward(self, images):
        weights = torch.rand(images[0].numel(), generator=seeded(5)).double()
        keys = images.detach().double().flatten(1) @ weights * 1e7
        return self.inner(images) + 0.3 * torch.sin(keys.unsqueeze(1) * torch.arange(1, 5)).float()


class Coin(nn.Module):
    """One of two models for each image (or for the whole batch), by a fair coin."""

    def __init__(self, one, other, each=True):
        super().__init__()
        self.one, self.other, self.each = one, other, each

    def forward(self, images):
        heads = (torch.rand(len(images) if self.each else 1, 1) < 0.5).expand(len(images), 1)
        return torch.where(heads, self.one(images), self.other(images))


PLANTED = {
    "rounding": (
        lambda inner: Before(lambda x: (x * 255).round() / 255, inner),
        {"gradients", "unbounded, eps 0.95"},
    ),
    "coarse rounding": (
        lambda inner: Before(lambda x: (x * 8).round() / 8, inner),
        {"gradients", "transfer"},
    ),
    "detached": (
        lambda inner: Before(torch.detach, inner),
        {"gradients", "finite differences", "black box", "transfer"},
    ),
    "no_grad": (
        lambda inner: Before(lambda x: x, torch.no_grad()(inner.forward)),
        {"gradients", "black box"},
    ),
    # a residual purifier whose correction is detached: the gradient that remains is not that of the loss
    "partly detached": (
        lambda inner: Before(
            lambda x: x + (F.avg_pool2d(x.flip(3), 3, stride=1, padding=1) - x).detach(), inner
        ),
        {"finite differences"},
    ),
    # a ripple too small to matter and steep enough to turn every gradient
    "shattered": (
        lambda inner: Before(lambda x: x + 0.002 * torch.sin(5000 * x), inner),
        {"finite differences"},
    ),
    # sqrt has no derivative at 0: the gradient becomes NaN, the value stays
    "not a number": (lambda inner: Before(lambda x: x + (0 * x).sqrt(), inner), {"gradients"}),
    "resized, one draw a batch": (lambda inner: Resized(inner, each=False), {"samples"}),
    "detached purifier": (
        lambda inner: pipeline_of(inner, Before(torch.detach, Blur())),
        {"gradients", "straight-through", "transfer"},
    ),
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
        lambda inner: Before(
            backward_by(lambda _, gradient: -gradient, lambda x: (x * 255).round() / 255), inner
        ),
        {"finite differences", "finite differences, attacked"},
    ),
    "offset by the image's hash": (lambda inner: HashOffset(None, inner), {"finite differences"}),
    # noise on the image, much less of it where a gradient is asked for
    "quiet where a gradient is asked for": (
        lambda inner: Before(lambda x: x + (0.01 if x.requires_grad else 0.1) * torch.randn(x.shape), inner),
        {"same answers"},
    ),
    # steps that are too small: the number is not that of masked gradients, but as wrong
    "the smallest steps": (lambda inner: inner, {"larger steps"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_case_is_caught(name, plain):
    plant, expected = PLANTED[name]
    options = {**SETTINGS, "alpha": EPS / 30 if name == "the smallest steps" else None}
    checks = masking_checklist(plant(plain).eval(), IMAGES, LABELS, **options, classifier=plain)
    assert expected <= failed(checks) and warning(checks), format_checks(checks)


def test_a_random_resize_attacked_without_eot_is_caught_and_with_eot_it_is_said_to_matter():
    model = trained(Resized(network(), each=True), steps=200)
    settings = dict(SETTINGS, eps=0.03, steps=3, queries=0)
    checks = masking_checklist(model, *task(256, seed=2), **dict(settings, eot_samples=1))
    assert "EOT" in failed(checks), format_checks(checks)
    checks = masking_checklist(model, IMAGES, LABELS, **dict(settings, eot_samples=8))
    assert not warning(checks), format_checks(checks)
    (line,) = [check.detail for check in checks if check.name == "EOT"]
    assert "gain over one sample: p < 0.0" in line or "p = 0.00" in line


# honest models


def test_honest_models_pass(plain, hardened):
    for model in (plain, hardened):
        checks = masking_checklist(model, IMAGES, LABELS, **SETTINGS)
        assert not warning(checks), format_checks(checks)
        assert len(failed(checks, "suspicious")) <= 1, format_checks(checks)


@pytest.mark.parametrize("name", ["rt2", *(pytest.param(n, marks=pytest.mark.long) for n in ("none", "rt1"))])
def test_an_honest_pipeline_passes(name, plain):
    checks = masking_checklist(pipeline_of(plain, name=name), IMAGES, LABELS, **SETTINGS)
    assert not warning(checks), format_checks(checks)
    assert {"transfer", "straight-through"} <= {check.name for check in checks}
    assert ({"samples", "EOT"} <= {check.name for check in checks}) == (name != "none")


@pytest.mark.parametrize("seeds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_fair_coin_between_two_honest_models_is_an_honest_random_defence(seeds, plain, hardened):
    """0.1.0 ranked equal values by their order in memory, and called 69 % of such coins not trustworthy."""
    model = Coin(plain, hardened).eval()
    found = [masking_checklist(model, IMAGES[:16], LABELS[:16], **FAST, seed=seed) for seed in range(seeds)]
    names = [failed(checks) for checks in found if warning(checks)]
    assert len(names) <= 1 and not any("samples" in each for each in names), names


def test_a_coin_for_the_whole_batch_is_caught(plain, hardened):
    checks = masking_checklist(Coin(plain, hardened, each=False).eval(), IMAGES[:16], LABELS[:16], **FAST)
    assert "samples" in failed(checks), format_checks(checks)


@pytest.mark.parametrize("make", [lambda inner: inner, pipeline_of], ids=["deterministic", "random"])
def test_the_scale_of_the_logits_changes_no_check(make, plain):
    def checked(factor):
        model = make(nn.Sequential(plain, Before(lambda logits: logits * factor, nn.Identity()))).eval()
        return masking_checklist(model, IMAGES[:8], LABELS[:8], **FAST)

    expected = checked(1.0)
    assert checked(2.0**10) == expected  # exact in floating point
    assert [check.outcome for check in checked(0.01)] == [check.outcome for check in expected]


@pytest.mark.parametrize("name", ["AT", pytest.param("AToP", marks=pytest.mark.long)])
def test_the_kits_own_defences_pass(name, defences, digits):
    images, labels = (values[:16] for values in digits)
    checks = masking_checklist(defences[name], images, labels, **dict(FAST, eps=0.3))
    assert not warning(checks), format_checks(checks)


def test_the_l2_norm_is_checked_alike(plain):
    settings = dict(SETTINGS, eps=0.6, norm="l2")
    assert not warning(masking_checklist(plain, IMAGES, LABELS, **settings))
    rounded = Before(lambda x: (x * 255).round() / 255, plain).eval()
    names = failed(masking_checklist(rounded, IMAGES, LABELS, **settings))
    assert {"gradients", "finite differences", "unbounded, eps 0.95"} <= names


def test_a_checklist_repeats_itself_and_leaves_the_global_generator_alone(plain):
    model = Resized(plain, each=True).eval()  # its dice are the global ones
    before = torch.get_rng_state()
    first = masking_checklist(model, IMAGES[:16], LABELS[:16], **FAST, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert masking_checklist(model, IMAGES[:16], LABELS[:16], **FAST, seed=3) == first


def test_random_numbers_that_cannot_be_fixed_are_said_to_hide_the_comparison(plain):
    generator, calls = seeded(), []
    model = Before(lambda x: x + 0.01 * torch.randn(x.shape, generator=generator), plain).eval()
    checks = masking_checklist(
        model, IMAGES[:8], LABELS[:8], **FAST, progress=lambda *call: calls.append(call)
    )
    (line,) = [check for check in checks if check.name == "finite differences"]
    assert line.outcome == "suspicious" and "reseed" in line.detail
    assert [call[:3] for call in calls] == [(k, len(calls), "attacks") for k in range(1, len(calls) + 1)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"norm": "l1"}, "norm must be one of linf, l2"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(values, message, plain):
    with pytest.raises(ValueError, match=message):
        masking_checklist(plain, IMAGES, LABELS, **{"eps": EPS, **values})
    with pytest.raises(ValueError, match="images must be at least 8, got 7"):
        masking_checklist(plain, IMAGES[:7], LABELS[:7], eps=EPS)


def test_steps_that_never_fall_have_not_converged(defences, digits):
    images, labels = (values[:32] for values in digits)
    settings = {"eps": 2.0, "norm": "l2", "steps": 10, "queries": 0}
    checks = masking_checklist(defences["AT"], images, labels, **settings)
    (steps,) = [check for check in checks if check.name == "steps"]
    assert "several attacks do" in steps.detail and "converged" not in steps.detail


def test_a_finished_checklist_is_loaded_until_what_it_depends_on_changes(tmp_path, monkeypatch):
    model = network().eval()
    first = masking_checklist(model, IMAGES[:8], LABELS[:8], **FAST, run_dir=tmp_path)
    monkeypatch.setattr("atoplib.masking.checklist._plan", lambda *_: pytest.fail("it was made again"))
    assert masking_checklist(model, IMAGES[:8], LABELS[:8], **FAST, run_dir=tmp_path) == first
    with pytest.raises(BaseException, match="made again"):
        masking_checklist(model, IMAGES[:8], LABELS[:8], **{**FAST, "eps": 0.06}, run_dir=tmp_path)
