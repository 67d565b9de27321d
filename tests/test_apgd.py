"""The losses of attacks are the published ones, restarts keep what broke an image, and APGD follows its algorithm."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from atoplib.attacks import (
    APGDSettings,
    PGDSettings,
    apgd,
    check_attack,
    check_budget,
    cross_entropy,
    dlr,
    input_gradient,
    margin,
    pgd,
    random_start,
    strongest_attempt,
    targeted_dlr,
)
from atoplib.attacks.apgd import checkpoints
from atoplib.attacks.attempts import Attempt, assess
from atoplib.attacks.losses import likely_targets, target_margin
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import Verdict, judge, predict

VOTE = Verdict("majority", 9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count, low=0.0, high=1.0):
    return torch.rand(count, 3, 4, 4, generator=seeded(5)) * (high - low) + low


def smooth_model(classes=5):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(32, classes)).eval()


def attacked_set(count=24, classes=5):
    """A model with images that it reads correctly."""
    model, images = smooth_model(classes), images_of(count)
    return model, images, model(images).argmax(dim=1)


class Recorder(nn.Module):
    """Counts the images that a model is shown, call by call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, images):
        self.sizes.append(len(images))
        return self.model(images)


class Noisy(nn.Module):
    """A random model: another noise on the logits in every draw, the gradient of the plain model in all of them."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale, self.generator = model, scale, seeded(7)

    def forward(self, images):
        logits = self.model(images)
        return logits + self.scale * torch.randn(logits.shape, generator=self.generator)


class Coin(nn.Module):
    """Right with probability 2/3 in every draw whatever it is shown; class 0 is the label."""

    def __init__(self):
        super().__init__()
        self.generator = seeded(3)

    def forward(self, images):
        wrong = torch.rand(len(images), generator=self.generator) < 1 / 3
        logits = torch.zeros(len(images), 4) + images.flatten(1).mean(dim=1, keepdim=True)
        return logits + F.one_hot(wrong.long(), 4) * 5.0


# Losses


@pytest.mark.parametrize("classes", [4, 5, 10])
def test_each_loss_is_its_formula(classes):
    logits = torch.randn(200, classes, generator=seeded()) * 5
    labels = torch.randint(classes, (200,), generator=seeded(1))
    targets = (labels + torch.randint(1, classes, (200,), generator=seeded(2))) % classes
    found = [loss(logits, labels).tolist() for loss in (margin, dlr, cross_entropy)]
    found.append(targeted_dlr(logits, labels, targets).tolist())
    for row, label, target, *values in zip(logits.tolist(), labels.tolist(), targets.tolist(), *found, strict=True):
        ordered = sorted(row, reverse=True)
        other = max(value for index, value in enumerate(row) if index != label)
        expected = [
            other - row[label],
            -(row[label] - other) / (ordered[0] - ordered[2]),  # eq. 6
            torch.tensor(row).logsumexp(dim=0).item() - row[label],
            -(row[label] - row[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2),  # eq. 7
        ]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_a_loss_is_above_0_exactly_where_the_model_is_wrong(loss):
    logits, labels = torch.randn(500, 6, generator=seeded()), torch.randint(6, (500,), generator=seeded(1))
    assert torch.equal(loss(logits, labels) > 0, logits.argmax(dim=1) != labels)


def test_dlr_changes_neither_with_the_scale_of_the_logits_nor_with_a_shift():
    logits, labels = torch.randn(50, 6, generator=seeded()), torch.randint(6, (50,), generator=seeded(1))
    targets = (labels + 2) % 6
    torch.testing.assert_close(dlr(logits * 1e4 + 3, labels), dlr(logits, labels), rtol=1e-3, atol=1e-4)
    moved = targeted_dlr(logits * 1e4 + 3, labels, targets)
    torch.testing.assert_close(moved, targeted_dlr(logits, labels, targets), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [margin, dlr, cross_entropy])
def test_losses_of_half_precision_logits_are_float32_and_ties_are_finite(loss):
    logits = torch.zeros(3, 5, dtype=torch.bfloat16, requires_grad=True)
    values = loss(logits, torch.tensor([0, 1, 4]))
    assert values.dtype == torch.float32 and torch.isfinite(values).all()
    assert torch.isfinite(torch.autograd.grad(values.sum(), logits)[0]).all()


@pytest.mark.parametrize("loss, least", [(margin, 2), (dlr, 3), (targeted_dlr, 4)])
def test_too_few_classes_are_refused_with_the_number_that_is_needed(loss, least):
    labels = torch.zeros(1, dtype=torch.int64)
    targets = (labels,) if loss is targeted_dlr else ()
    loss(torch.randn(1, least), labels, *targets)
    with pytest.raises(ValueError, match=f"needs at least {least} classes, but the model has {least - 1}"):
        loss(torch.randn(1, least - 1), labels, *targets)


def test_likely_targets_are_the_other_classes_from_the_likeliest_on():
    logits = torch.tensor([[3.0, 9.0, 1.0, 5.0], [3.0, 9.0, 1.0, 5.0]])
    assert likely_targets(logits, torch.tensor([1, 0]), 2).tolist() == [[3, 0], [1, 3]]
    assert likely_targets(logits, torch.tensor([1, 0]), 9).tolist() == [[3, 0, 2], [1, 3, 2]]


@pytest.mark.parametrize("max_batch", [1, 5, 512])
def test_every_copy_of_an_image_is_driven_to_that_images_target(max_batch):
    model, images, labels = attacked_set(6)
    targets = torch.tensor([1, 0, 3, 2, 4, 1])
    found = input_gradient(model, images, labels, loss=target_margin, targets=targets, eot_samples=3, max_batch=max_batch)
    copies = images.clone().requires_grad_()
    logits = model(copies)
    wanted = logits[range(6), targets] - logits[range(6), labels]
    torch.testing.assert_close(found.loss, wanted.detach())
    torch.testing.assert_close(found.gradient, torch.autograd.grad(wanted.sum(), copies)[0])


# PGD: momentum and restarts


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_momentum_adds_the_past_gradients_of_l1_norm_1_to_the_next(norm, eps):
    model, images, labels = attacked_set(6)
    settings = PGDSettings(eps, norm, steps=5, alpha=eps / 8, start="clean", momentum=0.9)
    found = pgd(model, images, labels, settings)
    points, past = images.clone(), torch.zeros_like(images)
    for _ in range(5):
        gradient = input_gradient(model, points, labels).gradient
        past = 0.9 * past + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        step = past.sign() if norm == "linf" else past / past.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        points = points + eps / 8 * step
        move = points - images
        if norm == "linf":
            points = images + move.clamp(-eps, eps)
        else:
            size = move.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
            points = images + move * (eps / size).clamp_max(1)
        points = points.clamp(0, 1)
    torch.testing.assert_close(found, points, atol=1e-5, rtol=0)
    assert (found - pgd(model, images, labels, replace(settings, momentum=0.0))).abs().max() > 1e-3


class Pockets(nn.Module):
    """Wrong only where the first pixel's red is raised by more than 0.05; its gradient leads away from there."""

    def forward(self, images):
        red = images[:, 0, 0, 0]
        wrong = (red > 0.55).float()
        return torch.stack([red, wrong * 9 - red, red * 0], dim=1)


