"""Square and SPSA break what can be broken through logits alone, keep their budgets, and let broken images go."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.attacks import PGDSettings, check_budget, input_gradient, pgd
from atoplib.attacks.losses import margin
from atoplib.attacks.queries import mean_margin, still_standing
from atoplib.attacks.spsa import SPSASettings, estimate_gradient, spsa
from atoplib.attacks.square import HALVINGS, SquareSettings, share_of_pixels, square
from atoplib.attacks.square import _hill as hill
from atoplib.attacks.square import _hill_and_valley as hill_and_valley
from atoplib.attacks.square import _pairs as pairs
from atoplib.attacks.square import _squares as squares
from atoplib.attacks.square import _stripes as stripes
from atoplib.attacks.square import _tiles as tiles
from atoplib.attacks.square import _windows as windows
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import Verdict, draw_logits

ONE = Verdict()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count=6, size=8, low=0.0, high=1.0):
    return torch.rand(count, 3, size, size, generator=seeded(count)) * (high - low) + low


def smooth_model(classes=4, size=8):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * (size - 2) ** 2, classes)
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


def attack_of(name, norm="linf", eps=None, **options):
    eps = (0.08 if norm == "linf" else 1.0) if eps is None else eps
    if name == "square":
        return square, SquareSettings(eps, norm, **({"queries": 80} | options))
    return spsa, SPSASettings(eps, norm, **({"steps": 10, "samples": 32, "learning_rate": 0.02} | options))


ATTACKS = [(name, norm) for name in ("square", "spsa") for norm in ("linf", "l2")]


@pytest.mark.parametrize("name, norm", ATTACKS)
def test_it_breaks_without_a_gradient_most_of_what_pgd_breaks_and_keeps_its_budget(name, norm):
    body, images = smooth_model(), images_of(32)
    labels = body(images).argmax(dim=1)
    attack, settings = attack_of(name, norm)
    found = attack(NoGradient(body).eval(), images, labels, settings, generator=seeded())
    check_budget(found, images, settings.eps, norm)
    white = pgd(body, images, labels, PGDSettings(settings.eps, norm, steps=20), generator=seeded())
    broken, possible = ((body(x).argmax(dim=1) != labels).sum().item() for x in (found, white))
    assert 8 <= possible and 0.5 * possible <= broken


@pytest.mark.parametrize("name, norm", ATTACKS)
def test_every_point_on_the_way_is_within_the_budget_and_the_steps_are_counted(name, norm):
    images = images_of(4).round()
    attack, settings = attack_of(name, norm)
    seen = []

    def callback(step, steps, adversarial, losses):
        check_budget(adversarial, images, settings.eps, norm)
        assert losses.shape == (4,)
        seen.append((step, steps))

    labels = torch.zeros(4, dtype=torch.int64)
    attack(Sure().eval(), images, labels, settings, generator=seeded(), callback=callback)
    steps = settings.queries if name == "square" else settings.steps
    assert seen == [(step, steps) for step in range(1, steps + 1)]


class Sure(nn.Module):
    """Two classes, linear in the image, and so sure of class 0 that no attack can break it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 8, 8, generator=seeded(1))

    def forward(self, images):
        score = (images * self.weight).flatten(1).sum(dim=1)
        return torch.stack([100 - score, score], dim=1) / 2


