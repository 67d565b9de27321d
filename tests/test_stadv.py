"""StAdv warps as an independent warp does, keeps to its flow's bound, and breaks what moving pixels can break."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn
from torch.nn import functional as F

from atoplib.attacks.losses import margin
from atoplib.attacks.stadv import StAdvSettings, check_flow, find_flow, flow_loss, stadv, warp

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


def test_the_flow_loss_of_a_step_is_its_height_times_its_length_from_both_sides():
    flow = torch.zeros(2, 2, 4, 6)
    flow[0, :, :, 3:] = torch.tensor([3.0, 4.0]).view(2, 1, 1)  # a step of length 5 in each of 4 rows
    flow[1, 0, 2:] = 1.0  # a step of length 1 in each of 6 columns
    torch.testing.assert_close(flow_loss(flow), torch.tensor([2 * 4 * 5.0, 2 * 6 * 1.0]), atol=0.01, rtol=0)


def test_the_flow_loss_has_a_finite_gradient_at_rest():
    flow = torch.zeros(1, 2, 4, 4, requires_grad=True)
    flow_loss(flow).sum().backward()
    assert torch.equal(flow.grad, torch.zeros_like(flow))


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
    settings = StAdvSettings(steps=30, eot_samples=2, smoothness=0.0)
    found = stadv(Ramp().eval(), ramp, labels, settings)
    best = ramp.clone()
    best[..., :9] += 0.05 * 10 / 2 / 20
    torch.testing.assert_close(found, best)


def small_model(classes=4):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 64, classes)).eval()


def test_the_attack_breaks_images_and_keeps_its_budget():
    model, images = small_model(), images_of(24)
    labels = model(images).argmax(dim=1)
    settings = StAdvSettings(bound=0.3, steps=20, learning_rate=0.05, eot_samples=1)
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
    strong = replace(QUICK, smoothness=0.5, learning_rate=0.05)  # smoothness and overshooting undo what was reached
    found = stadv(model, images, labels, strong, callback=lambda *given: seen.append(given))
    margins = torch.stack([margin for *_, margin in seen])
    assert [given[0] for given in seen] == list(range(1, 21)) and {given[1] for given in seen} == {20}
    best = margins.argmax(dim=0)
    assert (best < 19).any()
    expected = torch.stack([seen[step][2][image] for image, step in enumerate(best.tolist())])
    torch.testing.assert_close(found, expected)


def test_the_last_step_counts_too():
    model, images = small_model(), images_of(6)
    labels = model(images).argmax(dim=1)
    seen = []
    found = stadv(model, images, labels, replace(QUICK, steps=1), callback=lambda *given: seen.append(given))
    ((step, steps, warped, margins),) = seen
    assert (step, steps) == (1, 1) and not torch.equal(found, images)
    torch.testing.assert_close(found, warped)
    torch.testing.assert_close(margins, margin(model(warped), labels))


def test_smoothness_makes_flows_smoother():
    model, images = small_model(), images_of(6)
    labels = model(images).argmax(dim=1)
    rough, smooth = (find_flow(model, images, labels, replace(QUICK, smoothness=weight)) for weight in (0.0, 0.2))
    assert (flow_loss(smooth) < flow_loss(rough)).all()


def test_confidence_lets_a_broken_draw_pull_no_further():
    ramp = (torch.arange(10.0) / 20 + 0.274).expand(1, 3, 10, 10)  # of class 0 by a hair
    labels = torch.zeros(1, dtype=torch.int64)
    model = Ramp().eval()
    edge, far = (
        model(stadv(model, ramp, labels, replace(QUICK, smoothness=0.0, confidence=confidence))).diff(dim=1).item()
        for confidence in (0.0, None)
    )
    assert 0 <= edge < far / 2


@pytest.mark.parametrize("max_batch", [1, 5, 512])
def test_draws_and_images_share_batches_of_at_most_max_batch(max_batch):
    model, images = Ramp().eval(), images_of(3)
    stadv(model, images, torch.tensor([0, 1, 0]), StAdvSettings(steps=2, eot_samples=4), max_batch=max_batch)
    assert max(model.calls) <= max_batch and sum(model.calls) == 1 + (2 + 1) * 3 * 4


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
        ({"steps": 0}, "steps and eot_samples must be at least 1, got 0 and 20"),
        ({"eot_samples": 0}, "steps and eot_samples must be at least 1, got 100 and 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"smoothness": -1.0}, r"smoothness must be at least 0 \(or None\), got -1.0"),
        ({"confidence": -1.0}, r"confidence must be at least 0 \(or None\), got -1.0"),
        ({"confidence": float("nan")}, "confidence must be at least 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        StAdvSettings(**wrong)


def test_the_defaults_are_the_published_setting():
    settings = StAdvSettings()
    assert (settings.bound, settings.steps, settings.learning_rate, settings.eot_samples) == (0.05, 100, 0.01, 20)
    assert settings.flow_weight == pytest.approx(0.05) and StAdvSettings(bound=0.1).flow_weight == pytest.approx(0.025)


def test_a_model_in_train_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        stadv(small_model().train(), images_of(), torch.tensor([0, 1, 2]), QUICK)
