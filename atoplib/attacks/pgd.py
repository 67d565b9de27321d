"""FGSM, N-FGSM and PGD, with EOT for random models: one loop, restarts around it."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from itertools import cycle
from math import cos, pi
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate

from atoplib.attacks.eot import StepCallback, eot_gradient, make_generator
from atoplib.attacks.losses import Loss, likely_targets, target_margin
from atoplib.attacks.norms import FINITE, Ball, of_l1_norm_1
from atoplib.attacks.queries import at_rows, broken_samples, prepare_attack, strongest_attempt
from atoplib.decisions import Model, sample_logits
from atoplib.parameters import above, at_least, between, check_counts, check_settings, one_of

LIKELY = "likely_targets"
# The defaults of ``pgd_ensemble`` that are not those of ``pgd``.
ENSEMBLE = {
    "steps": 80, "eot_samples": 5, "restarts": 2, "loss": ("mean_softmax", "margin", *[LIKELY] * 8),
    "momentum": 0.75, "cycles": 3, "early_stop": 3,
}  # fmt: skip
# Where the ball shrinks meanwhile: one cycle, smoothed runs that begin near the best so far. In l2 every
# third is not smoothed and has a target: natural images need that one, digits the others.
L2 = ENSEMBLE | {
    "cycles": 1, "smoothing": (0.5, 0.0, 0.3), "loss": ("mean_softmax", LIKELY, "mean_softmax"),
    "recombine": True,
}  # fmt: skip
L1 = L2 | {"smoothing": (0.5, 0.0), "loss": "mean_softmax", "momentum": 0.25}
ENSEMBLES = {"linf": ENSEMBLE, "l2": L2, "l1": L1}
# Of the default step size, in units of eps: the gradients of a random model are noisy, so that small steps
# get lost in the noise; the projection makes up for steps that are too large.
SMALLEST_STEP = 1 / 3
# Of a step size that falls, in units of the first.
LAST_STEP = 0.06


def pgd(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 40,
    alpha: float | None = None,
    eot_samples: int = 1,
    restarts: int = 1,
    loss: Loss | str | Sequence[Loss | str] = "ce",
    start: str | Float[Tensor, "batch channels height width"] = "random",
    momentum: float = 0.0,
    cycles: int = 0,
    early_stop: int = 0,
    shrink: bool = True,
    smoothing: float | Sequence[float] = 0.0,
    recombine: bool = False,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    ball: Callable[..., Ball] = Ball,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images by projected gradient ascent: the last iterate, of the strongest of all restarts.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. A function that is no module (as in a
            training step) is taken as it is, without a check, and always gets the whole batch.
        images: in [0, 1].
        labels: true classes.
        eps: radius of the ball in units of the image: 8/255 for linf, 0.5 for l2.
        norm: ``linf``, ``l2`` or ``l1``.
        steps: of each run, at least 1.
        alpha: step size in units of the image; None: eps where it falls (``cycles``), else eps for one step,
            2.5 eps / steps for a few and never less than eps / 3, below which a random defence looks up to
            twice as robust as it is.
        eot_samples: samples of the model that each gradient is taken over.
        restarts: runs; each attacks the images that are not yet misclassified, from a random start of its
            own.
        loss: what is raised, as in ``eot_gradient``; of several each restart takes the next, in turn, and
            ``likely_targets`` is the margin of the most likely other class, then of the next.
        start: of the first run: ``random`` (uniform in the ball), ``clean``, or images; every restart begins
            at random.
        momentum: share of the past direction in the next one: g <- momentum * g + gradient / its l1 norm, and
            a step along g (MI-FGSM; Dong et al. 2018, eq. 6 and 7).
        cycles: how often the step size falls along half a cosine, from alpha to 0.06 alpha; 0: it never does,
            and then a deterministic model is not attacked to the end.
        early_stop: an image leaves once every sample was misclassified in so many steps in a row; 0, or in a
            smoothed run, whose samples are of other points: never.
        shrink: l1 and l2 runs begin in a larger ball, which shrinks to eps (``norms.STAGES``), and find far
            more; False: all in the ball, as published.
        smoothing: standard deviation of Gaussian noise, in units of the image, that is added where gradients
            are taken, another for each of the EOT samples; it falls to 0 along the run. Across the flat
            parts of a loss (l_inf-trained networks have them in l2 and l1) it finds the way that a gradient
            at the point itself does not. Of several each restart takes the next, in turn.
        recombine: every restart begins at a mixture of the best point so far and a random one, in each of
            8 x 8 parts of the image one of the two, so that what one run found is not lost to the next;
            False: at the random one.
        rule, votes: by which an image counts as misclassified between restarts (``strongest_attempt``).
        targets: class that each image is driven to, by the margin between it and the true one, in place of
            ``loss``.
        ball: makes what is searched from images, eps and norm; ``flow`` searches displacements of pixels by
            another than ``Ball``.
        seed: of the attack's own random numbers; None: torch's global generator. The model's are not
            reseeded.
        max_batch: copies of images (images x samples) that are in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step; steps of all restarts
            together.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``contract.prepare``; for settings out of range; for a target that is an image's own
            class.

    Source: Madry et al. 2018, section 2.1; EOT: Athalye et al. 2018, section 4.2.
    """
    losses = [loss] if isinstance(loss, str) or callable(loss) else list(loss)
    check_counts(steps=steps, eot_samples=eot_samples, restarts=restarts)
    check_settings(momentum=(momentum, between(0, FINITE)), early_stop=(early_stop, at_least(0)))
    checked = isinstance(model, nn.Module)
    model, images, labels, targets = prepare_attack(model, images, labels, targets)
    if isinstance(start, str):
        check_settings(start=(start, one_of("random", "clean")))
        start = images if start == "clean" else None
    else:
        check_settings(**{"shape of start": (start.shape, one_of(images.shape))})
    max_batch = max_batch if checked else max(max_batch, eot_samples * len(images))
    whole, generator = ball(images, eps, norm), make_generator(seed, images.device)
    sizes = step_sizes(eps, steps, alpha, cycles)
    noises = [smoothing] if isinstance(smoothing, float | int) else list(smoothing)
    check_settings(smoothing=(min(noises, default=-1), between(0, FINITE)))
    goals = [(losses[number % len(losses)], None) for number in range(restarts)]
    if targets is not None:
        goals = [(target_margin, targets)] * restarts
    elif (LIKELY, None) in goals:
        logits = sample_logits(model, images, num_samples=votes, max_batch=max_batch).mean(dim=0)
        likely = cycle(likely_targets(logits, labels, goals.count((LIKELY, None))))
        goals = [(target_margin, next(likely)) if goal[0] == LIKELY else goal for goal in goals]

    def attempt(number: int, rows: Tensor, report: StepCallback | None) -> Tensor:
        goal, classes = goals[number]
        near = whole.rows(rows) if restarts > 1 else whole
        wide = near.searched(1 / steps) if shrink else near
        begin = wide.start(generator) if number or start is None else near.project(start[rows])
        if number and recombine:
            share = torch.rand((len(rows), 1, 8, 8), generator=generator, device=begin.device)
            kept = interpolate(share, size=begin.shape[2:]) < 0.5  # one draw for all pixels of a part
            begin = wide.project(torch.where(kept, best[rows], begin))
        ends[rows] = _pgd(
            model, begin, labels[rows], near, goal, at_rows(classes, rows), sizes=sizes,
            eot_samples=eot_samples, momentum=momentum, early_stop=early_stop, shrink=shrink,
            smoothing=noises[number % len(noises)], generator=generator, reach=targets is not None,
            max_batch=max_batch, callback=report,
        )  # fmt: skip
        return near.images_at(ends[rows])

    best, ends = whole.still().clone(), whole.still().clone()
    if restarts == 1:
        adversarial = attempt(0, torch.arange(len(images), device=images.device), callback)
    else:
        attempts = [(steps, partial(attempt, number)) for number in range(restarts)]
        adversarial = strongest_attempt(
            model, images, labels, attempts, rule=rule, votes=votes, targets=targets, max_batch=max_batch,
            callback=callback, taken=lambda rows: best.index_copy_(0, rows, ends[rows]),
        )  # fmt: skip
    return whole.check(adversarial) if checked else adversarial


