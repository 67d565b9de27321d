"""Occlusion, rotation and translation against brute force; corruptions; minimum-norm attacks against closed
forms."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from PIL import Image
from test_attacks import seeded
from test_autoattack import Linear
from torch import nn

from atoplib.attacks import ATTACKS, Ball, pgd
from atoplib.attacks.norms import norm_of
from atoplib.attacks.third_party import ddn, fmn
from atoplib.attacks.unseen import (
    CORRUPTIONS,
    corrupt,
    corruption,
    move,
    occlusion,
    pose_grid,
    rotation_translation,
)


class Toy(nn.Module):
    """A small network, or one whose logits get noise: every sample another, which can be fixed by a seed or
    cannot."""

    def __init__(self, noise=0.0, classes=4, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * (size - 2) ** 2, classes)
        )
        self.noise, self.generator = noise, seeded(9)

    def forward(self, images):
        logits = self.body(images)
        return (
            logits + self.noise * torch.randn(logits.shape, generator=self.generator)
            if self.noise
            else logits
        )


def toy_set(count=16):
    model, images = Toy().eval(), torch.rand(count, 3, 8, 8, generator=seeded(1))
    return model, images, model(images).argmax(dim=1)


@torch.no_grad()
def gaps(model, images, labels):
    logits = model(images)
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return other - logits.gather(1, labels[:, None])[:, 0]


def check_against_brute_force(model, labels, found, candidates):
    """What any candidate breaks is broken; elsewhere the result is the candidate nearest to an error."""
    known = torch.stack([gaps(model, each, labels) for each in candidates])
    breakable = (known > 0).any(dim=0)
    assert 0 < breakable.sum() < len(labels) and torch.equal(gaps(model, found, labels) > 0, breakable)
    torch.testing.assert_close(gaps(model, found, labels)[~breakable], known.amax(dim=0)[~breakable])
    same = torch.stack([(each - found).abs().flatten(1).amax(dim=1) < 1e-6 for each in candidates])
    assert same.any(dim=0).all(), "the result is none of the candidates"


@pytest.mark.parametrize("name", ["occlusion", "rotation_translation", "corruption"])
def test_a_search_has_as_many_candidates_as_the_time_left_is_told_by(name):
    model, images, labels = toy_set(2)
    totals = []
    ATTACKS[name].function(
        model, images, labels, eps=1, norm=ATTACKS[name].norms[0],
        callback=lambda step, total, *_: totals.append(total),
    )  # fmt: skip
    assert set(totals) == {ATTACKS[name].tries}


@pytest.mark.parametrize("eps, grid, patch", [(1, 4, "grey"), (1, 3, "random"), (2, 5, "grey")])
def test_occlusion_is_the_worst_of_all_positions(eps, grid, patch):
    model, images, labels = toy_set(400)
    sure = gaps(model, images, labels).argsort()[: 300 if eps == 1 else 100].view(20, -1)[:, 0]
    images, labels = images[sure], labels[sure]
    found = occlusion(model, images, labels, eps=eps, grid_size=grid, patch=patch, seed=1)
    noise = torch.empty_like(images).uniform_(generator=torch.Generator().manual_seed(1))
    cover = noise if patch == "random" else torch.full_like(images, 0.5)
    edges = [-(-8 * i // grid) for i in range(grid + 1)]
    candidates = [images]
    for number in range(1, eps + 1):
        for place in combinations(product(range(grid), repeat=2), number):
            covered = images.clone()
            for row, column in place:
                window = (..., slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1]))
                covered[window] = cover[window]
            candidates.append(covered)
    check_against_brute_force(model, labels, found, candidates)
    assert (found != images).any(dim=1).flatten(1).sum(dim=1).max() <= eps * (8 // grid + 1) ** 2


def test_rotation_and_translation_are_the_worst_of_the_grid():
    model, images, labels = toy_set(400)
    sure = gaps(model, images, labels).argsort()[:300].view(20, -1)[:, 0]
    images, labels = images[sure], labels[sure]
    options = {"eps": 5, "translation": 0.06, "angles": 5, "shifts": 3}
    found = rotation_translation(model, images, labels, **options)
    poses = product(torch.linspace(-5, 5, 5).tolist(), *[torch.linspace(-0.06, 0.06, 3).tolist()] * 2)
    check_against_brute_force(model, labels, found, [move(images, *pose) for pose in poses])
    assert found.min() >= 0 and found.max() <= 1


def test_a_move_turns_and_shifts_as_pillow_does():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((36, 24), Image.Resampling.BICUBIC)
    images = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    for degrees, right, down in ((25, 0, 0), (0, 0.25, -0.125), (-40, 0, 0)):
        shifted = picture.rotate(degrees, Image.Resampling.BILINEAR, translate=(0, 0)).transform(
            picture.size,
            Image.Transform.AFFINE,
            (1, 0, -right * 36, 0, 1, -down * 24),
            Image.Resampling.BILINEAR,
        )
        expected = torch.from_numpy(np.asarray(shifted).copy()).permute(2, 0, 1) / 255
        ours = move(images, degrees, right, down)[0]
        inside = move(torch.ones_like(images), degrees, right, down)[0] > 0.999
        assert ((ours - expected).abs()[inside] < 0.06).float().mean() > 0.97
        with torch.autocast("cpu", torch.bfloat16):  # as within an attack
            assert torch.equal(move(images, degrees, right, down)[0], ours)
    torch.testing.assert_close(move(images, 0, 0, 0), images)
    off = move(images, 10, 0.1, 0.05) - move(move(images, 10, 0, 0), 0, 0.1, 0.05)
    assert off[:, :, 8:16, 12:24].abs().max() < 0.05


def test_the_grid_of_poses_holds_every_pose_once_and_none_first():
    poses = pose_grid(30, 0.1, 31, 5)
    assert len(poses) == len(set(poses)) == 31 * 25 and poses[0] == (0, 0, 0) and abs(poses[1][0]) == 30
    assert pose_grid(30, 0.0, 3, 5) == [(0, 0, 0), (-30, 0, 0), (30, 0, 0)]


@pytest.mark.parametrize(
    "attack, options", [(occlusion, {"grid_size": 4}), (rotation_translation, {"angles": 5, "shifts": 3})]
)
def test_a_random_model_is_searched_by_mean_margins_and_judged_by_votes(attack, options):
    plain, images, labels = toy_set(24)
    noise = gaps(plain, images, labels).abs().median().item() / 4
    sharp = attack(plain, images, labels, **options)
    seen = []
    found = attack(
        Toy(noise).eval(), images, labels, **options, eot_samples=16, rule="majority", votes=101,
        callback=lambda step, steps, points, values: seen.append((step, steps, points.shape, values.shape)),
    )  # fmt: skip
    assert seen[0][2:] == (images.shape, labels.shape) and [step for step, *_ in seen] == list(
        range(1, len(seen) + 1)
    )
    clear = gaps(plain, sharp, labels).abs() > noise
    agree = (gaps(plain, found, labels) > 0) == (gaps(plain, sharp, labels) > 0)
    assert clear.sum() > 10 and agree[clear].float().mean() > 0.9


def test_with_targets_a_search_ends_where_the_target_is_the_answer():
    model, images, labels = toy_set(32)
    targets = (labels + 1) % 4
    found = occlusion(model, images, labels, eps=2, grid_size=4, targets=targets)
    candidates = [occlusion(model, images[:1], labels[:1], eps=2, grid_size=4, targets=targets[:1])]
    assert torch.equal(candidates[0], found[:1])
    assert (gaps(model, found, targets) <= gaps(model, images, targets)).all()
    assert (model(found).argmax(dim=1) == targets).sum() > (model(images).argmax(dim=1) == targets).sum()


# Corruptions


@pytest.fixture(scope="module")
def smooth():
    """Smooth coloured pictures."""
    coarse = torch.rand(8, 3, 5, 5, generator=seeded(4))
    return torch.nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_grows_with_its_severity_and_is_the_same_each_time(kind, smooth):
    made = [corrupt(smooth, kind, severity) for severity in (1, 2, 3, 4, 5)]
    assert all(each.shape == smooth.shape and each.min() >= 0 and each.max() <= 1 for each in made)
    change = [(each - smooth).square().mean().item() for each in made]
    assert 0 < change[0] == min(change) and change[4] == max(change), change
    before = torch.get_rng_state()
    assert torch.equal(corrupt(smooth, kind, 5), made[4]) and torch.equal(torch.get_rng_state(), before)
    noisy = kind.endswith("noise") or kind == "motion_blur"
    assert torch.equal(corrupt(smooth, kind, 5, seed=1), made[4]) != noisy
    assert corrupt(smooth[:, :1], kind, 3).shape == (8, 1, 32, 32)


def test_noises_have_the_moments_of_their_strengths(smooth):
    flat = torch.full((64, 3, 32, 32), 0.5)
    for kind, std in (("gaussian_noise", 0.08), ("shot_noise", (0.5 / 100) ** 0.5), ("speckle_noise", 0.06)):
        moved = corrupt(flat, kind, 3) - flat
        assert moved.mean().abs() < 2e-3 and moved.std().item() == pytest.approx(std, rel=0.02)
    hit = corrupt(flat, "impulse_noise", 5)
    assert (hit != 0.5).float().mean().item() == pytest.approx(0.07, abs=0.003)
    assert (hit == 1).float().mean().item() == pytest.approx(0.035, abs=0.003)


def test_deterministic_corruptions_are_their_definitions(smooth):
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(smooth.double().numpy(), (0, 0, 1.0, 1.0), mode="nearest", truncate=4)
    np.testing.assert_allclose(corrupt(smooth, "gaussian_blur", 5).numpy(), blurred, atol=1e-5)
    means = smooth.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(smooth, "contrast", 5), (smooth - means) * 0.15 + means)
    import colorsys

    red, green, blue = smooth[0, :, 3, 4].tolist()
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15))
    assert corrupt(smooth, "brightness", 3)[0, :, 3, 4].tolist() == pytest.approx(expected, abs=1e-5)
    for blur in ("defocus_blur", "motion_blur", "zoom_blur", "gaussian_blur"):
        flat = torch.full((2, 3, 32, 32), 0.3)
        torch.testing.assert_close(corrupt(flat, blur, 5), flat)
    small = Image.fromarray((smooth[0] * 255).round().byte().permute(1, 2, 0).numpy()).resize(
        (20, 20), Image.Resampling.BOX
    )
    coarse = (
        torch.from_numpy(np.asarray(small.resize((32, 32), Image.Resampling.BOX)).copy()).permute(2, 0, 1)
        / 255
    )
    torch.testing.assert_close(corrupt(smooth, "pixelate", 5)[0], coarse)


def test_the_attack_takes_the_worst_kind_or_the_one_that_is_named(defences, digits):
    images, labels = (part[:16] for part in digits)
    model = defences["undefended"]
    alone = corruption(model, images, labels, eps=1, kind="contrast")
    torch.testing.assert_close(alone, corrupt(images, "contrast", 1))
    made = [corrupt(images, kind, 1) for kind in CORRUPTIONS]
    check_against_brute_force(model, labels, corruption(model, images, labels, eps=1), made)


@pytest.mark.parametrize(
    "attack, options",
    [
        (corruption, {"kind": "gaussian_blur"}),
        (occlusion, {"grid_size": 2}),
        (rotation_translation, {"angles": 3}),
    ],
)
def test_under_autocast_candidates_stay_in_float32(defences, digits, attack, options):
    images, labels = (part[:4] for part in digits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attack(defences["AT"], images, labels, **options)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "attack, wrong, message",
    [
        (occlusion, {"eps": 3}, "eps must be one of 1, 2"),
        (occlusion, {"grid_size": 9}, r"grid_size must lie in 1..8, got 9"),
        (occlusion, {"norm": "linf"}, "norm must be one of occlusion"),
        (occlusion, {"patch": "black"}, "patch must be one of grey, random"),
        (rotation_translation, {"eps": 200}, "eps must be above 0, at most 180"),
        (rotation_translation, {"translation": 1.5}, r"translation must lie in 0..1"),
        (rotation_translation, {"shifts": 0}, "shifts must be at least 1"),
        (rotation_translation, {"angles": 2.5}, "angles must be a whole number"),
        (corruption, {"kind": "fog"}, "kind must be one of all, gaussian_noise"),
        (corruption, {"eps": 6}, "severity must be one of 1, 2, 3, 4, 5, got 6"),
        (ddn, {"norm": "linf"}, "norm must be one of l2"),
        (fmn, {"norm": "l0"}, "norm must be one of linf, l2, l1"),
        (fmn, {"steps": 0}, "steps must be at least 1"),
        (fmn, {"alpha": -1.0}, "alpha must be above 0"),
        (fmn, {"gamma": 5.0}, "gamma must be above 0, at most 1"),
        (ddn, {"first_norm": -1.0}, "first_norm must be above 0"),
        (ddn, {"max_batch": 0}, "max_batch must be at least 1"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_threats_that_do_not_exist_are_refused(attack, wrong, message, without_shape_checks):
    model, images, labels = toy_set(2)
    with pytest.raises(ValueError, match=message):
        attack(model, images, labels, **wrong)


def test_images_of_two_channels_have_no_corruption():
    with pytest.raises(ValueError, match="channels must be one of 1, 3, got 2"):
        corrupt(torch.rand(1, 2, 8, 8), "jpeg", 1)


# Minimum norm


@pytest.mark.parametrize(
    "attack, norm, dual", [(ddn, "l2", 2), (fmn, "l2", 2), (fmn, "linf", 1), (fmn, "l1", torch.inf)]
)
def test_a_minimum_norm_attack_ends_at_the_nearest_boundary(attack, norm, dual):
    model = Linear().eval().requires_grad_(False)
    images = torch.rand(20, 3, 4, 4, generator=seeded(5)) * 0.6 + 0.2
    logits = model(images)
    labels = logits.argmax(dim=1)
    distances = (logits.gather(1, labels[:, None]) - logits) / (
        model.weight[labels][:, None] - model.weight
    ).norm(p=dual, dim=2)
    known = distances.scatter(1, labels[:, None], torch.inf).amin(dim=1)
    options = {"steps": 200, "first_norm": 0.1} if attack is ddn else {"steps": 60, "alpha": 0.2}
    found = attack(model, images, labels, norm=norm, **options)
    sizes = norm_of(found - images, norm)
    assert (model(found).argmax(dim=1) != labels).all() and (sizes >= known - 1e-5).all()
    assert (sizes / known).median() < {"l1": 1.3, "l2": 1.1, "linf": 1.03}[norm]
    eps = known.median().item()
    Ball(images, eps, norm).check(attack(model, images, labels, norm=norm, eps=eps, **options))
    targets = (labels + 1) % 5
    hit = attack(model, images, labels, norm=norm, targets=targets, **options)
    assert (model(hit).argmax(dim=1) == targets).float().mean() > 0.9


def test_what_is_misclassified_stays_and_a_random_model_has_no_nearest_point():
    model, images, labels = toy_set(12)
    labels[:2] = (labels[:2] + 1) % 4
    found = ddn(model, images, labels, steps=10)
    assert torch.equal(found[:2], images[:2]) and not torch.equal(found[2:], images[2:])
    with pytest.raises(ValueError, match="the model is random; use pgd"):
        fmn(Toy(0.1).eval(), images, labels)


@pytest.mark.parametrize("attack", [ddn, fmn])
def test_the_curve_of_a_minimum_norm_attack_is_that_of_our_l2_pgd(attack, defences, digits):
    model, (images, labels) = defences["undefended"], (part[:32] for part in digits)
    found = attack(model, images, labels, norm="l2")
    sizes = norm_of(found - images, "l2").where(model(found).argmax(dim=1) != labels, torch.inf)
    for eps in (0.5, 1.0, 1.5):
        ours = model(pgd(model, images, labels, eps=eps, norm="l2", cycles=1)).argmax(dim=1) == labels
        assert float((sizes > eps).float().mean()) == pytest.approx(float(ours.float().mean()), abs=4 / 32)
