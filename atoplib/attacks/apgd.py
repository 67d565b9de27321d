"""Auto-PGD, whose step size adapts to how the loss rises, with EOT for random models; and AutoAttack: the
original one for deterministic models, one of our own parts, judged by votes, for random models."""

from functools import partial
from math import ceil
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.black_box import square
from atoplib.attacks.eot import StepCallback, eot_gradient, make_generator
from atoplib.attacks.losses import (
    Loss,
    cross_entropy,
    dlr,
    likely_targets,
    margin,
    target_margin,
    targeted_dlr,
)
from atoplib.attacks.norms import Ball
from atoplib.attacks.queries import (
    at_rows,
    broken,
    broken_samples,
    check_rule,
    prepare_attack,
    strongest_attempt,
)
from atoplib.decisions import Model, forked_rng, sample_logits
from atoplib.parameters import check_counts, check_settings, one_of

RHO = 0.75  # a step size is halved unless the loss rose in more than this share of the steps looked at
NEW_SHARE = 0.75  # alpha of eq. 4: share of the new step, the rest is momentum
SPREAD = 4.0  # of the logits in the cross-entropy: standard deviation over the classes, in the median image
# (multiple of eps, share of the steps); Croce & Hein 2021, section 4.3.
L1_STAGES = ((3, 0.3), (2, 0.3), (1, 0.4))
PUBLISHED_SCHEDULE = 10_000  # of Square's shares; 5,000 queries run the first half of it


