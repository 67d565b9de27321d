"""FGSM and PGD, with EOT for random models."""

from dataclasses import dataclass
from math import cos, pi

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.attempts import Attempt, StepCallback, random_model_with_votes, strongest_attempt
from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.eot import input_gradient
from atoplib.attacks.losses import Loss, cross_entropy, likely_targets, margin, target_margin
from atoplib.attacks.norms import check_ball, project, random_start, steepest_step
from atoplib.shares import WHOLE, Share
from atoplib.verdicts import Model, Verdict, draw_logits

SMALLEST_STEP = 1 / 3
"""Of the default step size, in units of eps. The gradients of a random model are noisy, so that many small steps get lost in
the noise; the projection makes up for steps that are too large."""
LAST_STEP = 0.06
"""Of a step size that decays, in units of the first."""


@dataclass(frozen=True)
class PGDSettings:
    """Projected gradient ascent (Madry et al. 2018, section 2.1).

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]): 8/255 = 0.0314, l2 0.5.
        norm: ``linf`` or ``l2``.
        steps: iterations, at least 1.
        alpha: step size in the same units; None: eps for a single step, 2.5 * eps / steps for a few, and never less than
            eps / 3, below which a random defence looks up to twice as robust as it is.
        eot_samples: draws of the model that each gradient is averaged over, at least 1.
        start: ``random`` (uniform in the ball) or ``clean``.
        stop_after: an image leaves the batch once every draw has been wrong in so many steps in a row, which saves the time
            of images that are broken anyhow; 0: never.
        decay: whether the step size falls along a half cosine, from alpha at the first step to ``LAST_STEP`` * alpha at the
            last. A step that never falls does not converge on a deterministic model.
        cycles: how often the step size falls so, on the way of one run; at least 1.
        joint: whether cross-entropy is that of the mean softmax over the EOT samples (``eot.input_gradient``).
        momentum: share of the past direction in the next one: g <- momentum * g + gradient / its l1 norm, and a step along
            g in place of the gradient (MI-FGSM; Dong et al. 2018, eq. 6 and 7). 0: plain PGD.
        restarts: runs, each from a random start of its own, at least 1. With several, each attacks those images alone that
            ``verdict`` still calls right, and they differ in their loss, too: the loss given, the margin, then the margin of
            each of the most likely other classes. Training makes one run, whatever is set.
        verdict: when an image counts as broken between restarts; several draws for a random model.
    """

    eps: float
    norm: str = "linf"
    steps: int = 20
    alpha: float | None = None
    eot_samples: int = 1
    start: str = "random"
    stop_after: int = 0
    decay: bool = False
    cycles: int = 1
    joint: bool = False
    momentum: float = 0.0
    restarts: int = 1
    verdict: Verdict = Verdict()

    def __post_init__(self) -> None:
        check_ball(self.eps, self.norm)
        if self.steps < 1 or self.eot_samples < 1:
            raise ValueError(f"steps and eot_samples must be at least 1, got {self.steps} and {self.eot_samples}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be above 0 (or None), got {self.alpha}")
        if self.stop_after < 0:
            raise ValueError(f"stop_after must be 0 (never) or more, got {self.stop_after}")
        if self.start not in ("random", "clean"):
            raise ValueError(f"unknown start {self.start!r}; allowed: random, clean")
        if not 0 <= self.momentum < float("inf"):
            raise ValueError(f"momentum must be 0 (none) or more, got {self.momentum}")
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {self.cycles}")
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {self.restarts}")
        if self.restarts > 1 and self.start == "clean":
            raise ValueError(f"{self.restarts} restarts differ in their starts only; choose start 'random' (or 1 restart)")

    @property
    def step_size(self) -> float:
        """alpha, or its default."""
        if self.alpha is not None:
            return self.alpha
        return self.eps if self.steps == 1 else self.eps * max(2.5 / self.steps, SMALLEST_STEP)

    def step_size_at(self, step: int) -> float:
        """The step size of step ``step``, from 0."""
        if not self.decay or self.steps == 1:
            return self.step_size
        length = max(2, -(-self.steps // self.cycles))
        falling = (1 + cos(pi * (step % length) / (length - 1))) / 2
        return self.step_size * (LAST_STEP + (1 - LAST_STEP) * falling)


def ascend(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: PGDSettings,
    *,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    targets: Int[Tensor, " batch"] | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
    share: Share = WHOLE,
) -> Float[Tensor, "batch 3 height width"]:
    """One run of PGD on any callable, without checks: what training uses on every batch. Arguments as ``pgd``.

    ``share`` says which part of a batch the images are, where several processes train together.
    """
    adversarial = images.detach()
    if settings.start == "random":
        adversarial = random_start(images, settings.eps, settings.norm, generator, share)
    adversarial = adversarial.clone()
    active = torch.arange(len(images), device=images.device)
    wrong_in_a_row = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    losses = torch.zeros(len(images), device=images.device)
    past = torch.zeros_like(adversarial) if settings.momentum else None
    for step in range(settings.steps):
        if len(active) == 0:
            break
        found = input_gradient(
            model,
            adversarial[active],
            labels[active],
            loss=loss,
            targets=None if targets is None else targets[active],
            eot_samples=settings.eot_samples,
            joint=settings.joint and loss is cross_entropy,
            max_batch=max_batch,
        )
        direction = found.gradient
        if past is not None:
            direction = past[active] = settings.momentum * past[active] + _of_l1_norm_1(found.gradient)
        moved = adversarial[active] + settings.step_size_at(step) * steepest_step(direction, settings.norm)
        adversarial[active] = project(moved, images[active], settings.eps, settings.norm)
        losses[active] = found.loss
        if callback is not None:
            callback(step + 1, settings.steps, adversarial.clone(), losses.clone())
        if settings.stop_after:
            wrong_in_a_row[active] = torch.where(found.right > 0, 0, wrong_in_a_row[active] + 1)
            active = active[wrong_in_a_row[active] < settings.stop_after]
    return adversarial.detach()


def check_targets(targets: Int[Tensor, " batch"], labels: Int[Tensor, " batch"]) -> None:
    """Raise ValueError where there is not one target an image, or one is the image's own class."""
    if targets.shape != labels.shape:
        raise ValueError(f"targets need one class an image, shape {tuple(labels.shape)}, got {tuple(targets.shape)}")
    same = (targets == labels).nonzero().flatten().tolist()
    if same:
        raise ValueError(f"the target of image {same[0]} is its own class, {int(labels[same[0]])}; choose another class")


def _of_l1_norm_1(gradient: Tensor) -> Tensor:
    tiny = torch.finfo(gradient.dtype).tiny
    return gradient / gradient.flatten(1).norm(p=1, dim=1).clamp_min(tiny).view(-1, 1, 1, 1)


def pgd(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: PGDSettings,
    *,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    targets: Int[Tensor, " batch"] | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by projected gradient ascent: the last iterate, whether or not it succeeded.

    With several restarts: the last iterate of the first run that broke an image by the verdict; where none did, that of the
    largest margin loss.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random.
        images: in [0, 1].
        labels: true classes.
        generator: of the random start, on the images' device; the model's own dice are not touched.
        loss: (logits, labels) -> one value an image, to be raised.
        targets: the class that each image is driven to, in place of ``loss``: the margin between it and the true one.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``check_attack``; for a target that is an image's own class; for restarts on a random model with a verdict of a single draw.

    Source: Madry et al. 2018, section 2.1; EOT: Athalye et al. 2018, section 4.2.
    """
    model, images, labels = check_attack(model, images, labels)
    if targets is not None:
        check_targets(targets, labels)
    everything = torch.arange(len(images), device=images.device)

    def attempt(goal: Loss, classes: Tensor | None) -> Attempt:
        def run(positions: Tensor, report: StepCallback | None) -> Tensor:
            return ascend(
                model,
                images[positions],
                labels[positions],
                settings,
                generator=generator,
                loss=goal,
                targets=None if classes is None else classes[positions],
                max_batch=max_batch,
                callback=report,
            )

        return Attempt(settings.steps, run)

    if settings.restarts == 1:
        goal, classes = (loss, None) if targets is None else (target_margin, targets)
        adversarial = attempt(goal, classes).run(everything, callback)
    else:
        random_model_with_votes(model, images, settings.verdict)
        if targets is None:
            logits = draw_logits(model, images, num_draws=settings.verdict.num_draws, max_batch=max_batch).mean(dim=0)
            likely = likely_targets(logits, labels, settings.restarts).unbind(dim=1)
            later = [(target_margin, likely[number % len(likely)]) for number in range(settings.restarts - 2)]
            goals = [(loss, None), (margin, None), *later]
        else:
            goals = [(target_margin, targets)] * settings.restarts
        attempts = [attempt(*goal) for goal in goals]
        adversarial = strongest_attempt(
            model, images, labels, attempts, settings.verdict, max_batch=max_batch, callback=callback
        )
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial


def fgsm(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    eps: float,
    *,
    eot_samples: int = 1,
    max_batch: int = 512,
) -> Float[Tensor, "batch 3 height width"]:
    """One step of size eps along the sign of the gradient, from the image itself (Goodfellow et al. 2015, section 4).

    Arguments, result and errors as ``pgd``, linf norm.
    """
    settings = PGDSettings(eps=eps, steps=1, eot_samples=eot_samples, start="clean")
    return pgd(model, images, labels, settings, max_batch=max_batch)