def test_an_image_that_any_restart_broke_keeps_what_broke_it_and_is_attacked_no_more():
    images = torch.full((40, 3, 4, 4), 0.5)
    labels = torch.zeros(40, dtype=torch.int64)
    settings = PGDSettings(eps=0.1, steps=1, alpha=1e-6)
    one = pgd(Pockets().eval(), images, labels, settings, generator=seeded(1))
    broken_by_one = ~judge(Pockets(), one, labels)
    assert 5 < broken_by_one.sum() < 15  # a quarter of the starts
    model = Recorder(Pockets()).eval()
    many = pgd(model, images, labels, replace(settings, restarts=12), generator=seeded(1))
    broken = ~judge(Pockets(), many, labels)
    assert torch.equal(many[broken_by_one], one[broken_by_one])
    assert broken.sum() > 30 and (broken | ~broken_by_one).all()
    # check; two looks for dice; the likely targets; clean verdict; then gradient and verdict of each restart
    gradients = model.sizes[5::2]
    assert gradients[:2] == [40, 40 - int(broken_by_one.sum())] and gradients == sorted(gradients, reverse=True)


def test_where_no_restart_succeeds_the_candidate_nearest_to_an_error_is_kept():
    model, images, labels = attacked_set(8)
    settings = PGDSettings(eps=0.002, steps=1, alpha=1e-7)
    runs = [pgd(model, images, labels, settings, generator=generator) for generator in [seeded(4)] * 3]
    kept = pgd(model, images, labels, replace(settings, restarts=3), generator=seeded(4))
    assert judge(model, kept, labels).all()
    margins = torch.stack([margin(model(run), labels) for run in [images, *runs]])
    assert len(set(margins.argmax(dim=0).tolist())) > 2
    torch.testing.assert_close(margin(model(kept), labels), margins.amax(dim=0))


