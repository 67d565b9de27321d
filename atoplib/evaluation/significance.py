"""On the same images: does one attack find significantly more errors than another, does one defence outlast
another?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import bdtr, bdtrc

from atoplib.decisions import RULES
from atoplib.evaluation.results import Evaluation, Outcome, worst_case

SIGNIFICANCE = 0.05


class McNemar(NamedTuple):
    """Images that only the first or only the second is correct on, and how probable so uneven a split is by
    chance."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Any, second: Any, *, alternative: str = "two-sided") -> McNemar:
    """The exact McNemar test: only images on which the two differ count.

    Args:
        first, second: which images are correct, (images,) bool: two defences under one attack, or two attacks
            on one defence.
        alternative: ``two-sided``, or ``less``: the first is correct on fewer images.

    Raises:
        ValueError: for other numbers of images, or another alternative.

    Source: McNemar 1947.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(
            f"a paired test needs the same images twice, got shapes {one.shape} and {other.shape}"
        )
    if alternative not in ("two-sided", "less"):
        raise ValueError(f"unknown alternative {alternative!r}; allowed: two-sided, less")
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    if alternative == "less":
        p_value = float(bdtrc(only_second - 1, differ, 0.5)) if only_second else 1.0
    else:
        p_value = min(1.0, 2 * float(bdtr(min(only_first, only_second), differ, 0.5))) if differ else 1.0
    return McNemar(only_first, only_second, p_value)


def compare_attacks(
    correct: Mapping[str, Any], baseline: str, *, seconds: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """Attacks against a baseline on one defence and the same images: ``attack``, ``remaining`` (images still
    correct), ``only_it`` and ``only_baseline`` (images that only the one breaks), ``p`` (one-sided: it breaks
    more), ``significant``.

    Args:
        correct: which images are correct after each attack, the baseline among them.
        seconds: what each attack took: one more column.
    """
    rows = []
    for name in (name for name in correct if name != baseline):
        test = mcnemar(correct[name], correct[baseline], alternative="less")
        row = {"attack": name, "remaining": int(sum(map(bool, correct[name]))), "images": len(correct[name])}
        row |= {"only_it": test.only_second, "only_baseline": test.only_first, "p": test.p_value}
        row |= {"significant": test.p_value < SIGNIFICANCE}
        rows.append(row | ({"seconds": seconds.get(name)} if seconds else {}))
    return pd.DataFrame(rows)


def compare_defences(evaluation: Evaluation, first: str, *, rule: str = "single") -> pd.DataFrame:
    """``first`` against every other defence under every attack that both met: ``attack``, ``eps``, ``other``,
    ``only_first`` and ``only_other`` (images that only the one is correct on), ``p`` (two-sided). Of twenty
    tests, one falls below 0.05 by chance.

    Raises:
        ValueError: for a defence that was not evaluated.
    """
    names = list(dict.fromkeys(item.defence for item in evaluation.outcomes))
    if first not in names:
        raise ValueError(f"defence {first!r} was not evaluated; allowed: {', '.join(names)}")
    number = RULES.index(rule)
    own = {(item.attack, str(item.eps)): item for item in evaluation.outcomes if item.defence == first}
    rows = []
    for item in evaluation.outcomes:
        mine = own.get((item.attack, str(item.eps)))
        if item.defence != first and mine is not None:
            test = mcnemar(mine.correct[number], item.correct[number])
            rows.append((item.attack, item.eps, item.defence, *test))
    return pd.DataFrame(rows, columns=["attack", "eps", "other", "only_first", "only_other", "p"])


def masked_gradients(evaluation: Evaluation) -> list[str]:
    """A sentence for each attack that should be weaker and finds significantly more errors: transfer, BPDA,
    or one that sees no gradient at all, against the white-box attacks of the same norm and radius together,
    by majority vote. None: no sign of masked gradients here, which is less than ``masking.masking_checklist``
    asks.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019.
    """
    free, aside = (set(evaluation.facts.get(name, ())) for name in ("gradient_free", "known_sample"))
    number = RULES.index("majority")

    def weaker(item: Outcome) -> bool:
        return item.threat_model != "white-box" or item.attack in free

    sentences = []
    met = [item for item in evaluation.outcomes if item.threat_model and item.attack not in aside]
    for item in filter(weaker, met):
        place = item.defence, item.norm, item.eps
        same = [o for o in met if (o.defence, o.norm, o.eps) == place and not weaker(o)]
        if same:
            test = mcnemar(item.correct[number], worst_case(same).correct[number], alternative="less")
            if test.p_value < SIGNIFICANCE:
                sentences.append(
                    f"{item.defence}: {item.attack} breaks {test.only_second} images that the white-box "
                    f"attacks miss, which break {test.only_first} that it misses (p {test.p_value:.2g}): "
                    "gradients may be masked"
                )
    return sentences
