"""Square breaks what can be broken through logits alone, keeps its ball, and lets broken images
go."""

from importlib.util import find_spec

import pytest
import torch
from test_attacks import seeded
from torch import nn

from atoplib.attacks import Ball, pgd, queries
from atoplib.attacks.black_box import square
from atoplib.attacks.losses import margin
from atoplib.attacks.queries import Search, broken_by, mean_margin
from atoplib.contract import adapt
from atoplib.decisions import sample_logits
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform


def images_of(count=6, size=8, low=0.0, high=1.0):
    return torch.rand(count, 3, size, size, generator=seeded(count)) * (high - low) + low


def smooth_model(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 36, classes)
    ).eval()


class NoGradient(nn.Module):
    """Logits without a graph, and a record of how many images it was asked about."""

    def __init__(self, body, noise=0.0):
        super().__init__()
        self.body, self.noise, self.asked = body, noise, []
        self.generator = seeded(9)

    def forward(self, images):
        assert not images.requires_grad
        assert images.min() >= 0 and images.max() <= 1
        self.asked.append(len(images))
        with torch.no_grad():
            logits = self.body(images)
        return logits + self.noise * torch.randn(logits.shape, generator=self.generator)


class Sure(nn.Module):
    """Two classes, linear in the image, and so sure of class 0 that no attack can break it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 8, 8, generator=seeded(1))

    def forward(self, images):
        score = (images * self.weight).flatten(1).sum(dim=1)
        return torch.stack([100 - score, score], dim=1) / 2


def attack(model, images, labels, *, norm="linf", eps=None, **options):
    eps = (0.08 if norm == "linf" else 1.0) if eps is None else eps
    return square(model, images, labels, eps=eps, norm=norm, **({"queries": 80} | options))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_breaks_without_a_gradient_most_of_what_pgd_breaks_and_keeps_its_ball(norm):
    body, images = smooth_model(), images_of(32)
    labels, eps = body(images).argmax(dim=1), 0.08 if norm == "linf" else 1.0
    found = attack(NoGradient(body).eval(), images, labels, norm=norm)
    Ball(images, eps, norm).check(found)
    white = pgd(body, images, labels, eps=eps, norm=norm, steps=20)
    broken, possible = ((body(x).argmax(dim=1) != labels).sum().item() for x in (found, white))
    assert 8 <= possible and 0.5 * possible <= broken


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_point_on_the_way_is_within_the_ball_and_the_steps_are_counted(norm):
    images, ball, seen = images_of(4).round(), None, []
    ball = Ball(images, 0.08 if norm == "linf" else 1.0, norm)

    def callback(step, steps, adversarial, losses):
        ball.check(adversarial)
        assert losses.shape == (4,)
        seen.append((step, steps))

    attack(Sure().eval(), images, torch.zeros(4, dtype=torch.int64), norm=norm, callback=callback)
    assert seen == [(step, 80) for step in range(1, 81)]


def test_broken_images_leave_the_batch_and_stay_broken():
    body, images = smooth_model(), images_of(16)
    labels = body(images).argmax(dim=1)
    labels[5] = (labels[5] + 1) % 4  # misclassified from the start
    model, path = NoGradient(body).eval(), []  # the first query is the image itself
    found = attack(adapt(model), images, labels, callback=lambda *given: path.append(given[2]))
    wrong = torch.stack([body(x).argmax(dim=1) != labels for x in path])
    assert wrong[0].nonzero().tolist() == [[5]] and wrong[-1].sum() >= 4
    assert (wrong[1:] >= wrong[:-1]).all(), "what was broken became correct again"
    ends = [int(row.nonzero()[0]) if row.any() else None for row in wrong.T]
    assert len(set(ends)) > 2 and ends[5] == 0
    for i, end in enumerate(ends):
        assert end is None or all(torch.equal(path[end][i], later[i]) for later in path[end:]), (
            "it was moved on"
        )
        assert torch.equal(found[i], path[-1][i])
    looks = sum(len(wrong) if end is None else end + 1 for end in ends)
    decisions = sum(end is not None for end in ends)
    first = 1 + 2 * 8  # the check, and whether the model is random
    assert sum(model.asked) == first + looks + decisions, "who was broken was asked about no more"


def test_a_random_model_is_broken_by_the_rule_that_is_asked_for():
    """Noise flips single samples of most images from the start; a vote over many must not be satisfied with
    that."""
    body, images = smooth_model(), images_of(16)
    labels = body(images).argmax(dim=1)
    model = NoGradient(body, noise=0.3 * margin(body(images), labels).abs().mean().item()).eval()
    found = attack(model, images, labels, eot_samples=4, rule="majority", votes=41, eps=0.15)
    assert (body(found).argmax(dim=1) != labels).sum() >= 8


def test_values_are_averaged_over_the_samples():
    body, images, labels = smooth_model(), images_of(), torch.tensor([0, 1, 2, 3, 0, 1])
    model = NoGradient(body, noise=0.05).eval()
    true = mean_margin(model, images, labels, eot_samples=10_000, max_batch=4096)

    def error(samples):
        return (mean_margin(model, images, labels, eot_samples=samples) - true).square().mean().sqrt().item()

    one, many = (sum(error(samples) for _ in range(20)) / 20 for samples in (1, 64))
    assert many == pytest.approx(one / 8, rel=0.25)


def test_only_suspects_are_judged_and_a_rule_of_the_model_is_turned_round_for_targets():
    body, images = smooth_model(), images_of()
    labels = body(images).argmax(dim=1)
    labels[2:4] = (labels[2:4] + 1) % 4
    model = NoGradient(body).eval()
    options = {"rule": "majority", "votes": 3, "eot_samples": 1, "seed": 0, "max_batch": 256}
    search, before = Search(model, images, labels, targets=None, **options), sum(model.asked)
    search.let_go(torch.tensor([True, False, True, False, False, False]))
    assert search.active.tolist() == [0, 1, 3, 4, 5] and sum(model.asked) == before + 2
    classes = torch.tensor([[0, 0, 0], [0, 1, 2], [2, 2, 0]]).T  # votes of three images
    logits = torch.nn.functional.one_hot(classes, 3).float()
    zeros, twos = torch.zeros(3, dtype=torch.int64), torch.full((3,), 2)
    for rule, without, with_targets in (
        ("any", [False, False, False], [False, False, False]),
        ("worst_of_n", [False, True, True], [False, True, True]),
        ("majority", [False, False, True], [False, False, True]),
    ):
        assert broken_by(logits, zeros, None, rule).tolist() == without
        assert broken_by(logits, zeros, twos, rule).tolist() == with_targets


def test_the_best_of_many_noisy_candidates_is_chosen_again_on_votes(monkeypatch):
    """The margin rises from candidate to candidate, by far less than the noise of a single value."""
    images, labels = torch.zeros(200, 3, 4, 4), torch.zeros(200, dtype=torch.int64)

    def noisy(x):
        score = 1.5 * x.flatten(1).mean(dim=1) - 2.5 + torch.randn(len(x))
        return torch.stack([-score, score], dim=1) / 2

    def chosen(finalists):
        monkeypatch.setattr(queries, "FINALISTS", finalists)
        torch.manual_seed(0)
        search = Search(
            noisy, images, labels, targets=None, rule="any", votes=10, eot_samples=1, seed=0, max_batch=999
        )
        return search.try_all(lambda number, rows: images[rows] + number / 60, 60, None).mean()

    assert chosen(queries.FINALISTS) > chosen(1) + 0.02


@pytest.mark.long
@pytest.mark.skipif(find_spec("pyautoattack") is None, reason="pyautoattack is not installed")
@pytest.mark.parametrize("norm, eps", [("linf", 0.31), ("l2", 3.0)])
def test_square_breaks_as_many_images_as_the_original(digits, defences, norm, eps):
    import pyautoattack

    model, (images, labels) = defences["AT"], digits
    original = pyautoattack.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    original.square.n_queries, original.attacks_to_run = 150, ["square"]
    theirs = original.run_standard_evaluation(images, labels)[0]
    ours = square(model, images, labels, eps=eps, norm=norm, queries=150, schedule=10_000)
    broken = [int((model(found).argmax(dim=1) != labels).sum()) for found in (ours, theirs)]
    assert 2 < broken[1] < 62 and abs(broken[0] - broken[1]) <= 5, broken


class LuckyAtFirst(nn.Module):
    """A random model whose first calls look far better than all that follow."""

    def __init__(self, lucky_calls):
        super().__init__()
        self.left, self.generator = lucky_calls, seeded(4)

    def forward(self, images):
        self.left -= 1
        gain = images.mean(dim=(1, 2, 3)) * 5 + 1e-3 * torch.randn(len(images), generator=self.generator)
        return torch.stack([torch.full_like(gain, 9.0), gain + 4.0 * (self.left >= 0)], dim=1)


def test_asking_again_keeps_a_lucky_sample_from_stopping_the_search():
    images, labels, moved = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64), []
    for ask_again in (0, 10):
        path = []
        # the check, twice whether it is random, the image itself, and the stripes
        square(
            adapt(LuckyAtFirst(5).eval()), images, labels, eps=0.2, queries=30, ask_again=ask_again,
            callback=lambda *given, path=path: path.append(given[2]),
        )  # fmt: skip
        moved.append((path[-1] - path[1]).mean().item())
    assert moved[0] == 0 and moved[1] > 0.01


class Hidden(nn.Module):
    """A pipeline whose sample cannot be fixed."""

    def __init__(self, pipeline):
        super().__init__()
        object.__setattr__(self, "pipeline", pipeline)

    def forward(self, images):
        return self.pipeline(images)


def test_common_random_numbers_let_a_search_see_through_the_noise():
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)).eval()
    purifier = nn.Sequential(nn.Conv2d(5, 3, 1), nn.Hardtanh()).eval()
    with torch.no_grad():
        purifier[0].weight.zero_()
        purifier[0].bias.zero_()
        purifier[0].weight[range(3), range(3)] = 1.0
        body[1].weight.copy_(torch.randn(3, 192, generator=seeded(1)) / 3)
    pipeline = AToPPipeline(
        Transform("rt2", missing_rate=0.1, noise_std=0.5, grid_size=4), purifier, body
    ).eval()
    images = images_of(40, low=0.2, high=0.8)
    with torch.no_grad():
        labels = pipeline.classifier(images).argmax(dim=1)
    share = {}
    for model in (Hidden(pipeline).eval(), pipeline):
        pipeline.reseed(1)
        found = attack(model, images, labels, eps=0.1, queries=60, seed=2)
        pipeline.reseed(3)
        share[type(model)] = float(
            (sample_logits(pipeline, found, num_samples=20).argmax(dim=2) == labels).float().mean()
        )
    assert share[AToPPipeline] < share[Hidden] - 0.05, share
