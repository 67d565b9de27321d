"""Results as files that others can read: JSON, CSV, Markdown and LaTeX, the published numbers beside ours."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from atoplib.checkpoints import write_atomically, write_json
from atoplib.evaluation.scores import Outcomes, Score
from atoplib.verdicts import VERDICTS

HEADINGS = {
    "one_shot": "one-shot",
    "average": "average draw",
    "majority": "majority",
    "mean_softmax": "mean softmax",
    "worst_of_n": "worst of N",
}


@dataclass(frozen=True)
class Published:
    """A number from the literature; accuracies in %, None where it was not reported."""

    defence: str
    clean: float | None
    robust: float
    protocol: str


# CIFAR-10, l_inf 8/255
PUBLISHED: tuple[Published, ...] = (
    Published("AToP, GAN purifier, RT2", None, 72.85, "AutoAttack on the pipeline, authors' review thread"),
    Published("the same without fine-tuning", None, 59.57, "AutoAttack on the pipeline, authors' review thread"),
    Published("AToP, ResNet-18", 90.04, 64.06, "PGD-200 + EOT-20, full gradient, 64 images"),
    Published("the same without fine-tuning", None, 56.25, "PGD-200 + EOT-20, full gradient, 64 images"),
    Published("DiffPure, WRN-28-10", 89.02, 70.64, "adjoint AutoAttack"),
    Published("DiffPure, WRN-28-10", 89.02, 48.28, "correct gradient, later re-evaluation"),
    Published("DiffPure, WRN-70-16", None, 39.45, "majority vote, DiffBreak"),
    Published("DiffPure, WRN-70-16", None, 17.19, "worst of 10, DiffBreak"),
    Published("ADBM", None, 47.70, "PGD-200 + EOT-20"),
    Published("AT, ResNet-18 (TRADES-AWP)", None, 51.62, "AutoAttack"),
    Published("AT, WRN-94-16, extra data", 93.6, 73.71, "AutoAttack"),
)


def verdict_table(scores: Sequence[Score]) -> str:
    """Markdown: a line for each defence and attack, every verdict in % (one-shot with its interval), seconds, images/s."""
    head = ["defence", "attack", *(HEADINGS[name] for name in HEADINGS), "N", "s.d. over seeds", "seconds", "images/s"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for item in scores:
        values = [f"{100 * getattr(item, name):.1f}" for name in HEADINGS]
        values[0] += f" [{100 * item.low:.1f}, {100 * item.high:.1f}]"
        spread = "–" if item.spread is None else f"{100 * item.spread:.1f}"
        speed = f"{item.images_per_second:.3g}" if item.seconds else "–"
        lines.append([item.defence, item.attack, *values, str(item.draws), spread, f"{item.seconds:.1f}", speed])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nAccuracy in %, one-shot with its 95 % Wilson interval. {said_of_draws(scores)}"


def said_of_draws(scores: Sequence[Score]) -> str:
    """How many draws the verdicts rest on, in words."""
    counts = sorted({item.draws for item in scores})
    few = next((count for count in counts if count > 1), 1)
    more = (
        f", of {few} draws for worst-of-N, which more draws would worsen whatever the attack" if counts[-1:] > [few] else ""
    )
    return f"N: draws of a vote{more}; 1 for a defence that throws no dice."


def latex_table(
    scores: Sequence[Score], *, caption: str, published: Sequence[Published] = (), verdict: str = "one_shot"
) -> str:
    """A LaTeX ``table``: rows defences, columns attacks, accuracy by ``verdict`` in % with its interval; published below."""
    attacks = list(dict.fromkeys(item.attack for item in scores))
    cells = {(item.defence, item.attack): item for item in scores}
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(attacks)}}}",
        r"\hline",
        " & ".join(["defence", *map(escape, attacks)]) + r" \\",
        r"\hline",
    ]
    for defence in dict.fromkeys(item.defence for item in scores):
        row = [escape(defence)]
        for attack in attacks:
            item = cells.get((defence, attack))
            if item is None:
                row.append("--")
                continue
            low, high = item.interval(verdict)
            row.append(f"{100 * getattr(item, verdict):.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(" & ".join(row) + r" \\")
    lines += [r"\hline", r"\end{tabular}"]
    if published:
        lines += [r"\par\smallskip", r"\begin{tabular}{lrrl}", r"published & clean & robust & protocol \\", r"\hline"]
        for item in published:
            clean = "--" if item.clean is None else f"{item.clean:.2f}"
            lines.append(f"{escape(item.defence)} & {clean} & {item.robust:.2f} & {escape(item.protocol)} " + r"\\")
        lines += [r"\hline", r"\end{tabular}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def latex_tables(scores: Sequence[Score], *, caption: str, published: Sequence[Published] = ()) -> str:
    """``latex_table`` one-shot; where a defence is random, one more for each other verdict."""
    counts = sorted({item.draws for item in scores if item.draws > 1})
    others = [name for name in VERDICTS if name != "one_shot"] if counts else []
    votes = " or ".join(map(str, counts))
    first = latex_table(scores, caption=f"{caption}; one draw" if others else caption, published=published)
    drawn = {name: counts[0] if name == "worst_of_n" else votes for name in others}
    more = [latex_table(scores, caption=f"{caption}; {HEADINGS[name]}, N = {drawn[name]}", verdict=name) for name in others]
    return "\n".join([first, *more])


def published_table(published: Sequence[Published] = PUBLISHED) -> str:
    """Markdown: the published numbers, each with its protocol."""
    lines = ["| published | clean % | robust % | protocol |", "|---|---:|---:|---|"]
    for item in published:
        clean = "–" if item.clean is None else f"{item.clean:.2f}"
        lines.append(f"| {item.defence} | {clean} | {item.robust:.2f} | {item.protocol} |")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def scores_csv(scores: Sequence[Score]) -> str:
    """A line for each defence and attack, shares in [0, 1]."""
    rows = [item.as_dict() for item in scores]
    return _csv(list(rows[0]) if rows else [], (row.values() for row in rows))


def images_csv(outcomes: Sequence[Outcomes], labels: Tensor, indices: Tensor | None = None) -> str:
    """A line for each defence, attack, seed and image: its place in the data set, its label, 1 or 0 by every verdict."""
    places = range(len(labels)) if indices is None else indices.tolist()
    rows = []
    for item in outcomes:
        for seed in range(len(item.average)):
            columns = [item.right[name][seed].int().tolist() for name in VERDICTS]
            average = [round(value, 6) for value in item.average[seed].tolist()]
            for place, label, *values in zip(places, labels.tolist(), *columns, average, strict=True):
                rows.append([item.defence, item.attack, seed, place, label, *values])
    return _csv(["defence", "attack", "repetition", "index", "label", *VERDICTS, "average"], rows)


def write_results(
    directory: Path,
    scores: Sequence[Score],
    outcomes: Sequence[Outcomes],
    labels: Tensor,
    *,
    indices: Tensor | None = None,
    caption: str,
    published: Sequence[Published] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write ``results.json``, ``scores.csv``, ``images.csv``, ``table.md`` and ``table.tex``, each atomically.

    Args:
        caption: what was measured, in one line.
        published: rows to stand beside ours.
        facts: anything else for ``results.json``: protocol, budget, seeds, machine, verdict of the masking checks.

    Raises:
        OSError: where the directory cannot be written; earlier files stay.
    """
    content = {
        "caption": caption,
        "scores": [item.as_dict() for item in scores],
        "indices": None if indices is None else indices.tolist(),
        "published": [asdict(item) for item in published],
        **(facts or {}),
    }
    markdown = [f"{caption}\n", verdict_table(scores)]
    if published:
        markdown.append(f"\n{published_table(published)}")
    texts = {
        "scores.csv": scores_csv(scores),
        "images.csv": images_csv(outcomes, labels, indices),
        "table.md": "\n".join(markdown) + "\n",
        "table.tex": latex_tables(scores, caption=caption, published=published),
    }
    for name, text in texts.items():
        write_atomically(directory / name, lambda part, text=text: part.write_text(text, newline=""))
    write_json(directory / "results.json", content)


def _csv(head: Sequence[str], rows: Any) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue()
