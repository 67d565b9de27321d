"""FAB finds the nearest boundary, AutoAttack's parts hand on what stands, and its results are those of the original."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from atoplib.attacks import (
    AutoAttackSettings,
    FABSettings,
    PGDSettings,
    ascend,
    autoattack,
    autoattack_parts,
    check_budget,
    fab,
    margin,
)
from atoplib.attacks.fab import towards_plane
from atoplib.attacks.norms import perturbation_size
from atoplib.data import load_dataset, to_float
from atoplib.verdicts import Verdict, judge


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count, low=0.0, high=1.0):
    return torch.rand(count, 3, 4, 4, generator=seeded(5)) * (high - low) + low


class Linear(nn.Module):
    """Logits that are linear in the pixels: the distance to every boundary is known."""

    def __init__(self, classes=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 48, generator=seeded(1)))

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weight.T


def distances(model, images, labels, norm):
    """From each image to the nearest boundary of its class, in a box that is not felt."""
    logits = model(images).detach()
    gaps = logits.gather(1, labels[:, None]) - logits
    normals = model.weight.detach()[labels][:, None] - model.weight.detach()[None]
    found = gaps / normals.norm(p=1 if norm == "linf" else 2, dim=2).clamp_min(1e-9)
    return found.scatter(1, labels[:, None], torch.inf).amin(dim=1)


# FAB


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 1.5])
def test_a_move_towards_a_plane_is_the_smallest_one_within_the_box(norm, share):
    points, normal = images_of(40), torch.randn(40, 3, 4, 4, generator=seeded(2))
    points[::4] = points[::4].round()
    normal[1::4, 0] = 0
    normal[2::4] *= 1e-6
    sign = torch.randn(40, generator=seeded(3)).sign()
    toward = (normal * sign.view(-1, 1, 1, 1)).sign()
    room = torch.where(toward > 0, 1 - points, points)
    most = (normal.abs() * room).flatten(1).sum(dim=1)  # the largest gap that the box lets close
    gap = sign * share * most
    move = towards_plane(points, normal, gap, norm)
    check = (points + move).clamp(0, 1) - points
    torch.testing.assert_close(move, check, atol=1e-6, rtol=0)
    closed = (normal * move).flatten(1).sum(dim=1)
    torch.testing.assert_close(closed, gap.sign() * gap.abs().clamp_max(most), rtol=1e-4, atol=1e-9)
    if share > 1:
        return
    # by bisection on the common factor, in double precision
    low, high = torch.zeros(40, 1).double(), torch.full((40, 1), 1e14).double()
    weight, room = normal.abs().flatten(1).double(), room.flatten(1).double()
    rate = torch.ones_like(weight) if norm == "linf" else weight
    for _ in range(200):
        middle = (low + high) / 2
        enough = (weight * torch.minimum(middle * rate, room)).sum(dim=1, keepdim=True) >= gap.abs()[:, None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    expected = torch.minimum(high * rate, room) * (weight > 0)
    torch.testing.assert_close(move.flatten(1).abs().double(), expected, rtol=1e-3, atol=1e-5)


def test_a_plane_without_a_normal_or_a_gap_moves_nothing():
    points, normal = images_of(2), torch.ones(2, 3, 4, 4)
    normal[0] = 0
    for norm in ("linf", "l2"):
        assert towards_plane(points, normal, torch.tensor([1.0, 0.0]), norm).abs().max() == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_breaks_exactly_the_images_whose_boundary_lies_within_eps(norm):
    model, images = Linear().eval(), images_of(40, 0.35, 0.65)
    labels = model(images).argmax(dim=1)
    known = distances(model, images, labels, norm)
    eps = known.median().item() + 1e-4
    assert eps < 0.35 or norm == "l2"  # the box is not felt
    seen = []
    found = fab(model, images, labels, FABSettings(eps, norm, steps=30), callback=lambda step, *_: seen.append(step))
    check_budget(found, images, eps, norm)
    clear = (known - eps).abs() > 0.02 * eps
    assert torch.equal((~judge(model, found, labels))[clear], (known < eps)[clear]) and clear.sum() > 30
    assert seen[-1] == 30 * 4, "all targets are tried on the images that stand"


@pytest.mark.parametrize("norm, eps", [("linf", 0.002), ("l2", 0.015)])
def test_where_the_nearest_error_lies_outside_the_ball_its_projection_is_returned(norm, eps):
    model, images = Linear().eval(), images_of(10, 0.4, 0.6)
    labels = model(images).argmax(dim=1)
    far = distances(model, images, labels, norm) > eps
    found = fab(model, images, labels, FABSettings(eps, norm, steps=20))
    assert far.sum() > 3 and judge(model, found, labels)[far].all()
    torch.testing.assert_close(perturbation_size(found - images, norm)[far], torch.full((10,), eps)[far])
    assert (margin(model(found), labels) > margin(model(images), labels))[far].all()


def test_fab_lets_broken_images_leave_and_asks_for_no_larger_batch_than_allowed():
    model, images = Linear().eval(), images_of(20, 0.35, 0.65)
    labels = model(images).argmax(dim=1)
    sizes = []
    model.register_forward_pre_hook(lambda _model, given: sizes.append(len(given[0])))
    whole = fab(model, images, labels, FABSettings(0.3, steps=10))
    assert not judge(model, whole, labels).any() and sum(sizes) < 20 * 2 * 10
    sizes.clear()
    parts = fab(model, images, labels, FABSettings(0.3, steps=10), max_batch=7)
    torch.testing.assert_close(parts, whole)
    assert max(sizes) <= 8


# AutoAttack


class Dice(nn.Module):
    """A random model: the noise of every draw is smaller than most margins."""

    def __init__(self, model, scale=0.3):
        super().__init__()
        self.model, self.scale, self.generator = model, scale, seeded(4)

    def forward(self, images):
        logits = self.model(images)
        return logits + self.scale * torch.randn(logits.shape, generator=self.generator)


QUICK = AutoAttackSettings(0.05, steps=5, queries=20)


def test_the_versions_hold_the_attacks_of_the_original_with_its_numbers():
    standard = autoattack_parts(AutoAttackSettings(0.1, "l2"))
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [part.steps for part in standard.values()] == [100, 900, 900, 5000]
    assert [part.settings.eps for part in standard.values()] == [0.1] * 4
    assert [part.settings.norm for part in standard.values()] == ["l2"] * 4
    rand = autoattack_parts(AutoAttackSettings(0.1, version="rand", verdict=Verdict("mean_softmax", 30)))
    assert list(rand) == ["apgd-ce", "apgd-dlr"]
    for part, loss in zip(rand.values(), ("ce", "dlr"), strict=True):
        given = part.settings
        assert (given.loss, given.steps, given.eot_samples, given.restarts) == (loss, 100, 20, 1)
        assert given.verdict == Verdict("mean_softmax", 30)


@pytest.mark.parametrize("norm, eps", [("linf", 0.04), ("l2", 0.2)])
def test_autoattack_breaks_what_any_part_breaks_and_attacks_it_no_more(norm, eps):
    model, images = Linear(10).eval(), images_of(40)
    labels = model(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 10
    settings = replace(QUICK, norm=norm, eps=eps)
    seen = []

    def callback(step, steps, adversarial, losses):
        assert adversarial.shape == images.shape and losses.shape == (40,)
        check_budget(adversarial, images, eps, norm)
        seen.append((step, steps))

    found = autoattack(model, images, labels, settings, generator=seeded(), callback=callback)
    check_budget(found, images, eps, norm)
    broken = ~judge(model, found, labels)
    assert torch.equal(found[:3], images[:3])
    assert 8 < broken.sum() < 36
    for part in autoattack_parts(settings).values():
        alone = part.attack(model, images, labels, part.settings, generator=seeded())
        assert (broken | judge(model, alone, labels)).all()
    assert {steps for _, steps in seen} == {5 + 45 + 45 + 20} and [step for step, _ in seen] == sorted(dict(seen))
    # what stands is not the clean image, but the candidate nearest to an error
    assert (margin(model(found), labels) > margin(model(images), labels))[~broken].all()


def test_the_parts_see_only_what_the_ones_before_left_standing():
    model, images = Linear(10).eval(), images_of(30)
    labels = model(images).argmax(dim=1)
    first = autoattack_parts(QUICK)["apgd-ce"]
    standing = judge(model, first.attack(model, images, labels, first.settings, generator=seeded()), labels)
    sizes = {}

    def callback(step, _steps, adversarial, losses):
        sizes[step] = int((losses != 0).sum())

    autoattack(model, images, labels, QUICK, generator=seeded(), callback=callback)
    assert sizes[1] == 30 and 0 < int(standing.sum()) < 30
    assert sizes[6] == int(standing.sum())


def test_standard_is_refused_on_a_random_model_and_rand_judges_by_a_vote():
    model, images = Dice(Linear()).eval(), images_of(20)
    labels = model.model(images).argmax(dim=1)
    with pytest.raises(ValueError, match="'standard' of AutoAttack is for deterministic models, but this one is random"):
        autoattack(model, images, labels, QUICK)
    with pytest.raises(ValueError, match="FAB needs a deterministic model"):
        fab(model, images, labels, FABSettings(0.1))
    rand = replace(QUICK, version="rand", steps=20, eot_samples=4, verdict=Verdict("majority", 15))
    with pytest.raises(ValueError, match="rests on a single one"):
        autoattack(model, images, labels, replace(rand, verdict=Verdict()))
    found = autoattack(model, images, labels, rand, generator=seeded())
    check_budget(found, images, QUICK.eps, "linf")
    # by the vote the noise does not count: the images that fall are those whose boundary lies within eps
    known = distances(model.model, images, labels, "linf")
    clear = (known - QUICK.eps).abs() > 0.2 * QUICK.eps
    right = judge(model, found, labels, Verdict("majority", 201))
    assert clear.sum() > 12 and torch.equal(right[clear], (known > QUICK.eps)[clear])


def test_a_deterministic_model_may_be_attacked_by_rand_with_any_verdict():
    model, images = Linear().eval(), images_of(12)
    labels = model(images).argmax(dim=1)
    settings = replace(QUICK, version="rand", verdict=Verdict())
    assert (~judge(model, autoattack(model, images, labels, settings, generator=seeded()), labels)).any()


@pytest.mark.parametrize("version, classes", [("standard", 3), ("rand", 2)])
def test_too_few_classes_are_refused_before_anything_runs(version, classes):
    model, images, seen = Linear(classes).eval(), images_of(4), []
    settings = replace(QUICK, version=version)
    with pytest.raises(ValueError, match=f"{version}' needs at least {classes + 1} classes, but the model has {classes}"):
        autoattack(model, images, model(images).argmax(dim=1), settings, callback=lambda step, *_: seen.append(step))
    assert seen == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eps": -0.1}, "eps must be above 0"),
        ({"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
        ({"version": "plus"}, "unknown version 'plus'; allowed: standard, rand"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"eot_samples": 0}, "eot_samples must be at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_settings_of_autoattack_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AutoAttackSettings(**{"eps": 0.1} | wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eps": 2.0}, "eps of the linf norm must be at most 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"alpha_max": 1.0}, "alpha_max must lie between 0 and 1, got 1.0"),
        ({"beta": 0.0}, "beta must lie between 0 and 1, got 0.0"),
        ({"eta": 0.9}, "eta must be at least 1, got 0.9"),
    ],
    ids=str,
)
def test_impossible_settings_of_fab_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FABSettings(**{"eps": 0.1} | wrong)


# The original


@pytest.fixture(scope="module")
def hardened_digits(tmp_path_factory):
    """A small network, trained on attacked digits of 16 px for some seconds, and 40 test digits."""
    torch.manual_seed(0)
    digits = load_dataset("mnist5k", data_dir=tmp_path_factory.mktemp("data"), max_train=1500, max_test=40)

    def small(split):
        return F.avg_pool2d(to_float(split.images), 2)

    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)]
    model, images, labels = nn.Sequential(*layers), small(digits.train), digits.train.labels
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(6):
        for part in torch.randperm(len(images), generator=seeded(epoch)).split(50):
            settings = PGDSettings(0.02 * (epoch + 1), steps=3)
            attacked = ascend(model, images[part], labels[part], settings, generator=seeded(epoch))
            loss = F.cross_entropy(model(attacked), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), small(digits.test), digits.test.labels


@pytest.mark.skipif(find_spec("pyautoattack") is None, reason="pyautoattack, the original AutoAttack, is not installed")
@pytest.mark.parametrize("norm, eps", [("linf", 0.12), ("l2", 2.0)])
def test_every_part_agrees_with_the_original_within_one_image(hardened_digits, norm, eps):
    from benchmarks.autoattack_agreement import compare, table

    model, images, labels = hardened_digits
    settings = AutoAttackSettings(eps, norm, steps=20, num_targets=3, queries=100)
    rows = compare(model, images, labels, settings)
    print(table(rows))
    assert [row.part for row in rows] == ["none", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert rows[0].ours.float().mean() > 0.8 and 0.2 < rows[-1].ours.float().mean() < 0.8
    for row in rows:
        assert row.differing <= 1, row.part
    whole = autoattack(model, images, labels, settings, generator=seeded())
    assert (judge(model, whole, labels) != rows[-1].original).sum() <= 1


@pytest.mark.skipif(find_spec("pyautoattack") is None, reason="pyautoattack, the original AutoAttack, is not installed")
@pytest.mark.parametrize("part", ["apgd-t", "fab-t"])
def test_a_part_alone_agrees_with_the_original_on_images_no_other_part_has_seen(hardened_digits, part):
    import pyautoattack

    model, images, labels = hardened_digits
    settings = AutoAttackSettings(0.12, steps=20, num_targets=3)
    original = pyautoattack.AutoAttack(model, eps=0.12, seed=0)
    for attack in (original.apgd, original.apgd_targeted, original.fab):
        attack.n_iter = 20
    original.apgd_targeted.n_target_classes = original.fab.n_target_classes = 3
    original.attacks_to_run = [part]
    theirs = original.run_standard_evaluation(images, labels)[0]
    chosen = autoattack_parts(settings)[part]
    ours = chosen.attack(model, images, labels, chosen.settings, generator=seeded())
    assert (judge(model, ours, labels) != judge(model, theirs, labels)).sum() <= 1
