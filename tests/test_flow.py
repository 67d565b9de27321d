"""The flow attack warps as an independent warp does, keeps to its bound, and breaks what moving pixels can
break."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from test_attacks import seeded
from torch import nn
from torch.nn import functional as F

from atoplib.attacks import flow
from atoplib.attacks.flow import spread, warp
from atoplib.attacks.losses import margin

QUICK = {"steps": 20, "eot_samples": 1, "restarts": 2}


def images_of(count=3, height=10, width=10):
    return torch.rand(count, 3, height, width, generator=seeded(count))


def moves_of(images, bound):
    return (torch.rand(len(images), 2, *images.shape[2:], generator=seeded(1)) * 2 - 1) * bound


def constant(images, down, right):
    return torch.tensor([down, right]).view(1, 2, 1, 1).expand(len(images), 2, *images.shape[2:])


@pytest.mark.parametrize("bound", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("height, width", [(10, 10), (6, 11), (1, 7), (5, 1)])
def test_the_warp_agrees_with_scipys(height, width, bound):
    images = images_of(2, height, width).double()
    moves = moves_of(images, bound).double()
    found = warp(images, moves)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    for image, shift, result in zip(images, moves, found, strict=True):
        points = np.stack([rows + shift[0].numpy() * height / 2, columns + shift[1].numpy() * width / 2])
        expected = [map_coordinates(channel.numpy(), points, order=1, mode="nearest") for channel in image]
        torch.testing.assert_close(result, torch.tensor(np.stack(expected)))


def test_the_warp_and_its_gradient_agree_with_grid_sample_away_from_the_border():
    images = images_of(2).double()
    inner = torch.zeros(10, 10).double()
    inner[2:-2, 2:-2] = 1  # beyond the border ours goes on, so that what is there comes back
    moves = (moves_of(images, 0.3).double() * inner).requires_grad_()
    ramp = torch.rand(2, 3, 10, 10, generator=seeded()).double()
    grid = F.affine_grid(torch.eye(2, 3).expand(2, 2, 3).double(), list(images.shape), align_corners=False)
    grid = grid + moves.flip(1).movedim(1, 3)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    found = warp(images, moves)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((result * ramp).sum(), moves)[0] for result in (found, expected)]
    torch.testing.assert_close(*(gradient[..., 2:-2, 2:-2] for gradient in gradients))


def test_no_flow_changes_nothing_and_a_whole_pixel_only_shifts():
    images = images_of()
    assert torch.equal(warp(images, constant(images, 0.0, 0.0)), images)
    shifted = warp(images, constant(images, 0.2, 0.4))  # one and two of ten pixels
    torch.testing.assert_close(shifted[:, :, :-1, :-2], images[:, :, 1:, 2:])


def test_control_points_are_spread_bilinearly_and_stay_within_their_bound():
    points = (torch.rand(2, 2, 4, 5, generator=seeded()) * 2 - 1).double()
    expected = F.interpolate(points, size=(12, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(spread(points, 12, 9), expected)
    assert spread(points.sign(), 12, 9).abs().max() <= 1


class Ramp(nn.Module):
    """Two classes by a smooth weight: the closed form of the best flow is the bound along the image's
    slope."""

    def forward(self, images):
        score = (images - 0.5).mean(dim=(1, 2, 3)) * 40
        return torch.stack([-score, score], dim=1)


def test_on_a_ramp_the_attack_finds_the_known_optimum():
    """The brightness of a ramp rises most where every pixel looks its bound further up: the last column
    cannot."""
    ramp = (torch.arange(10.0) / 20).expand(2, 3, 10, 10)
    best, labels = ramp.clone(), torch.zeros(2, dtype=torch.int64)
    found = flow(Ramp().eval(), ramp, labels, steps=30, eot_samples=2, restarts=1)
    best[..., :9] += 0.05 * 10 / 2 / 20
    torch.testing.assert_close(found, best)


def small_model(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 64, classes)
    ).eval()


def places(count):
    """Images whose first two channels say where each pixel is, so that a flow can be read from its result."""
    place = torch.arange(10.0) / 9
    return torch.stack([place[:, None].expand(10, 10), place.expand(10, 10), torch.rand(10, 10)]).expand(
        count, 3, 10, 10
    )


@pytest.mark.parametrize("control", [None, 2, 4])
def test_the_attack_raises_the_loss_and_keeps_its_bound(control):
    model, images = small_model(), places(6)
    labels = model(images).argmax(dim=1)
    with torch.autocast("cpu", torch.bfloat16):  # in which an attack may run; where pixels come from is exact
        found = flow(model, images, labels, eps=0.3, control=control, **QUICK)
    # by how much each inner pixel has moved, in units of the sampling grid
    moves = ((found - images)[:, :2] * 9 * 2 / 10)[..., 2:-2, 2:-2]
    assert (
        margin(model(found), labels) > margin(model(images), labels)
    ).all() and 0.2 < moves.abs().max() <= 0.3 + 1e-5
    if control == 2:
        assert moves.diff(n=2, dim=3).abs().max() < 1e-5, "straight between the control points"


def test_restarts_break_more_and_leave_what_is_broken_alone():
    model, images = small_model(), images_of(40)
    labels = model(images).argmax(dim=1)
    one, many = (flow(model, images, labels, eps=0.02, steps=2, eot_samples=1, restarts=n) for n in (2, 8))
    broken_by_few, broken = (model(found).argmax(dim=1) != labels for found in (one, many))
    assert torch.equal(one[broken_by_few], many[broken_by_few]) and (
        broken_by_few.sum() < broken.sum() and (broken | ~broken_by_few).all()
    )
