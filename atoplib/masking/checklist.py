"""The masking checklist: attacks on one model and its images, all under the same random numbers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib import contract, files, hashing
from atoplib.attacks import IdentityBackward, eot, norms, pgd, square
from atoplib.decisions import Model, fixed_sample, forked_rng, full_float32, is_random, reseed, sample_logits
from atoplib.masking import checks
from atoplib.parameters import at_least, check_counts, check_settings, one_of
from atoplib.progress import Report

SPREAD = 3.0  # of an ordinary network's logits: cross-entropy neither saturates nor is linear
FEWEST_IMAGES = 8  # eight images to none are the fewest on which a comparison can fail
UNBOUNDED = (64 / 255, 0.95)  # changes of every value by which an attack should break everything
# Attacks that must not win against the main one.
WEAKER = "one step", "larger steps", "margin loss", "noise", "black box", "transfer", "straight-through"


def smooth_margin(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log-sum-exp of the other logits minus the label's: as smooth as cross-entropy, but it never
    saturates."""
    logits, index = logits.float(), labels.unsqueeze(1)
    return logits.scatter(1, index, -inf).logsumexp(dim=1) - logits.gather(1, index).squeeze(1)


class Attackable(nn.Module):
    """A model as an attack needs it, however it hides: logits of a given spread (their scale decides nothing,
    so it shall change no check), that depend on the images; with ``repaired``, a gradient that is zero where
    the model gives none that is finite: an attack then stays where it is."""

    def __init__(self, model: Model, spread: float, repaired: bool = True) -> None:
        super().__init__()
        self.model, self.factor, self.repaired = model, SPREAD / spread, repaired
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        images = images.view_as(images)
        if self.repaired and images.requires_grad:
            images.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        return self.model(images).float() * self.factor + 0 * images.flatten(1).sum(dim=1, keepdim=True)


class Probe:
    """One model and its images, with what every attack on them shares.

    Args:
        attack: options of pgd.
        num_samples: of a decision.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        attack: dict[str, Any],
        num_samples: int,
        random: bool,
        seed: int,
        max_batch: int,
    ) -> None:
        self.model, self.images, self.labels, self.attack = model, images, labels, attack
        self.num_samples, self.random, self.seed, self.max_batch = num_samples, random, seed, max_batch
        self.eps, self.norm, samples = attack["eps"], attack["norm"], attack["eot_samples"]
        # the norm of a change of every value by 1
        self.widest = 1.0 if self.norm == "linf" else sqrt(images[0].numel())
        self.eot_efforts = () if not random else sorted({1, samples, 2 * samples} if samples > 1 else {1, 8})
        first, again = (self.answers(model, images) for _ in range(2))
        self.spread, self.can_be_fixed = spread_of(first), torch.equal(first, again)

    def start_random_numbers(self, seed: int) -> None:
        """Every random number that a model may use, from ``seed``."""
        torch.manual_seed(seed)
        reseed(self.model, seed)

    @contextmanager
    def same_sample(self) -> Iterator[None]:
        """The same random numbers in each such block."""
        self.start_random_numbers(self.seed)
        with fixed_sample(self.model, self.seed):
            yield

    @torch.no_grad()
    def answers(self, model: Model, images: Tensor) -> Tensor:
        """Logits (batch, classes) of one sample that all such calls share."""
        with self.same_sample(), full_float32(images.device):
            return torch.cat([model(part).float() for part in images.split(self.max_batch)])

    def run(
        self,
        *,
        function: Callable[..., Tensor] = pgd,
        target: Model | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> Tensor:
        """Adversarial images by the main attack with ``changes``, or by another ``function``, on ``target``
        (the model itself if None)."""
        attackable, seed = Attackable(self.model, self.spread), self.seed if seed is None else seed
        if target is not None:
            attackable = Attackable(target, spread_of(self.answers(target, self.images)))
        self.start_random_numbers(seed)
        shared = (
            self.attack if function is pgd else {k: self.attack[k] for k in ("eps", "norm", "eot_samples")}
        )
        options = {**shared, "seed": seed, "max_batch": self.max_batch, **changes}
        ball = norms.Ball(self.images, options["eps"], self.norm)
        return ball.check(function(attackable, self.images, self.labels, **options))

    def logits(self, images: Tensor, seed: int) -> Tensor:
        self.start_random_numbers(seed)
        return sample_logits(self.model, images, num_samples=self.num_samples, max_batch=self.max_batch)

    def wrong(self, images: Tensor) -> Tensor:
        """Misclassified samples an image; the same random numbers for every attack."""
        return (self.logits(images, self.seed + 1).argmax(dim=2) != self.labels).sum(dim=0)

    def hardest(self, candidates: Iterable[Tensor]) -> Tensor:
        """Of several perturbations, each image's most harmful, by random numbers that no decision uses."""
        candidates, gained = list(candidates), []
        for images in candidates:
            logits = self.logits(images, self.seed + 2) * (SPREAD / self.spread)
            gained.append(sum(smooth_margin(sample, self.labels) for sample in logits))
        every = torch.arange(len(self.labels), device=self.labels.device)
        return torch.stack(candidates)[torch.stack(gained).argmax(dim=0), every]


