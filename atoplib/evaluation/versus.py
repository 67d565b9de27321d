"""On the same images: does another attack find significantly more errors than ours, does one defence outlast another?"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from scipy.special import bdtr, bdtrc
from torch import Tensor

from atoplib.evaluation.protocols import PlannedAttack, Protocol
from atoplib.evaluation.scores import Outcomes, worst_case

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


@dataclass(frozen=True)
class Pairing:
    """Two defences under one attack, image by image.

    Attributes:
        attack: its label.
        first, second: the defences' names.
        images: how many both met.
        only_first, only_second: images that only the one or the other still reads.
        p_value: probability of so uneven a split, to either side, if neither were better.
    """

    attack: str
    first: str
    second: str
    images: int
    only_first: int
    only_second: int
    p_value: float


def pair(first: Outcomes, second: Outcomes, verdict: str = "one_shot") -> Pairing:
    """The exact McNemar test, two-sided: only images on which the defences differ count; of several seeds the first.

    Raises:
        ValueError: for outcomes of different attacks or numbers of images.

    Source: McNemar 1947.
    """
    one, other = first.right[verdict][0], second.right[verdict][0]
    if first.attack != second.attack or len(one) != len(other):
        raise ValueError(
            f"defences are paired under one attack on the same images, got {first.attack!r} on {len(one)} and "
            f"{second.attack!r} on {len(other)}"
        )
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    p_value = min(1.0, 2 * float(bdtr(min(only_first, only_second), differ, 0.5))) if differ else 1.0
    return Pairing(first.attack, first.defence, second.defence, len(one), only_first, only_second, p_value)


def pairings(outcomes: Sequence[Outcomes], first: str, verdict: str = "one_shot") -> list[Pairing]:
    """``first`` against every other defence, under every attack that both met, in the order of the outcomes."""
    own = {item.attack: item for item in outcomes if item.defence == first}
    others = [item for item in outcomes if item.defence != first and item.attack in own]
    return [pair(own[item.attack], item, verdict) for item in others]


def pairing_table(found: Sequence[Pairing]) -> str:
    """Markdown: a line for each attack, a column for each other defence: images that only the first reads, that only the
    other one does, and p.

    Raises:
        ValueError: without a pairing, or for pairings of several first defences.
    """
    if len({item.first for item in found}) != 1:
        raise ValueError(f"a table is about one defence and its rivals, got {sorted({item.first for item in found})}")
    rivals, attacks = (list(dict.fromkeys(names)) for names in zip(*((f.second, f.attack) for f in found), strict=True))
    cells = {(item.attack, item.second): f"{item.only_first} : {item.only_second} (p {item.p_value:.2g})" for item in found}
    lines = [f"| only {found[0].first} : only ... | {' | '.join(rivals)} |", "|---|" + "---:|" * len(rivals)]
    lines += [f"| {attack} | {' | '.join(cells.get((attack, rival), '') for rival in rivals)} |" for attack in attacks]
    return "\n".join(lines)


GRADIENT_FREE = ("square", "spsa")


def masked_gradients(outcomes: Sequence[Outcomes], protocol: Protocol) -> list[str]:
    """A sentence for each attack that should be weaker and finds significantly more errors: one that sees the classifier
    alone, takes the identity for a gradient (BPDA), or sees no gradient at all, against the attacks of the same norm that
    differentiate through the whole defence, together, by a majority of the draws. None: no sign of masked gradients here,
    which is less than ``masking.masking_checklist`` asks.

    Args:
        outcomes: of ``evaluate`` by this ``protocol``.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019.
    """
    planned = {item.heading: item for item in protocol.attacks}

    def weaker(item: PlannedAttack) -> bool:
        return item.sees != "defence" or item.attack in GRADIENT_FREE

    sentences = []
    for defence in dict.fromkeys(item.defence for item in outcomes):
        met = [item for item in outcomes if item.defence == defence and item.attack in planned]
        for challenger in (item for item in met if weaker(planned[item.attack])):
            white_box = [i for i in met if not weaker(planned[i.attack]) and i.norm == challenger.norm]
            if not white_box:
                continue
            ours, theirs = worst_case(white_box, "white-box").right["majority"], challenger.right["majority"]
            found = compare(challenger.attack, theirs[0], ours[0])
            if found.beaten:
                sentences.append(
                    f"{defence}: {challenger.attack} breaks {found.only_challenger} images that the white-box attacks miss, "
                    f"which break {found.only_incumbent} that it misses (p {found.p_value:.2g}): gradients may be masked"
                )
    return sentences
