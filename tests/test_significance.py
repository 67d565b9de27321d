"""Two attacks, or two defences, on the same images: who finds or keeps significantly more."""

import numpy as np
import pytest

from atoplib.evaluation import (
    Evaluation,
    Outcome,
    compare_attacks,
    compare_defences,
    masked_gradients,
    mcnemar,
)


def remaining(broken: range) -> np.ndarray:
    right = np.ones(128, dtype=bool)
    right[list(broken)] = False
    return right


def outcome(right, attack="PGD", threat_model="white-box", norm="linf", defence="a") -> Outcome:
    right = np.array(right, dtype=bool)
    return Outcome(defence, attack, threat_model, norm, 0.1, 1, np.stack([right] * 4), right.astype(float))


def evaluation(*outcomes, **facts) -> Evaluation:
    return Evaluation(outcomes, np.zeros(len(outcomes[0].sample_mean)), facts)


def test_five_images_more_are_significant_and_four_may_be_chance():
    """0.5^5 < 0.05 < 0.5^4."""
    found = compare_attacks(
        {"ours": remaining(range(0)), "five": remaining(range(5)), "four": remaining(range(4))}, "ours"
    )
    assert found.p.tolist() == pytest.approx([1 / 32, 1 / 16]) and found.significant.tolist() == [True, False]
    assert found.attack.tolist() == ["five", "four"] and found.remaining.tolist() == [123, 124]


def test_only_images_on_which_the_two_differ_count():
    few, many = remaining(range(10)), remaining(range(5, 40))
    assert mcnemar(few, many, alternative="less")[:2] == (30, 5)
    assert (
        mcnemar(few, many, alternative="less").p_value
        > 0.99
        > 0.01
        > mcnemar(many, few, alternative="less").p_value
    )
    assert mcnemar(few, few).p_value == mcnemar(few, few, alternative="less").p_value == 1


def test_the_two_sided_p_is_that_of_the_binomial():
    one, other = [1] * 8 + [0] * 2 + [1] * 90, [0] * 8 + [1] * 2 + [1] * 90
    found = mcnemar(one, other)
    assert (found.only_first, found.only_second) == (8, 2)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10), "2 or fewer of 10, to either side"
    assert mcnemar(other, one).p_value == found.p_value


def test_other_images_and_alternatives_are_refused():
    with pytest.raises(ValueError, match="the same images twice"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="allowed: two-sided, less"):
        mcnemar([True], [True], alternative="greater")


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
    with pytest.raises(ValueError, match="'AToPP' was not evaluated; allowed: a"):
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