def spread_of(logits: Float[Tensor, "batch classes"]) -> float:
    """The standard deviation of an image's logits over the classes, in the mean over the images; 1 where it
    is zero."""
    return float(logits.float().std(dim=1).mean()) or 1.0


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
    run_dir: Path | None = None,
) -> list[checks.Check]:
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
        progress: called with attacks done and in all.
        run_dir: where the result is kept, and loaded from if all that it depends on is the same.

    Returns:
        the checks in a fixed order: those of gradients and samples first, then the attacks that must not win.

    Raises:
        ValueError: as ``contract.prepare``, for fewer than eight images, or a number out of its range.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5; Hill et al. 2021
        (straight-through purifier).
    """
    check_settings(
        norm=(norm, one_of("linf", "l2")),  # l1: random noise and small steps mean little there
        steps=(steps, at_least(2)),
        images=(len(images), at_least(FEWEST_IMAGES)),  # that a comparison needs
    )
    check_counts(eot_samples=eot_samples, num_samples=num_samples)
    classifier = getattr(defence, "classifier", None) if classifier is None else classifier
    settings = (eps, norm, steps, alpha, eot_samples, num_samples, queries, seed, max_batch)
    kept = run_dir and run_dir / f"masking/{_identity((defence, classifier), images, labels, settings)}.json"
    if cached := kept and files.read_json(kept):
        return [checks.Check(**each) for each in cached["checks"]]
    with forked_rng(images.device):
        model, images, labels = contract.prepare(defence, images, labels)
        if classifier is not None:
            classifier, *_ = contract.prepare(classifier, images, labels)
        random = is_random(model, images, max_batch=max_batch)
        probe = Probe(
            model,
            images,
            labels,
            attack={
                "eps": eps,
                "norm": norm,
                "steps": steps,
                "alpha": alpha,
                "eot_samples": eot_samples if random else 1,
            },
            num_samples=num_samples if random else 1,
            random=random,
            seed=seed,
            max_batch=max_batch,
        )
        plan, attacked = _plan(probe, queries, classifier), {}
        for name, changes in plan.items():
            attacked[name] = probe.run(**changes)
            if progress is not None:
                progress(len(attacked), len(plan), "attacks", {})
        attacked["noise"] = probe.hardest(_noise(probe))
        judged = list(_judge(probe, attacked))
    if kept:
        files.write_json(kept, {"checks": [asdict(check) for check in judged]})
    return judged


def _identity(networks: Iterable[nn.Module | None], images: Tensor, labels: Tensor, settings: tuple) -> str:
    """A hash of all that the checks depend on."""
    return hashing.json_hash(
        [
            [each and hashing.model_hash(each, images) for each in networks],
            [hashing.tensor_hash(images), hashing.tensor_hash(labels), settings],
            [hashing.code_hash(__name__), hashing.environment(images.device)],
        ]
    )


def _plan(probe: Probe, queries: int, classifier: Model | None) -> dict[str, dict[str, Any]]:
    """The attacks by name, and how they differ from the main one. Those without a real bound start from the
    image itself: a random start in so large a ball would destroy the image without any gradient."""
    steps, seed, margin = probe.attack["steps"], probe.seed, {"loss": smooth_margin}
    falling = {"alpha": probe.eps, "momentum": 0.75, "cycles": 1}
    attacks: dict[str, dict[str, Any]] = {
        "main": {},
        "restart": {"seed": seed + 1000},
        "falling steps": {"seed": seed + 2000, "steps": 2 * steps, **margin, **falling},
        "targets": {"seed": seed + 3000, "loss": "likely_targets", "restarts": 3, **falling},
        "half the steps": {"steps": steps // 2},
        "twice the steps": {"steps": 2 * steps},
        "one step": {"steps": 1, "alpha": None, "start": "clean"},
        "larger steps": {"alpha": probe.eps},
        "margin loss": margin,
    }
    attacks |= {f"EOT {samples}": {"eot_samples": samples} for samples in probe.eot_efforts}
    for size in UNBOUNDED:
        if size * probe.widest >= 2 * probe.eps or size == max(UNBOUNDED):
            attacks[f"unbounded {size}"] = {"eps": size * probe.widest, "alpha": None, "start": "clean"}
    if queries:
        # large squares for the few queries that a check can afford
        attacks["black box"] = {"function": square, "queries": queries, "first_share": 0.3, "schedule": 2000}
    if classifier is not None:
        attacks["transfer"] = {"target": classifier, "eot_samples": 1}
    if hasattr(probe.model, "purify") and hasattr(probe.model, "classifier"):
        attacks["straight-through"] = {"target": IdentityBackward(probe.model.purify, probe.model.classifier)}
    return attacks


def _judge(probe: Probe, attacked: dict[str, Tensor]) -> Iterator[checks.Check]:
    """The checks, from what the attacks found."""
    steps, samples, main = probe.attack["steps"], probe.num_samples, attacked["main"]
    wrong = {name: probe.wrong(images) for name, images in attacked.items()}
    yield _measure_gradients(probe)
    if probe.can_be_fixed:
        yield _measure_modes(probe, main)
        yield _measure_agreement(probe, probe.images, "finite differences")
        yield _measure_agreement(probe, main, "finite differences, attacked")
    else:
        for name in ("same answers", "finite differences", "finite differences, attacked"):
            yield checks.Check(
                name,
                "suspicious",
                "not compared, as the model's random numbers cannot be fixed: give it reseed(seed)",
            )
    if probe.random:
        yield _measure_samples(probe)
    for size in UNBOUNDED:
        if f"unbounded {size}" in attacked:
            logits = probe.logits(attacked[f"unbounded {size}"], probe.seed + 1)[0]
            yield checks.check_unbounded(logits.argmax(dim=1) == probe.labels, logits.shape[1], size)
    yield checks.check_effort(
        "steps",
        "steps",
        {steps // 2: wrong["half the steps"], steps: wrong["main"], 2 * steps: wrong["twice the steps"]},
        samples,
        others={
            name: wrong[name]
            for name in ("restart", "larger steps", "margin loss", "falling steps", "targets")
        },
    )
    if probe.random:
        yield _check_eot(probe, wrong)
    both = probe.wrong(probe.hardest([main, attacked["restart"]]))
    yield checks.check_effort("restarts", "starts", {1: wrong["main"], 2: both}, samples)
    for name in WEAKER:
        if name in wrong:
            yield checks.check_weaker_attack(name, wrong[name], wrong["main"], wrong["restart"], samples)


def _noise(probe: Probe) -> Iterator[Tensor]:
    """Random perturbations at the edge of the ball: signs (linf), a direction (l2); clipped to [0, 1]."""
    images, generator = probe.images, torch.Generator(probe.images.device).manual_seed(probe.seed)
    ball = norms.Ball(images, probe.eps, probe.norm)
    for _ in range(10):
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        yield ball.project(images + probe.eps * (noise.sign() if probe.norm == "linf" else noise / length))


def _measure_gradients(probe: Probe) -> checks.Check:
    model, samples = Attackable(probe.model, probe.spread, repaired=False), probe.attack["eot_samples"]
    probe.start_random_numbers(probe.seed)
    gradient, *_ = eot.eot_gradient(
        model, probe.images, probe.labels, eot_samples=samples, max_batch=probe.max_batch
    )
    return checks.check_gradients(gradient)


def _measure_modes(probe: Probe, attacked: Tensor) -> checks.Check:
    """Logits as an attack meets them against those of a decision, of images and attacked images, under one
    sample."""
    shown = torch.cat([probe.images, attacked])
    with torch.enable_grad(), probe.same_sample(), full_float32(shown.device):
        parts = (part.detach().requires_grad_() for part in shown.split(probe.max_batch))
        with_gradient = torch.cat([probe.model(part).detach().float() for part in parts])
    return checks.check_modes(with_gradient, probe.answers(probe.model, shown), probe.spread)


def _measure_agreement(probe: Probe, images: Tensor, name: str) -> checks.Check:
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
    with probe.same_sample():
        gradient, *_ = eot.eot_gradient(
            model, origin, probe.labels, loss=smooth_margin, max_batch=probe.max_batch
        )
    predicted, measured, labels = [], [], probe.labels
    for _ in range(8):
        direction = torch.randint(2, origin.shape, generator=generator, device=origin.device) * 2.0 - 1
        predicted.append((gradient * direction).flatten(1).sum(dim=1))
        above, below = (probe.answers(model, origin + side * step * direction) for side in (1, -1))
        measured.append((smooth_margin(above, labels) - smooth_margin(below, labels)) / (2 * step))
    return checks.check_agreement(torch.stack(predicted), torch.stack(measured), name)


def _measure_samples(probe: Probe, calls: int = 12, copies: int = 12, images: int = 4) -> checks.Check:
    probe.start_random_numbers(probe.seed)
    shown, labels = probe.images[:images].repeat(copies, 1, 1, 1), probe.labels[:images].repeat(copies)
    with torch.no_grad():
        model = Attackable(probe.model, probe.spread)
        values = torch.stack([smooth_margin(model(shown), labels) for _ in range(calls)])
    return checks.check_samples(values.unflatten(1, (copies, images)))


def _check_eot(probe: Probe, wrong: dict[str, Tensor]) -> checks.Check:
    """More samples a gradient must not weaken the attack; an attack with a single sample must not gain by
    more."""
    counts = {samples: wrong[f"EOT {samples}"] for samples in probe.eot_efforts}
    check = checks.check_effort("EOT", "samples a gradient", counts, probe.num_samples)
    p_value = checks.paired_p_value(counts[max(counts)], counts[1])
    # an attack that averages nothing measures no random model
    alone = probe.attack["eot_samples"] == 1 and check.outcome == "passed"
    return checks.Check(
        "EOT",
        checks.outcome_of(p_value) if alone else check.outcome,
        f"{check.detail}; gain over one sample: {checks.p_text(p_value)}",
    )