def test_the_callback_of_several_restarts_sees_all_images_and_counts_all_steps():
    model, images, labels = attacked_set(6)
    seen = []

    def callback(step, steps, adversarial, losses):
        check_budget(adversarial, images, 0.002, "linf")
        assert adversarial.shape == images.shape and losses.shape == (6,)
        seen.append((step, steps))

    pgd(model, images, labels, PGDSettings(0.002, steps=4, restarts=3), generator=seeded(), callback=callback)
    assert seen == [(step, 12) for step in range(1, 13)]


@pytest.mark.parametrize("verdict", [Verdict(), Verdict("majority", 1), Verdict("one_shot", 9)], ids=str)
def test_on_a_random_model_a_verdict_of_a_single_draw_is_refused(verdict):
    images, labels = images_of(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="the model is random, and verdict .* rests on a single one"):
        pgd(Coin().eval(), images, labels, PGDSettings(0.1, steps=1, restarts=2, verdict=verdict))
    with pytest.raises(ValueError, match="the model is random, and verdict .* rests on a single one"):
        apgd(Coin().eval(), images, labels, APGDSettings(0.1, steps=1, verdict=verdict))
    pgd(Coin().eval(), images, labels, PGDSettings(0.1, steps=1, verdict=verdict))  # one run decides nothing


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"momentum": -0.1}, r"momentum must be 0 \(none\) or more, got -0.1"),
        ({"momentum": float("nan")}, "momentum must be 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"restarts": 2, "start": "clean"}, "2 restarts differ in their starts only; choose start 'random'"),
    ],
    ids=str,
)
def test_impossible_settings_of_pgd_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PGDSettings(eps=0.1, **wrong)


# Attempts


def fixed(result):
    """An attempt that shows a fixed candidate for each image, and keeps a list of the positions it was asked for."""
    asked = []

    def run(positions, _report):
        asked.append(positions.tolist())
        return result[positions]

    return Attempt(1, run), asked


def test_attempts_go_on_with_the_images_that_are_still_right():
    # the label is 0; an image's mean red decides: above 0.6 wrong, and the nearer to it the nearer to an error
    def model(images):
        red = images[:, 0].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(red), red - 0.6], dim=1)

    def painted(*reds):
        return torch.stack([torch.full((3, 4, 4), red) for red in reds])

    images, labels = painted(0.7, 0.1, 0.1, 0.1), torch.zeros(4, dtype=torch.int64)
    attempts = [painted(0.9, 0.65, 0.5, 0.05), painted(0.9, 0.9, 0.2, 0.04), painted(0.9, 0.9, 0.8, 0.03)]
    (first, asked_first), (second, asked_second), (third, asked_third) = map(fixed, attempts)
    found = strongest_attempt(model, images, labels, [first, second, third], Verdict())
    assert (asked_first, asked_second, asked_third) == ([[1, 2, 3]], [[2, 3]], [[2, 3]])
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([0.7, 0.65, 0.8, 0.1]))
    last, asked_last = fixed(images)
    strongest_attempt(model, painted(0.9, 0.9), labels[:2], [last], Verdict())
    assert asked_last == []


def test_an_assessment_judges_by_the_verdict_and_takes_the_mean_margin_over_the_draws():
    draws = torch.randn(9, 6, 4, generator=seeded())
    labels = torch.randint(4, (6,), generator=seeded(1))

    def model(images):
        return draws.flatten(0, 1)[: len(images)]

    found = assess(model, images_of(6), labels, VOTE)
    assert torch.equal(found.right, judge(model, images_of(6), labels, VOTE))
    expected = torch.stack([margin(draw, labels) for draw in draws]).mean(dim=0)
    torch.testing.assert_close(found.margin, expected)


