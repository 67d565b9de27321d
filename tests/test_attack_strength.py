"""What the attacks find on the kit's own digits, what must not change it, and how restarts choose."""

import numpy as np
import pytest
import torch
from test_attacks import seeded
from torch import nn

from atoplib.attacks import Ball, EOTWrapper, PassCounter, flow, pgd, pgd_ensemble, third_party
from atoplib.attacks.queries import strongest_attempt
from atoplib.decisions import reseed, sample_logits

STRONG = {"steps": 20, "eot_samples": 1, "restarts": 8}


def accuracy(model, images, labels, samples=1):
    return float((sample_logits(model, images, num_samples=samples).argmax(dim=2) == labels).float().mean())


def independent(model, images, labels, eps, steps, restarts, samples=1):
    """Sign ascent on targeted margins from random starts, written without a look at the kit's: what remains
    correct."""
    correct, best = torch.ones(len(images), dtype=torch.bool), images.clone()
    for restart in range(restarts):
        rows = correct.nonzero().flatten()
        x, y = images[rows], labels[rows]
        logits = sum(model(x).detach() for _ in range(samples))
        rank = logits.scatter(1, y[:, None], -1e9).argsort(1, descending=True)[:, restart % 4]
        a = (x + eps * (2 * torch.rand(x.shape, generator=seeded(restart)) - 1)).clamp(0, 1)
        velocity = torch.zeros_like(a)
        for step in range(steps):
            a = a.detach().requires_grad_()
            z = model(a.repeat(samples, 1, 1, 1)).view(samples, len(x), -1).mean(dim=0)
            picked = z.gather(1, rank[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]
            (g,) = torch.autograd.grad(picked.sum(), a)
            velocity = 0.7 * velocity + g / g.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-20)
            size = eps * (1 - step / steps) * 0.8
            a = a.detach() + size * velocity.sign()
            a = torch.minimum(torch.maximum(a, x - eps), x + eps).clamp(0, 1)
        best[rows] = a
        correct[rows] = model(a).argmax(1) == y
    return best


def test_an_independent_attack_of_as_many_passes_finds_no_more_than_its_noise(defences, digits):
    model, (images, labels) = defences["AT"], (part[:32] for part in digits)
    ours = pgd_ensemble(model, images, labels, eps=0.3, steps=20, eot_samples=1, restarts=3)
    other = independent(model, images, labels, 0.3, 20, 3)
    assert accuracy(model, ours, labels) <= accuracy(model, other, labels) + 1 / 32


@pytest.mark.long
def test_an_independent_attack_on_the_random_defence_finds_no_more_than_its_noise(defences, digits):
    model, (images, labels) = defences["AToP"].freeze_for_attack(), digits
    ours = pgd_ensemble(model, images, labels, eps=0.3, restarts=1)
    other = independent(model, images, labels, 0.3, 80, 1, samples=5)
    assert accuracy(model, ours, labels, 40) <= accuracy(model, other, labels, 40) + 3 / 64


@pytest.mark.parametrize("norm, eps, most", [("l1", 12.0, 10), ("l2", 2.0, 20)])
def test_smoothed_restarts_from_outside_find_what_a_run_within_does_not(defences, digits, norm, eps, most):
    """One start in the ball and a step that never falls keep 34 (l1) and 33 (l2) of 40; restarts from outside
    leave 16 to 17 and 30, smoothed ones 4 to 6 and 15 to 16."""
    model, (images, labels) = defences["AT"], (part[:40] for part in digits)
    weak = pgd(model, images, labels, eps=eps, norm=norm, steps=40, shrink=False)
    strong = pgd_ensemble(model, images, labels, eps=eps, norm=norm, **STRONG | {"steps": 30})
    assert 40 * accuracy(model, strong, labels) <= most < 40 * accuracy(model, weak, labels)


def test_moving_pixels_break_most_digits_of_at(defences, digits):
    """A smoothness term weighed against logits printed 37 to 41 % where 1 % is reachable. These runs leave
    0 to 1 of the 64 digits, without a blurred gradient 4 to 11."""
    left = flow(defences["AT"], *digits, eot_samples=1, restarts=5)
    assert 64 * accuracy(defences["AT"], left, digits[1]) <= 3


@pytest.fixture
def batch():
    layers = nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 36, 5)
    model = nn.Sequential(*layers).double().eval()
    images = torch.rand(16, 3, 8, 8, generator=seeded()).double()
    return model, images, model(images).argmax(dim=1)


def test_an_image_that_is_wrong_but_not_its_target_is_attacked_on(batch):
    """With targets an image leaves, and counts as broken, only when it is classified as its target."""
    model, images, found = batch
    labels, targets = (found + 1) % 5, (found + 2) % 5  # wrong from the start
    counter = PassCounter(model)
    found = pgd(counter, images, labels, eps=0.5, steps=20, restarts=2, early_stop=1, targets=targets)
    reached = (model(found).argmax(dim=1) == targets).double().mean()
    assert reached > 0.6 and counter.gradient_passes > 2 * 16


def test_of_several_losses_each_restart_takes_the_next_in_turn(batch):
    called, (model, images, labels) = [], batch
    losses = [lambda logits, _, mark=mark: called.append(mark) or logits.sum(dim=-1) for mark in "abc"]
    pgd(model, images, labels, eps=1e-6, steps=1, restarts=5, loss=losses)
    assert called == [*"abcab"]


