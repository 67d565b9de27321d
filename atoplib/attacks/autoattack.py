"""AutoAttack: the original one for deterministic models, and one of our own parts, judged by votes, for
random models."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.apgd import apgd
from atoplib.attacks.eot import StepCallback
from atoplib.attacks.losses import margin
from atoplib.attacks.norms import Ball, check_counts
from atoplib.attacks.queries import check_rule, prepare_attack, strongest_attempt
from atoplib.attacks.square import square
from atoplib.decisions import Model, sample_logits

ORIGINAL_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
PUBLISHED_SCHEDULE = 10_000  # of Square's shares; 5,000 queries run the first half of it


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
        model: in eval mode, images in [0, 1] -> logits; may be random.
        images: in [0, 1].
        labels: true classes.
        eps: radius in units of the image.
        norm: ``linf``, ``l2`` or ``l1`` (of random models without Square).
        steps: iterations of APGD and FAB, for each target; fewer than 100 make a rough trial, no AutoAttack.
        num_targets: targets of APGD-T and FAB-T, the most likely other classes; None: 9, and 3 of random
            models.
        queries: of Square; None: 5000, and 1000 of random models.
        eot_samples: samples of a random model that gradients are averaged over.
        rule, votes: when an image of a random model counts as broken between the parts.
        seed: of the attack's own random numbers; None: torch's global generator.
        max_batch: copies of images (images x samples) in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step; of the original after its
            end.

    Returns:
        adversarial images in [0, 1], within eps of ``images``; where the original found none, the image
        itself.

    Raises:
        ValueError: as ``contract.prepare``; for too few classes; for a random model that would be judged by
            one sample.
        ImportError: where the original is needed and not installed.

    Source: Croce & Hein 2020, section 5, in the composition of the authors' code since 2020-08.
    """
    model, images, labels = prepare_attack(model, images, labels)
    ball = Ball(images, eps, norm)
    random, votes = check_rule(model, images, rule, votes)
    classes, least = sample_logits(model, images[:1]).shape[2], 3 if random else 4
    if classes < least:
        raise ValueError(
            f"AutoAttack needs at least {least} classes here, but the model has {classes}; use apgd ('ce')"
        )
    num_targets = min(num_targets or (3 if random else 9), classes - 1)
    queries = queries or (1000 if random else 5000)
    check_counts(steps=steps, num_targets=num_targets, queries=queries, eot_samples=eot_samples)
    common = {"eps": eps, "norm": norm, "seed": seed, "max_batch": max_batch}
    if random:
        common |= {"rule": rule, "votes": votes}
        by_gradient = partial(apgd, steps=steps, eot_samples=eot_samples, **common)
        dlr, targets = ("targeted_dlr", num_targets) if classes > 3 else ("dlr", 1)
        parts = [
            (steps, by_gradient),
            (steps * targets, partial(by_gradient, loss=dlr, num_targets=targets)),
            (queries, partial(square, queries=queries, schedule=PUBLISHED_SCHEDULE, **common)),
        ]

        def attempt(attack: partial, rows: Tensor, report: StepCallback | None) -> Tensor:
            return attack(model, images[rows], labels[rows], callback=report)

        adversarial = strongest_attempt(
            model, images, labels,
            [(length, partial(attempt, attack)) for length, attack in parts[: 2 if norm == "l1" else 3]],
            rule=rule, votes=votes, max_batch=max_batch, callback=callback,
        )  # fmt: skip
    else:
        options = {"steps": steps, "num_targets": num_targets, "queries": queries}
        adversarial = _original(model, images, labels, **options, **common)
        if callback is not None:
            logits = sample_logits(model, adversarial, max_batch=max_batch)[0]
            callback(1, 1, adversarial.clone(), margin(logits, labels))
    ball.check(adversarial)
    return adversarial


def _original(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str,
    seed: int | torch.Generator | None,
    max_batch: int,
    steps: int,
    num_targets: int,
    queries: int,
) -> Tensor:
    """The authors' AutoAttack, version standard; torch's global generators, which it seeds, are left as they
    were."""
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            "AutoAttack of a deterministic model is the authors' own: pip install pyautoattack"
        ) from error
    device = images.device
    if not isinstance(seed, int):
        seed = int(torch.randint(2**31, (), generator=seed, device=device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        original = AutoAttack(model, norm=ORIGINAL_NORMS[norm], eps=eps, seed=seed, device=device)
        original.square.n_queries, original.fab.n_iter = queries, steps
        original.apgd_targeted.n_target_classes = original.fab.n_target_classes = num_targets
        for attack in (original.apgd, original.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = steps
            attack.n_iter_2, attack.n_iter_min, attack.size_decr = (
                max(1, int(share * steps)) for share in (0.22, 0.06, 0.03)
            )
        found = original.run_standard_evaluation(images, labels, batch_size=max_batch)[0].detach()
    moved = (found != images).flatten(1).any(dim=1).view(-1, 1, 1, 1)
    # it clips to the ball in float32, up to rounding
    return torch.where(moved, Ball(images, eps, norm).project(found), images)