# APGD


def test_the_step_size_is_looked_at_when_the_paper_says_so():
    # p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    for steps in (1, 2, 7, 10, 33, 1000):
        windows = checkpoints(steps)
        assert list(windows) == [sum(list(windows.values())[: i + 1]) for i in range(len(windows))]
        assert max(windows) <= steps and min(windows.values()) >= 1


def by_the_book(model, image, label, target, start, settings):
    """Algorithm 1 for a single image, line by line; returns the best point after every step, or the first wrong one."""

    def evaluate(x):
        copy = x.clone().requires_grad_()
        logits = model(copy[None])
        given = (label[None],) if target is None else (label[None], target[None])
        name = {"ce": cross_entropy, "dlr": dlr, "targeted_dlr": targeted_dlr}[settings.loss]
        value = name(logits, *given).sum()
        return value.item(), torch.autograd.grad(value, copy)[0], logits.argmax().item() != label.item()

    def project(x):
        if settings.norm == "linf":
            return (image + (x - image).clamp(-settings.eps, settings.eps)).clamp(0, 1)
        return (image + (x - image) * min(1.0, settings.eps / max((x - image).norm().item(), 1e-12))).clamp(0, 1)

    def direction(gradient):
        return gradient.sign() if settings.norm == "linf" else gradient / gradient.norm()

    x, previous, step_size = start, start, 2 * settings.eps
    value, gradient, wrong = evaluate(x)
    values, best, best_value, best_gradient = [value], x, value, gradient
    if wrong:
        return [x] * settings.steps
    path, last_best, halved, last_look = [], value, True, 0
    for k in range(1, settings.steps + 1):
        z = project(x + step_size * direction(gradient))
        share = 0.75 if k > 1 else 1.0
        x, previous = project(x + share * (z - x) + (1 - share) * (x - previous)), x
        value, gradient, wrong = evaluate(x)
        values.append(value)
        if wrong:
            return path + [x] * (settings.steps - k + 1)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        path.append(best)
        if k in checkpoints(settings.steps):
            rises = sum(values[j + 1] > values[j] for j in range(last_look, k))
            condition_1 = rises <= settings.rho * (k - last_look)
            condition_2 = not halved and best_value <= last_best
            halved = condition_1 or condition_2
            if halved:
                step_size, x, gradient = step_size / 2, best, best_gradient
            last_best, last_look = best_value, k
    return path


@pytest.mark.parametrize("loss, rho", [("ce", 0.75), ("dlr", 0.3), ("targeted_dlr", 0.75)])
@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.3)])
def test_each_image_climbs_as_algorithm_1_would_have_it_climb_alone(norm, eps, loss, rho):
    model, images, labels = attacked_set(16)
    settings = APGDSettings(eps, norm, steps=30, loss=loss, num_targets=1, rho=rho)
    seen = []
    found = apgd(
        model,
        images,
        labels,
        settings,
        generator=seeded(3),
        callback=lambda _s, _n, adversarial, _l: seen.append(adversarial),
    )
    starts = random_start(images, eps, norm, seeded(3))
    targets = likely_targets(model(images), labels, 1)[:, 0] if loss == "targeted_dlr" else [None] * len(images)
    paths = [by_the_book(model, *given, settings) for given in zip(images, labels, targets, starts, strict=True)]
    broken = ~judge(model, found, labels)
    assert 3 <= broken.sum() <= len(images) - 3
    for step in (1, 5, 15, 30):
        expected = torch.stack([path[step - 1] for path in paths])
        # which of two equal losses is the higher is a matter of rounding, and may lead an image or two elsewhere
        elsewhere = (seen[step - 1] - expected).abs().flatten(1).amax(dim=1) > 2e-3
        assert elsewhere.sum() <= 2
    assert torch.equal(found[broken], seen[-1][broken])


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_apgd_keeps_budget_box_model_images_and_global_dice(norm, eps):
    model, images, labels = attacked_set()
    images = images.round()
    before, kept = torch.get_rng_state(), images.clone()
    found, again, other = (
        apgd(model, images, labels, APGDSettings(eps, norm, steps=10), generator=seeded(seed)) for seed in (1, 1, 2)
    )
    check_budget(found, images, eps, norm)
    assert torch.equal(found, again) and not torch.equal(found, other)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(images, kept)
    assert all(p.grad is None for p in model.parameters()) and not found.requires_grad