def test_broken_images_cost_no_further_passes(batch):
    model, images, labels = batch
    labels = torch.cat([(labels[:4] + 1) % 5, labels[4:]])
    counter = PassCounter(model)
    found = pgd(counter, images, labels, eps=1e-4, steps=5, restarts=3)
    assert counter.gradient_passes == 3 * 5 * 12 + 1 and torch.equal(found[:4], images[:4])


class Coin(nn.Module):
    """Wrong with a probability that is the brightness of the image."""

    def __init__(self):
        super().__init__()
        self.generator = seeded()

    def forward(self, images):
        wrong = torch.rand(len(images), generator=self.generator) < images.mean(dim=(1, 2, 3))
        noise = torch.rand(1, generator=self.generator) * 0.1  # random at every brightness
        return torch.stack([-(wrong * 2.0 - 1), wrong * 2.0 - 1], dim=1) + noise


def constant(value):
    return lambda rows, report: torch.full((len(rows), 3, 2, 2), value)


@pytest.mark.parametrize("order", [(0.2, 0.8, 0.5), (0.8, 0.2, 0.5)])
def test_of_several_attempts_the_one_with_the_most_lost_votes_is_kept(order):
    images, labels = torch.full((50, 3, 2, 2), 0.1), torch.zeros(50, dtype=torch.int64)
    assert (
        strongest_attempt(Coin(), images, labels, [(1, constant(value)) for value in order], votes=40) == 0.8
    ).float().mean() > 0.95


@pytest.mark.parametrize("rule, made", [("any", 3), ("majority", 1), ("mean_softmax", 1), ("worst_of_n", 1)])
def test_an_image_takes_part_in_a_further_attempt_until_the_rule_calls_it_broken(rule, made):
    images, labels, seen = torch.full((50, 3, 2, 2), 0.001), torch.zeros(50, dtype=torch.int64), []

    def attempt(rows, report):
        seen.append(len(rows))
        return torch.full((len(rows), 3, 2, 2), 0.8)

    strongest_attempt(Coin(), images, labels, [(1, attempt)] * 3, rule=rule, votes=40)
    assert sum(count > 25 for count in seen) == made


def test_the_callback_of_restarts_counts_all_steps_and_shows_all_images(batch):
    model, images, labels = batch
    seen = []
    found = pgd_ensemble(model, images, labels, eps=0.01, steps=3, eot_samples=1, restarts=2, early_stop=0,
                         callback=lambda *given: seen.append(given))  # fmt: skip
    assert [(step, steps) for step, steps, *_ in seen] == [(number, 6) for number in range(1, 7)]
    for _, _, adversarial, losses in seen:
        Ball(images, 0.01, "linf").check(adversarial)
        assert losses.shape == (16,)
    Ball(images, 0.01, "linf").check(found)


STEPS, SAMPLES = 15, 4
BALLS = {"linf": (0.3, 0.1), "l2": (2.0, 0.34)}  # eps, alpha


def by_torchattacks(model, images, labels, norm):
    (eps, alpha), name = BALLS[norm], {"linf": "PGD", "l2": "PGDL2"}[norm]
    return third_party(model, images, labels, name=name, eps=eps, norm=norm, steps=STEPS, alpha=alpha, seed=1)


def by_foolbox(model, images, labels, norm):
    foolbox = pytest.importorskip("foolbox")
    eps, alpha = BALLS[norm]
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    return kind(abs_stepsize=alpha, steps=STEPS).run(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilon=eps
    )


def by_art(model, images, labels, norm):
    evasion = pytest.importorskip("art.attacks.evasion")
    classification = pytest.importorskip("art.estimators.classification")
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu", "input_shape": (3, 32, 32), "nb_classes": 10}
    wrapped = classification.PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), **options)
    options = dict(zip(("eps", "eps_step"), BALLS[norm], strict=True)) | {
        "max_iter": STEPS,
        "num_random_init": 1,
        "batch_size": 64,
    }
    kind = {"linf": np.inf, "l2": 2}[norm]
    attack = evasion.ProjectedGradientDescentPyTorch(wrapped, norm=kind, verbose=False, **options)
    return torch.from_numpy(attack.generate(images.numpy(), y=labels.numpy()))


@pytest.mark.parametrize("by", [by_torchattacks, by_foolbox, by_art])
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name, samples", [("AT", 1), pytest.param("AToP", SAMPLES, marks=pytest.mark.long)])
def test_no_other_library_beats_ours_at_equal_passes(by, norm, name, samples, defences, digits):
    model, (images, labels) = defences[name], digits
    reseed(model, 0)
    other = by(EOTWrapper(model, samples).eval(), images, labels, norm).detach()
    eps, alpha = BALLS[norm]
    Ball(images, eps, norm).check(other, tolerance=1e-5)
    assert not any(part.training for part in model.modules()), "it left the model in train mode"
    settings = {"eps": eps, "norm": norm, "steps": STEPS, "eot_samples": samples}
    same, strong = (
        pgd(model, images, labels, alpha=alpha, **settings),
        pgd_ensemble(model, images, labels, restarts=1, **settings),
    )
    votes = 1 if samples == 1 else 20
    left = [
        float((sample_logits(model, x, num_samples=votes).argmax(dim=2) == labels).float().mean())
        for x in (other, same, strong)
    ]
    assert left[0] < 0.95, "it did not attack at all"
    assert left[1] < left[0] + 6 / 64 and left[2] < left[0] + 3 / 64, left
