"""Attack against attack on the same images: does anybody else's find significantly more errors than ours?"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from scipy.special import bdtrc
from torch import Tensor

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """How a challenger's attack did against the incumbent's.

    Attributes:
        challenger: its name.
        images: how many both attacked.
        standing: images still right after the challenger's attack.
        only_challenger, only_incumbent: images that only the one or the other broke.
        p_value: probability that the challenger breaks so many more by chance (one-sided).
        seconds: what the challenger's attack took.
    """

    challenger: str
    images: int
    standing: int
    only_challenger: int
    only_incumbent: int
    p_value: float
    seconds: float = 0.0

    @property
    def beaten(self) -> bool:
        """Whether the challenger broke significantly more images: the incumbent's number was too high."""
        return self.p_value < SIGNIFICANCE


def compare(
    challenger: str, theirs: Bool[Tensor, " batch"], ours: Bool[Tensor, " batch"], *, seconds: float = 0.0
) -> Comparison:
    """The exact McNemar test, one-sided: only images on which the attacks differ count.

    Args:
        challenger: its name.
        theirs, ours: which images are right after the challenger's and after our attack, by the same verdict.

    Raises:
        ValueError: for other numbers of images.

    Source: McNemar 1947.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"the attacks must be on the same images, got {len(theirs)} and {len(ours)}")
    only_theirs, only_ours = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    differ = only_theirs + only_ours
    p_value = float(bdtrc(only_theirs - 1, differ, 0.5)) if only_theirs else 1.0
    return Comparison(challenger, len(theirs), int(theirs.sum()), only_theirs, only_ours, p_value, seconds)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Markdown: a line for each challenger, and a sentence on what it means.

    Raises:
        ValueError: without a comparison.
    """
    if not comparisons:
        raise ValueError("there are no comparisons to show")
    lines = ["| attack | still right | only it breaks | only ours breaks | p | seconds |", "|---|---:|---:|---:|---:|---:|"]
    for item in comparisons:
        right = f"{item.standing} of {item.images}"
        broke = f"{item.only_challenger} | {item.only_incumbent}"
        lines.append(f"| {item.challenger} | {right} | {broke} | {item.p_value:.2g} | {item.seconds:.1f} |")
    won = [item.challenger for item in comparisons if item.beaten]
    if won:
        stamp = f"**Our attack is too weak**: {', '.join(won)} finds significantly more errors."
    else:
        stamp = "None finds significantly more errors than ours (exact McNemar test, one-sided, 95 %)."
    return "\n".join([*lines, "", stamp])