@pytest.mark.parametrize("name, norm", ATTACKS)
def test_a_generator_fixes_the_attack_and_the_global_one_is_spared(name, norm):
    model, images = smooth_model(), images_of()
    labels = model(images).argmax(dim=1)
    attack, settings = attack_of(name, norm, eps=0.02, **({"queries": 12} if name == "square" else {"steps": 3}))
    before = torch.get_rng_state()
    first, again, other = (attack(model, images, labels, settings, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["square", "spsa"])
def test_broken_images_leave_the_batch_and_stay_broken(name):
    body, images = smooth_model(), images_of(16)
    labels = body(images).argmax(dim=1)
    labels[5] = (labels[5] + 1) % 4  # misread from the start
    model = NoGradient(body).eval()
    attack, settings = attack_of(name, verdict=ONE, **({"ask_again": 0} if name == "square" else {}))
    path = [] if name == "square" else [images]  # the first query of Square is the image itself
    found = attack(model, images, labels, settings, generator=seeded(), callback=lambda *given: path.append(given[2]))
    wrong = torch.stack([body(x).argmax(dim=1) != labels for x in path])
    assert wrong[0].nonzero().tolist() == [[5]] and wrong[-1].sum() >= 4
    assert (wrong[1:] >= wrong[:-1]).all(), "what was broken came right again"
    judged = wrong if name == "square" else wrong[:-1]  # SPSA does not look at its last step
    ends = [int(row.nonzero()[0]) if row.any() else None for row in judged.T]
    assert len(set(ends)) > 2 and ends[5] == 0
    for i, end in enumerate(ends):
        assert end is None or all(torch.equal(path[end][i], later[i]) for later in path[end:]), "a broken image was moved on"
        assert torch.equal(found[i], path[-1][i])
    looks = sum(len(judged) if end is None else end + 1 for end in ends)
    probes = 0 if name == "square" else sum(len(judged) if end is None else end for end in ends) * settings.samples
    verdicts = sum(end is not None for end in ends)
    assert sum(model.asked) == 1 + looks + probes + verdicts, "1 is the check; who was broken was asked about no more"


@pytest.mark.parametrize("name, norm", ATTACKS)
@pytest.mark.parametrize("max_batch", [3, 64])
def test_no_batch_is_larger_than_max_batch(name, norm, max_batch):
    model, images = NoGradient(smooth_model(), noise=0.01).eval(), images_of()
    attack, settings = attack_of(name, norm, eot_samples=3, **({"queries": 5} if name == "square" else {"steps": 2}))
    attack(model, images, model.body(images).argmax(dim=1), settings, generator=seeded(), max_batch=max_batch)
    assert max(model.asked) <= max_batch


@pytest.mark.parametrize("name", ["square", "spsa"])
def test_a_random_model_is_broken_by_the_verdict_that_is_asked_for(name):
    """Noise flips single draws of most images from the start; a vote over many draws must not be satisfied with that."""
    body, images = smooth_model(), images_of(16)
    labels = body(images).argmax(dim=1)
    model = NoGradient(body, noise=0.3 * margin(body(images), labels).abs().mean().item()).eval()
    vote = Verdict("majority", num_draws=41)
    attack, settings = attack_of(name, eot_samples=4, verdict=vote, eps=0.15)
    found = attack(model, images, labels, settings, generator=seeded())
    broken = body(found).argmax(dim=1) != labels
    assert broken.sum() >= 8
    assert (margin(body(found), labels)[broken] > 0).all()


def test_values_are_averaged_over_the_draws():
    body, images, labels = smooth_model(), images_of(), torch.tensor([0, 1, 2, 3, 0, 1])
    model = NoGradient(body, noise=0.05).eval()
    true = mean_margin(model, images, labels, eot_samples=10_000)
    model.asked.clear()

    def error(draws):
        return (mean_margin(model, images, labels, eot_samples=draws) - true).square().mean().sqrt().item()

    one, many = (sum(error(draws) for _ in range(20)) / 20 for draws in (1, 64))
    assert sum(model.asked) == 20 * 6 * 65
    assert many == pytest.approx(one / 8, rel=0.25)


def test_only_suspects_are_judged():
    body, images = smooth_model(), images_of()
    labels = body(images).argmax(dim=1)
    labels[2:4] = (labels[2:4] + 1) % 4
    model = NoGradient(body).eval()
    suspects = torch.tensor([True, False, True, False, False, False])
    standing = still_standing(model, images, labels, suspects, Verdict("majority", 3))
    assert standing.tolist() == [True, True, False, True, True, True]
    assert sum(model.asked) == 2 * 3
    assert still_standing(model, images, labels, suspects & False, ONE).all() and sum(model.asked) == 6


# -- the parts of Square --


@pytest.mark.parametrize("side", [1, 3, 8])
def test_each_image_has_a_window_of_its_own_that_lies_within_it_and_is_uniform(side):
    rows, columns, inside = windows(images_of(2000), side, seeded())
    assert (inside.flatten(1).sum(dim=1) == side**2).all()
    counts = inside.float().mean(dim=0)[0]
    starts = (torch.arange(8)[:, None] - torch.arange(9 - side)[None, :]).ge(0) & (
        torch.arange(8)[:, None] - torch.arange(9 - side)[None, :]
    ).lt(side)
    share = starts.float().mean(dim=1)
    torch.testing.assert_close(counts, share[:, None] * share[None, :], atol=0.05, rtol=0)
    place = inside[7, 0].nonzero()
    assert rows[7, place[0, 0], 0] == 0 and columns[7, 0, place[0, 1]] == 0


def test_a_square_changes_one_window_of_each_image_to_plus_or_minus_eps():
    images, points = images_of(50, low=0.2, high=0.8), images_of(50, low=0.2, high=0.8)
    found = squares(points, images, 0.1, 0.15, seeded())
    changed = (found != points).any(dim=1)
    side = round((0.15 * 64) ** 0.5)
    assert ((changed.flatten(1).sum(dim=1)) == side**2).all()
    moves = (found - images)[changed[:, None].expand_as(found)]
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, 0.1))
    by_channel = (found - images).sign() * changed[:, None]
    assert (by_channel.flatten(2).sum(dim=2).abs() == side**2).all(), "one sign a channel"
    assert len({tuple(signs) for signs in by_channel.amax(dim=(2, 3)).tolist()}) > 4


