"""What an evaluation found: one frame of numbers, which images were correct, tables, files that others can
read, and paired tests: does one attack find, or one defence keep, significantly more on the same images?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from atoplib.decisions import RULES, wilson_interval
from atoplib.files import write_json, write_text
from atoplib.parameters import check_settings, one_of

CLEAN, WORST = "clean", "worst case"
KNOWN = "known sample"  # threat model of who knows the sample of t: it tells what randomness hides
FILES = ("results.json", "frame.csv", "images.csv", "table.md", "table.tex")
RULE_NAMES = dict(zip(RULES, ("single sample", "majority", "mean softmax", "worst of N"), strict=True))
NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
UNITS = {"occlusion": " patch", "rotation": "°", "corruption": " of 5"}  # of what is no norm
LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
)  # its special characters made harmless
KEYS = ["defence", "attack", "threat_model", "norm", "eps"]
SIGNIFICANCE = 0.05

# (defence, clean %, robust %, by which protocol): the literature's numbers for CIFAR-10, l_inf 8/255
PUBLISHED = pd.DataFrame(
    [
        ("AToP, GAN purifier, RT2", None, 72.85, "AutoAttack on the pipeline, authors' review thread"),
        ("the same without fine-tuning", None, 59.57, "AutoAttack on the pipeline, authors' review thread"),
        ("AToP, ResNet-18", 90.04, 64.06, "PGD-200 + EOT-20, full gradient, 64 images"),
        ("the same without fine-tuning", None, 56.25, "PGD-200 + EOT-20, full gradient, 64 images"),
        ("DiffPure, WRN-28-10", 89.02, 70.64, "adjoint AutoAttack"),
        ("DiffPure, WRN-28-10", 89.02, 48.28, "correct gradient, later re-evaluation"),
        ("DiffPure, WRN-70-16", None, 39.45, "majority vote, DiffBreak"),
        ("DiffPure, WRN-70-16", None, 17.19, "worst of 10, DiffBreak"),
        ("ADBM", None, 47.70, "PGD-200 + EOT-20"),
        ("AT, ResNet-18 (TRADES-AWP)", None, 51.62, "AutoAttack"),
        ("AT, WRN-94-16, extra data", 93.6, 73.71, "AutoAttack"),
    ],
    columns=["published", "clean %", "robust %", "protocol"],
)


def percents(right: float, images: int) -> tuple[float, float, float]:
    """Accuracy in percent, and the ends of its 95 % interval (Wilson)."""
    low, high = wilson_interval(right, images)
    return 100 * right / images, 100 * low, 100 * high


def worst_case(by_image: pd.DataFrame, attacks: pd.Series | np.ndarray, name: str = WORST) -> pd.DataFrame:
    """Several attacks together, a row a defence and image: an image counts as correct if it is under each of
    them. The clean images belong to them: an attack may turn a wrong classification into a correct one, which
    is no robustness.

    Args:
        by_image: as ``Evaluation.by_image``.
        attacks: which of its rows are those of the attacks; defences without one are left out.
    """
    attacked = by_image[attacks]
    clean = by_image[(by_image["attack"] == CLEAN) & by_image["defence"].isin(attacked["defence"])]
    together = pd.concat([clean, attacked]).groupby(["defence", "image"], sort=False, as_index=False)
    norm, eps = (attacked[column].unique() for column in ("norm", "eps"))
    return together.agg(
        dict.fromkeys([*RULES, "sample_mean", "votes"], "min") | {"passes": "sum", "seconds": "sum"}
    ).assign(
        attack=name,
        threat_model="",
        norm=norm[0] if len(norm) == 1 else "",
        eps=eps[0] if len(eps) == 1 else np.nan,
    )


def by_defence(*parts: pd.DataFrame) -> pd.DataFrame:
    """Rows of several frames, those of a defence together."""
    return pd.concat([rows for _, rows in pd.concat(parts).groupby("defence", sort=False)], ignore_index=True)


def with_worst_cases(by_image: pd.DataFrame) -> pd.DataFrame:
    """Each defence with its worst cases: of each norm and radius, and of all norms at their largest radii;
    attacks that know the sample are no part of them."""
    attacked = (by_image["attack"] != CLEAN) & (by_image["threat_model"] != KNOWN)
    several, parts = by_image.loc[attacked, "norm"].nunique() > 1, [by_image]
    for (norm, _), together in by_image[attacked].groupby(["norm", "eps"], sort=False):
        if together["attack"].nunique() > 1:
            name = f"{WORST} {norm}" if several else WORST
            parts.append(worst_case(by_image, by_image.index.isin(together.index), name))
    if several:
        largest = by_image["eps"] == by_image.groupby("norm")["eps"].transform("max")
        parts.append(worst_case(by_image, attacked & largest))
    return by_defence(*parts)


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of ``evaluate``; shows itself as a table of single-sample accuracies.

    Attributes:
        by_image: a row for each defence, attack (``clean`` first, worst cases last), radius and ``image``:
            whether it is correct by each of ``RULES``, ``sample_mean`` (the proportion of its samples that
            are correct), ``votes`` (samples of the decision; ``worst_of_n`` rests on the protocol's number at
            most), ``passes`` of it through the target of the attack and ``seconds`` of attack and decision.
        labels: true classes, (images,).
        facts: what was measured: protocol, radii, seed, what each defence is.
        images: the adversarial images by (defence, attack, eps), on the CPU, if they were to be kept.
    """

    by_image: pd.DataFrame
    labels: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[tuple[str, str, float], Tensor] = field(default_factory=dict)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row for each defence, attack, radius and rule; ``accuracy``, its 95 % Wilson interval ``low`` to
        ``high``, and ``sample_mean`` (of all samples) in per cent; ``passes`` an image; ``seconds`` of attack
        and decision."""
        rows = []
        for key, part in self.by_image.groupby(KEYS, sort=False, dropna=False):
            mean, cost = 100 * part["sample_mean"].mean(), (part["passes"].mean(), part["seconds"].sum())
            for rule in RULES:
                numbers = percents(int(part[rule].sum()), len(part))
                rows.append([*key, rule, part["votes"].iloc[0], *numbers, mean, len(part), *cost])
        numbers = ["votes", "accuracy", "low", "high", "sample_mean", "images", "passes", "seconds"]
        return pd.DataFrame(rows, columns=[*KEYS, "rule", *numbers])

    @cached_property
    def correct(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Which images were correct, by (defence, attack), at the largest radius: a line an image, a column a
        rule."""
        groups = self.by_image.groupby(["defence", "attack", "eps"], sort=False, dropna=False)
        return {key[:2]: part[list(RULES)].reset_index(drop=True) for key, part in groups}

    def adversarial(self, defence: str, attack: str, eps: float | None = None) -> Tensor:
        """The adversarial images of one attack, at its largest radius or at ``eps``;
        ``evaluate(keep_images=True)``.

        Raises:
            KeyError: for what was not measured, or not kept.
        """
        kept = (key for key in self.images if key[:2] == (defence, attack) and eps in (None, key[2]))
        return self.images[max(kept, default=(defence, attack, "evaluate(keep_images=True) keeps them"))]

    def with_worst(self, name: str, attacks: Sequence[str]) -> "Evaluation":
        """The same with one more worst case for each defence: of its clean images and of ``attacks``."""
        chosen = self.by_image["attack"].isin(attacks)
        return replace(self, by_image=by_defence(self.by_image, worst_case(self.by_image, chosen, name)))

    def table(self, rule: str = "single", *, bold: bool = False) -> pd.DataFrame:
        """Lines attacks, columns defences, cells ``47.0 [40.2, 53.9]`` in %; ``bold``: the best of a line as
        ``**47.0**``."""
        frame = self.frame[self.frame["rule"] == rule]
        sweep = frame.groupby("attack")["eps"].transform("nunique") > 1
        lines = frame["attack"] + frame["eps"].map(", ε = {:.3g}".format).where(sweep, "")
        best = frame.groupby(lines)["accuracy"].transform("max") == frame["accuracy"]
        marks = (best & bold & (frame["defence"].nunique() > 1)).map({True: "**", False: ""})
        number, low, high = (frame[name].map("{:.1f}".format) for name in ("accuracy", "low", "high"))
        cells = marks + number + marks + "\N{NO-BREAK SPACE}[" + low + ",\N{NO-BREAK SPACE}" + high + "]"
        table = frame.assign(line=lines, cell=cells).pivot(index="line", columns="defence", values="cell")
        table = table.loc[lines.unique(), frame["defence"].unique()].fillna("\N{EN DASH}")
        return table.rename_axis(index="% [95 % interval]", columns=None)

    @property
    def caption(self) -> str:
        """What the table shows, in one line."""
        sizes = [eps_text(eps, norm) for norm, each in self.facts.get("eps", {}).items() for eps in each]
        protocol = self.facts.get("protocol", {"name": ""})
        return ", ".join([f"protocol {protocol['name']}", *sizes, f"{len(self.labels)} images"])

    def __repr__(self) -> str:
        return f"Single-sample accuracy, {self.caption}:\n\n{self.table().to_string()}"

    def _repr_markdown_(self) -> str:
        return f"Single-sample accuracy, {self.caption}:\n\n{markdown_table(self.table(bold=True))}"

    def write(
        self,
        path: Path,
        *,
        caption: str = "",
        indices: Sequence[int] | None = None,
        published: bool = False,
        **facts: Any,
    ) -> None:
        """Write ``results.json``, ``frame.csv``, ``images.csv``, ``table.md`` and ``table.tex``, each
        atomically.

        Args:
            caption: what was measured, in one line; "": ``caption``.
            indices: each image's place in the data set.
            published: put the literature's numbers beside ours.
            facts: anything else for ``results.json``: checks for masked gradients, costs.

        Raises:
            OSError: where the directory cannot be written; earlier files stay.
        """
        caption, latex = caption or self.caption, []
        markdown, places = [caption], None if indices is None else list(map(int, indices))
        for rule in RULES if self.frame["votes"].max() > 1 else RULES[:1]:
            table, heading = self.table(rule), f"{caption}; {RULE_NAMES[rule]}"
            markdown.append(f"**{RULE_NAMES[rule]}**\n\n{markdown_table(table)}")
            latex.append(table.to_latex(escape=True, caption=heading.translate(LATEX)))
        if published:
            markdown.append(markdown_table(PUBLISHED, index=False, digits=4))
            latex.append(PUBLISHED.to_latex(index=False, escape=True, na_rep="--", float_format="%.2f"))
        rows, place = self.by_image.copy(), np.array(places or range(len(self.labels)))
        rows.insert(0, "label", self.labels[rows["image"]])
        rows["index"] = place[rows.pop("image")]
        write_text(path / "frame.csv", self.frame.to_csv(index=False))
        write_text(path / "images.csv", rows.to_csv(index=False))
        write_text(path / "table.md", "\n\n".join(markdown) + "\n")
        write_text(path / "table.tex", "\n".join(latex))
        frame = self.frame.astype(object).where(self.frame.notna(), None).to_dict("records")
        summary = {"caption": caption, "frame": frame, "indices": places}
        write_json(path / "results.json", {**summary, **self.facts, **facts})


