"""What an evaluation found: one frame of numbers, which images were correct, tables, and files that others
can read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from atoplib.decisions import RULES, wilson_interval
from atoplib.files import write_json, write_text

CLEAN, WORST = "clean", "worst case"
FILES = ("results.json", "frame.csv", "images.csv", "table.md", "table.tex")
RULE_NAMES = dict(zip(RULES, ("single sample", "majority", "mean softmax", "worst of N"), strict=True))
NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
NO_BREAK = "\N{NO-BREAK SPACE}"
COLUMNS = [
    *("defence", "attack", "threat_model", "norm", "eps", "rule", "votes", "accuracy", "low", "high"),
    *("sample_mean", "images", "passes", "seconds"),
]

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


class Outcome(NamedTuple):
    """What became of each image: one defence, one attack at one radius.

    Attributes:
        defence, attack, threat_model, norm, eps: which; of clean images the last three are "", "" and 0.
        votes: samples of the decision (``worst_of_n`` rests on the protocol's number at most).
        correct: by each of ``RULES``, (rules, images) bool.
        sample_mean: proportion of the samples that are correct, (images,).
        passes: of one image through the target of the attack, forward alone or with a gradient, in the mean.
        seconds: attack and decision.
        images: the adversarial images, on the CPU, if they were to be kept.
    """

    defence: str
    attack: str
    threat_model: str
    norm: str
    eps: float
    votes: int
    correct: np.ndarray
    sample_mean: np.ndarray
    passes: float = 0.0
    seconds: float = 0.0
    images: Tensor | None = None


def worst_case(outcomes: Sequence[Outcome], attack: str = WORST) -> Outcome:
    """One defence under several attacks together: an image counts as correct if it is under each of them. The
    clean images belong to them: an attack may turn a wrong classification into a correct one, which is no
    robustness.

    Raises:
        ValueError: for no outcomes, or those of several defences.
    """
    defences = {outcome.defence for outcome in outcomes}
    if len(defences) != 1:
        raise ValueError(
            f"a worst case is one of a single defence, got {len(defences)}: {', '.join(sorted(defences))}"
        )
    norms, sizes = ({getattr(item, name) for item in outcomes if item.norm} for name in ("norm", "eps"))
    return outcomes[0]._replace(
        attack=attack,
        threat_model="",
        norm=norms.pop() if len(norms) == 1 else "",
        eps=sizes.pop() if len(sizes) == 1 else float("nan"),
        votes=min(outcome.votes for outcome in outcomes),
        correct=np.all([outcome.correct for outcome in outcomes], axis=0),
        sample_mean=np.min([outcome.sample_mean for outcome in outcomes], axis=0),
        passes=sum(outcome.passes for outcome in outcomes),
        seconds=sum(outcome.seconds for outcome in outcomes),
        images=None,
    )


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of ``evaluate``; shows itself as a table of single-sample accuracies.

    Attributes:
        outcomes: for each defence clean, every attack, and last its worst cases.
        labels: true classes, (images,).
        facts: what was measured: protocol, radii, seed, what each defence is.
    """

    outcomes: tuple[Outcome, ...]
    labels: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row for each defence, attack, radius and rule; ``accuracy``, its 95 % Wilson interval ``low`` to
        ``high``, and ``sample_mean`` (of all samples) in per cent; ``passes`` an image; ``seconds`` of attack
        and decision."""
        rows = []
        for item in self.outcomes:
            mean = 100 * float(item.sample_mean.mean())
            for rule, correct in zip(RULES, item.correct, strict=True):
                ends = wilson_interval(int(correct.sum()), len(correct))
                percents = [100 * float(share) for share in (correct.mean(), *ends)]
                row = [*item[:5], rule, item.votes, *percents, mean, len(correct), item.passes, item.seconds]
                rows.append(row)
        return pd.DataFrame(rows, columns=COLUMNS)

    @cached_property
    def correct(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Which images were correct, by (defence, attack), at the largest radius: a line an image, a column a
        rule."""
        return {
            (item.defence, item.attack): pd.DataFrame(item.correct.T, columns=RULES) for item in self.outcomes
        }

    def adversarial(self, defence: str, attack: str, eps: float | None = None) -> Tensor:
        """The adversarial images of one attack, at its largest radius or at ``eps``;
        ``evaluate(keep_images=True)``.

        Raises:
            KeyError: for what was not measured, or not kept.
        """
        own = [item for item in self.outcomes if (item.defence, item.attack) == (defence, attack)]
        chosen = [item.images for item in own if item.images is not None and eps in (None, item.eps)]
        if not chosen:
            raise KeyError(
                f"no images of {attack!r} on {defence!r} were kept; evaluate(keep_images=True) keeps them"
            )
        return chosen[-1]

    def with_worst(self, name: str, among: Callable[[Outcome], bool]) -> "Evaluation":
        """The same with one more worst case for each defence: of its clean images and the attacks that
        ``among`` chooses."""
        outcomes: list[Outcome] = []
        for defence in dict.fromkeys(item.defence for item in self.outcomes):
            own = [item for item in self.outcomes if item.defence == defence]
            chosen = [item for item in own if item.threat_model and among(item)]
            outcomes += [*own, *([worst_case([own[0], *chosen], name)] if chosen else [])]
        return replace(self, outcomes=tuple(outcomes))

    def table(self, rule: str = "single", *, bold: bool = False) -> pd.DataFrame:
        """Lines defences, columns attacks, cells ``47.0 [40.2, 53.9]`` in %; ``bold``: the best of a column
        as ``**47.0**``."""
        frame = self.frame[self.frame["rule"] == rule]
        sweep = frame.groupby("attack")["eps"].transform("nunique") > 1
        with_eps = frame["attack"] + frame["eps"].map(", ε = {:.3g}".format)
        frame = frame.assign(column=frame["attack"].where(~sweep, with_eps))
        best = frame.groupby("column")["accuracy"].transform("max") == frame["accuracy"]
        marked = bold and frame["defence"].nunique() > 1
        cells: dict[str, dict[str, str]] = {head: {} for head in frame["column"]}
        for item, leads in zip(frame.itertuples(), best, strict=True):
            number = f"**{item.accuracy:.1f}**" if marked and leads else f"{item.accuracy:.1f}"
            cells[item.column][item.defence] = f"{number}{NO_BREAK}[{item.low:.1f},{NO_BREAK}{item.high:.1f}]"
        found = pd.DataFrame(cells, index=list(dict.fromkeys(frame["defence"]))).fillna("\N{EN DASH}")
        return found.rename_axis("% [95 % interval]")

    @property
    def caption(self) -> str:
        """What the table shows, in one line."""
        sizes = [eps_text(eps, norm) for norm, each in self.facts.get("eps", {}).items() for eps in each]
        name = self.facts.get("protocol", {}).get("name", "")
        return ", ".join([f"protocol {name}", *sizes, f"{len(self.labels)} images"])

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
        path, caption = Path(path), caption or self.caption
        places = None if indices is None else [int(index) for index in indices]
        rules = RULES if self.frame["votes"].max() > 1 else RULES[:1]
        tables = {rule: self.table(rule) for rule in rules}
        parts = [f"**{RULE_NAMES[rule]}**\n\n{markdown_table(table)}" for rule, table in tables.items()]
        latex = [
            table.to_latex(escape=True, caption=_latex_escaped(f"{caption}; {RULE_NAMES[rule]}"))
            for rule, table in tables.items()
        ]
        if published:
            parts.append(markdown_table(PUBLISHED, index=False, digits=4))
            latex.append(PUBLISHED.to_latex(index=False, escape=True, na_rep="--", float_format="%.2f"))
        images = []
        for item in self.outcomes:
            by_rule = pd.DataFrame(item.correct.T.astype(int), columns=RULES)
            by_rule.insert(0, "index", range(len(self.labels)) if places is None else places)
            by_rule.insert(1, "label", self.labels)
            facts_of = {"defence": item.defence, "attack": item.attack, "eps": item.eps}
            images.append(by_rule.assign(sample_mean=item.sample_mean.round(6), **facts_of))
        write_text(path / "frame.csv", self.frame.to_csv(index=False))
        write_text(path / "images.csv", pd.concat(images).to_csv(index=False))
        write_text(path / "table.md", "\n\n".join([caption, *parts]) + "\n")
        write_text(path / "table.tex", "\n".join(latex))
        frame = self.frame.astype(object).where(self.frame.notna(), None).to_dict("records")
        whole = {"caption": caption, "frame": frame, "indices": places, **self.facts, **facts}
        write_json(path / "results.json", whole)


def markdown_table(frame: pd.DataFrame, *, index: bool = True, digits: int = 3) -> str:
    """A frame as a Markdown table; numbers to the right, floats with so many digits, None and NaN as a
    dash."""

    def text(value: Any) -> str:
        missing = value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value))
        number = f"{value:.{digits}g}" if isinstance(value, float) else str(value)
        return "\N{EN DASH}" if missing else number.replace("|", "\\|")

    frame = frame.reset_index() if index else frame
    rule = ["---:" if pd.api.types.is_numeric_dtype(frame[name]) else "---" for name in frame]
    lines = [
        [text(name) for name in frame],
        rule,
        *([text(value) for value in line] for line in frame.itertuples(index=False)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def eps_text(eps: float, norm: str = "linf") -> str:
    """``ℓ∞ ε = 8/255``; ``ℓ∞ ε = 0.3`` where the radius is a round decimal number."""
    levels = 255 * eps
    is_round = abs(100 * eps - round(100 * eps)) < 1e-6
    as_levels = norm == "linf" and not is_round and abs(levels - round(levels)) < 1e-6
    return f"{NORMS.get(norm, norm)} ε = " + (f"{round(levels)}/255" if as_levels else f"{eps:.4g}")


def _latex_escaped(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
