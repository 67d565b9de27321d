"""APGD follows its algorithm, agrees with the original, and is blind to the scale of the logits."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from test_attacks import seeded
from torch import nn
from torch.nn import functional as F

from atoplib.attacks.apgd import RHO, _cross_entropy_at_fixed_scale, apgd, checkpoints
from atoplib.attacks.losses import dlr, likely_targets, margin, targeted_dlr
from atoplib.attacks.norms import Ball
from atoplib.decisions import sample_logits
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

RADII = {"linf": 0.1, "l2": 0.5, "l1": 3.0}
has_original = pytest.mark.skipif(find_spec("pyautoattack") is None, reason="pyautoattack is not installed")


def attacked_set(count=24, classes=5, size=4):
    """A model with images that it classifies correctly."""
    layers = nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * (size - 2) ** 2, classes)
    model, images = nn.Sequential(*layers).eval(), torch.rand(count, 3, size, size, generator=seeded(5))
    return model, images, model(images).argmax(dim=1)


def broken(model, adversarial, labels):
    return model(adversarial).argmax(dim=1) != labels


class Recorder(nn.Module):
    """Counts the images that a model is shown, call by call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, images):
        self.sizes.append(len(images))
        return self.model(images)


class Noisy(nn.Module):
    """A random model: another noise on the logits of every sample, the gradient of the plain model in all of
    them."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale, self.generator = model, scale, seeded(7)

    def forward(self, images):
        logits = self.model(images)
        return logits + self.scale * torch.randn(logits.shape, generator=self.generator)


class Coin(nn.Module):
    """Correct with probability 2/3 in every sample whatever it is shown; class 0 is the label."""

    def __init__(self):
        super().__init__()
        self.generator = seeded(3)

    def forward(self, images):
        wrong = torch.rand(len(images), generator=self.generator) < 1 / 3
        logits = torch.zeros(len(images), 4) + images.flatten(1).mean(dim=1, keepdim=True)
        return logits + F.one_hot(wrong.long(), 4) * 5.0


def test_the_step_size_is_looked_at_when_the_paper_says_so():
    # p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert list(checkpoints(100, "l1")) == list(range(4, 101, 4)) and list(checkpoints(3, "l1")) == [1, 2, 3]
    for steps in (1, 2, 7, 10, 33, 1000):
        windows = checkpoints(steps)
        assert list(windows) == [sum(list(windows.values())[: i + 1]) for i in range(len(windows))]
        assert max(windows) <= steps and min(windows.values()) >= 1


def by_the_book(model, image, label, target, start, *, eps, norm, loss, steps):
    """Algorithm 1 for a single image, line by line; returns the best point after every step, or the first
    wrong one."""

    def evaluate(x):
        copy = x.clone().requires_grad_()
        logits = model(copy[None])
        value = loss(logits, *((label[None],) if target is None else (label[None], target[None]))).sum()
        return value.item(), torch.autograd.grad(value, copy)[0], logits.argmax().item() != label.item()

    def project(x):
        if norm == "linf":
            return (image + (x - image).clamp(-eps, eps)).clamp(0, 1)
        change = x.clamp(0, 1) - image  # clipped first: see Ball.project
        return image + change * min(1.0, eps / max(change.norm().item(), 1e-12))

    def direction(gradient):
        return gradient.sign() if norm == "linf" else gradient / gradient.norm()

    x, previous, step_size = start, start, 2 * eps
    value, gradient, wrong = evaluate(x)
    values, best, best_value, best_gradient = [value], x, value, gradient
    if wrong:
        return [x] * steps
    path, last_best, halved, last_look = [], value, True, 0
    for k in range(1, steps + 1):
        z = project(x + step_size * direction(gradient))
        share = 0.75 if k > 1 else 1.0
        x, previous = project(x + share * (z - x) + (1 - share) * (x - previous)), x
        value, gradient, wrong = evaluate(x)
        values.append(value)
        if wrong:
            return path + [x] * (steps - k + 1)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        path.append(best)
        if k in checkpoints(steps):
            increases = sum(values[j + 1] > values[j] for j in range(last_look, k))
            halved = increases <= RHO * (k - last_look) or (not halved and best_value <= last_best)
            if halved:
                step_size, x, gradient = step_size / 2, best, best_gradient
            last_best, last_look = best_value, k
    return path


@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted_dlr"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.3)])
def test_each_image_climbs_as_algorithm_1_would_have_it_climb_alone(norm, eps, loss):
    model, images, labels = attacked_set(16)
    seen = []
    options = {"eps": eps, "norm": norm, "steps": 30}
    found = apgd(
        model,
        images,
        labels,
        loss=loss,
        **options,
        num_targets=1,
        seed=3,
        callback=lambda *given: seen.append(given[2]),
    )
    clean = model(images).detach()
    losses = {"ce": _cross_entropy_at_fixed_scale(clean), "dlr": dlr, "targeted_dlr": targeted_dlr}
    starts = Ball(images, eps, norm).start(seeded(3))
    targets = likely_targets(clean, labels, 1)[0] if loss == "targeted_dlr" else [None] * len(images)
    paths = [
        by_the_book(model, *given, loss=losses[loss], **options)
        for given in zip(images, labels, targets, starts, strict=True)
    ]
    assert 3 <= broken(model, found, labels).sum() <= len(images) - 3
    for step in (1, 5, 15, 30):
        expected = torch.stack([path[step - 1] for path in paths])
        # which of two equal losses is the higher is a matter of rounding, and may lead two elsewhere
        assert ((seen[step - 1] - expected).abs().flatten(1).amax(dim=1) > 2e-3).sum() <= 2


def test_a_misclassified_image_leaves_the_batch_and_a_wrong_one_never_enters():
    model, images, labels = attacked_set()
    labels[:5] = (labels[:5] + 1) % 5
    recorder, seen = Recorder(model).eval(), []

    def callback(step, _steps, adversarial, _losses):
        seen.append(int(broken(model, adversarial, labels).sum()))

    assert torch.equal(apgd(recorder, images, labels, eps=0.03, steps=12, callback=callback)[:5], images[:5])
    sizes = iter(recorder.sizes)
    for remaining in (19, *(24 - count for count in seen[:-1])):  # each is shown the model at its step
        assert remaining in sizes, recorder.sizes
    assert 5 < seen[-1] < 24


class Deceptive(nn.Module):
    """Class 0 is correct; class 1 is the next likeliest, and no pixel changes either; class 2 wins in bright
    images."""

    def forward(self, images):
        still = torch.zeros(len(images))
        return torch.stack([still + 1, still + 0.9, images.mean(dim=(1, 2, 3)) * 4 - 1.2, still], dim=1)


def test_the_second_target_is_tried_on_what_the_first_did_not_break():
    images, labels = torch.full((5, 3, 4, 4), 0.5), torch.zeros(5, dtype=torch.int64)
    for num_targets, expected in ((1, False), (2, True), (9, True)):
        found = apgd(
            Deceptive().eval(), images, labels, eps=0.1, steps=4, loss="targeted_dlr", num_targets=num_targets
        )
        assert broken(Deceptive(), found, labels).tolist() == [expected] * 5


@pytest.mark.parametrize("classes", [3, 6])
def test_with_targets_each_image_is_driven_to_its_own_and_is_done_there_alone(classes):
    model, images, labels = attacked_set(classes=classes)
    targets = (labels + 1 + torch.arange(len(labels)) % (classes - 1)) % classes
    found = apgd(model, images, labels, eps=0.6, steps=30, targets=targets)
    assert (model(found).argmax(dim=1) == targets).float().mean() > 0.8


class Pockets(nn.Module):
    """Wrong only where the first pixel's red is raised by more than 0.05; its gradient leads away from
    there."""

    def forward(self, images):
        red = images[:, 0, 0, 0]
        return torch.stack([red, (red > 0.55).float() * 9 - red, red * 0], dim=1)


def test_every_restart_has_a_start_of_its_own_and_a_start_that_breaks_an_image_counts():
    images, labels = torch.full((40, 3, 4, 4), 0.5), torch.zeros(40, dtype=torch.int64)
    runs = [apgd(Pockets().eval(), images, labels, eps=0.1, steps=1, restarts=n, seed=1) for n in (1, 12)]
    one, many = (broken(Pockets(), found, labels) for found in runs)
    assert 5 < one.sum() < 15 and many.sum() > 30 and (many | ~one).all()


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_apgd_through_a_random_pipeline_raises_the_mean_loss_of_new_samples(norm):
    purifier = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh())
    classifier, images, _ = attacked_set(12)
    pipeline = AToPPipeline(Transform("rt2", noise_std=0.3, grid_size=4), purifier, classifier).eval()
    labels = sample_logits(pipeline, images, num_samples=50).mean(dim=0).argmax(dim=1)
    options = {"steps": 20, "eot_samples": 8, "votes": 9, "rule": "majority", "max_batch": 50}
    found = apgd(pipeline, images, labels, eps=2 * RADII[norm], norm=norm, **options)
    Ball(images, 2 * RADII[norm], norm).check(found)
    clean, attacked = (sample_logits(pipeline, x, num_samples=200).mean(dim=0) for x in (images, found))
    assert (margin(attacked, labels) > margin(clean, labels)).all()


def test_a_coin_that_is_wrong_in_a_third_of_its_samples_is_never_broken_by_a_vote():
    # a single sample of the last step would call a third of the images broken, and one of any step nearly all
    images, labels = torch.rand(30, 3, 4, 4), torch.zeros(30, dtype=torch.int64)
    seen = []
    options = {"eps": 0.1, "steps": 9, "eot_samples": 3, "rule": "majority", "votes": 41, "restarts": 2}
    apgd(Coin().eval(), images, labels, **options, callback=lambda step, *_: seen.append(step))
    assert seen == list(range(1, 19)), "a run ended early, though no image was broken"


def test_an_image_of_a_random_model_leaves_once_no_vote_is_correct():
    model, images, labels = attacked_set(12)
    recorder, seen = Recorder(Noisy(model, 1e-4)).eval(), []
    options = {"eps": 0.3, "steps": 100, "eot_samples": 4, "votes": 9}
    found = apgd(recorder, images, labels, **options, callback=lambda step, *_: seen.append(step))
    assert broken(model, found, labels).all()
    assert seen[-1] == 22, "all images were broken at the first look"
    assert 12 * 9 in recorder.sizes[-3:], "the look asks as many samples as the decision has"


# The original


def original_apgd(model, images, labels, *, eps, norm, steps, loss, seed=0):
    import pyautoattack

    names = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    original = pyautoattack.AutoAttack(model, norm=names[norm], eps=eps, seed=seed)
    original.apgd.n_restarts, original.apgd_targeted.n_target_classes = 1, 3
    for attack in (original.apgd, original.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min, attack.size_decr = (
            max(1, int(x * steps)) for x in (0.22, 0.06, 0.03)
        )
    original.attacks_to_run = [{"ce": "apgd-ce", "dlr": "apgd-dlr", "targeted_dlr": "apgd-t"}[loss]]
    return original.run_standard_evaluation(images, labels)[0]


@has_original
@pytest.mark.parametrize(
    "norm, eps, count, steps, seeds",
    [
        ("linf", 0.3, 12, 15, 1),
        ("l2", 2.0, 12, 15, 1),
        pytest.param("linf", 0.3, 64, 40, 3, marks=pytest.mark.long),
        pytest.param("l2", 2.0, 64, 40, 3, marks=pytest.mark.long),
        pytest.param("l1", 10.0, 64, 40, 8, marks=pytest.mark.long),
    ],
)
def test_apgd_is_at_most_one_image_weaker_than_the_original(digits, defences, norm, eps, count, steps, seeds):
    """In the mean over the seeds: the number that either breaks differs by two or three from seed to seed."""
    model, (images, labels) = defences["AT"], (part[:count] for part in digits)
    ours, theirs = torch.zeros(2, seeds, count, dtype=torch.bool)
    for seed, loss in product(range(seeds), ("ce", "targeted_dlr")):
        options = {"eps": eps, "norm": norm, "steps": steps, "loss": loss, "seed": seed}
        ours[seed] |= broken(model, apgd(model, images, labels, num_targets=3, **options), labels)
        theirs[seed] |= broken(model, original_apgd(model, images, labels, **options), labels)
    assert 0.1 < theirs.float().mean() < 0.9
    assert ours.sum() >= theirs.sum() - seeds and (ours != theirs).sum() <= seeds * max(4, count // 10), (
        ours.sum(dim=1),
        theirs.sum(dim=1),
    )