def leaders(accuracy: pd.Series) -> str:
    """Who keeps most, of accuracies by name: all of them where several are level; "nobody" where all keep
    nothing."""
    best = accuracy[accuracy == accuracy.max()]
    return " and ".join(map(str, best.index)) if accuracy.max() > 0 else "nobody"


def markdown_table(frame: pd.DataFrame, *, index: bool = True, digits: int = 3) -> str:
    """A frame as a Markdown table; numbers to the right, floats with so many digits, None and NaN as a
    dash."""
    frame = frame.reset_index() if index else frame
    rule = ["---:" if pd.api.types.is_numeric_dtype(frame[name]) else "---" for name in frame]
    text = frame.map(lambda value: f"{value:.{digits}g}" if isinstance(value, float) else str(value))
    lines = [map(str, frame), rule, *text.where(frame.notna(), "\N{EN DASH}").to_numpy()]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def eps_text(eps: float, norm: str = "linf") -> str:
    """``ℓ∞ ε = 8/255``; ``ℓ∞ ε = 0.3`` where the radius is a round decimal number."""
    of_100, of_255 = (abs(whole * eps - round(whole * eps)) < 1e-6 for whole in (100, 255))
    size = f"{round(255 * eps)}/255" if norm == "linf" and of_255 and not of_100 else f"{eps:.4g}"
    return f"{NORMS.get(norm, norm)} ε = {size}{UNITS.get(norm, '')}" + "es" * (
        norm == "occlusion" and eps != 1
    )


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
        only_baseline, only_it, p = mcnemar(right, correct[baseline], alternative="less")
        rows.append(
            [name, int(sum(map(bool, right))), len(right), only_it, only_baseline, p, p < SIGNIFICANCE]
        )
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
            rows.append(
                (attack, defence, *mcnemar(correct[first, attack][rule], correct[defence, attack][rule]))
            )
    return pd.DataFrame(rows, columns=["attack", "other", "only_first", "only_other", "p"])


