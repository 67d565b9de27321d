"""Two attacks on the same images: who is beaten, and what the table says."""

import pytest
import torch

from atoplib.evaluation import Outcomes, compare, comparison_table, pair, pairing_table, pairings
from atoplib.verdicts import VERDICTS


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


def met(defence, right, attack="pgd"):
    right = torch.tensor([right], dtype=torch.bool)
    return Outcomes(defence, attack, "linf", 1, dict.fromkeys(VERDICTS, right), right.float())


def test_defences_are_paired_by_the_images_that_only_one_of_them_reads():
    one, other = met("AToP", [1] * 8 + [0] * 2 + [1] * 90), met("AT", [0] * 8 + [1] * 2 + [1] * 90)
    found = pair(one, other)
    assert (found.only_first, found.only_second) == (8, 2)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10), "two-sided binomial: 2 or fewer of 10"
    assert pair(other, one).p_value == found.p_value and pair(one, one).p_value == 1
    with pytest.raises(ValueError, match="under one attack on the same images"):
        pair(one, met("AT", [1] * 100, "square"))


def test_the_table_of_pairs_has_a_line_for_each_attack_and_a_column_for_each_rival():
    outcomes = [met("AToP", [1, 1], "a"), met("AToP", [1, 0], "b"), met("AT", [0, 1], "a"), met("AP", [0, 0], "b")]
    found = pairings(outcomes, "AToP")
    assert [(item.attack, item.second) for item in found] == [("a", "AT"), ("b", "AP")]
    assert pairing_table(found).splitlines() == [
        "| only AToP : only ... | AT | AP |",
        "|---|---:|---:|",
        "| a | 1 : 0 (p 1) |  |",
        "| b |  | 1 : 0 (p 1) |",
    ]
    with pytest.raises(ValueError, match="one defence and its rivals"):
        pairing_table([])
