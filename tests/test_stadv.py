"""StAdv warps as an independent warp does, keeps to its flow's bound, and breaks what moving pixels can break."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn
from torch.nn import functional as F

from atoplib.attacks.losses import margin
from atoplib.attacks.stadv import StAdvSettings, check_flow, find_flow, spread, stadv, warp

QUICK = StAdvSettings(steps=20, eot_samples=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count=3, height=10, width=10):
    return torch.rand(count, 3, height, width, generator=seeded(count))


def flow_of(images, bound):
    return (torch.rand(len(images), 2, *images.shape[2:], generator=seeded(1)) * 2 - 1) * bound


def constant(images, down, right):
    flow = torch.tensor([down, right]).view(1, 2, 1, 1)
    return flow.expand(len(images), 2, *images.shape[2:]).clone()


@pytest.mark.parametrize("bound", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("height, width", [(10, 10), (6, 11), (1, 7), (5, 1)])
def test_the_warp_agrees_with_scipys(height, width, bound):
    images = images_of(2, height, width).double()
    flow = flow_of(images, bound).double()
    found = warp(images, flow)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    for image, moves, result in zip(images, flow, found, strict=True):
        points = np.stack([rows + moves[0].numpy() * height / 2, columns + moves[1].numpy() * width / 2])
        expected = [map_coordinates(channel.numpy(), points, order=1, mode="nearest") for channel in image]
        torch.testing.assert_close(result, torch.tensor(np.stack(expected)))


def test_the_warp_and_its_gradient_agree_with_grid_sample_away_from_the_border():
    images = images_of(2).double()
    flow, ramp = flow_of(images, 0.3).double().requires_grad_(), torch.rand(2, 3, 10, 10, generator=seeded()).double()
    grid = F.affine_grid(torch.eye(2, 3).expand(2, 2, 3).double(), list(images.shape), align_corners=False)
    grid = grid + flow.flip(1).movedim(1, 3)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    found = warp(images, flow)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((result * ramp).sum(), flow)[0] for result in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_flow_of_0_05_moves_a_ramp_of_32_pixels_by_0_8_of_a_pixel():
    ramp = (torch.arange(32.0) / 40).expand(1, 3, 32, 32)
    right = warp(ramp, constant(ramp, 0.0, 0.05))
    torch.testing.assert_close(right[..., :31], ramp[..., :31] + 0.8 / 40)
    torch.testing.assert_close(right[..., 31], ramp[..., 31])
    torch.testing.assert_close(warp(ramp, constant(ramp, 0.05, 0.0)), ramp)
    down = warp(ramp.mT, constant(ramp, -0.05, 0.0))
    torch.testing.assert_close(down[..., 1:, :], ramp.mT[..., 1:, :] - 0.8 / 40)


def test_no_flow_changes_nothing_and_a_whole_pixel_only_shifts():
    images = images_of()
    assert torch.equal(warp(images, constant(images, 0.0, 0.0)), images)
    shifted = warp(images, constant(images, 0.2, 0.4))  # one and two of ten pixels
    torch.testing.assert_close(shifted[:, :, :-1, :-2], images[:, :, 1:, 2:])


@pytest.mark.parametrize("bound", [0.05, 2.0])
def test_a_warp_keeps_the_range_of_black_and_white_images(bound):
    images = images_of(50).round()
    warped = warp(images, flow_of(images, bound))
    assert warped.min() >= 0 and warped.max() <= 1


def test_control_points_are_spread_bilinearly_and_stay_within_their_bound():
    points = (torch.rand(2, 2, 4, 5, generator=seeded()) * 2 - 1).double()
    expected = F.interpolate(points, size=(12, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(spread(points, 12, 9), expected)
    assert spread(points.sign(), 12, 9).abs().max() <= 1


class Ramp(nn.Module):
    """Two classes by a smooth weight: the closed form of the best flow is the bound along the image's slope."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(len(images))
        score = (images - 0.5).mean(dim=(1, 2, 3)) * 40
        return torch.stack([-score, score], dim=1)


def test_on_a_ramp_the_attack_finds_the_known_optimum():
    """The brightness of a ramp rises most where every pixel looks its bound further up: the last column cannot."""
    ramp = (torch.arange(10.0) / 20).expand(2, 3, 10, 10)
    labels = torch.zeros(2, dtype=torch.int64)
    settings = StAdvSettings(steps=30, eot_samples=2)
    found = stadv(Ramp().eval(), ramp, labels, settings)
    best = ramp.clone()
    best[..., :9] += 0.05 * 10 / 2 / 20
    torch.testing.assert_close(found, best)


def small_model(classes=4):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 64, classes)).eval()


def test_the_attack_breaks_images_and_keeps_its_budget():
    model, images = small_model(), images_of(24)
    labels = model(images).argmax(dim=1)
    settings = StAdvSettings(bound=0.3, steps=20, eot_samples=1)
    flow = find_flow(model, images, labels, settings)
    adversarial = stadv(model, images, labels, settings)
    check_flow(adversarial, images, flow, 0.3)
    assert flow.abs().max() == pytest.approx(0.3)
    assert (model(adversarial).argmax(dim=1) != labels).float().mean() > 0.5
    assert not adversarial.requires_grad


