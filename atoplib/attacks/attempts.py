"""Several attempts on the same images (restarts, targets, whole attacks): what breaks one is kept, else the strongest."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atoplib.attacks.losses import margin
from atoplib.verdicts import Model, Verdict, draw_logits, is_random, right_by

StepCallback = Callable[[int, int, Tensor, Tensor], None]
"""(step, steps, adversarial images, loss of each image), called after every step of an attack."""


class Attempt(NamedTuple):
    """One way to attack.

    Attributes:
        steps: how often it will report at most.
        run: (positions of the images to attack, callback) -> adversarial images at these positions.
    """

    steps: int
    run: Callable[[Tensor, StepCallback | None], Tensor]


class Assessment(NamedTuple):
    """Of each image: whether the verdict calls it right, and its margin loss in the mean over the draws."""

    right: Bool[Tensor, " batch"]
    margin: Float[Tensor, " batch"]


def assess(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    verdict: Verdict,
    *,
    max_batch: int = 512,
) -> Assessment:
    """Judge images and say how near each is to an error, from the same draws."""
    logits = draw_logits(model, images, num_draws=verdict.num_draws, max_batch=max_batch)
    margins = margin(logits.flatten(0, 1), labels.repeat(verdict.num_draws)).unflatten(0, logits.shape[:2])
    return Assessment(right_by(logits, labels, verdict.name), margins.mean(dim=0))


def random_model_with_votes(model: Model, images: Float[Tensor, "batch 3 height width"], verdict: Verdict) -> bool:
    """Whether the model is random; then the verdict must rest on several draws.

    Raises:
        ValueError: for a random model and a verdict of a single draw, which breaks every image once an attack has tried
            often enough, however weak the attack.
    """
    random = is_random(model, images)
    if random and (verdict.num_draws < 2 or verdict.name == "one_shot"):
        raise ValueError(
            f"the model is random, and verdict {verdict.name!r} of {verdict.num_draws} draws rests on a single one, which "
            "says little of an image; choose several, as in Verdict('best_of_n', 20)"
        )
    return random


def strongest_attempt(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    attempts: Sequence[Attempt],
    verdict: Verdict,
    *,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Make the attempts one after the other, each on those images alone that the model still reads correctly.

    Returns:
        for an image that was broken, what broke it (the image itself where that is read wrongly); for any other the
        candidate of the largest mean margin loss. That one is still right by the verdict, yet nearer to an error than the
        original: a verdict of other draws may fall otherwise, and the next attack may start from it.
    """
    adversarial = images.clone()
    right, margins = assess(model, images, labels, verdict, max_batch=max_batch)
    done, steps = 0, sum(attempt.steps for attempt in attempts)
    for attempt in attempts:
        standing = right.nonzero().squeeze(1)
        if len(standing) == 0:
            break
        report = _report_within(callback, done, steps, adversarial, standing)
        found = attempt.run(standing, report)
        judged = assess(model, found, labels[standing], verdict, max_batch=max_batch)
        better = ~judged.right | (judged.margin > margins[standing])
        adversarial[standing] = torch.where(better.view(-1, 1, 1, 1), found, adversarial[standing])
        margins[standing] = torch.where(better, judged.margin, margins[standing])
        right[standing] = judged.right
        done += attempt.steps
    return adversarial


def _report_within(
    callback: StepCallback | None, done: int, steps: int, whole: Tensor, positions: Tensor
) -> StepCallback | None:
    """The callback of one attempt on some of the images: reports all images, and steps out of all attempts' steps."""
    if callback is None:
        return None

    def report(step: int, _steps: int, adversarial: Tensor, losses: Tensor) -> None:
        shown, all_losses = whole.clone(), losses.new_zeros(len(whole))
        shown[positions], all_losses[positions] = adversarial, losses
        callback(done + step, steps, shown, all_losses)

    return report
