"""Outcomes of the masking checks follow from their numbers; comparisons are exact tests."""

from math import inf, nan

import pytest
import torch
from scipy.stats import binomtest, kruskal, permutation_test
from test_attacks import seeded

from atoplib.attacks.losses import cross_entropy
from atoplib.masking import Check, format_checks, warning
from atoplib.masking.checklist import smooth_margin
from atoplib.masking.checks import (
    check_agreement,
    check_effort,
    check_gradients,
    check_modes,
    check_samples,
    check_unbounded,
    check_weaker_attack,
    outcome_of,
    paired_p_value,
)

# the comparison


@pytest.mark.parametrize("more, less", [(0, 0), (5, 0), (8, 1), (3, 3), (0, 6), (40, 20)])
def test_with_counts_of_0_and_1_the_comparison_is_mcnemars_exact_test(more, less):
    challenger = torch.tensor([1] * more + [0] * less + [1, 0] * 4)
    incumbent = torch.tensor([0] * more + [1] * less + [1, 0] * 4)
    exact = binomtest(more, more + less, alternative="greater").pvalue if more + less else 1.0
    assert paired_p_value(challenger, incumbent) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_with_counts_of_draws_it_is_the_exact_permutation_test(seed):
    one, other = torch.randint(0, 9, (2, 10), generator=seeded(seed))
    exact = permutation_test(
        (one.numpy(), other.numpy()),
        lambda x, y: (x - y).sum(),
        permutation_type="samples",
        alternative="greater",
        n_resamples=inf,
    ).pvalue
    assert paired_p_value(one, other) == pytest.approx(exact, abs=1e-12)


def counts(*values):
    return torch.cat([torch.full((number,), value) for number, value in values])


@pytest.mark.parametrize(
    "challenger, attack, restart, outcome",
    [
        (counts((20, 4), (44, 0)), counts((40, 4), (24, 0)), counts((40, 4), (24, 0)), "passed"),
        (counts((40, 4), (24, 0)), counts((20, 4), (44, 0)), counts((20, 4), (44, 0)), "failed"),
        # weaker in all, yet it breaks twelve images that the attack misses and a restart does not
        (
            counts((24, 0), (28, 0), (12, 4)),
            counts((24, 4), (28, 4), (12, 0)),
            counts((52, 4), (12, 0)),
            "failed",
        ),
        (counts((24, 0), (28, 0), (12, 4)), counts((24, 4), (28, 4), (12, 0)), counts((64, 4)), "passed"),
        (counts((8, 4), (56, 0)), counts((64, 0)), counts((64, 0)), "suspicious"),
        (counts((10, 4), (54, 0)), counts((64, 0)), counts((64, 0)), "failed"),
        (counts((5, 4), (59, 0)), counts((64, 0)), counts((64, 0)), "passed"),
    ],
)
def test_a_challenger_must_neither_win_nor_break_what_the_attack_misses(challenger, attack, restart, outcome):
    assert check_weaker_attack("noise", challenger, attack, restart, num_samples=4).outcome == outcome


@pytest.mark.parametrize(
    "wrong, outcome, words",
    [
        ((20, 30, 30), "passed", "more do not help"),
        ((20, 30, 45), "passed", "more still help"),
        ((30, 20, 20), "failed", "weaker"),
        ((20, 30, 15), "failed", "weaker"),
        ((20, 20, 19), "passed", "more do not help"),
    ],
)
def test_more_effort_must_not_weaken_the_attack(wrong, outcome, words):
    efforts = {2**k: counts((number, 4), (64 - number, 0)) for k, number in enumerate(wrong)}
    check = check_effort("steps", "steps", efforts, num_samples=4)
    assert check.outcome == outcome and words in check.detail
    assert f"1: {wrong[0]}, 2: {wrong[1]}, 4: {wrong[2]}" in check.detail
    assert "converged" not in check.detail  # one schedule alone never shows it


@pytest.mark.parametrize("more, converged", [(0, True), (1, False), (7, False)])
def test_only_attacks_of_other_kinds_show_that_one_has_converged(more, converged):
    """MNIST AT: "converged" at 85 % said 0.1.0, where steps that fall leave 78.5."""
    efforts = {steps: counts((20, 1), (44, 0)) for steps in (10, 20)}
    others = {"another start": efforts[20], "falling steps": counts((20 + more, 1), (44 - more, 0))}
    check = check_effort("steps", "steps", efforts, 1, others=others)
    assert check.outcome == "passed" and ("converged" in check.detail) == converged
    assert converged or f"({more} of 44: another start 0, falling steps {more})" in check.detail


