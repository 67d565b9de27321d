"""The masking checklist: attacks on one model and its images, all under the same random numbers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.bpda import IdentityBackward
from atoplib.attacks.eot import eot_gradient
from atoplib.attacks.norms import Ball, check_eps
from atoplib.attacks.square import square
from atoplib.contract import prepare
from atoplib.decisions import Model, full_float32, is_random
from atoplib.masking.checks import (
    Check,
    check_agreement,
    check_effort,
    check_gradients,
    check_modes,
    check_samples,
    check_unbounded,
    check_weaker_attack,
    outcome_of,
    p_text,
    paired_p_value,
)
from atoplib.masking.probe import Attackable, Probe, smooth_margin
from atoplib.progress import Report

FEWEST_IMAGES = 8  # eight images to none are the fewest on which a comparison can fail
MOMENTUM = 0.75  # of the falling steps that the main attack's schedule is compared with
SHORT_SCHEDULE = 2000  # of Square's shares: large squares for the few queries that a check can afford
UNBOUNDED = (64 / 255, 0.95)  # changes of every value by which an attack should break everything
NOISE_SAMPLES = 10  # random perturbations an image
DIRECTIONS = 8  # random directions an image in which gradient and loss are compared
NOT_FIXED = "not compared, as the model's random numbers cannot be fixed: give it reseed(seed)"


def masking_checklist(
    defence: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    alpha: float | None = None,
    eot_samples: int = 4,
    num_samples: int = 8,
    queries: int = 100,
    classifier: nn.Module | None = None,
    seed: int = 0,
    max_batch: int = 256,
    progress: Report | None = None,
) -> list[Check]:
    """Look for gradient masking in a model; 64 images are enough, at about 12 * steps * eot_samples gradients
    an image.

    A model's random numbers are fixed by its methods ``reseed(seed)`` and ``fixed_sample(seed)`` where it has
    them, else by the global generators of CPU and GPU, which are as before afterwards. The model's own are
    elsewhere afterwards.

    Args:
        defence: in eval mode, images in [0, 1] -> logits; may be random. One with ``purify`` and
            ``classifier``, as ``AToPPipeline``, is attacked with a straight-through gradient, too.
        images, labels: in [0, 1]; true classes; at least eight.
        eps, norm: of the robust accuracy that is to be believed.
        steps, alpha: of that attack, as in ``pgd``, at least 2 steps; half and twice as many, equal steps of
            eps, and steps that fall from eps with momentum are tried, too.
        eot_samples: samples a gradient where the model is random; one and twice as many are tried, too.
        num_samples: forward passes an image for a decision of a random model.
        queries: of the Square attack that must not win either; 0: none.
        classifier: what a transfer attack sees; None: the model's own ``classifier`` if it has one, else no
            such attack.
        seed: of everything random.
        max_batch: copies of images that are in memory at once.
        progress: called with checks done and in all.

    Returns:
        the checks in a fixed order: those of gradients and samples first, then the attacks that must not win.

    Raises:
        ValueError: as ``contract.prepare``, for fewer than eight images, or a number out of its range.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5; Hill et al. 2021
        (straight-through purifier).
    """
    check_eps(eps, norm)
    if norm == "l1":
        raise ValueError(
            "the checklist knows linf and l2, not l1: random noise and small steps mean little there"
        )
    if min(steps // 2, eot_samples, num_samples) < 1:
        numbers = f"{steps}, {eot_samples} and {num_samples}"
        raise ValueError(f"steps must be at least 2, eot_samples and num_samples at least 1, got {numbers}")
    classifier = getattr(defence, "classifier", None) if classifier is None else classifier
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        model, images, labels = prepare(defence, images, labels)
        if len(images) < FEWEST_IMAGES:
            raise ValueError(f"a comparison needs at least {FEWEST_IMAGES} images, got {len(images)}")
        if classifier is not None:
            classifier, *_ = prepare(classifier, images, labels)
        random = is_random(model, images, max_batch=max_batch)
        attack = {"eps": eps, "norm": norm, "steps": steps, "alpha": alpha}
        attack["eot_samples"] = eot_samples if random else 1
        probe = Probe(model, images, labels, attack, num_samples if random else 1, random, seed, max_batch)
        checks, planned = [], _plan(probe, queries, classifier)
        for check in planned:
            checks.append(check())
            if progress is not None:
                progress(len(checks), len(planned), "checks", {})
    return checks


def _noise(probe: Probe) -> Iterator[Tensor]:
    """Random perturbations at the edge of the ball: signs (linf), a direction (l2); clipped to [0, 1]."""
    images, generator = probe.images, torch.Generator(probe.images.device).manual_seed(probe.seed)
    ball = Ball(images, probe.eps, probe.norm)
    for _ in range(NOISE_SAMPLES):
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        yield ball.project(images + probe.eps * (noise.sign() if probe.norm == "linf" else noise / length))


def _measure_gradients(probe: Probe) -> Check:
    model = Attackable(probe.model, probe.spread, repaired=False)
    probe.start_random_numbers(probe.seed)
    options = {"eot_samples": probe.attack["eot_samples"], "max_batch": probe.max_batch}
    return check_gradients(eot_gradient(model, probe.images, probe.labels, **options).gradient)


def _measure_modes(probe: Probe, attacked: Tensor, name: str) -> Check:
    """Logits as an attack meets them against those of a decision, of images and attacked images, under one
    sample."""
    shown = torch.cat([probe.images, attacked])
    with torch.enable_grad(), probe.same_sample(), full_float32(shown.device):
        parts = (part.detach().requires_grad_() for part in shown.split(probe.max_batch))
        with_gradient = torch.cat([probe.model(part).detach().float() for part in parts])
    return check_modes(with_gradient, probe.answers(probe.model, shown), probe.spread, name)


def _measure_agreement(probe: Probe, images: Tensor, name: str) -> Check:
    """Central differences of the margin, under one sample that all evaluations share, against the gradient's
    prediction.

    Args:
        images: where: the images, or attacked ones, for a gradient may be right at the ones and wrong on the
            way.
    """
    step = probe.eps / 64 if probe.norm == "linf" else probe.eps / 16 / probe.widest
    generator = torch.Generator(images.device).manual_seed(probe.seed)
    jitter = torch.rand(images.shape, generator=generator, device=images.device) * 2 - 1
    # not at the image itself: where neighbours are equal, as on a black background, max pooling has a kink
    origin = (images + 4 * step * jitter).clamp(step, 1 - step)  # both sides of it are images
    model = Attackable(probe.model, probe.spread)

    def value(points: Tensor) -> Tensor:
        return smooth_margin(probe.answers(model, points), probe.labels)

    with probe.same_sample():
        found = eot_gradient(model, origin, probe.labels, loss=smooth_margin, max_batch=probe.max_batch)
    predicted, measured = [], []
    for _ in range(DIRECTIONS):
        direction = torch.randint(2, origin.shape, generator=generator, device=origin.device) * 2.0 - 1
        predicted.append((found.gradient * direction).flatten(1).sum(dim=1))
        measured.append((value(origin + step * direction) - value(origin - step * direction)) / (2 * step))
    return check_agreement(torch.stack(predicted), torch.stack(measured), name)


def _measure_samples(probe: Probe, calls: int = 12, copies: int = 12, images: int = 4) -> Check:
    model = Attackable(probe.model, probe.spread)
    probe.start_random_numbers(probe.seed)
    shown, labels = probe.images[:images].repeat(copies, 1, 1, 1), probe.labels[:images].repeat(copies)
    with torch.no_grad():
        values = torch.stack([smooth_margin(model(shown), labels) for _ in range(calls)])
    return check_samples(values.unflatten(1, (copies, images)))


def _measure_unbounded(probe: Probe, eps: float) -> Check:
    """From the image itself: a random start in so large a ball would destroy the image without any
    gradient."""
    adversarial = probe.run(eps=eps * probe.widest, alpha=None, start="clean")
    logits = probe.logits(adversarial, probe.seed + 1)[0]
    return check_unbounded(logits.argmax(dim=1) == probe.labels, logits.shape[1], eps)


def _measure_eot(probe: Probe, wrong: Tensor) -> Check:
    """More samples a gradient must not weaken the attack; an attack with a single sample must not gain by
    more."""
    own = probe.attack["eot_samples"]
    efforts = sorted({1, own, 2 * own} if own > 1 else {1, 8})
    counts = {n: wrong if n == own else probe.wrong(probe.run(eot_samples=n)) for n in efforts}
    check = check_effort("EOT", "samples a gradient", counts, probe.num_samples)
    p_value = paired_p_value(counts[efforts[-1]], counts[1])
    check = replace(check, detail=f"{check.detail}; more than one sample matters: {p_text(p_value)}")
    if own == 1 and check.outcome == "passed":  # an attack that averages nothing measures no random model
        return replace(check, outcome=outcome_of(p_value))
    return check


def _plan(probe: Probe, queries: int, classifier: Model | None) -> list[Callable[[], Check]]:
    """The checks that can be made of this model, each still to be run; they share the attacks."""
    steps, margin = probe.attack["steps"], {"loss": smooth_margin}
    falling = {"steps": 2 * steps, "alpha": probe.eps, "momentum": MOMENTUM, "cycles": 1}
    attacks = {
        "one step": partial(probe.run, steps=1, alpha=None, start="clean"),
        "larger steps": partial(probe.run, alpha=probe.eps),
        "margin loss": partial(probe.run, **margin),
        "noise": lambda: probe.hardest(_noise(probe)),
    }
    if queries:
        options = {"queries": queries, "first_share": 0.3, "schedule": SHORT_SCHEDULE}
        attacks["black box"] = partial(probe.run, function=square, **options)
    if classifier is not None:
        attacks["transfer"] = partial(probe.run, target=classifier, eot_samples=1)
    if hasattr(probe.model, "purify") and hasattr(probe.model, "classifier"):
        target = IdentityBackward(probe.model.purify, probe.model.classifier)
        attacks["straight-through"] = partial(probe.run, target=target)
    weaker = list(attacks)
    attacks["main"] = probe.run
    attacks["restart"] = partial(probe.run, seed=probe.seed + 1000)
    attacks["falling steps"] = partial(probe.run, seed=probe.seed + 2000, **margin, **falling)

    @cache
    def adversarial(name: str) -> Tensor:
        return attacks[name]()

    @cache
    def wrong(name: str) -> Tensor:
        return probe.wrong(adversarial(name))

    def compare(name: str) -> Check:
        return check_weaker_attack(name, wrong(name), wrong("main"), wrong("restart"), probe.num_samples)

    def more_steps() -> Check:
        efforts = (steps // 2, steps, 2 * steps)
        counts = {n: wrong("main") if n == steps else probe.wrong(probe.run(steps=n)) for n in efforts}
        others = {name: wrong(name) for name in ("restart", "larger steps", "margin loss", "falling steps")}
        return check_effort("steps", "steps", counts, probe.num_samples, others=others)

    def more_starts() -> Check:
        both = probe.hardest([adversarial("main"), adversarial("restart")])
        return check_effort("restarts", "starts", {1: wrong("main"), 2: probe.wrong(both)}, probe.num_samples)

    under_one_sample = {
        "same answers": lambda name: _measure_modes(probe, adversarial("main"), name),
        "finite differences": lambda name: _measure_agreement(probe, probe.images, name),
        "finite differences, attacked": lambda name: _measure_agreement(probe, adversarial("main"), name),
    }
    sizes = [size for size in UNBOUNDED if size * probe.widest >= 2 * probe.eps or size == max(UNBOUNDED)]
    return [
        partial(_measure_gradients, probe),
        *(
            partial(check, name) if probe.can_be_fixed else partial(Check, name, "suspicious", NOT_FIXED)
            for name, check in under_one_sample.items()
        ),
        *([partial(_measure_samples, probe)] if probe.random else []),
        *(partial(_measure_unbounded, probe, size) for size in sizes),
        more_steps,
        *([lambda: _measure_eot(probe, wrong("main"))] if probe.random else []),
        more_starts,
        *(partial(compare, name) for name in weaker),
    ]
