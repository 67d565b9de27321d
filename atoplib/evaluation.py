"""Honest numbers: accuracy under an attack with its interval, for every way to judge a random defence."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import PGDSettings, check_attack, pgd
from atoplib.progress import Report
from atoplib.verdicts import VERDICTS, draw_logits, is_random, reseed, right_by, wilson_interval


@dataclass(frozen=True)
class Score:
    """Accuracy of one defence on one kind of image.

    Attributes:
        defence, attack: names of the row and the column.
        images, draws: how many images, and how often each was classified.
        one_shot: share that the first draw gets right (what a user of the defence meets); low, high: its 95 % interval.
        majority, mean_softmax: share that a vote over the draws gets right.
        worst_of_n: share that every draw gets right.
        seconds: time of attack and verdict.
    """

    defence: str
    attack: str
    images: int
    draws: int
    one_shot: float
    low: float
    high: float
    majority: float
    mean_softmax: float
    worst_of_n: float
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share that is printed: one-shot."""
        return self.one_shot


def score(
    logits: Float[Tensor, "draws batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    defence: str = "",
    attack: str = "",
    seconds: float = 0.0,
) -> Score:
    """Judge the logits of several draws by every verdict (PROTOCOLS: N-evaluation)."""
    draws, images, _ = logits.shape
    right = {name: int(right_by(logits, labels, name).sum()) for name in VERDICTS}
    low, high = wilson_interval(right["one_shot"], images)
    return Score(
        defence=defence,
        attack=attack,
        images=images,
        draws=draws,
        low=low,
        high=high,
        seconds=seconds,
        **{name: count / images for name, count in right.items()},
    )


@dataclass(frozen=True)
class Evaluation:
    """Scores of all defences under all attacks, and the adversarial images they were measured on, by (defence, attack)."""

    scores: tuple[Score, ...]
    adversarial: dict[tuple[str, str], Tensor]


def evaluate(
    defences: Mapping[str, nn.Module],
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    attack: PGDSettings,
    classifier: nn.Module,
    num_draws: int = 10,
    seed: int = 0,
    max_batch: int = 256,
    progress: Report | None = None,
) -> Evaluation:
    """Clean, transfer and white-box accuracy of each defence on the same images.

    ``transfer`` is made against ``classifier`` alone and then shown to every defence: what the published log of AToP
    measures. ``white-box`` goes through the whole defence, its gradient averaged over ``attack.eot_samples`` draws (1 for
    a defence without randomness, whose draws are all the same); only that column says something about robustness.

    Args:
        defences: by name; any module in eval mode, images in [0, 1] -> logits. One with a method ``reseed(seed)``, as
            ``AToPPipeline``, gives the same numbers again.
        images, labels: in [0, 1]; true classes; on the defences' device.
        attack: PGD's settings, used for both attacks.
        classifier: what the transfer attack sees.
        num_draws: forward passes a verdict.
        seed: of the random starts and of the defences' dice, another one for attack and verdict.
        max_batch: copies of images that are in memory at once.
        progress: called with gradient steps done and in all.

    Raises:
        ValueError: for a model in train mode, images outside [0, 1], labels without a logit.

    Source: Lin et al. 2024, section 4; Lee & Kim 2023 (PGD + EOT through the whole pipeline).
    """
    for model in (classifier, *defences.values()):
        check_attack(model, images, labels)  # all of them before the first runs: no statistics move, no hour is lost
    names = ["transfer", *defences]
    total = attack.steps * len(names)

    def run_attack(position: int, model: nn.Module) -> Tensor:
        reseed(model, seed)
        settings = attack if is_random(model, images[:1]) else replace(attack, eot_samples=1)
        reseed(model, seed)

        def report(step: int, _steps: int, _adversarial: Tensor, _loss: Tensor) -> None:
            if progress is not None:
                progress(position * attack.steps + step, total, "steps", {})

        generator = torch.Generator(images.device).manual_seed(seed)
        return pgd(model, images, labels, settings, generator=generator, max_batch=max_batch, callback=report)

    scores, adversarial = [], {}

    def judge(defence: str, attack_name: str, shown: Tensor, seconds: float) -> None:
        reseed(defences[defence], seed + 1)
        started = time.monotonic()
        logits = draw_logits(defences[defence], shown, num_draws=num_draws, max_batch=max_batch)
        seconds += time.monotonic() - started
        scores.append(score(logits, labels, defence=defence, attack=attack_name, seconds=seconds))
        adversarial[defence, attack_name] = shown

    started = time.monotonic()
    transfer = run_attack(0, classifier)
    transfer_seconds = time.monotonic() - started
    for position, (name, model) in enumerate(defences.items(), start=1):
        judge(name, "clean", images, 0.0)
        judge(name, "transfer", transfer, transfer_seconds)
        started = time.monotonic()
        result = run_attack(position, model)
        judge(name, "white-box", result, time.monotonic() - started)
    return Evaluation(tuple(scores), adversarial)