@pytest.mark.parametrize("off, outcome", [(0, "passed"), (1, "suspicious"), (14, "failed")])
def test_logits_must_not_depend_on_whether_a_gradient_is_asked_for(off, outcome):
    logits = torch.randn(64, 4, generator=seeded())
    other = logits * (1 + 1e-6)
    other[:off, 2] += 0.01
    if off:
        other[0] = nan
    check = check_modes(other, logits, 1.0)
    assert check.outcome == outcome and f"{64 - off} of 64" in check.detail


@pytest.mark.parametrize(
    "zero, broken, outcome", [(0, 0, "passed"), (1, 0, "suspicious"), (0, 1, "suspicious"), (7, 7, "failed")]
)
def test_gradients_that_are_zero_or_not_finite_are_counted(zero, broken, outcome):
    gradients = torch.ones(64, 3, 4, 4)
    gradients[:zero] = 0
    gradients[zero : zero + broken, 0, 1, 1] = nan
    gradients[60:, :, 2:] = 0  # a part of an image may be masked
    check = check_gradients(gradients)
    assert check.outcome == outcome and f"zero for {zero} and not finite for {broken} of 64" in check.detail


@pytest.mark.parametrize(
    "share, outcome",
    [
        (1.0, "passed"),
        (0.97, "passed"),
        (0.92, "suspicious"),
        (0.7, "failed"),
        (0.2, "failed"),
        (-1.0, "failed"),
    ],
)
def test_the_gradient_must_agree_with_the_loss(share, outcome):
    one, other = torch.randn(2, 8, 64, generator=seeded())
    assert check_agreement(3 * one, share * one + (1 - share**2) ** 0.5 * other).outcome == outcome


@pytest.mark.parametrize("gradient", [0.0, nan, inf])
def test_a_gradient_of_zero_or_nan_agrees_with_nothing(gradient):
    values = torch.randn(8, 64, generator=seeded())
    assert check_agreement(torch.full((8, 64), gradient), values).outcome == "failed"


@pytest.mark.parametrize(
    "right, outcome", [(0, "passed"), (6, "passed"), (10, "passed"), (13, "suspicious"), (16, "failed")]
)
def test_accuracy_must_fall_to_chance_without_a_bound(right, outcome):
    check = check_unbounded(torch.arange(64) < right, 10, 0.95)
    assert check.outcome == outcome == outcome_of(binomtest(right, 64, 0.1, alternative="greater").pvalue)
    assert check.detail.startswith(f"{right} of 64")


def test_draws_shared_in_a_batch_are_found_by_the_test_of_kruskal_and_wallis():
    generator = seeded()
    own, shared = torch.randn(12, 12, 1, generator=generator), torch.randn(12, 1, 1, generator=generator)
    for share in (0.0, 0.3, 1.0):
        values = own * (1 - share) + shared * share
        check = check_samples(values)
        exact = float(kruskal(*values.squeeze(2).numpy()).pvalue)
        assert check.outcome == outcome_of(exact)
        assert exact < 1e-4 or f"{exact:.2g}" in check.detail
    assert check.outcome == "failed"


def test_independent_draws_are_accused_as_rarely_as_the_significance_says():
    outcomes = [check_samples(torch.randn(6, 6, 2, generator=seeded(k)) ** 3).outcome for k in range(200)]
    assert outcomes.count("passed") >= 180


# what the measurements stand on


def test_the_margin_is_positive_where_the_label_loses_to_the_rest_and_never_saturates():
    logits = torch.tensor([[2.0, 1.0, 1.0], [5000.0, 0.0, 0.0], [0.0, 3.0, 0.0]]).requires_grad_()
    values = smooth_margin(logits, torch.tensor([0, 0, 0]))
    expected = cross_entropy(logits[[0, 2]], torch.tensor([0, 0])).expm1().log()  # log((1 - p) / p)
    torch.testing.assert_close(values[[0, 2]], expected)
    values.sum().backward()
    assert (logits.grad[:, 0] == -1).all()


# the table


def test_only_a_failed_check_costs_the_trust():
    checks = [Check("a", "passed", "fine"), Check("b|c", "suspicious", "odd"), Check("d", "failed", "bad")]
    assert warning(checks[:2]) == warning(()) == warning({"AP": checks[:2]}) == warning({}) == ""
    assert "failed d." in warning(checks) and warning({"AP": checks[:2], "AToP": checks}).endswith(
        "in: AToP."
    )
    table = format_checks(checks)
    assert "| b\\|c | suspicious | odd |" in table and table.endswith(f"**{warning(checks)}**")
    assert "look into b|c" in format_checks(checks[:2]) and "**" not in format_checks(checks[:2])
