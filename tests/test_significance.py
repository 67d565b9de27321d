"""Two attacks, or two defences, on the same images: who finds or keeps significantly more."""

import numpy as np
import pandas as pd
import pytest

from atoplib.decisions import RULES
from atoplib.evaluation import Evaluation, compare_attacks, compare_defences, masked_gradients, mcnemar


def remaining(broken: range) -> np.ndarray:
    right = np.ones(128, dtype=bool)
    right[list(broken)] = False
    return right


def outcome(right, attack="PGD", threat_model="white-box", norm="linf", defence="a") -> pd.DataFrame:
    """What became of each image, by every rule the same."""
    what = {"defence": defence, "attack": attack, "threat_model": threat_model, "norm": norm, "eps": 0.1}
    by_rule = dict.fromkeys(RULES, np.array(right, dtype=bool))
    return pd.DataFrame({**what, "image": range(len(right)), **by_rule})


def evaluation(*outcomes, **facts) -> Evaluation:
    return Evaluation(pd.concat(outcomes, ignore_index=True), np.zeros(len(outcomes[0])), facts)


def test_five_images_more_are_significant_and_four_may_be_chance():
    """0.5^5 < 0.05 < 0.5^4."""
    found = compare_attacks(
        {"ours": remaining(range(0)), "five": remaining(range(5)), "four": remaining(range(4))}, "ours"
    )
    assert found.p.tolist() == pytest.approx([1 / 32, 1 / 16]) and found.significant.tolist() == [True, False]
    assert found.attack.tolist() == ["five", "four"] and found.remaining.tolist() == [123, 124]


def test_only_images_on_which_the_two_differ_count():
    few, many = remaining(range(10)), remaining(range(5, 40))
    assert mcnemar(few, many, alternative="less") == (30, 5, pytest.approx(1, abs=0.01))
    assert mcnemar(many, few, alternative="less")[2] < 0.01
    assert mcnemar(few, few) == mcnemar(few, few, alternative="less") == (0, 0, 1)
    one, other = [1] * 8 + [0] * 2 + [1] * 90, [0] * 8 + [1] * 2 + [1] * 90
    p = pytest.approx(2 * (1 + 10 + 45) / 2**10)  # 2 or fewer of 10, to either side
    assert mcnemar(one, other) == (8, 2, p) and mcnemar(other, one) == (2, 8, p)


def test_a_defence_is_paired_with_every_other_under_every_attack_that_both_met():
    found = compare_defences(
        evaluation(
            outcome([1, 1], "x", defence="AToP"),
            outcome([1, 0], "y", defence="AToP"),
            outcome([0, 1], "x", defence="AT"),
            outcome([0, 0], "y", defence="AP"),
        ),
        "AToP",
    )
    assert found[["attack", "other", "only_first", "only_other"]].values.tolist() == [
        ["x", "AT", 1, 0],
        ["y", "AP", 1, 0],
    ]
    with pytest.raises(ValueError, match="first must be one of a, got 'AToPP'"):
        compare_defences(evaluation(outcome([1])), "AToPP")


def test_a_weaker_attack_that_wins_is_told():
    ours, square = outcome([1] * 20), outcome([0] * 6 + [1] * 14, "Square")
    flow = outcome([0] * 20, "flow", norm="flow")
    (sentence,) = masked_gradients(evaluation(ours, square, flow, gradient_free=["Square"]))
    assert (
        sentence.startswith("a: Square breaks 6 images that the white-box attacks miss")
        and "p 0.016" in sentence
    )
    assert masked_gradients(evaluation(ours, outcome([0] * 4 + [1] * 16, "T", "transfer"))) == []
    assert len(masked_gradients(evaluation(ours, outcome([0] * 6 + [1] * 14, "T", "transfer")))) == 1
    strong = outcome([0] * 20, "known sample")
    assert (
        len(
            masked_gradients(
                evaluation(ours, square, strong, gradient_free=["Square"], known_sample=["known sample"])
            )
        )
        == 1
    )
    assert masked_gradients(evaluation(strong, square, gradient_free=["Square"])) == []
