"""Balls: start, steepest step, projection and size of each norm, and a result outside that never passes."""

import pytest
import torch
from test_attacks import SHAPE, images_of, seeded

from atoplib.attacks import Ball
from atoplib.attacks.norms import norm_of


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-12, 1.0, 1e12, 1e25])
def test_a_step_has_norm_1_however_small_or_large_the_gradient(norm, scale):
    gradient = torch.randn(SHAPE, generator=seeded()) * scale
    step = Ball(images_of(), 0.1, norm).direction(gradient)
    torch.testing.assert_close(norm_of(step, norm), torch.ones(6), rtol=1e-4, atol=0)
    along = (step * (gradient / scale)).flatten(1).sum(dim=1)
    best = (gradient / scale).flatten(1).norm(p=1 if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(along, best, rtol=1e-3, atol=0)


def test_an_l1_step_moves_the_largest_entries_that_can_move():
    images = torch.rand(2, 3, 40, 20, generator=seeded()).clamp(0.1, 0.9)
    gradient = torch.randn(images.shape) * 0.1
    images[0, 0, 0, :8], gradient[0, 0, 0, :8] = 0.0, -9.0  # at the edge, and pushed out
    images[0, 1, 0, :8], gradient[0, 1, 0, :8] = 1.0, -9.0
    step = Ball(images, 1.0, "l1").direction(gradient, images)
    torch.testing.assert_close(norm_of(step, "l1"), torch.ones(2))
    assert (step != 0).flatten(1).sum(dim=1).tolist() == [12, 12]
    assert (step[0, 0, 0, :8] == 0).all() and (step[0, 1, 0, :8] < 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_zero_gradient_gives_a_zero_step_to_that_image_alone(norm):
    gradient = torch.ones(2, 3, 4, 4)
    gradient[0] = 0
    step = Ball(torch.zeros(2, 3, 4, 4), 0.1, norm).direction(gradient)
    assert (step[0] == 0).all() and (step[1] > 0).any()


def test_the_size_of_a_perturbation_is_its_norm():
    perturbation = torch.zeros(2, 3, 4, 4)
    perturbation[0, 0, 0, 0], perturbation[0, 2, 3, 3], perturbation[1, 1, 1, 1] = 3.0, -4.0, -0.5
    assert {norm: norm_of(perturbation, norm).tolist() for norm in ("linf", "l2", "l1")} == {
        "linf": [4.0, 0.5],
        "l2": [5.0, 0.5],
        "l1": [7.0, 0.5],
    }


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.3), ("l1", 1.0)])
@pytest.mark.parametrize("low, high", [(0.3, 0.7), (0.0, 1.0)])
def test_a_projection_leaves_what_is_inside_and_moves_what_is_outside_to_the_nearest(norm, eps, low, high):
    origin = images_of(low=low, high=high)
    ball = Ball(origin, eps, norm)
    inside = torch.stack([ball.start(seeded(seed)) for seed in range(20)])
    torch.testing.assert_close(ball.project(inside[0]), inside[0])
    outside = origin + torch.randn(SHAPE, generator=seeded()) * 0.1
    assert (ball.size(outside) > eps).all()
    projected = ball.project(outside)
    ball.check(projected)
    torch.testing.assert_close(ball.project(projected), projected, rtol=0, atol=1e-5)
    if low == 0.3 or norm == "l2":  # in l2 what is clipped takes no share of the radius
        torch.testing.assert_close(ball.size(projected), torch.full((6,), eps))
    if low == 0.3 or norm == "l1":
        # the nearest point of a convex set: whatever else lies inside is at an obtuse angle
        angle = ((outside - projected) * (inside - projected)).flatten(2).sum(dim=2)
        assert (angle <= 2e-5).all()


@pytest.mark.parametrize("size", [32, 384])
@pytest.mark.parametrize("norm, eps", [("l2", 3.0), ("l1", 60.0)])
def test_a_large_image_stays_in_its_ball_too(norm, eps, size):
    """float32 adds up its squares with an error larger than what is forgiven."""
    origin = torch.rand(2, 3, size, size, generator=seeded(size))
    ball = Ball(origin, eps, norm)
    moved = ball.project(origin + torch.randn(origin.shape, generator=seeded()))
    exact = (moved.double() - origin.double()).flatten(1).norm(p=1 if norm == "l1" else 2, dim=1)
    assert (exact <= eps * (1 + 1e-6)).all() and (exact > eps / 3).all()
    torch.testing.assert_close(ball.size(moved), exact.float())
    ball.check(moved)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_ball_may_have_a_radius_for_each_image(norm):
    images, radii = images_of(), torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    points = Ball(images, radii, norm).project(1 - images)
    for radius, rows in ((0.1, [0, 3]), (0.2, [1, 4]), (0.3, [2, 5])):
        torch.testing.assert_close(points[rows], Ball(images[rows], radius, norm).project(1 - images[rows]))
        part = Ball(images, radii, norm).rows(torch.tensor(rows)).project(1 - images[rows])
        torch.testing.assert_close(part, points[rows])


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 0.2)])
def test_a_random_start_is_uniform_in_the_ball(norm, eps):
    ball = Ball(torch.full((4000, 3, 1, 1), 0.5), eps, norm)
    start = ball.start(seeded())
    sizes = ball.size(start) / eps
    assert sizes.max() <= 1 + 1e-5 and (start - 0.5).mean(dim=0).abs().max() < 0.01
    # uniform in three dimensions: the share within radius r is r^3, in the ball as in the cube
    for radius in (0.25, 0.5, 0.75, 0.9):
        assert (sizes < radius).float().mean() == pytest.approx(radius**3, abs=0.025)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_run_begins_outside_and_ends_in_the_ball(norm):
    balls = [Ball(images_of(), torch.ones(6), norm).searched(share) for share in (0.01, 0.5, 1.0)]
    assert [ball.eps[0].item() for ball in balls] == ([5, 2, 1] if norm == "l1" else [2, 1.5, 1])
    large = Ball(torch.rand(4, 3, 32, 32, generator=seeded()), 12.0, "l1")
    start, noise = large.start(seeded()), torch.randn(large.images.shape, generator=seeded())
    assert (start != large.images).float().mean() < 0.02, "l1 starts are sparse"
    begun = [large.project(large.images.roll(shift, 0) + noise) for shift in range(4)]
    same = torch.stack([(points == start).flatten(1).all(dim=1) for points in begun])
    assert same.any(dim=0).all() and not same[0].all(), "each at noise around one of the images"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x[0, 0, 0, 0].fill_(float("nan")), "not finite"),
        (lambda x: x[0, 0, 0, 0].fill_(-0.01), "values from -0.00999"),
        (lambda x: x[0, 0, 0, 0].fill_(1.01), r"to 1\.0(1|0999)"),
        (lambda x: x[3, 1, 2, 2].add_(0.102), "linf norm 0.102 above eps 0.1"),
    ],
    ids=["nan", "below", "above", "eps"],
)
def test_a_result_outside_box_or_ball_never_passes(spoil, message):
    images = images_of(low=0.4, high=0.6)
    adversarial, ball = images + 0.1, Ball(images, 0.1, "linf")
    ball.check(adversarial)
    spoil(adversarial)
    with pytest.raises(AssertionError, match=message):
        ball.check(adversarial)