def test_the_margin_that_is_returned_is_the_best_of_the_way():
    model, images = small_model(), images_of(6)
    labels = model(images).argmax(dim=1)
    seen = []
    found = stadv(model, images, labels, replace(QUICK, restarts=2), callback=lambda *given: seen.append(given))
    assert [given[0] for given in seen] == list(range(1, len(seen) + 1)) and {given[1] for given in seen} == {40}
    bests = torch.stack([best for *_, best in seen])
    assert torch.equal(bests, bests.cummax(dim=0).values)
    torch.testing.assert_close(margin(model(found), labels), bests[-1])


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_scale_of_the_logits_changes_nothing(factor):
    """With a smoothness weighed in logits the same classifier was five times as robust or a tenth, by its scale alone."""

    class Scaled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return factor * self.model(images) + 3.0

    model, images = small_model().double(), images_of(12).double()
    labels = model(images).argmax(dim=1)
    settings = replace(QUICK, steps=6, restarts=3)
    plain, scaled = (stadv(m.eval(), images, labels, settings, generator=seeded()) for m in (model, Scaled(model)))
    torch.testing.assert_close(scaled, plain)


def test_restarts_break_more_and_leave_what_is_broken_alone():
    model, images = small_model(), images_of(40)
    labels = model(images).argmax(dim=1)
    one, many = (
        stadv(model, images, labels, StAdvSettings(0.03, 3, 1, restarts), generator=seeded()) for restarts in (1, 8)
    )
    broken_by_one, broken = (model(found).argmax(dim=1) != labels for found in (one, many))
    assert torch.equal(one[broken_by_one], many[broken_by_one])
    assert broken_by_one.sum() < broken.sum() and (broken | ~broken_by_one).all()


@pytest.mark.parametrize("control", [2, 4])
def test_a_flow_of_control_points_is_bilinear_between_them(control):
    model, images = small_model(), images_of(4)
    labels = model(images).argmax(dim=1)
    flow = find_flow(model, images, labels, StAdvSettings(0.2, 5, 1, control=control))
    assert 0.1 < flow.abs().max() <= 0.2 + 1e-6
    if control == 2:
        torch.testing.assert_close(flow.diff(dim=3).diff(dim=3), torch.zeros(4, 2, 10, 8), atol=1e-6, rtol=0)
    else:
        assert not torch.equal(flow, torch.zeros_like(flow))


def test_the_last_step_counts_too():
    model, images = small_model(), images_of(6)
    labels = model(images).argmax(dim=1)
    seen = []
    found = stadv(model, images, labels, replace(QUICK, steps=1), callback=lambda *given: seen.append(given))
    ((step, steps, warped, margins),) = seen
    assert (step, steps) == (1, 1) and not torch.equal(found, images)
    torch.testing.assert_close(found, warped)
    torch.testing.assert_close(margins, margin(model(warped), labels))


@pytest.mark.parametrize("max_batch", [1, 5, 512])
def test_draws_and_images_share_batches_of_at_most_max_batch(max_batch):
    model, images = Ramp().eval(), images_of(3)
    stadv(model, images, torch.tensor([0, 1, 0]), StAdvSettings(steps=2, eot_samples=4), max_batch=max_batch)
    # the check; two looks for dice, of 8 images each; the gradients
    assert max(model.calls) <= max(max_batch, 8) and sum(model.calls) == 1 + 2 * 8 + (2 + 1) * 3 * 4


def test_an_attack_of_parts_is_the_attack_of_the_whole_and_changes_nothing_else():
    model, images = small_model(), images_of(4)
    kept, labels = images.clone(), torch.tensor([0, 1, 2, 3])
    few = replace(QUICK, steps=4)  # later, rounding errors grow wherever a pixel crosses into another cell of the grid
    whole = stadv(model, images, labels, few)
    with torch.no_grad():
        each = torch.cat([stadv(model, images[i : i + 1], labels[i : i + 1], few) for i in range(4)])
    torch.testing.assert_close(each, whole, atol=1e-4, rtol=0)
    assert torch.equal(images, kept) and all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda a, f: a[0, 0, 0, 0].fill_(float("nan")), "not finite"),
        (lambda a, f: a[0, 0, 0, 0].fill_(1.01), r"left \[0, 1\]"),
        (lambda a, f: a[0, 0, 0, 0].sub_(0.01), "not the warped image"),
        (lambda a, f: f[0, 0, 0, 0].fill_(0.051), "left its budget"),
    ],
    ids=["nan", "above", "painted", "bound"],
)
def test_a_result_outside_its_budget_never_passes(spoil, message):
    images = images_of() * 0.5 + 0.25
    flow = flow_of(images, 0.05)
    adversarial = warp(images, flow)
    check_flow(adversarial, images, flow, 0.05)
    spoil(adversarial, flow)
    with pytest.raises(AssertionError, match=message):
        check_flow(adversarial, images, flow, 0.05)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bound": 0.0}, r"bound must lie in \(0, 2\]"),
        ({"bound": 8.0}, r"bound must lie in \(0, 2\].*got 8.0"),
        ({"bound": float("nan")}, "bound must lie"),
        ({"steps": 0}, "steps, eot_samples and restarts must be at least 1, got 0, 20, 1"),
        ({"eot_samples": 0}, "steps, eot_samples and restarts must be at least 1, got 100, 0, 1"),
        ({"restarts": 0}, "restarts must be at least 1, got 100, 20, 0"),
        ({"control": 1}, "control must be at least 2 points"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        StAdvSettings(**wrong)


def test_the_bound_steps_and_samples_are_the_published_ones():
    settings = StAdvSettings()
    assert (settings.bound, settings.steps, settings.eot_samples, settings.control) == (0.05, 100, 20, None)


def test_a_model_in_train_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        stadv(small_model().train(), images_of(), torch.tensor([0, 1, 2]), QUICK)
