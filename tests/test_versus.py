"""Two attacks on the same images: who is beaten, and what the table says."""

import pytest
import torch

from atoplib.evaluation import compare, comparison_table


def standing(broken: range) -> torch.Tensor:
    right = torch.ones(128, dtype=torch.bool)
    right[list(broken)] = False
    return right


def test_five_images_more_are_significant_and_four_may_be_chance():
    """0.5^5 < 0.05 < 0.5^4."""
    five = compare("theirs", standing(range(5)), standing(range(0)))
    four = compare("theirs", standing(range(4)), standing(range(0)))
    assert (five.p_value, four.p_value) == (pytest.approx(1 / 32), pytest.approx(1 / 16))
    assert five.beaten and not four.beaten


def test_only_images_on_which_the_attacks_differ_count():
    few, many = standing(range(0, 10)), standing(range(5, 40))
    found = compare("theirs", few, many)
    assert (found.standing, found.only_challenger, found.only_incumbent) == (118, 5, 30)
    assert not found.beaten and compare("theirs", many, few).beaten
    assert compare("theirs", few, few).p_value == 1


def test_the_table_says_who_won():
    lost = compare("mild", standing(range(2)), standing(range(50)), seconds=1.25)
    won = compare("harsh", standing(range(60)), standing(range(50)))
    assert "| mild | 126 of 128 | 0 | 48 | 1 | 1.2 |" in comparison_table([lost])
    assert comparison_table([lost]).endswith(
        "None finds significantly more errors than ours (exact McNemar test, one-sided, 95 %)."
    )
    assert "**Our attack is too weak**: harsh finds" in comparison_table([lost, won])


def test_other_images_and_empty_tables_are_refused(without_shape_checks):
    with pytest.raises(ValueError, match="on the same images, got 3 and 128"):
        compare("theirs", standing(range(0))[:3], standing(range(0)))
    with pytest.raises(ValueError, match="no comparisons"):
        comparison_table([])