def masked_gradients(evaluation: Evaluation) -> list[str]:
    """A sentence for each attack that should be weaker and finds significantly more errors: transfer, BPDA,
    or one that sees no gradient at all, against the white-box attacks of the same norm and radius together,
    by majority vote. None: no sign of masked gradients here, which is less than ``masking.masking_checklist``
    asks.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019.
    """
    free = set(evaluation.facts.get("gradient_free", ()))
    met = evaluation.by_image[lambda rows: ~rows["threat_model"].isin(["", KNOWN])]
    weaker = (met["threat_model"] != "white-box") | met["attack"].isin(free)
    strongest = met[~weaker].groupby(["defence", "norm", "eps", "image"])["majority"].min()
    sentences = []
    for (defence, norm, eps, attack), part in met[weaker].groupby(["defence", "norm", "eps", "attack"]):
        if (defence, norm, eps) in strongest:
            pair = part["majority"], strongest[defence, norm, eps]
            only_strongest, only_weaker, p = mcnemar(*pair, alternative="less")
            if p < SIGNIFICANCE:
                sentences.append(
                    f"{defence}: {attack} breaks {only_weaker} images that the white-box attacks miss, which "
                    f"break {only_strongest} that it misses (p {p:.2g}): gradients may be masked"
                )
    return sentences