def apgd(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 100,
    loss: str = "ce",
    eot_samples: int = 1,
    restarts: int = 1,
    num_targets: int = 9,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images by Auto-PGD; no result depends on the scale of the logits.

    Restarts and targets follow one another, each on the images that are not broken yet. A run gives, for each
    image: of a deterministic model the first misclassified point, with which the image leaves the batch; of a
    random one the point of the highest mean loss, and an image leaves early only if no vote is correct at
    that point (looked at whenever the step size is).

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random.
        images: in [0, 1].
        labels: true classes.
        eps: radius in units of the image: 8/255 for linf, 0.5 for l2, 12 for l1.
        norm: ``linf``, ``l2`` or ``l1`` (sparse steps, and radii that shrink from 3 eps).
        steps: iterations of a run, at least 1.
        loss: ``ce`` (of logits at a fixed scale), ``dlr`` (at least 3 classes) or ``targeted_dlr`` (at least
            4): one run for each target.
        eot_samples: samples of a random model that each gradient is averaged over; a deterministic model gets
            one.
        restarts: runs (for each target), each from a random start of its own.
        num_targets: so many of the most likely other classes are targets, or all of them if they are fewer.
        rule, votes: when an image counts as broken between runs (``decisions.correct``).
        targets: class that each image is driven to, in place of ``loss``.
        seed: of the random starts; None: torch's global generator. The model's own random numbers are not
            reseeded.
        max_batch: copies of images (images x samples) in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step; steps of all runs together.

    Returns:
        adversarial images in [0, 1], within eps of ``images``; where none was found, the strongest candidate.

    Raises:
        ValueError: as ``contract.prepare``; for settings out of range; for too few classes; for a random
            model that would be judged by a single sample.

    Source: Croce & Hein 2020, algorithm 1 and section 4 (targets); l1: Croce & Hein 2021, "Mind the box",
    section 4.
    """
    check_counts(steps=steps, eot_samples=eot_samples, restarts=restarts, num_targets=num_targets)
    check_settings(loss=(loss, one_of("ce", "dlr", "targeted_dlr")))
    model, images, labels, targets = prepare_attack(model, images, labels, targets)
    ball, generator = Ball(images, eps, norm), make_generator(seed, images.device)
    random, votes = check_rule(model, images, rule, votes, max_batch)
    clean = sample_logits(model, images, num_samples=votes, max_batch=max_batch).mean(dim=0)
    if targets is not None:
        objective, columns = (targeted_dlr if clean.shape[1] > 3 else target_margin), (targets,)
    elif loss == "targeted_dlr":
        objective, columns = targeted_dlr, likely_targets(clean, labels, num_targets)
    else:
        objective, columns = (dlr if loss == "dlr" else _cross_entropy_at_fixed_scale(clean)), (None,)

    def attempt(goals: Tensor | None, rows: Tensor, report: StepCallback | None) -> Tensor:
        run = _run_l1 if norm == "l1" else _run
        return run(
            model, ball.rows(rows), labels[rows], objective=objective, goals=at_rows(goals, rows),
            targets=at_rows(targets, rows), steps=steps, eot_samples=eot_samples if random else 1,
            random=random, votes=votes, generator=generator, max_batch=max_batch, callback=report,
        )  # fmt: skip

    attempts = [(steps, partial(attempt, goals)) for goals in columns for _ in range(restarts)]
    return ball.check(strongest_attempt(
        model, images, labels, attempts, rule=rule, votes=votes, targets=targets, max_batch=max_batch,
        callback=callback,
    ))  # fmt: skip


def checkpoints(steps: int, norm: str = "linf") -> dict[int, int]:
    """After which steps the step size is looked at, and how many steps each look judges: 22 % of ``steps``,
    then ever fewer; for l1 always 4 %.

    Source: Croce & Hein 2020, section 3.2, and 2021, section 4.2, rounded as in the authors' code.
    """
    shares = (0.04, 0, 0.04) if norm == "l1" else (0.22, 0.03, 0.06)
    window, shrink, least = (max(1, int(share * steps)) for share in shares)
    windows, step = {}, window
    while step <= steps:
        windows[step] = window
        window = max(window - shrink, least)
        step += window
    return windows


def _cross_entropy_at_fixed_scale(logits: Tensor) -> Loss:
    """The cross-entropy of logits times a constant, the same for all images and steps, that gives ``logits``
    the spread ``SPREAD``: a model of large logits would saturate it, one of small logits make it linear."""
    factor = SPREAD / logits.std(dim=1).median().clamp_min(torch.finfo(logits.dtype).tiny)
    return lambda outputs, labels: cross_entropy(outputs.float() * factor, labels)


def _run_l1(
    model: Model, ball: Ball, labels: Tensor, *, steps: int, generator, callback, **options
) -> Tensor:
    """Three runs whose radii shrink to eps, each from where the one before ended; only the last may break an
    image."""
    points, done = None, 0

    def report(step: int, _steps: int, x: Tensor, losses: Tensor) -> None:
        callback(done + step, steps, ball.project(x), losses)

    for multiple, share in L1_STAGES:
        stage, length = ball.rows(slice(None), multiple), min(ceil(share * steps), steps - done)
        if points is None:  # the published start; that of ``Ball`` is another
            points = ball.images + torch.empty_like(ball.images).normal_(generator=generator)
        points = stage.project(points)
        if length > 0:
            points = _run(
                model, stage, labels, steps=length, start=points, leave=multiple == 1,
                callback=callback and report, **options,
            )  # fmt: skip
        done += length
    return points


def _run(
    model: Model,
    ball: Ball,
    labels: Tensor,
    *,
    objective: Loss,
    goals: Tensor | None,
    targets: Tensor | None,
    steps: int,
    eot_samples: int,
    random: bool,
    votes: int,
    max_batch: int,
    callback: StepCallback | None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    leave: bool = True,
) -> Tensor:
    """One run: algorithm 1 on all images at once, each with a step size of its own.

    The first step counts as an increase if its loss is above that of the start, as in the paper; the authors'
    code asks whether it is above 0.
    """
    points = ball.start(generator) if start is None else start
    zeros, windows = points.new_zeros(len(points), dtype=torch.float32), checkpoints(steps, ball.norm)
    support = (points != ball.images).flatten(1).sum(dim=1).float()  # l1: how many values are changed
    state = SimpleNamespace(  # entry i of every tensor belongs to image rows[i] of the batch
        rows=torch.arange(len(points), device=points.device), labels=labels, goals=goals, targets=targets,
        points=points, previous=points, gradient=torch.zeros_like(points), loss=zeros + torch.inf,
        best=points, best_gradient=torch.zeros_like(points), best_loss=zeros - torch.inf,
        last_best_loss=zeros - torch.inf,
        step_size=zeros + (1 if ball.norm == "l1" else 2) * ball.eps, increases=zeros, halved=zeros == 0,
        density=support / points[0].numel() / 1.5, support=support,  # l1: share of the values in a step
    )  # fmt: skip
    result, losses = points.clone(), zeros.clone()
    for step in range(steps + 1):
        if step > 0:
            state.previous, state.points = state.points, _step(state, ball, NEW_SHARE if step > 1 else 1.0)
        gradient, loss, logits = eot_gradient(
            model, state.points, state.labels, loss=objective, eot_samples=eot_samples, targets=state.goals,
            max_batch=max_batch,
        )  # fmt: skip
        state.increases = state.increases + (loss > state.loss)
        state.gradient, state.loss = gradient, loss
        better = loss > state.best_loss
        at = better.view(-1, 1, 1, 1)
        state.best = torch.where(at, state.points, state.best)
        state.best_gradient = torch.where(at, state.gradient, state.best_gradient)
        state.best_loss = torch.where(better, state.loss, state.best_loss)
        result[state.rows], losses[state.rows] = state.best, state.loss
        if random:
            candidates, suspects = state.best, torch.full_like(better, step in windows)
        else:  # what breaks an image counts, whatever its loss
            candidates, suspects = state.points, broken_samples(logits, state.labels)[0]
        gone = suspects & leave
        if gone.any():  # by decisions in float32, whatever the attack computes in
            gone[gone.clone()] = broken(
                model, candidates[gone], state.labels[gone], targets=at_rows(state.targets, gone),
                votes=votes, max_batch=max_batch,
            )  # fmt: skip
            result[state.rows[gone]] = candidates[gone]
        if callback is not None and step > 0:
            callback(step, steps, result.clone(), losses.clone())
        if gone.any():
            ball = ball.rows(~gone)
            state = SimpleNamespace(**{name: at_rows(each, ~gone) for name, each in vars(state).items()})
            if len(state.rows) == 0:
                break
        if step in windows:
            _adapt_step_sizes(state, ball, windows[step])
    return result


def _step(state: SimpleNamespace, ball: Ball, share: float) -> Tensor:
    """Eq. 3 and 4: a projected step along the gradient, mixed with the movement of the last step, projected
    again; for l1 the signs of the largest entries of the gradient, without momentum."""
    size = state.step_size.to(state.points.dtype).view(-1, 1, 1, 1)
    ahead = ball.project(state.points + size * ball.direction(state.gradient, density=state.density))
    if ball.norm == "l1":
        return ahead
    momentum = state.points - state.previous
    return ball.project(state.points + share * (ahead - state.points) + (1 - share) * momentum)


def _adapt_step_sizes(state: SimpleNamespace, ball: Ball, window: int) -> None:
    """Adapt the step sizes, and go back to the best points where that restarts the search.

    The step is halved where the loss rose in too few of the last ``window`` steps, or where its best stood
    still although the step was not halved the last time (conditions 1 and 2 of section 3.2). For l1: the step
    is eps again where the best point has become sparser, and smaller by 1.5 (down to eps / 10) elsewhere.
    """
    if ball.norm == "l1":
        support = (state.best != ball.images).flatten(1).sum(dim=1).float()
        back = support / state.support < 0.95
        state.density, state.support = support / state.best[0].numel() / 1.5, support
        state.step_size = torch.where(back, ball.eps, state.step_size / 1.5).clamp(ball.eps / 10, ball.eps)
    else:
        stuck = ~state.halved & (state.best_loss <= state.last_best_loss)
        back = state.halved = (state.increases <= RHO * window) | stuck
        state.step_size = torch.where(back, state.step_size / 2, state.step_size)
    state.points = torch.where(back.view(-1, 1, 1, 1), state.best, state.points)
    state.gradient = torch.where(back.view(-1, 1, 1, 1), state.best_gradient, state.gradient)
    state.last_best_loss, state.increases = state.best_loss, torch.zeros_like(state.increases)


def autoattack(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 100,
    num_targets: int | None = None,
    queries: int | None = None,
    eot_samples: int = 20,
    rule: str = "any",
    votes: int = 20,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images by AutoAttack.

    A deterministic model is attacked by the authors' code, version standard (package ``pyautoattack``):
    APGD-CE, APGD-T, FAB-T, Square. The authors' version for random models judges by a single sample of the
    last step, so that we run APGD-CE, APGD-T (on the DLR loss without targets for three classes) and Square
    ourselves, each on the images that the ones before left unbroken by votes.

    Args:
        model, images, labels, eps: as ``apgd``.
        norm: ``linf``, ``l2`` or ``l1`` (of random models without Square).
        steps: iterations of APGD and FAB, for each target; fewer than 100 make a rough trial, no AutoAttack.
        num_targets: targets of APGD-T and FAB-T, the most likely other classes; None: 9, and 3 of random
            models.
        queries: of Square; None: 5000, and 1000 of random models.
        eot_samples: samples of a random model that gradients are averaged over.
        rule, votes: when an image of a random model counts as broken between the parts.
        seed: of the attack's own random numbers; None: torch's global generator.
        max_batch, callback: as ``apgd``; of the original the callback is called once, after its end.

    Returns:
        adversarial images in [0, 1], within eps of ``images``; where the original found none, the image
        itself.

    Raises:
        ValueError: as ``contract.prepare``; for too few classes; for a random model that would be judged by
            one sample.
        ImportError: where the original is needed and not installed.

    Source: Croce & Hein 2020, section 5, in the composition of the authors' code since 2020-08.
    """
    model, images, labels, _ = prepare_attack(model, images, labels)
    ball = Ball(images, eps, norm)
    random, votes = check_rule(model, images, rule, votes, max_batch)
    classes, least = sample_logits(model, images[:1]).shape[2], 3 if random else 4
    if classes < least:
        raise ValueError(
            f"AutoAttack needs at least {least} classes here, but the model has {classes}; use apgd ('ce')"
        )
    num_targets = min(num_targets or (3 if random else 9), classes - 1)
    queries = queries or (1000 if random else 5000)
    check_counts(steps=steps, num_targets=num_targets, queries=queries, eot_samples=eot_samples)
    if not random:
        adversarial = _original(
            model, ball, labels, steps=steps, num_targets=num_targets, queries=queries, seed=seed,
            max_batch=max_batch,
        )  # fmt: skip
        if callback is not None:
            logits = sample_logits(model, adversarial, max_batch=max_batch)[0]
            callback(1, 1, adversarial.clone(), margin(logits, labels))
        return ball.check(adversarial)
    judged = {"rule": rule, "votes": votes, "max_batch": max_batch}
    common = {"eps": eps, "norm": norm, "seed": seed, **judged}
    by_gradient = partial(apgd, steps=steps, eot_samples=eot_samples, **common)
    dlr_loss, targets = ("targeted_dlr", num_targets) if classes > 3 else ("dlr", 1)
    parts = [
        (steps, by_gradient),
        (steps * targets, partial(by_gradient, loss=dlr_loss, num_targets=targets)),
        (queries, partial(square, queries=queries, schedule=PUBLISHED_SCHEDULE, **common)),
    ]

    def attempt(attack: partial, rows: Tensor, report: StepCallback | None) -> Tensor:
        return attack(model, images[rows], labels[rows], callback=report)

    adversarial = strongest_attempt(
        model, images, labels,
        [(length, partial(attempt, attack)) for length, attack in parts[: 2 if norm == "l1" else 3]],
        callback=callback, **judged,
    )  # fmt: skip
    return ball.check(adversarial)


def _original(
    model: Model,
    ball: Ball,
    labels: Tensor,
    *,
    steps: int,
    num_targets: int,
    queries: int,
    seed,
    max_batch: int,
) -> Tensor:
    """The authors' AutoAttack, version standard; torch's global generators, which it seeds, are left as they
    were."""
    from pyautoattack import AutoAttack  # an optional extra: pip install pyautoattack

    images, device = ball.images, labels.device
    if not isinstance(seed, int):
        seed = int(torch.randint(2**31, (), generator=seed, device=device))
    with forked_rng(device):
        original = AutoAttack(model, norm=ball.norm.capitalize(), eps=ball.eps, seed=seed, device=device)
        original.square.n_queries, original.fab.n_iter = queries, steps
        original.apgd_targeted.n_target_classes = original.fab.n_target_classes = num_targets
        for attack in (original.apgd, original.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = steps
            attack.n_iter_2, attack.n_iter_min, attack.size_decr = (
                max(1, int(share * steps)) for share in (0.22, 0.06, 0.03)
            )
        adversarial = original.run_standard_evaluation(images, labels, batch_size=max_batch)[0].detach()
    moved = (adversarial != images).flatten(1).any(dim=1).view(-1, 1, 1, 1)
    # it clips to the ball in float32, up to rounding
    return torch.where(moved, ball.project(adversarial), images)
