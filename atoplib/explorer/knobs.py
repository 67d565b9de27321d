"""The knobs of the explorer: their values, their ranges, which of them apply, and their way to papermill and back."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import yaml

from atoplib.attacks import NORMS
from atoplib.parameters import NOTEBOOKS, SEES, ParameterError, convert
from atoplib.plain_yaml import NotPlainYAML, load_yaml
from atoplib.transforms import TRANSFORMS, TransformSettings

NO_ATTACK = "none"
ATTACK_NOTEBOOK = "04_attack"
MARK = "# explorer: "  # the line of a YAML file that only the explorer reads; to papermill it is a comment
MAX_STEPS, MAX_EOT, MAX_DRAWS, MAX_MASKS = 1000, 100, 200, 64
MAX_QUERIES = 10_000
L2_OF_LINF = 0.5 / (8 / 255)  # the usual l2 radius of CIFAR-10 over its usual l_inf radius
USUAL_FLOW = 0.05  # of StAdv: 0.8 px of 32
RADII = (*NORMS, "flow")


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Everything that decides what the explorer shows.

    Attributes:
        dataset, defence: names among those that ``explore`` was given.
        image: index of the test image.
        attack: ``none`` or a name of the attacks that ``explore`` was given.
        attack_sees: ``pipeline`` (the gradient goes through transform, purifier and classifier), ``bpda`` (the same with the
            identity as the backward pass of transform and purifier), or ``classifier`` (the classifier alone: a transfer
            attack on the defence).
        norm: ``linf`` or ``l2``; of StAdv ``flow``.
        eps: radius, images in [0, 1] (of a flow: in units of a grid on which the image is 2 wide); 0 leaves the image as it
            is.
        steps: iterations of the attack; the step size is the default of notebook 4.
        eot_samples: draws that each gradient is averaged over.
        queries: forward passes of a black-box attack.
        transform, missing_rate, noise_std, num_masks: as ``transforms.TransformSettings``.
        seed: of the attack's start and of the defence's dice; the verdict's dice are those of ``seed + 1``.
        num_draws: forward passes of the vote.
        draw: which draw is pictured, counted from 0. The first ``num_draws`` are those of the vote; a higher one belongs to
            another vote with new dice.
        shown_step: step of the attack whose image is shown; None: the end.
    """

    dataset: str
    defence: str
    image: int = 0
    attack: str = "pgd"
    attack_sees: str = "pipeline"
    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 10
    eot_samples: int = 1
    queries: int = 500
    transform: str = "rt2"
    missing_rate: float = 0.25
    noise_std: float = 0.25
    num_masks: int = 4
    seed: int = 0
    num_draws: int = 10
    draw: int = 0
    shown_step: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("attack_sees", tuple(SEES)), ("norm", RADII), ("transform", TRANSFORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be 0 or above, got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps of the linf norm must be at most 1 (images lie in [0, 1]), got {self.eps}; 8/255?")
        if self.norm == "flow" and self.eps > 2:
            raise ValueError(f"eps of a flow must be at most 2 (the image is 2 wide), got {self.eps}; 0.05?")
        ranges = {
            "steps": (1, MAX_STEPS),
            "eot_samples": (1, MAX_EOT),
            "queries": (1, MAX_QUERIES),
            "num_draws": (1, MAX_DRAWS),
            "num_masks": (2, MAX_MASKS),
            "image": (0, 2**31 - 1),
            "seed": (0, 2**31 - 1),
            "draw": (0, 2**20),
            "shown_step": (0, 2**31 - 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must lie in {low}..{high}, got {value}")
        _ = self.transform_settings(8)

    @property
    def attacks(self) -> bool:
        """Whether there is anything to attack with."""
        return self.attack != NO_ATTACK and self.eps > 0

    def transform_settings(self, grid_size: int) -> TransformSettings:
        """The random transform; raises ValueError for values that it refuses."""
        return TransformSettings(self.transform, self.missing_rate, self.noise_std, self.num_masks, grid_size)

    def is_random(self, grid_size: int = 8) -> bool:
        """Whether two draws of the transform differ."""
        noisy = self.transform in ("rt2", "rt3") and self.noise_std > 0
        drops = self.transform in ("rt1", "rt2") and math.floor(self.missing_rate * grid_size**2) > 0
        return noisy or drops or self.transform == "rt3"


def check_names(knobs: Knobs, **allowed: Sequence[str]) -> None:
    """Raise ValueError, naming what is allowed, unless each of the knobs named has one of the values listed for it."""
    for name, values in allowed.items():
        value = getattr(knobs, name)
        if value not in values:
            near = difflib.get_close_matches(value, values, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"there is no {name} {value!r} here{hint}; allowed: {', '.join(values)}")


def applicable(knobs: Knobs, uses: Sequence[str], *, purifies: bool, random: bool) -> frozenset[str]:
    """Names of the knobs that change anything, given the others; the explorer disables the rest.

    Args:
        uses: the knobs that the attack reads, given what it sees.
        purifies: whether the defence is a pipeline with a transform, and not a bare classifier.
        random: whether two draws of the defence differ.
    """
    names = {"dataset", "defence", "image", "attack"}
    if purifies:
        names |= {"transform"}
        names |= {"missing_rate"} if knobs.transform in ("rt1", "rt2") else set()
        names |= {"noise_std"} if knobs.transform in ("rt2", "rt3") else set()
        names |= {"num_masks"} if knobs.transform == "rt3" else set()
    if random:
        names |= {"seed", "num_draws", "draw"}
    if knobs.attack != NO_ATTACK:
        names |= {"eps"} & set(uses)
    if knobs.attacks:
        names |= {"shown_step", *({"norm", "steps", "eot_samples", "queries", "seed"} & set(uses))}
        names |= {"attack_sees"} if purifies else set()
    return frozenset(names)


def presets(start: Knobs) -> dict[str, Knobs]:
    """The knobs of each preset; image, data set, defence, transform and eps stay those of ``start``.

    ``clean``: no attack. ``paper``: PGD-20 on the classifier alone, what the published code of AToP logs (PROTOCOLS:
    transfer). ``strict``: PGD-200 with 20 draws a gradient through the whole pipeline (Lee & Kim 2023), which takes longer.
    """
    if start.norm == "flow":
        start = replace(start, norm="linf", eps=8 / 255)
    return {
        "clean": replace(start, attack=NO_ATTACK, draw=0, shown_step=None),
        "paper": replace(
            start, attack="pgd", attack_sees="classifier", steps=20, eot_samples=1, num_draws=10, draw=0, shown_step=None
        ),
        "strict": replace(
            start, attack="pgd", attack_sees="pipeline", steps=200, eot_samples=20, num_draws=20, draw=0, shown_step=None
        ),
    }


def to_yaml(knobs: Knobs, notebook: Mapping[str, Any], *, max_batch: int) -> str:
    """Parameters for ``papermill -f`` that run ``04_attack`` on what the knobs show.

    Args:
        notebook: parameters of the notebook that explores; those that ``04_attack`` has too are handed on.
        max_batch: copies of images in one batch; another number throws the dice in another order.

    Returns:
        a mapping of parameters of ``04_attack``. All knobs, also those that this notebook has no parameter for, stand in a
        comment, from which ``from_yaml`` sets them again. An eps of 0 stands there alone: no attack takes it, and the clean
        column of ``04_attack`` is what it shows.
    """
    known = {item.name for item in fields(NOTEBOOKS[ATTACK_NOTEBOOK])}
    own = asdict(knobs)
    values = {name: value for name, value in notebook.items() if name in known and name not in own}
    values |= {"max_batch": max_batch, "dtype": "float32"}
    values |= {name: value for name, value in own.items() if name in known and (name != "eps" or knobs.eps)}
    line = yaml.safe_dump(own, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    head = f"# papermill notebooks/{ATTACK_NOTEBOOK}.ipynb out.ipynb -k python3 -f THIS_FILE\n"
    return head + f"{MARK}{line}\n" + yaml.safe_dump(values, sort_keys=False)


def from_yaml(text: str, start: Knobs) -> Knobs:
    """The knobs in a YAML text: one that ``to_yaml`` wrote, or any mapping with names of knobs (the others as in ``start``).

    Parameters of ``04_attack`` that are no knobs are passed over. A value in the mapping wins over the explorer's line, so
    that an edit by hand counts.

    Raises:
        ValueError: for a text that is no YAML mapping, an unknown name, a wrong type or value.
    """
    try:
        content = load_yaml(text)
        marked = [load_yaml(line[len(MARK) :]) for line in text.splitlines() if line.startswith(MARK)]
    except NotPlainYAML as error:
        raise ValueError(" ".join(str(error).split())) from error
    for part in (content or {}, *marked):
        if not isinstance(part, dict):
            raise ValueError(f"the YAML must be a mapping such as 'eps: 0.3', got {str(part)[:60]!r}")
    if not (content or marked):
        raise ValueError("the YAML is empty: give a mapping such as 'eps: 0.3'")
    types_of = {item.name: item.type for item in fields(Knobs)}
    passed_over = {item.name for item in fields(NOTEBOOKS[ATTACK_NOTEBOOK])} - set(types_of)
    written = {name: value for part in marked for name, value in part.items()}
    edited = {name: value for name, value in (content or {}).items() if name not in passed_over}
    for name in {**written, **edited}:
        if name not in types_of:
            near = difflib.get_close_matches(str(name), types_of, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"there is no knob {name!r}{hint}; allowed: {', '.join(types_of)}")
    edited = {name: value for name, value in edited.items() if value is not None or name == "shown_step"}
    try:
        values = {name: convert(name, value, types_of[name]) for name, value in {**written, **edited}.items()}
    except ParameterError as error:
        raise ValueError(str(error)) from error
    return replace(start, **values)