def test_a_broken_image_leaves_the_batch_and_a_wrong_one_never_enters():
    model, images, labels = attacked_set()
    labels[:5] = (labels[:5] + 1) % 5
    recorder = Recorder(model).eval()
    seen = []

    def callback(step, _steps, adversarial, _losses):
        seen.append(int((~judge(model, adversarial, labels)).sum()))

    found = apgd(recorder, images, labels, APGDSettings(0.06, steps=12), generator=seeded(), callback=callback)
    assert torch.equal(found[:5], images[:5])
    # check; two looks for dice; clean verdict; gradients of start and steps; verdict of the run
    gradients = recorder.sizes[4:-1]
    assert gradients[0] == 24 - 5 and gradients[1:] != gradients[:-1]
    assert gradients[2:] == [24 - broken for broken in seen[: len(gradients) - 2]]


@pytest.mark.parametrize("max_batch", [1, 7, 512])
def test_a_deterministic_model_gets_one_draw_and_no_batch_is_larger_than_asked(max_batch):
    model, images, labels = attacked_set()
    model, images = model.double(), images.double()  # rounding depends on the batch, and may flip a sign in float32
    recorder = Recorder(model).eval()
    settings = APGDSettings(0.02, steps=5, loss="dlr", eot_samples=20)
    found = apgd(recorder, images, labels, settings, generator=seeded(), max_batch=max_batch)
    whole = apgd(model, images, labels, replace(settings, eot_samples=1), generator=seeded())
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)
    assert max(recorder.sizes) <= max(max_batch, 8)  # 8: the look for dice


class Deceptive(nn.Module):
    """Class 0 is right; class 1 is the next likeliest, and no pixel changes either; class 2 wins in bright images."""

    def forward(self, images):
        still = torch.zeros(len(images))
        return torch.stack([still + 1, still + 0.9, images.mean(dim=(1, 2, 3)) * 4 - 1.2, still], dim=1)


def test_the_second_target_is_tried_on_what_the_first_did_not_break():
    images, labels = torch.full((5, 3, 4, 4), 0.5), torch.zeros(5, dtype=torch.int64)
    for num_targets, broken in ((1, False), (2, True), (9, True)):
        settings = APGDSettings(0.1, steps=4, loss="targeted_dlr", num_targets=num_targets)
        found = apgd(Deceptive().eval(), images, labels, settings, generator=seeded())
        assert (~judge(Deceptive(), found, labels)).tolist() == [broken] * 5


def test_every_restart_has_a_start_of_its_own_and_a_start_that_breaks_an_image_counts():
    images, labels = torch.full((40, 3, 4, 4), 0.5), torch.zeros(40, dtype=torch.int64)
    broken = [
        ~judge(Pockets(), apgd(Pockets().eval(), images, labels, settings, generator=seeded(1)), labels)
        for settings in (APGDSettings(0.1, steps=1), APGDSettings(0.1, steps=1, restarts=12))
    ]
    assert 5 < broken[0].sum() < 15 and broken[1].sum() > 30 and (broken[1] | ~broken[0]).all()


def pipeline_of(noise_std=0.3):
    purifier = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh())
    classifier = smooth_model()
    return AToPPipeline(TransformSettings("rt2", noise_std=noise_std, grid_size=4), purifier, classifier).eval()


@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted_dlr"])
def test_apgd_through_a_random_pipeline_raises_the_mean_loss_of_fresh_draws(loss):
    pipeline, images = pipeline_of(), images_of(12)
    labels = predict(pipeline, images, num_draws=50)
    settings = APGDSettings(0.2, steps=12, loss=loss, eot_samples=8, num_targets=1, verdict=VOTE)
    found = apgd(pipeline, images, labels, settings, generator=seeded(), max_batch=50)
    check_budget(found, images, 0.2, "linf")
    clean, attacked = (assess(pipeline, shown, labels, Verdict("majority", 200)).margin for shown in (images, found))
    assert (attacked > clean).all()


