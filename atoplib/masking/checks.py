"""Checks of gradient masking: numbers in, a line of the checklist out.

Comparisons are paired and exact: ``suspicious`` is a p-value below ``SIGNIFICANCE``, ``failed`` one below a
tenth of it, because a checklist makes about ten comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import atanh, pi, sqrt, tanh

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import bdtrc, chdtrc
from torch import Tensor

from atoplib.decisions import wilson_interval
from atoplib.evaluation.results import SIGNIFICANCE, markdown_table


@dataclass(frozen=True)
class Check:
    """One line of the checklist: what was looked at, ``passed``, ``suspicious`` or ``failed``, and one
    sentence with the numbers. Only what failed costs the trust; what is suspicious asks for a stronger
    attack."""

    name: str
    outcome: str
    detail: str


def warning(checks: Sequence[Check] | Mapping[str, Sequence[Check]]) -> str:
    """What is written over a number, or over a table of several defences, that must not be believed; empty if
    no check failed."""
    if isinstance(checks, Mapping):
        masked = ", ".join(name for name, each in checks.items() if warning(each))
        return masked and f"NOT TRUSTWORTHY, gradients may be masked in: {masked}."
    failed = ", ".join(check.name for check in checks if check.outcome == "failed")
    return failed and (
        f"Not trustworthy: failed {failed}. A robust accuracy means nothing until this is explained."
    )


def format_checks(checks: Sequence[Check]) -> str:
    """The checklist as a Markdown table, with what it means for the number below it."""
    unsure = ", ".join(check.name for check in checks if check.outcome == "suspicious")
    trust = f"with a question: look into {unsure}" if unsure else "as far as these checks see"
    meaning = f"**{warning(checks)}**" if warning(checks) else f"Trustworthy {trust}."
    return f"{markdown_table(pd.DataFrame(map(asdict, checks)), index=False)}\n\n{meaning}"


def paired_p_value(attack: Int[Tensor, " batch"], baseline: Int[Tensor, " batch"]) -> float:
    """Probability of so large a sum of (attack - baseline), were each image's two counts exchangeable;
    one-sided.

    The exact paired permutation test (Fisher 1935; Pitman 1937): each difference keeps its size and a fair
    coin decides its sign. With counts of 0 and 1 it is McNemar's exact test. Many differences cost no more
    than few: the distribution of their sum comes from its characteristic function.

    Args:
        attack, baseline: whole numbers an image, such as misclassified samples under two attacks.
    """
    differences = (attack - baseline).double().cpu()
    total = int(differences.abs().sum())
    waves = torch.linspace(0, 2 * pi, 2 * total + 2, dtype=torch.float64)[:-1]  # of sums from -total to total
    spectrum = torch.cos(waves.unsqueeze(1) * differences).prod(dim=1).to(torch.complex128)
    probabilities = torch.fft.fftshift(torch.fft.ifft(spectrum).real)  # of the sums -total to total
    return float(probabilities[total + int(differences.sum()) :].sum().clamp(0, 1))


def p_text(p_value: float) -> str:
    """A p-value as it is printed."""
    return f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"


def _errors(wrong: Tensor, num_samples: int) -> str:
    return f"{float(wrong.sum()) / num_samples:.1f}".removesuffix(".0")


def outcome_of(p_value: float) -> str:
    """``suspicious`` below ``SIGNIFICANCE``, ``failed`` below a tenth of it, else ``passed``."""
    return "failed" if p_value < SIGNIFICANCE / 10 else "suspicious" if p_value < SIGNIFICANCE else "passed"


def _outcome_of_share(wrong: Bool[Tensor, " batch"]) -> str:
    low, _ = wilson_interval(int(wrong.sum()), len(wrong))
    return "failed" if low > 0.1 else "suspicious" if low > 0 else "passed"


def check_gradients(gradients: Float[Tensor, "batch channels height width"]) -> Check:
    """Input gradients must be finite and not zero: of hardly any image (at most a tenth; any at all is
    suspicious)."""
    broken = ~gradients.isfinite().flatten(1).all(dim=1)
    zero = (gradients == 0).flatten(1).all(dim=1)
    return Check(
        "gradients",
        _outcome_of_share(broken | zero),
        f"the input gradient is zero for {int(zero.sum())} and not finite for {int(broken.sum())} of "
        f"{len(zero)} images",
    )


def check_modes(
    with_gradient: Float[Tensor, "batch classes"], without: Float[Tensor, "batch classes"], spread: float
) -> Check:
    """Logits must be the same whether or not a gradient is asked for: an attack sees the one, a decision
    rests on the other.

    Args:
        spread: of the logits over the classes; a difference beyond a thousandth of it counts, as two
            computations of one function may differ by less. Failed and suspicious as in ``check_gradients``.
    """
    off = ~((with_gradient - without).abs().amax(dim=1) <= 1e-3 * spread)  # so that NaN counts, too
    return Check(
        "same answers",
        _outcome_of_share(off),
        f"with and without a gradient the same sample gives the same logits for {int((~off).sum())} of "
        f"{len(off)} images",
    )


def check_agreement(
    predicted: Float[Tensor, "directions batch"],
    measured: Float[Tensor, "directions batch"],
    name: str = "finite differences",
) -> Check:
    """What the gradient predicts for small steps must be what the loss does: correlation over images and
    directions.

    In random directions it estimates the cosine between the gradient and the true one: a bias as long as the
    gradient itself leaves 0.71. The 95 % bound counts images only, since the directions of one image share
    its gradient. Failed where the correlation is surely below 0.9, suspicious where it is surely below 0.97.
    """
    pairs = torch.stack([predicted.flatten(), measured.flatten()]).double()
    correlation = float(torch.corrcoef(pairs)[0, 1].nan_to_num(0.0).clamp(1e-12 - 1, 1 - 1e-12))
    high = tanh(atanh(correlation) + 1.645 / sqrt(max(1, predicted.shape[1] - 3)))
    outcome = "failed" if high < 0.9 else "suspicious" if high < 0.97 else "passed"
    return Check(
        name,
        outcome,
        f"small steps change the margin as the gradient says with a correlation of {correlation:.2f} (at "
        f"most {high:.2f})",
    )


def check_samples(values: Float[Tensor, "calls copies batch"]) -> Check:
    """Copies of an image in one batch must get samples of their own, or EOT averages one sample with itself.

    ``values`` of an image in one call must not be more alike than those of different calls (Kruskal & Wallis
    1952, corrected for ties and summed over the images). An image whose values are all equal says nothing.
    """
    from scipy.stats import kruskal  # slow to load

    values = values[..., (values != values[0, 0]).flatten(0, 1).any(dim=0)].double().cpu().numpy()
    freedom = max(1, values.shape[2]) * (len(values) - 1)
    p_value = float(chdtrc(freedom, kruskal(*values, axis=0).statistic.sum()))
    return Check(
        "samples",
        outcome_of(p_value),
        f"copies of an image in one batch need independent samples for EOT ({p_text(p_value)})",
    )


def check_unbounded(correct: Bool[Tensor, " batch"], classes: int, eps: float) -> Check:
    """Under an attack without a real bound, accuracy must fall to chance, 1 / classes (exact binomial
    test)."""
    count, images = int(correct.sum()), len(correct)
    p_value = float(bdtrc(count - 1, images, 1 / classes)) if count else 1.0
    return Check(
        f"unbounded, eps {eps:.2f}",
        outcome_of(p_value),
        f"{count} of {images} images are still correct; chance is {images / classes:.1f} ({p_text(p_value)})",
    )


def check_weaker_attack(
    name: str,
    weaker: Int[Tensor, " batch"],
    attack: Int[Tensor, " batch"],
    restart: Int[Tensor, " batch"],
    num_samples: int,
) -> Check:
    """An attack that should be weaker must neither win nor break images that a restart of the main attack
    does not.

    Args:
        weaker, attack, restart: misclassified samples an image, of ``num_samples``, under each attack.
    """
    missed = 2 * attack <= num_samples
    broken, again = ((missed & (2 * other > num_samples)).long() for other in (weaker, restart))
    comparisons = paired_p_value(weaker, attack), paired_p_value(broken, again)
    p_value = min(1.0, len(comparisons) * min(comparisons))
    return Check(
        name,
        outcome_of(p_value),
        f"it finds {_errors(weaker, num_samples)} errors, the white-box attack {_errors(attack, num_samples)}"
        f"; of the {int(missed.sum())} images which that misses it breaks {int(broken.sum())}, "
        f"a restart {int(again.sum())} ({p_text(p_value)})",
    )


def check_effort(
    name: str,
    unit: str,
    wrong: Mapping[int, Int[Tensor, " batch"]],
    num_samples: int,
    *,
    others: Mapping[str, Int[Tensor, " batch"]] | None = None,
) -> Check:
    """More of ``unit`` (steps, samples, starts) must not make the attack weaker; that it still helps is said.

    Args:
        wrong: misclassified samples an image, of ``num_samples``, by the effort, in ascending order.
        others: the same under attacks that differ in something else (schedule, loss, start). One schedule
            alone never shows that an attack has converged: that is said only where these break no more than
            one in a hundred of the images beside those that the last effort breaks.
    """
    last = wrong[max(wrong)]
    gains = [paired_p_value(less, more) for less, more in pairwise(wrong.values())]
    weaker = min(1.0, len(gains) * min(gains))
    missed = 2 * last <= num_samples
    broken = {other: missed & (2 * counts > num_samples) for other, counts in (others or {}).items()}
    union = int(sum(broken.values(), torch.zeros_like(missed)).sum())
    state = "more do not help"
    if outcome_of(weaker) != "passed":
        state = f"more make the attack weaker ({p_text(weaker)})"
    elif paired_p_value(last, list(wrong.values())[-2]) < SIGNIFICANCE:
        state = "more still help: take more"
    elif union > 0.01 * len(missed):
        counts = ", ".join(f"{other} {int(each.sum())}" for other, each in broken.items())
        missing = f"{union} of {int(missed.sum())}: {counts}"
        state += f", but several attacks do: others break images that it misses ({missing})"
    elif others:
        state = f"converged, beside {', '.join(others)}, too"
    errors = (f"{effort}: {_errors(counts, num_samples)}" for effort, counts in wrong.items())
    return Check(name, outcome_of(weaker), f"errors by {unit}: {', '.join(errors)}; {state}")
