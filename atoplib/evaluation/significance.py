"""On the same images: does one attack find significantly more errors than another, does one defence outlast
another?"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from atoplib.evaluation.results import Evaluation
from atoplib.parameters import check_settings, one_of

SIGNIFICANCE = 0.05


def mcnemar(first: Any, second: Any, *, alternative: str = "two-sided") -> tuple[int, int, float]:
    """The exact McNemar test: how many images only the first and only the second is correct on, and how
    probable so uneven a split is by chance (p); images on which the two do not differ do not count.

    Args:
        first, second: which images are correct, (images,) bool: two defences under one attack, or two attacks
            on one defence.
        alternative: ``two-sided``, or ``less``: the first is correct on fewer images.

    Raises:
        ValueError: for other numbers of images.

    Source: McNemar 1947.
    """
    from scipy.stats import binomtest  # slow to load

    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    p_value = float(binomtest(only_first, differ, alternative=alternative).pvalue) if differ else 1.0
    return only_first, only_second, p_value


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
        right = correct[name]
        missed, found, p = mcnemar(right, correct[baseline], alternative="less")
        rows.append([name, int(sum(map(bool, right))), len(right), found, missed, p, p < SIGNIFICANCE])
    columns = ["attack", "remaining", "images", "only_it", "only_baseline", "p", "significant"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame if seconds is None else frame.assign(seconds=frame["attack"].map(seconds))


def compare_defences(evaluation: Evaluation, first: str, *, rule: str = "single") -> pd.DataFrame:
    """``first`` against every other defence under every attack that both met, at its largest radius:
    ``attack``, ``other``, ``only_first`` and ``only_other`` (images that only the one is correct on), ``p``
    (two-sided). Of twenty tests, one falls below 0.05 by chance.

    Raises:
        ValueError: for a defence that was not evaluated.
    """
    correct, rows = evaluation.correct, []
    check_settings(first=(first, one_of(*dict.fromkeys(defence for defence, _ in correct))))
    for defence, attack in correct:
        if defence != first and (first, attack) in correct:
            pair = correct[first, attack][rule], correct[defence, attack][rule]
            rows.append((attack, defence, *mcnemar(*pair)))
    return pd.DataFrame(rows, columns=["attack", "other", "only_first", "only_other", "p"])


def masked_gradients(evaluation: Evaluation) -> list[str]:
    """A sentence for each attack that should be weaker and finds significantly more errors: transfer, BPDA,
    or one that sees no gradient at all, against the white-box attacks of the same norm and radius together,
    by majority vote. None: no sign of masked gradients here, which is less than ``masking.masking_checklist``
    asks.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019.
    """
    free, aside = (set(evaluation.facts.get(name, ())) for name in ("gradient_free", "known_sample"))
    met = evaluation.by_image[lambda rows: (rows["threat_model"] != "") & ~rows["attack"].isin(aside)]
    weaker = (met["threat_model"] != "white-box") | met["attack"].isin(free)
    strongest = met[~weaker].groupby(["defence", "norm", "eps", "image"])["majority"].min()
    sentences = []
    for (defence, norm, eps, attack), part in met[weaker].groupby(["defence", "norm", "eps", "attack"]):
        if (defence, norm, eps) in strongest:
            missed, found, p = mcnemar(part["majority"], strongest[defence, norm, eps], alternative="less")
            if p < SIGNIFICANCE:
                sentences.append(
                    f"{defence}: {attack} breaks {found} images that the white-box attacks miss, which break "
                    f"{missed} that it misses (p {p:.2g}): gradients may be masked"
                )
    return sentences
