"""AutoAttack: a fixed set of attacks without parameters to tune, each on the images that the ones before left standing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.apgd import APGDSettings, apgd
from atoplib.attacks.attempts import Attempt, StepCallback, random_model_with_votes, strongest_attempt
from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.fab import FABSettings, fab
from atoplib.attacks.norms import check_ball
from atoplib.attacks.square import SquareSettings, square
from atoplib.verdicts import STANDING, Verdict, draw_logits, is_random

PUBLISHED_SCHEDULE = 10_000  # of Square's shares; 5,000 queries run the first half of it
LEAST_CLASSES = {"standard": 4, "rand": 3}
"""The versions, and how many classes their losses (targeted DLR; DLR) need."""


@dataclass(frozen=True)
class AutoAttackSettings:
    """AutoAttack (Croce & Hein 2020), whose numbers are meant to be left alone; fewer of them make a rough trial.

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]): 8/255 = 0.0314, l2 0.5.
        norm: ``linf`` or ``l2``.
        version: ``standard`` (APGD-CE, APGD-T, FAB-T, Square) for deterministic models; ``rand`` (APGD-CE, APGD-DLR,
            gradients averaged over draws) for random ones.
        steps: iterations of APGD and FAB, for each target.
        num_targets: targets of APGD-T and FAB-T, the likeliest other classes.
        queries: of Square.
        eot_samples: draws that each gradient of ``rand`` is averaged over.
        verdict: of ``rand``: when an image counts as broken and is spared the next attack. The authors' code asks a single
            draw of the last step.
    """

    eps: float
    norm: str = "linf"
    version: str = "standard"
    steps: int = 100
    num_targets: int = 9
    queries: int = 5000
    eot_samples: int = 20
    verdict: Verdict = Verdict(STANDING, 20)

    def __post_init__(self) -> None:
        check_ball(self.eps, self.norm)
        if self.version not in LEAST_CLASSES:
            raise ValueError(f"unknown version {self.version!r}; allowed: {', '.join(LEAST_CLASSES)}")
        for name in ("steps", "num_targets", "queries", "eot_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Part(NamedTuple):
    """One attack of the set: its function, the settings that it is called with, and the steps that it takes at most."""

    attack: Callable[..., Tensor]
    settings: Any
    steps: int


def autoattack_parts(settings: AutoAttackSettings) -> dict[str, Part]:
    """The attacks of a version by name, in their order; each can be run alone.

    Source: Croce & Hein 2020, section 5, in the composition of the authors' code since 2020-08.
    """
    eps, norm, steps, targets = settings.eps, settings.norm, settings.steps, settings.num_targets
    square_settings = SquareSettings(eps, norm, settings.queries, verdict=Verdict(), schedule=PUBLISHED_SCHEDULE)
    if settings.version == "rand":
        rest = {"eot_samples": settings.eot_samples, "verdict": settings.verdict}
        return {
            "apgd-ce": Part(apgd, APGDSettings(eps, norm, steps, "ce", **rest), steps),
            "apgd-dlr": Part(apgd, APGDSettings(eps, norm, steps, "dlr", **rest), steps),
        }
    targeted = APGDSettings(eps, norm, steps, "targeted_dlr", num_targets=targets)
    return {
        "apgd-ce": Part(apgd, APGDSettings(eps, norm, steps, "ce"), steps),
        "apgd-t": Part(apgd, targeted, steps * targets),
        "fab-t": Part(fab, FABSettings(eps, norm, steps, targets), steps * targets),
        "square": Part(square, square_settings, settings.queries),
    }


def autoattack(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: AutoAttackSettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by AutoAttack.

    Args:
        model: in eval mode, images in [0, 1] -> logits; random only for version ``rand``.
        images: in [0, 1].
        labels: true classes.
        generator: of the attacks' own random numbers, on the images' device; the model's dice are not touched.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step; steps of all attacks together.

    Returns:
        adversarial images in [0, 1], within eps of ``images``: what broke an image, or else the candidate that came nearest
        to it (of the largest margin loss), because a verdict of other draws may still fall otherwise.

    Raises:
        ValueError: as ``check_attack``; for too few classes; for version ``standard`` on a random model, or ``rand`` on one
            with a verdict of a single draw.

    Source: Croce & Hein 2020, section 5.
    """
    model, images, labels = check_attack(model, images, labels)
    classes, least = draw_logits(model, images[:1]).shape[2], LEAST_CLASSES[settings.version]
    if classes < least:
        raise ValueError(
            f"version {settings.version!r} needs at least {least} classes, but the model has {classes}; "
            "use apgd with loss 'ce'"
        )
    if settings.version == "standard" and is_random(model, images, max_batch=max_batch):
        raise ValueError(
            "version 'standard' of AutoAttack is for deterministic models, but this one is random: a single lucky draw "
            "would count as an error; use version 'rand'"
        )
    random = settings.version == "rand" and random_model_with_votes(model, images, settings.verdict)

    def attempt(part: Part) -> Attempt:
        def run(positions: Tensor, report: StepCallback | None) -> Tensor:
            chosen = (images[positions], labels[positions], part.settings)
            return part.attack(model, *chosen, generator=generator, max_batch=max_batch, callback=report)

        return Attempt(part.steps, run)

    attempts = [attempt(part) for part in autoattack_parts(settings).values()]
    verdict = settings.verdict if random else Verdict()
    adversarial = strongest_attempt(model, images, labels, attempts, verdict, max_batch=max_batch, callback=callback)
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial
