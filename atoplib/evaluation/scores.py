"""From the verdict on each image to the numbers of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atoplib.verdicts import VERDICTS, right_by, wilson_interval


@dataclass(frozen=True)
class Outcomes:
    """What became of each image: one defence, one attack, every seed.

    Attributes:
        defence, attack: names of the row and the column.
        norm: the attack's; "" for clean images.
        draws: forward passes of each verdict; ``worst_of_n`` has the protocol's number at most (``judge_draws``).
        right: by verdict (``verdicts.VERDICTS``), which images were read correctly, (seeds, images) bool.
        average: the share of the draws that were right, (seeds, images).
        seconds: attack and verdicts, all seeds.
    """

    defence: str
    attack: str
    norm: str
    draws: int
    right: Mapping[str, Bool[Tensor, "seeds images"]]
    average: Float[Tensor, "seeds images"]
    seconds: float = 0.0


def judge_draws(
    logits: Float[Tensor, "draws batch classes"], labels: Int[Tensor, " batch"], *, worst_of: int | None = None
) -> tuple[dict[str, Bool[Tensor, " batch"]], Float[Tensor, " batch"]]:
    """Every verdict on each image, and the share of its draws that are right (N-evaluation: DiffHammer, DiffBreak).

    Args:
        worst_of: ``worst_of_n`` rests on so many of the draws, the first ones; None: on all. More draws find more errors
            whatever the attack, so it is comparable only where it rests on as many everywhere.
    """
    right = {name: right_by(logits, labels, name) for name in VERDICTS}
    right["worst_of_n"] = right_by(logits[:worst_of], labels, "worst_of_n")
    return right, (logits.argmax(dim=2) == labels).float().mean(dim=0)


def worst_case(outcomes: Sequence[Outcomes], attack: str) -> Outcomes:
    """One defence under several attacks together: an image counts as right if it is under each of them. The clean images
    belong to them: an attack may turn a wrong reading into a right one, which is no robustness.

    Raises:
        ValueError: for no outcomes, or those of several defences.
    """
    defences = {item.defence for item in outcomes}
    if len(defences) != 1:
        raise ValueError(f"the worst case is one of a single defence, got {len(defences)}: {', '.join(sorted(defences))}")
    norms = {item.norm for item in outcomes if item.norm}
    return Outcomes(
        defence=outcomes[0].defence,
        attack=attack,
        norm=norms.pop() if len(norms) == 1 else "",
        draws=min(item.draws for item in outcomes),
        right={name: torch.stack([item.right[name] for item in outcomes]).all(dim=0) for name in VERDICTS},
        average=torch.stack([item.average for item in outcomes]).amin(dim=0),
        seconds=sum(item.seconds for item in outcomes),
    )


def weakest(outcomes: Sequence[Outcomes], norm: str) -> dict[str, float]:
    """Of each defence the least share of images that it reads in one draw under any attack in a norm; 1 if none was made."""
    names = dict.fromkeys(item.defence for item in outcomes)
    shares = [(item.defence, float(item.right["one_shot"].float().mean())) for item in outcomes if item.norm == norm]
    return {name: min((share for defence, share in shares if defence == name), default=1.0) for name in names}


@dataclass(frozen=True)
class Score:
    """Accuracy of one defence on one kind of image, in shares; with several seeds each is the mean over them.

    Attributes:
        defence, attack: names of the row and the column.
        images, draws, seeds: how many images, forward passes a verdict, repetitions.
        one_shot: share that the first draw gets right (what a user of the defence meets).
        low, high: the 95 % Wilson interval of ``one_shot`` over the images.
        spread: standard deviation of ``one_shot`` over the seeds; None for a single seed.
        average: share of all draws that are right.
        majority, mean_softmax: share that a vote over the draws gets right.
        worst_of_n: share that every draw gets right.
        seconds: attack and verdicts, all seeds.
    """

    defence: str
    attack: str
    images: int
    draws: int
    seeds: int
    one_shot: float
    low: float
    high: float
    spread: float | None
    average: float
    majority: float
    mean_softmax: float
    worst_of_n: float
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share that is printed: one-shot."""
        return self.one_shot

    @property
    def images_per_second(self) -> float:
        """Images attacked and judged a second."""
        return self.images * self.seeds / self.seconds if self.seconds > 0 else float("inf")

    def interval(self, verdict: str) -> tuple[float, float]:
        """The 95 % interval of any verdict."""
        return wilson_interval(getattr(self, verdict) * self.images, self.images)

    def as_dict(self) -> dict[str, Any]:
        """The fields, and the interval of every verdict as ``VERDICT_low`` and ``VERDICT_high``."""
        ends = {name: self.interval(name) for name in VERDICTS}
        return asdict(self) | {f"{name}_{end}": ends[name][i] for name in VERDICTS for i, end in enumerate(("low", "high"))}


def score(outcomes: Outcomes) -> Score:
    """Count one cell of the table."""
    shares = {name: right.float().mean(dim=1) for name, right in outcomes.right.items()}  # (seeds,)
    seeds, images = outcomes.average.shape
    low, high = wilson_interval(float(outcomes.right["one_shot"].sum()) / seeds, images)
    return Score(
        defence=outcomes.defence,
        attack=outcomes.attack,
        images=images,
        draws=outcomes.draws,
        seeds=seeds,
        low=low,
        high=high,
        spread=float(shares["one_shot"].std()) if seeds > 1 else None,
        average=float(outcomes.average.mean()),
        seconds=outcomes.seconds,
        **{name: float(share.mean()) for name, share in shares.items()},
    )


def voted(scores: Sequence[Score], verdict: str = "majority") -> list[dict[str, Any]]:
    """The cells of a table by another verdict: ``defence``, ``attack``, and shares ``accuracy``, ``low``, ``high``."""
    cells = []
    for item in scores:
        low, high = item.interval(verdict)
        accuracy = getattr(item, verdict)
        cells.append({"defence": item.defence, "attack": item.attack, "accuracy": accuracy, "low": low, "high": high})
    return cells