def pgd_ensemble(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    **options: Any,
) -> Float[Tensor, "batch channels height width"]:
    """The strongest PGD of the kit for its passes: ``pgd`` with a falling step, momentum, and restarts of
    several losses (``ENSEMBLES``, by norm).

    Arguments, result and errors as ``pgd``; other defaults.
    """
    return pgd(model, images, labels, **ENSEMBLES.get(options.get("norm"), ENSEMBLE) | options)


pgd_ensemble.__signature__ = signature(partial(pgd, **ENSEMBLE))  # what help() and the registry read


def fgsm(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    eot_samples: int = 1,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One step of size eps from the image itself along the sign of the gradient (Goodfellow et al. 2015,
    section 4).

    Arguments, result and errors as ``pgd``.
    """
    return pgd(
        model, images, labels, eps=eps, norm=norm, steps=1, alpha=eps, start="clean", eot_samples=eot_samples,
        targets=targets, seed=seed, max_batch=max_batch, callback=callback,
    )  # fmt: skip


def n_fgsm(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    noise: float = 2.0,
    seed: int | torch.Generator | None = 0,
) -> Float[Tensor, "batch channels height width"]:
    """Images for adversarial training, in [0, 1]: one step of size eps from the images with noise, uniform in
    +-noise * eps (at most 1). They are not projected, so they lie up to (1 + noise) eps away: no attack to
    evaluate by.

    Arguments and errors as ``pgd``; there is no other norm than linf.

    Source: de Jorge et al. 2022, "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
    algorithm 1.
    """
    check_settings(noise=(noise, above(0, FINITE)), norm=(norm, one_of("linf")))
    _, images, labels, _ = prepare_attack(model, images, labels)
    start = Ball(images, min(1.0, noise * eps), "linf").start(make_generator(seed, images.device))
    return fgsm(model, start, labels, eps=eps, seed=seed)


def step_sizes(eps: float, steps: int, alpha: float | None = None, cycles: int = 0) -> list[float]:
    """The size of every step of a run, as ``pgd`` describes ``alpha`` and ``cycles``.

    Raises:
        ValueError: for a size or a number of cycles out of range.
    """
    if alpha is None:
        alpha = eps if steps == 1 or cycles else eps * max(2.5 / steps, SMALLEST_STEP)
    check_settings(alpha=(alpha, above(0, FINITE)), cycles=(cycles, at_least(0)))
    if cycles == 0 or steps == 1:
        return [alpha] * steps
    length = max(2, -(-steps // cycles))
    falling = [(1 + cos(pi * (step % length) / (length - 1))) / 2 for step in range(steps)]
    return [alpha * (LAST_STEP + (1 - LAST_STEP) * share) for share in falling]


def _pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    ball: Ball,
    goal: Loss | str,
    classes: Tensor | None,
    *,
    sizes: Sequence[float],
    eot_samples: int,
    momentum: float,
    early_stop: int,
    shrink: bool,
    smoothing: float,
    generator: torch.Generator | None,
    reach: bool,
    max_batch: int,
    callback: StepCallback | None,
) -> Tensor:
    """Where one run from the points ``x`` of a ball ends; ``reach``: an image is done where it is classified
    as its class of ``classes``."""
    whole, result, losses = ball, x.clone(), torch.zeros(len(x), device=x.device, dtype=torch.float32)
    rows = torch.arange(len(x), device=x.device)
    in_a_row, past = torch.zeros_like(rows), torch.zeros_like(x)
    for step, size in enumerate(sizes):
        images, std = ball.images_at(x), smoothing * (1 - step / len(sizes))
        gradient, loss, logits = eot_gradient(
            model, images, labels, loss=goal, eot_samples=eot_samples, targets=classes, max_batch=max_batch,
            noise=std * torch.empty_like(images).normal_(generator=generator) if smoothing else None,
        )  # fmt: skip
        past = momentum * past + of_l1_norm_1(ball.gradient_at(x, gradient))
        near = ball.searched((step + 1) / len(sizes)) if shrink else ball
        x = near.project(x + size * near.direction(past, x))
        if callback is not None:
            result[rows], losses[rows] = x if near is ball else ball.project(x), loss
            callback(step + 1, len(sizes), whole.images_at(result).clone(), losses.clone())
        # only where the point that was judged lay in the ball
        if early_stop and not smoothing and (not shrink or ball.searched(step / len(sizes)) is ball):
            done = broken_samples(logits, labels, classes if reach else None).all(dim=0)
            in_a_row = torch.where(done, in_a_row + 1, 0)
            stays = in_a_row < early_stop
            if not stays.all():
                result[rows], ball = x, ball.rows(stays)
                each = (rows, x, labels, in_a_row, past, classes)
                rows, x, labels, in_a_row, past, classes = (at_rows(values, stays) for values in each)
                if len(rows) == 0:
                    break
    result[rows] = x
    return result.detach()
