"""The parts of Square are those of the paper: windows, squares, stripes, hills, tiles, their schedule."""

import pytest
import torch
from test_attacks import seeded
from test_black_box import images_of

from atoplib.attacks.black_box import (
    HALVINGS,
    _hill,
    _hill_and_valley,
    _pairs,
    _squares,
    _stripes,
    _tiles,
    _windows,
    share_of_pixels,
)


@pytest.mark.parametrize("side", [1, 3, 8])
def test_each_image_has_a_window_of_its_own_that_lies_within_it_and_is_uniform(side):
    rows, columns, inside = _windows(images_of(2000), side, seeded())
    assert (inside.flatten(1).sum(dim=1) == side**2).all()
    offset = torch.arange(8)[:, None] - torch.arange(9 - side)[None, :]
    share = (offset.ge(0) & offset.lt(side)).float().mean(dim=1)
    torch.testing.assert_close(
        inside.float().mean(dim=0)[0], share[:, None] * share[None, :], atol=0.05, rtol=0
    )
    place = inside[7, 0].nonzero()
    assert rows[7, place[0, 0], 0] == 0 and columns[7, 0, place[0, 1]] == 0


def test_a_square_changes_one_window_of_each_image_to_plus_or_minus_eps():
    images, points = images_of(50, low=0.2, high=0.8), images_of(50, low=0.2, high=0.8)
    found = _squares(points, images, 0.1, 0.15, seeded())
    changed = (found != points).any(dim=1)
    side = round((0.15 * 64) ** 0.5)
    assert ((changed.flatten(1).sum(dim=1)) == side**2).all()
    moves = (found - images)[changed[:, None].expand_as(found)]
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, 0.1))
    by_channel = (found - images).sign() * changed[:, None]
    assert (by_channel.flatten(2).sum(dim=2).abs() == side**2).all(), "one sign a channel"


def test_the_start_of_linf_is_vertical_stripes():
    images = images_of(20, low=0.2, high=0.8)
    moves = _stripes(images, 0.1, seeded()) - images
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, 0.1))
    torch.testing.assert_close(moves, moves[:, :, :1].expand_as(moves))


def plain_hill(height, width):
    """The paper's construction as it reads: squares that grow from the middle, each lifted by 1 / k^2."""
    top, row, column = torch.zeros(height, width), height // 2, width // 2
    for k in range(max(height, width) // 2 + 1):
        top[max(0, row - k) : row + k + 1, max(0, column - k) : column + k + 1] += 1 / (k + 1) ** 2
    return top / top.norm()


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (3, 3), (4, 8), (5, 9), (7, 2)])
def test_a_hill_is_the_sum_of_growing_squares_and_half_of_a_pattern_is_a_valley(height, width):
    torch.testing.assert_close(_hill(height, width, torch.device("cpu")), plain_hill(height, width))
    pattern = _hill_and_valley(width + 1, torch.device("cpu"))
    assert pattern.norm().item() == pytest.approx(1)
    assert (pattern[: (width + 1) // 2] > 0).all() and (pattern[(width + 1) // 2 :] < 0).all()


@pytest.mark.parametrize("height, width", [(8, 8), (12, 17), (2, 3)])
def test_the_l2_start_lies_on_the_sphere_and_is_made_of_tiles(height, width):
    images = torch.full((10, 3, height, width), 0.5)
    moves = _tiles(images, 0.3, seeded()) - images
    torch.testing.assert_close(moves.flatten(1).norm(dim=1), torch.full((10,), 0.3))
    side = max(2, min(height, width) // 5)
    rows, columns = height // side * side, width // side * side
    assert (moves.abs().flatten(1) > 0).sum(dim=1).eq(3 * rows * columns).all()


def test_an_l2_proposal_moves_the_energy_of_one_window_to_another_and_stays_on_the_sphere():
    images = torch.full((40, 3, 12, 12), 0.5)
    points = _tiles(images, 0.5, seeded(1))
    found = _pairs(points, images, 0.5, 0.1, seeded())
    torch.testing.assert_close((found - images).flatten(1).norm(dim=1), torch.full((40,), 0.5))
    side = round((0.1 * 144) ** 0.5)
    changed = ((found - points).abs() > 1e-6).any(dim=1)
    assert (changed.flatten(1).sum(dim=1) <= 2 * side**2).all() and (
        changed.flatten(1).sum(dim=1) >= side**2
    ).all()
    emptied = ((found - images).abs() < 1e-7).all(dim=1) & ((points - images).abs() > 1e-6).any(dim=1)
    assert emptied.flatten(1).any(dim=1).float().mean() > 0.5


def test_the_squares_shrink_by_the_published_schedule():
    for number, query in enumerate(HALVINGS, start=1):
        assert share_of_pixels(query, 10_000) == pytest.approx(0.8 / 2 ** (number - 1))
        assert share_of_pixels(query + 1, 10_000) == pytest.approx(0.8 / 2**number)
    assert [share_of_pixels(query, 100) / 0.8 for query in (1, 3, 100)] == [0.5**2, 0.5**3, 0.5**9]
