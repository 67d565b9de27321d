"""Verdicts on gradient masking: numbers in, a line of the checklist out.

Comparisons are paired and exact: ``suspicious`` is a p-value below ``significance``, ``failed`` one below a tenth of it,
because a checklist makes about ten comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atanh, isfinite, pi, sqrt, tanh

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import bdtrc, chdtrc
from torch import Tensor

from atoplib.verdicts import wilson_interval

OUTCOMES = ("passed", "suspicious", "failed")
AGREEMENT = {"failed": 0.9, "suspicious": 0.97}  # of gradient and loss: correlations that are too small
VANISHED = {"failed": 0.1, "suspicious": 0.0}  # shares of images without a usable gradient that are too large
SAME = 1e-3  # of the logits' spread: two computations of one function may differ by so much
CONVERGED = 0.01  # share of the images that other attacks may break beside the main one where that is called converged


@dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: what was looked at.
        verdict: ``passed``, ``suspicious`` or ``failed``.
        evidence: one sentence with the numbers.
    """

    name: str
    verdict: str
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in OUTCOMES:
            raise ValueError(f"unknown verdict {self.verdict!r}; allowed: {', '.join(OUTCOMES)}")


def trustworthy(checks: Sequence[Check]) -> bool:
    """Whether no check failed; one that is suspicious asks for a look, and for a stronger attack."""
    return all(check.verdict != "failed" for check in checks)


def stamp(checks: Mapping[str, Sequence[Check]]) -> str:
    """What is written over a table whose numbers must not be believed; empty if no check of any defence failed."""
    masked = [name for name, found in checks.items() if not trustworthy(found)]
    return f"NOT TRUSTWORTHY, gradients may be masked in: {', '.join(masked)}." if masked else ""


