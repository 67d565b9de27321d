"""Auto-PGD: projected gradient ascent with momentum that halves its own step where it stalls, with EOT for random models."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.attempts import Attempt, StepCallback, random_model_with_votes, strongest_attempt
from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.eot import input_gradient
from atoplib.attacks.losses import Loss, cross_entropy, dlr, likely_targets, targeted_dlr
from atoplib.attacks.norms import check_ball, project, random_start, steepest_step
from atoplib.verdicts import Model, Verdict, draw_logits

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "targeted_dlr": targeted_dlr}
STEP_SHARE = 0.75  # alpha of eq. 4: share of the new step, the rest is momentum


@dataclass(frozen=True)
class APGDSettings:
    """Auto-PGD (Croce & Hein 2020, algorithm 1).

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]): 8/255 = 0.0314, l2 0.5.
        norm: ``linf`` or ``l2``.
        steps: iterations of a run, at least 1.
        loss: ``ce``, ``dlr`` (at least 3 classes), or ``targeted_dlr`` (at least 4): one run for each target.
        eot_samples: draws of a random model that each gradient is averaged over; a deterministic model gets one.
        restarts: runs (for each target), each from a random start of its own.
        num_targets: so many of the likeliest other classes are targets, or all of them if they are fewer.
        rho: a step is halved unless the loss rose in more than this share of the steps since the last look.
        verdict: when an image counts as broken; several draws for a random model.
    """

    eps: float
    norm: str = "linf"
    steps: int = 100
    loss: str = "ce"
    eot_samples: int = 1
    restarts: int = 1
    num_targets: int = 9
    rho: float = 0.75
    verdict: Verdict = Verdict()

    def __post_init__(self) -> None:
        check_ball(self.eps, self.norm)
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; allowed: {', '.join(LOSSES)}")
        for name in ("steps", "eot_samples", "restarts", "num_targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rho < 1:
            raise ValueError(f"rho must lie between 0 and 1, got {self.rho}; the paper has 0.75")


def checkpoints(steps: int) -> dict[int, int]:
    """After which steps the step size is looked at, and how many steps each look judges: 22 % of ``steps``, then ever fewer.

    Source: Croce & Hein 2020, section 3.2, rounded as in the authors' code.
    """
    window, shrink, least = (max(1, int(share * steps)) for share in (0.22, 0.03, 0.06))
    windows, step = {}, window
    while step <= steps:
        windows[step] = window
        window = max(window - shrink, least)
        step += window
    return windows


def apgd(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: APGDSettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by Auto-PGD.

    Restarts and targets follow one another, each on the images that the verdict still calls right. A run gives, for each
    image: on a deterministic model the first point that is read wrongly, with which the image leaves the batch; otherwise
    the point of the highest loss, in the mean over the draws. On a random model an image leaves its run early only if
    every draw of the verdict is wrong at that point, looked at whenever the step size is.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random.
        images: in [0, 1].
        labels: true classes.
        generator: of the random starts, on the images' device; the model's own dice are not touched.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step; steps of all runs together.

    Returns:
        adversarial images in [0, 1], within eps of ``images``; where none was found, the strongest candidate.

    Raises:
        ValueError: as ``check_attack``; for too few classes; for a random model with a verdict of a single draw.

    Source: Croce & Hein 2020, section 3 and algorithm 1; targets: section 4.
    """
    model, images, labels = check_attack(model, images, labels)
    random = random_model_with_votes(model, images, settings.verdict)
    eot_samples = settings.eot_samples if random else 1

    def attempt(targets: Tensor | None) -> Attempt:
        def run(positions: Tensor, report: StepCallback | None) -> Tensor:
            return _climb(
                model,
                images[positions],
                labels[positions],
                None if targets is None else targets[positions],
                replace(settings, eot_samples=eot_samples),
                random=random,
                generator=generator,
                max_batch=max_batch,
                callback=report,
            )

        return Attempt(settings.steps, run)

    columns: tuple[Tensor | None, ...] = (None,)
    if settings.loss == "targeted_dlr":
        logits = draw_logits(model, images, num_draws=settings.verdict.num_draws, max_batch=max_batch).mean(dim=0)
        columns = likely_targets(logits, labels, settings.num_targets).unbind(dim=1)
    attempts = [attempt(targets) for targets in columns for _ in range(settings.restarts)]
    adversarial = strongest_attempt(
        model, images, labels, attempts, settings.verdict, max_batch=max_batch, callback=callback
    )
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial


@dataclass
class _State:
    """Where the climbs stand; entry i of every tensor belongs to image ``rows[i]`` of the batch."""

    rows: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    points: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor  # steps since the last look in which the loss rose
    seen_loss: Tensor  # the best loss at the last look
    halved: Tensor  # whether the step was halved at the last look

    def only(self, keep: Tensor) -> "_State":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _State(**{name: None if value is None else value[keep] for name, value in values.items()})