def test_a_coin_that_is_wrong_in_a_third_of_its_draws_is_never_broken_by_a_vote():
    # a single draw of the last step would call a third of the images broken, and one of any step nearly all
    images, labels = images_of(60), torch.zeros(60, dtype=torch.int64)
    verdict = Verdict("majority", 101)
    seen = []
    apgd(
        Coin().eval(),
        images,
        labels,
        APGDSettings(0.1, steps=9, eot_samples=3, verdict=verdict, restarts=2),
        callback=lambda step, *_: seen.append(step),
    )
    assert seen == list(range(1, 19)), "a run ended early, though no image was broken"


def test_an_image_of_a_random_model_leaves_once_every_draw_of_the_verdict_is_wrong():
    model, images, labels = attacked_set(12)
    recorder = Recorder(Noisy(model, 1e-4)).eval()
    settings = APGDSettings(0.3, steps=100, eot_samples=4, verdict=VOTE)
    seen = []
    found = apgd(recorder, images, labels, settings, generator=seeded(), callback=lambda step, *_: seen.append(step))
    assert not judge(model, found, labels).any()
    assert seen[-1] == 22, "all images were broken at the first look"
    assert recorder.sizes[-2] == 12 * 9, "the look asks as many draws as the verdict has"


def test_where_draws_disagree_the_image_stays_in_its_run_although_the_vote_is_wrong():
    # wrong in two of three draws: broken by the vote, so that no second run is made; not left early, because a stronger
    # point may be found
    model = Coin().eval()
    images, labels = images_of(1), torch.zeros(1, dtype=torch.int64)
    seen = []

    def callback(step, *_):
        labels[:] = 1  # right in a third of the draws from now on
        seen.append(step)

    settings = APGDSettings(0.1, steps=9, restarts=3, verdict=Verdict("majority", 101))
    apgd(model, images, labels, settings, callback=callback)
    assert seen == list(range(1, 10))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": 8.0}, r"at most 1 \(images lie in \[0, 1\]\), got 8.0; 8/255\?"),
        ({"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
        ({"loss": "cw"}, "unknown loss 'cw'; allowed: ce, dlr, targeted_dlr"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eot_samples": 0}, "eot_samples must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"rho": 1.0}, "rho must lie between 0 and 1, got 1.0"),
    ],
    ids=str,
)
def test_impossible_settings_of_apgd_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        APGDSettings(**{"eps": 0.1} | wrong)


@pytest.mark.parametrize("loss, classes", [("dlr", 2), ("targeted_dlr", 3)])
def test_apgd_refuses_a_loss_that_needs_more_classes(loss, classes):
    model, images, labels = attacked_set(4, classes)
    with pytest.raises(ValueError, match=f"needs at least {classes + 1} classes, but the model has {classes}"):
        apgd(model, images, labels, APGDSettings(0.1, steps=2, loss=loss))


# Models that an attack refuses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_returns_probabilities_is_refused_and_one_that_returns_their_logarithms_is_not(dtype):
    model, images, labels = attacked_set(4, 10)
    for scale in (1.0, 100.0):  # nearly uniform, nearly one-hot
        probabilities = nn.Sequential(model, Scaled(scale, dtype), nn.Softmax(dim=1)).eval()
        with pytest.raises(ValueError, match="the model returns probabilities .* needs the logits before the softmax"):
            check_attack(probabilities, images, labels)
    check_attack(nn.Sequential(model, nn.LogSoftmax(dim=1)).eval(), images, labels)
    check_attack(nn.Sequential(model, nn.ReLU()).eval(), images, labels)


class Scaled(nn.Module):
    def __init__(self, scale, dtype):
        super().__init__()
        self.scale, self.dtype = scale, dtype

    def forward(self, logits):
        return (logits * self.scale).to(self.dtype)


def test_a_model_or_labels_on_another_device_are_refused_with_both_named():
    _, images, labels = attacked_set(4)
    elsewhere = nn.Sequential(nn.Flatten(), nn.Linear(48, 5, device="meta")).eval()
    with pytest.raises(ValueError, match=r"the model is on meta, but the images are on cpu; move them with images\.to"):
        check_attack(elsewhere, images, labels)
    with pytest.raises(ValueError, match="the images are on cpu, but the labels are on meta; move them together"):
        check_attack(smooth_model(), images, labels.to("meta"))
    weightless = nn.Flatten().eval()
    check_attack(weightless, images, labels)