def format_checks(checks: Sequence[Check]) -> str:
    """The checklist as Markdown, readable as plain text, with what it means for the number below it.

    Raises:
        ValueError: without a check.
    """
    if not checks:
        raise ValueError("there are no checks to show: run masking_checklist first")
    rows = [("check", "verdict", "evidence"), *((check.name, check.verdict, check.evidence) for check in checks)]
    rows = [tuple(text.replace("|", "\\|") for text in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"| {name.ljust(widths[0])} | {verdict.ljust(widths[1])} | {evidence} |" for name, verdict, evidence in rows]
    lines.insert(1, f"| {'-' * widths[0]} | {'-' * widths[1]} | -------- |")
    failed = [check.name for check in checks if check.verdict == "failed"]
    unsure = [check.name for check in checks if check.verdict == "suspicious"]
    if failed:
        stamp = f"**Not trustworthy**: failed {', '.join(failed)}. A robust accuracy means nothing until this is explained."
    elif unsure:
        stamp = f"Trustworthy with a question: look into {', '.join(unsure)}."
    else:
        stamp = "Trustworthy as far as these checks see."
    return "\n".join([*lines, "", stamp])


def paired_p_value(challenger: Int[Tensor, " batch"], incumbent: Int[Tensor, " batch"]) -> float:
    """Probability of so large a sum of (challenger - incumbent), were each image's two counts exchangeable; one-sided.

    The exact paired permutation test (Fisher 1935; Pitman 1937): each difference keeps its size and throws a coin for its
    sign. With counts of 0 and 1 it is McNemar's exact test. Many differences cost no more than few: the distribution of
    their sum comes from its characteristic function.

    Args:
        challenger, incumbent: whole numbers an image, such as wrong draws under two attacks.
    """
    differences = (challenger - incumbent).double().cpu()
    total = int(differences.abs().sum())
    size = 2 * total + 1  # sums from -total to total
    waves = 2 * pi * torch.arange(size, dtype=torch.float64) / size
    spectrum = torch.cos(waves.unsqueeze(1) * differences).prod(dim=1)
    probabilities = torch.fft.ifft(spectrum.to(torch.complex128)).real  # of the sums 0, 1, ..., total, -total, ..., -1
    sums = torch.arange(size)
    sums = torch.where(sums > total, sums - size, sums)
    return float(probabilities[sums >= int(differences.sum())].sum().clamp(0, 1))


def outcome_of(p_value: float, significance: float) -> str:
    """``suspicious`` below ``significance``, ``failed`` below a tenth of it, else ``passed``."""
    return "failed" if p_value < significance / 10 else "suspicious" if p_value < significance else "passed"


def check_gradients(gradients: Float[Tensor, "batch 3 height width"]) -> Check:
    """Input gradients must be finite and not zero: of hardly any image (at most a tenth; any at all is suspicious)."""
    flat = gradients.flatten(1)
    broken = ~torch.isfinite(flat).all(dim=1)
    zero = (flat == 0).all(dim=1)
    count, images = int((broken | zero).sum()), len(gradients)
    low, _ = wilson_interval(count, images)
    verdict = next((name for name in ("failed", "suspicious") if low > VANISHED[name]), "passed")
    text = f"the input gradient is zero for {int(zero.sum())} and not finite for {int(broken.sum())} of {images} images"
    return Check("gradients", verdict, text)


def check_modes(
    with_gradient: Float[Tensor, "batch classes"], without: Float[Tensor, "batch classes"], spread: float
) -> Check:
    """Logits must be the same whether or not a gradient is asked for: an attack sees the one, a decision rests on the other.

    Args:
        spread: of the logits over the classes; a difference beyond ``SAME`` of it counts. Failed and suspicious as in
            ``check_gradients``.
    """
    off = ~((with_gradient - without).abs().amax(dim=1) <= SAME * spread)  # so that NaN counts, too
    count, images = int(off.sum()), len(off)
    low, _ = wilson_interval(count, images)
    verdict = next((name for name in ("failed", "suspicious") if low > VANISHED[name]), "passed")
    text = f"where a gradient is asked for, the same sample gives {count} of {images} images other logits"
    return Check("same answers", verdict, text)


def check_agreement(
    predicted: Float[Tensor, "directions batch"],
    measured: Float[Tensor, "directions batch"],
    name: str = "finite differences",
) -> Check:
    """What the gradient predicts for small steps must be what the loss does: correlation over images and directions.

    In random directions it estimates the cosine between the gradient and the true one: a bias as long as the gradient itself
    leaves 0.71. The 95 % bound counts images only, since the directions of one image share its gradient. Failed where the
    correlation is surely below 0.9, suspicious where it is surely below 0.97.
    """
    x, y = predicted.flatten().double(), measured.flatten().double()
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    correlation = float(x @ y) / size if size > 0 and isfinite(size) else 0.0
    within = max(-1 + 1e-12, min(1 - 1e-12, correlation))
    high = tanh(atanh(within) + 1.645 / sqrt(max(1, predicted.shape[1] - 3)))
    verdict = next((name for name in ("failed", "suspicious") if high < AGREEMENT[name]), "passed")
    text = f"small steps change the margin as the gradient says with a correlation of {correlation:.2f} (at most {high:.2f})"
    return Check(name, verdict, text)


def check_draws(values: Float[Tensor, "calls copies batch"], significance: float) -> Check:
    """Copies of an image in one batch must get draws of their own, or EOT averages one draw with itself.

    ``values`` of an image in one call must not be more alike than those of different calls (Kruskal & Wallis 1952, corrected
    for ties and summed over the images). An image whose values are all equal says nothing.
    """
    calls, copies, images = values.shape
    number = calls * copies
    ranks = _mid_ranks(values.flatten(0, 1)) - (number + 1) / 2
    variance = ranks.square().sum(dim=0) / (number - 1)
    distance = copies * ranks.unflatten(0, (calls, copies)).mean(dim=1).square().sum(dim=0)
    telling = variance > 0
    p_value = float(chdtrc(max(1, int(telling.sum())) * (calls - 1), float((distance / variance)[telling].sum())))
    verdict = outcome_of(p_value, significance)
    relation = "independent" if verdict == "passed" else "alike, so EOT averages fewer draws than it says"
    return Check("draws", verdict, f"copies of an image in one batch get draws that are {relation} ({p_text(p_value)})")


def _mid_ranks(values: Float[Tensor, "number images"]) -> Float[Tensor, "number images"]:
    """Ranks from 1 within each column; equal values share their mean rank, for their order in memory means nothing."""
    columns = values.double().T.contiguous()
    ordered = columns.sort(dim=1).values
    below, upto = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    return ((below + upto + 1).double() / 2).T


def check_unbounded(right: Bool[Tensor, " batch"], classes: int, eps: float, significance: float) -> Check:
    """Under an attack without a real bound, accuracy must fall to chance, 1 / classes (exact binomial test)."""
    count, images = int(right.sum()), len(right)
    p_value = float(bdtrc(count - 1, images, 1 / classes)) if count else 1.0
    text = f"{count} of {images} images are still read correctly; chance is {images / classes:.1f} ({p_text(p_value)})"
    return Check(f"unbounded, eps {eps:.2f}", outcome_of(p_value, significance), text)


def check_challenger(
    name: str,
    challenger: Int[Tensor, " batch"],
    attack: Int[Tensor, " batch"],
    restart: Int[Tensor, " batch"],
    num_draws: int,
    significance: float,
) -> Check:
    """An attack that should be weaker must neither win nor break images that a restart of the main attack does not.

    Args:
        challenger, attack, restart: wrong draws an image, of ``num_draws``, under each attack.
    """
    missed_by_attack = 2 * attack <= num_draws
    found, again = ((missed_by_attack & (2 * other > num_draws)).long() for other in (challenger, restart))
    p_value = min(1.0, 2 * min(paired_p_value(challenger, attack), paired_p_value(found, again)))  # two comparisons
    text = (
        f"it finds {_errors(challenger, num_draws)} errors, the white-box attack {_errors(attack, num_draws)}; "
        f"of the {int(missed_by_attack.sum())} images which that misses it breaks {int(found.sum())}, "
        f"a restart {int(again.sum())} ({p_text(p_value)})"
    )
    return Check(name, outcome_of(p_value, significance), text)


def check_effort(
    name: str,
    unit: str,
    wrong: Mapping[int, Int[Tensor, " batch"]],
    num_draws: int,
    significance: float,
    *,
    others: Mapping[str, Int[Tensor, " batch"]] | None = None,
) -> Check:
    """More of ``unit`` (steps, draws, starts) must not make the attack weaker; that it still helps is said.

    Args:
        wrong: wrong draws an image, of ``num_draws``, by the effort, in ascending order.
        others: the same under attacks that differ in something else (schedule, loss, start). One schedule alone never shows
            that an attack has converged: that is said only where these break no more than ``CONVERGED`` of the images beside
            those that the last effort breaks.
    """
    efforts = list(wrong)
    pairs = list(zip(efforts, efforts[1:], strict=False))
    weaker = min(1.0, len(pairs) * min(paired_p_value(wrong[less], wrong[more]) for less, more in pairs))
    stronger = paired_p_value(wrong[efforts[-1]], wrong[efforts[-2]])
    found = ", ".join(f"{effort}: {_errors(wrong[effort], num_draws)}" for effort in efforts)
    verdict = outcome_of(weaker, significance)
    if verdict != "passed":
        state = f"more make the attack weaker ({p_text(weaker)})"
    elif stronger < significance:
        state = "more still help, so a robust accuracy at this budget is too high"
    elif others:
        missed = 2 * wrong[efforts[-1]] <= num_draws
        broken = {other: int((missed & (2 * counts > num_draws)).sum()) for other, counts in others.items()}
        union = int((missed & torch.stack([2 * counts > num_draws for counts in others.values()]).any(dim=0)).sum())
        state = f"more do not help, but others break images that it misses ({union} of {int(missed.sum())}: "
        state += ", ".join(f"{other} {count}" for other, count in broken.items()) + "), so a robust accuracy is too high"
        if union <= CONVERGED * len(missed):
            state = f"converged, beside {', '.join(others)}, too"
    else:
        state = "more do not help"
    return Check(name, verdict, f"errors by {unit}: {found}; {state}")


def p_text(p_value: float) -> str:
    """A p-value as the evidence prints it."""
    return f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"


def _errors(wrong: Tensor, num_draws: int) -> str:
    return f"{float(wrong.sum()) / num_draws:.1f}".removesuffix(".0")