def test_the_start_of_linf_is_vertical_stripes():
    images = images_of(20, low=0.2, high=0.8)
    moves = stripes(images, 0.1, seeded()) - images
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, 0.1))
    torch.testing.assert_close(moves, moves[:, :, :1].expand_as(moves))
    assert moves.mean().abs() < 0.02


def plain_hill(height, width):
    """The paper's construction as it reads: squares that grow from the middle, each lifted by 1 / k^2."""
    top = torch.zeros(height, width)
    row, column = height // 2, width // 2
    for k in range(1, max(height, width) // 2 + 2):
        reach = k - 1
        top[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] += 1 / k**2
    return top / top.norm()


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3), (2, 5), (3, 3), (4, 8), (5, 9), (7, 2)])
def test_a_hill_is_the_sum_of_growing_squares(height, width):
    torch.testing.assert_close(hill(height, width, torch.device("cpu")), plain_hill(height, width))


@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_half_of_a_pattern_is_a_hill_and_half_a_valley(side):
    pattern = hill_and_valley(side, torch.device("cpu"))
    assert pattern.norm().item() == pytest.approx(1)
    assert (pattern[: side // 2] > 0).all() and (pattern[side // 2 :] < 0).all()


@pytest.mark.parametrize("height, width", [(8, 8), (12, 17), (2, 3), (32, 32)])
def test_the_l2_start_lies_on_the_sphere_and_is_made_of_tiles(height, width):
    images = torch.full((10, 3, height, width), 0.5)
    moves = tiles(images, 0.3, seeded()) - images
    torch.testing.assert_close(moves.flatten(1).norm(dim=1), torch.full((10,), 0.3))
    side = max(2, min(height, width) // 5)
    rows, columns = height // side * side, width // side * side
    assert (moves.abs().flatten(1) > 0).sum(dim=1).eq(3 * rows * columns).all()


def test_an_l2_proposal_moves_the_energy_of_one_window_to_another_and_stays_on_the_sphere():
    images = torch.full((40, 3, 12, 12), 0.5)
    points = tiles(images, 0.5, seeded(1))
    found = pairs(points, images, 0.5, 0.1, seeded())
    torch.testing.assert_close((found - images).flatten(1).norm(dim=1), torch.full((40,), 0.5))
    side = round((0.1 * 144) ** 0.5)
    changed = ((found - points).abs() > 1e-6).any(dim=1)
    assert (changed.flatten(1).sum(dim=1) <= 2 * side**2).all() and (changed.flatten(1).sum(dim=1) >= side**2).all()
    emptied = ((found - images).abs() < 1e-7).all(dim=1) & ((points - images).abs() > 1e-6).any(dim=1)
    assert emptied.flatten(1).any(dim=1).float().mean() > 0.5
    assert len({tuple(image.flatten().tolist()) for image in changed.int()}) > 30, "each image has windows of its own"


def test_the_squares_shrink_by_the_published_schedule():
    settings = SquareSettings(0.1, queries=10_000, first_share=0.8)
    assert share_of_pixels(1, settings) == 0.8
    for number, query in enumerate(HALVINGS, start=1):
        assert share_of_pixels(query, settings) == pytest.approx(0.8 / 2 ** (number - 1))
        assert share_of_pixels(query + 1, settings) == pytest.approx(0.8 / 2**number)
    short = replace(settings, queries=100)
    assert [share_of_pixels(query, short) / 0.8 for query in (1, 3, 100)] == [0.5**2, 0.5**3, 0.5**9]
    published = replace(short, schedule=10_000)  # as AutoAttack runs it: the share does not depend on the queries
    assert [share_of_pixels(query, published) / 0.8 for query in (1, 11, 100)] == [1, 0.5, 0.5**2]
    with pytest.raises(ValueError, match="schedule must be at least 1"):
        replace(short, schedule=0)


class LuckyAtFirst(nn.Module):
    """A random model whose first calls look far better than all that follow."""

    def __init__(self, lucky_calls):
        super().__init__()
        self.left, self.generator = lucky_calls, seeded(4)

    def forward(self, images):
        self.left -= 1
        luck = 4.0 if self.left >= 0 else 0.0
        noise = 1e-3 * torch.randn(len(images), generator=self.generator)
        gain = images.mean(dim=(1, 2, 3)) * 5
        return torch.stack([torch.full_like(gain, 9.0), gain + luck + noise], dim=1)


def test_asking_again_keeps_a_lucky_draw_from_stopping_the_search():
    images, labels = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)

    def progress(ask_again, calls_before):
        path = []
        settings = SquareSettings(0.2, queries=30, ask_again=ask_again)
        model = LuckyAtFirst(calls_before + 2).eval()  # and the image itself, and the stripes
        square(model, images, labels, settings, generator=seeded(), callback=lambda *given: path.append(given[2]))
        return (path[-1] - path[1]).mean().item()

    assert progress(0, calls_before=1) == 0, "before: the check"
    assert progress(10, calls_before=3) > 0.01, "before: the check, and twice whether the model is random"


# -- the parts of SPSA --


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 4, 4, generator=seeded(1))

    def forward(self, images):
        score = (images * self.weight).flatten(1).sum(dim=1)
        return torch.stack([-score, score], dim=1) / 2


@pytest.mark.parametrize("max_batch", [4, 512])
def test_the_estimated_gradient_tends_to_the_true_one(max_batch):
    model, images = Linear().eval(), images_of(3, size=4, low=0.2, high=0.8)
    labels = torch.tensor([0, 1, 0])
    true = input_gradient(model, images, labels, loss=margin).gradient

    def error(samples):
        settings = SPSASettings(0.1, samples=samples)
        found, value = estimate_gradient(model, images, labels, settings, generator=seeded(), max_batch=max_batch)
        torch.testing.assert_close(
            value, margin(model(images), labels), atol=1e-3, rtol=0
        )  # antithetic pairs cancel on a linear model
        return ((found - true).norm() / true.norm()).item()

    few, many = error(32), error(32 * 64 if max_batch > 4 else 32 * 8)
    assert many == pytest.approx(few / (8 if max_batch > 4 else 8**0.5), rel=0.35)


def test_on_a_linear_model_spsa_ends_at_the_known_optimum():
    model, images = Sure().eval(), images_of(3, low=0.3, high=0.7)
    labels = torch.zeros(3, dtype=torch.int64)
    found = spsa(model, images, labels, SPSASettings(0.1, steps=30, learning_rate=0.02), generator=seeded())
    best = images + 0.1 * model.weight.sign()
    gained, possible = (margin(model(x), labels) - margin(model(images), labels) for x in (found, best))
    assert (gained > 0.85 * possible).all(), gained / possible


@pytest.mark.parametrize(
    "settings, wrong, message",
    [
        *[
            (kind, wrong, message)
            for kind in (SquareSettings, SPSASettings)
            for wrong, message in [
                ({"eps": 0.0}, "eps must be above 0"),
                ({"eps": float("nan")}, "eps must be above 0"),
                ({"eps": 8.0}, r"at most 1 \(images lie in \[0, 1\]\), got 8.0; 8/255\?"),
                ({"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
                ({"eot_samples": 0}, "eot_samples must be at least 1"),
            ]
        ],
        (SquareSettings, {"queries": 0}, "queries and eot_samples must be at least 1, got 0 and 1"),
        (SquareSettings, {"first_share": 0.0}, r"first_share must lie in \(0, 1\]"),
        (SquareSettings, {"ask_again": -1}, r"ask_again must be 0 \(never\) or more"),
        (SPSASettings, {"steps": 0}, "steps and eot_samples must be at least 1, got 0 and 1"),
        (SPSASettings, {"samples": 7}, "samples must be even .* got 7"),
        (SPSASettings, {"samples": 0}, "samples must be even"),
        (SPSASettings, {"delta": 0.0}, "delta and learning_rate must be above 0"),
        (SPSASettings, {"learning_rate": float("nan")}, "delta and learning_rate must be above 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**{"eps": 0.1} | wrong)


@pytest.mark.parametrize("name", ["square", "spsa"])
def test_a_model_in_train_mode_is_refused(name):
    attack, settings = attack_of(name)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        attack(smooth_model().train(), images_of(), torch.zeros(6, dtype=torch.int64), settings)


def wobbly(noise=0.5):
    """A pipeline whose noise hides what one small change does."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)).eval()
    purifier = nn.Sequential(nn.Conv2d(5, 3, 1), nn.Hardtanh()).eval()
    with torch.no_grad():
        purifier[0].weight.zero_()
        purifier[0].bias.zero_()
        purifier[0].weight[range(3), range(3)] = 1.0
        body[1].weight.copy_(torch.randn(3, 192, generator=seeded(1)) / 3)
    return AToPPipeline(TransformSettings("rt2", missing_rate=0.1, noise_std=noise, grid_size=4), purifier, body).eval()


class Hidden(nn.Module):
    """A pipeline whose dice cannot be held."""

    def __init__(self, pipeline):
        super().__init__()
        self.pipeline = pipeline

    def forward(self, images):
        return self.pipeline(images)


@pytest.mark.parametrize("name, effort", [("square", {"queries": 120}), ("spsa", {"steps": 15, "samples": 8})])
def test_held_dice_let_a_search_see_through_the_noise(name, effort):
    pipeline, images = wobbly(), images_of(60, low=0.2, high=0.8)
    with torch.no_grad():
        labels = pipeline.classifier(images).argmax(dim=1)
    attack, settings = attack_of(name, eps=0.1, **effort)
    share = {}
    for model in (Hidden(pipeline).eval(), pipeline):
        pipeline.reseed(1)
        found = attack(model, images, labels, settings, generator=seeded(2))
        pipeline.reseed(3)
        share[type(model)] = float((draw_logits(pipeline, found, num_draws=20).argmax(dim=2) == labels).float().mean())
    assert share[AToPPipeline] < share[Hidden] - 0.05, share


def test_held_draws_are_the_same_for_two_calls_and_others_in_every_part():
    pipeline, drawn = wobbly(), []
    pipeline.register_forward_hook(lambda _module, _inputs, logits: drawn.append(logits.clone()))
    images, labels = images_of(1).expand(6, -1, -1, -1), torch.zeros(6, dtype=torch.int64)
    first, again = (mean_margin(pipeline, images, labels, eot_samples=2, max_batch=6, seed=5) for _ in range(2))
    assert torch.equal(first, again) and len(drawn) == 4
    assert len(torch.cat(drawn[:2]).unique(dim=0)) == 12, "one image, six times, in two parts: every draw another"