def _begin(images: Tensor, labels: Tensor, targets: Tensor | None, start: Tensor, eps: float) -> _State:
    count, device = len(images), images.device
    nothing = torch.zeros_like(start)
    return _State(
        rows=torch.arange(count, device=device),
        images=images,
        labels=labels,
        targets=targets,
        points=start,
        previous=start,
        gradient=nothing,
        loss=torch.full((count,), torch.inf, device=device),
        best=start,
        best_gradient=nothing,
        best_loss=torch.full((count,), -torch.inf, device=device),
        step_size=torch.full((count,), 2 * eps, device=device),
        rises=torch.zeros(count, device=device),
        seen_loss=torch.full((count,), -torch.inf, device=device),
        halved=torch.ones(count, dtype=torch.bool, device=device),
    )


def _climb(
    model: Model,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    settings: APGDSettings,
    *,
    random: bool,
    generator: torch.Generator | None,
    max_batch: int,
    callback: StepCallback | None,
) -> Tensor:
    """One run from one random start: algorithm 1 on all images at once, each with a step size of its own.

    The first step counts as a rise if its loss is above that of the start, as in the paper; the authors' code asks whether
    it is above 0.
    """
    start = random_start(images, settings.eps, settings.norm, generator)
    state = _begin(images, labels, targets, start, settings.eps)
    result, losses = start.clone(), torch.zeros(len(images), device=images.device)
    windows = checkpoints(settings.steps)
    for step in range(settings.steps + 1):
        if step > 0:
            moved = _step(state, settings, STEP_SHARE if step > 1 else 1.0)
            state.previous, state.points = state.points, moved
        right = _evaluate(model, state, settings, max_batch)
        if not random and torch.is_autocast_enabled(images.device.type):  # in float32, too?
            right = right | (draw_logits(model, state.points, max_batch=max_batch)[0].argmax(dim=1) == state.labels)
        kept = state.best
        if not random:  # what breaks an image counts, whatever its loss
            kept = torch.where(_like(right, kept), kept, state.points)
        elif step in windows:
            right = _any_right(model, state, settings.verdict, max_batch)
        else:
            right = torch.ones_like(right)
        result[state.rows], losses[state.rows] = kept, state.loss
        if callback is not None and step > 0:
            callback(step, settings.steps, result.clone(), losses.clone())
        if not right.all():
            state = state.only(right)
            if len(state.rows) == 0:
                break
        if step in windows:
            _look(state, settings.rho, windows[step])
    return result


def _step(state: _State, settings: APGDSettings, share: float) -> Tensor:
    """Eq. 3 and 4: a projected step along the gradient, mixed with the movement of the last step, projected again."""

    def projected(points: Tensor) -> Tensor:
        return project(points, state.images, settings.eps, settings.norm)

    size = state.step_size.view(-1, 1, 1, 1)
    ahead = projected(state.points + size * steepest_step(state.gradient, settings.norm))
    momentum = state.points - state.previous
    return projected(state.points + share * (ahead - state.points) + (1 - share) * momentum)


def _evaluate(model: Model, state: _State, settings: APGDSettings, max_batch: int) -> Tensor:
    """Gradient and loss at the new points, and the best of all points so far. Returns where any draw is right."""
    found = input_gradient(
        model,
        state.points,
        state.labels,
        loss=LOSSES[settings.loss],
        targets=state.targets,
        eot_samples=settings.eot_samples,
        max_batch=max_batch,
    )
    state.rises = state.rises + (found.loss > state.loss)
    state.gradient, state.loss = found.gradient, found.loss
    improved = found.loss > state.best_loss
    state.best = torch.where(_like(improved, state.best), state.points, state.best)
    state.best_gradient = torch.where(_like(improved, state.best), state.gradient, state.best_gradient)
    state.best_loss = torch.where(improved, state.loss, state.best_loss)
    return found.right > 0


def _any_right(model: Model, state: _State, verdict: Verdict, max_batch: int) -> Tensor:
    """Whether any of the verdict's draws is right at the best point."""
    logits = draw_logits(model, state.best, num_draws=verdict.num_draws, max_batch=max_batch)
    return (logits.argmax(dim=2) == state.labels).any(dim=0)


def _look(state: _State, rho: float, window: int) -> None:
    """Halve the step and go back to the best point where the loss rose in too few of the last ``window`` steps, or where
    its best stood still although the step was not halved the last time (conditions 1 and 2 of section 3.2)."""
    stalls = state.rises <= rho * window
    stuck = ~state.halved & (state.best_loss <= state.seen_loss)
    state.halved = stalls | stuck
    state.step_size = torch.where(state.halved, state.step_size / 2, state.step_size)
    state.points = torch.where(_like(state.halved, state.points), state.best, state.points)
    state.gradient = torch.where(_like(state.halved, state.points), state.best_gradient, state.gradient)
    state.seen_loss = state.best_loss
    state.rises = torch.zeros_like(state.rises)


def _like(mask: Tensor, images: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (images.ndim - 1))
