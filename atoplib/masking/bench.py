"""Measurements for the masking checklist: attacks on one model and its images, with the same dice for each."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import PGDSettings, ascend, check_budget, input_gradient, project
from atoplib.attacks.eot import Loss, cross_entropy
from atoplib.masking.verdicts import (
    Check,
    check_agreement,
    check_draws,
    check_effort,
    check_gradients,
    check_modes,
    check_unbounded,
    outcome_of,
    p_text,
    paired_p_value,
)
from atoplib.verdicts import Model, draw_logits, full_float32, reseed


@dataclass(frozen=True)
class MaskingSettings:
    """What is checked, and at which cost: about 12 * steps * eot_samples gradients an image, and as many forward passes.

    Attributes:
        eps, norm: the budget of the robust accuracy that is to be believed, as in ``PGDSettings``.
        steps: iterations of the attack, at least 2; half and twice as many are tried as well.
        alpha, decay, momentum: its step size, as in ``PGDSettings``; equal steps of eps, and steps that fall from eps with
            momentum, are tried as well.
        eot_samples: draws a gradient where the model is random; one and twice as many are tried as well.
        num_draws: forward passes an image to judge a random model.
        unbounded_eps: changes of every value at which an attack should break everything; in the l2 norm, their norm is
            used. Those below 2 * eps are left out, but for the largest.
        queries: of the Square attack that is tried where no ``black_box`` is given; 0: none.
        noise_samples: random perturbations an image of the same norm.
        directions: random directions an image in which gradient and loss are compared.
        significance: p-value below which a comparison is suspicious; a tenth of it fails.
    """

    eps: float
    norm: str = "linf"
    steps: int = 10
    alpha: float | None = None
    eot_samples: int = 4
    num_draws: int = 8
    unbounded_eps: tuple[float, ...] = (64 / 255, 0.95)
    queries: int = 100
    noise_samples: int = 10
    directions: int = 8
    significance: float = 0.05
    decay: bool = False
    momentum: float = 0.0

    def __post_init__(self) -> None:
        # says what is wrong with them
        PGDSettings(eps=self.eps, norm=self.norm, alpha=self.alpha, decay=self.decay, momentum=self.momentum)
        for name, least in (("steps", 2), ("eot_samples", 1), ("num_draws", 1), ("noise_samples", 1), ("directions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.queries < 0:
            raise ValueError(f"queries must be 0 (no black-box attack) or more, got {self.queries}")
        if not self.unbounded_eps or not all(0 < eps <= 1 for eps in self.unbounded_eps):
            raise ValueError(f"unbounded_eps must hold values in (0, 1], at least one, got {self.unbounded_eps}; 0.95?")
        if not 0 < self.significance < 1:
            raise ValueError(f"significance must lie in (0, 1), got {self.significance}; 0.05?")


def smooth_margin(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """log-sum-exp of the other logits minus the label's: as smooth as cross-entropy, but it never saturates."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    logits = logits.float()
    return logits.masked_fill(own, -inf).logsumexp(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


SPREAD = 3.0  # of the logits over the classes, as an ordinary network has it: cross-entropy neither saturates nor is linear


def spread_of(logits: Float[Tensor, "batch classes"]) -> float:
    """The standard deviation of an image's logits over the classes, in the mean over the images; 1 where it is zero."""
    return float(logits.float().std(dim=1).mean()) or 1.0


def scaled(model: Model, spread: float) -> Model:
    """The model with logits of spread ``SPREAD``: their scale decides nothing, so it shall change no check, either."""

    def forward(images: Tensor) -> Tensor:
        return model(images).float() * (SPREAD / spread)

    return forward


def attackable(model: Model) -> Model:
    """The model as an attack needs it, however it hides: logits that depend on the images, a gradient without NaN.

    Where the model gives no gradient it is zero, and where it is not finite, too: an attack then stands still.
    """

    def forward(images: Tensor) -> Tensor:
        passed = images.view_as(images)
        if passed.requires_grad:
            passed.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        return connected(model)(passed)

    return forward


def connected(model: Model) -> Model:
    """The same logits, with a gradient of zero where the model gives none (a detached input)."""

    def forward(images: Tensor) -> Tensor:
        return model(images) + 0 * images.flatten(1).sum(dim=1, keepdim=True)

    return forward


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """The global generators, of CPU and ``device``, as they were before the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def throw_anew(model: Model, seed: int) -> None:
    """Every dice a model may use, from ``seed``."""
    torch.manual_seed(seed)
    reseed(model, seed)


@contextmanager
def fixed(model: nn.Module, seed: int) -> Iterator[None]:
    """The same dice in each such block."""
    throw_anew(model, seed)
    if hasattr(model, "fixed_draws"):
        with model.fixed_draws(seed):
            yield
    else:
        yield


@dataclass(frozen=True)
class Bench:
    """One model and its images on the bench, with what every attack on them shares."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    settings: MaskingSettings
    random: bool
    seed: int
    max_batch: int

    @property
    def draws(self) -> int:
        """Of a gradient."""
        return self.settings.eot_samples if self.random else 1

    @property
    def num_draws(self) -> int:
        """Of a verdict."""
        return self.settings.num_draws if self.random else 1

    @property
    def widest(self) -> float:
        """The norm of a change of every value by 1."""
        return 1.0 if self.settings.norm == "linf" else sqrt(self.images[0].numel())

    @property
    def attack(self) -> PGDSettings:
        settings = self.settings
        return PGDSettings(
            settings.eps,
            settings.norm,
            settings.steps,
            settings.alpha,
            eot_samples=self.draws,
            decay=settings.decay,
            momentum=settings.momentum,
        )

    @cached_property
    def spread(self) -> float:
        """Of the model's logits, see ``spread_of``."""
        return spread_of(self.answers(self.model, self.images))

    @torch.no_grad()
    def answers(self, model: Model, images: Tensor) -> Tensor:
        """Logits (batch, classes) of one sample that all such calls share."""
        with fixed(self.model, self.seed), full_float32(images.device):
            return torch.cat([model(part).float() for part in images.split(self.max_batch)])

    def run(
        self, attack: PGDSettings, *, target: Model | None = None, loss: Loss = cross_entropy, seed: int | None = None
    ) -> Tensor:
        """Adversarial images by PGD on ``target`` (the model itself if None)."""
        seed = self.seed if seed is None else seed
        spread = self.spread if target is None else spread_of(self.answers(target, self.images))
        throw_anew(self.model, seed)
        found = ascend(
            attackable(scaled(self.model if target is None else target, spread)),
            self.images,
            self.labels,
            attack,
            generator=torch.Generator(self.images.device).manual_seed(seed),
            loss=loss,
            max_batch=self.max_batch,
        )
        check_budget(found, self.images, attack.eps, attack.norm)
        return found

    def logits(self, images: Tensor, *, seed: int) -> Tensor:
        throw_anew(self.model, seed)
        return draw_logits(self.model, images, num_draws=self.num_draws, max_batch=self.max_batch)

    def wrong(self, images: Tensor) -> Tensor:
        """Wrong draws an image; the same dice for every attack."""
        return (self.logits(images, seed=self.seed + 1).argmax(dim=2) != self.labels).sum(dim=0)

    def hardest(self, candidates: Iterable[Tensor]) -> Tensor:
        """Of several perturbations, the one that each image reads worst, by dice that no verdict uses."""
        best, reached = self.images, None
        for images in candidates:
            logits = self.logits(images, seed=self.seed + 2) * (SPREAD / self.spread)
            labels = self.labels.repeat(len(logits))
            gained = smooth_margin(logits.flatten(0, 1), labels).unflatten(0, logits.shape[:2]).mean(dim=0)
            if reached is None:
                best, reached = images, gained
                continue
            better = gained > reached
            best, reached = torch.where(better.view(-1, 1, 1, 1), images, best), torch.where(better, gained, reached)
        return best


def unbounded_sizes(bench: Bench) -> list[float]:
    """The sizes that are well above eps; the largest in any case."""
    sizes = bench.settings.unbounded_eps
    return [eps for eps in sizes if eps * bench.widest >= 2 * bench.settings.eps or eps == max(sizes)]


def noise_of_size(images: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """Random perturbations at the edge of the ball: signs (linf), a direction (l2); clipped to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    if norm == "linf":
        return project(images + eps * noise.sign(), images, eps, norm)
    length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return project(images + eps * noise / length, images, eps, norm)


def measure_gradients(bench: Bench) -> Check:
    model = connected(scaled(bench.model, bench.spread))
    throw_anew(bench.model, bench.seed)
    found = input_gradient(model, bench.images, bench.labels, eot_samples=bench.draws, max_batch=bench.max_batch)
    return check_gradients(found.gradient)


def can_be_fixed(bench: Bench) -> bool:
    """Whether the same sample of a random model can be had twice."""
    return torch.equal(bench.answers(bench.model, bench.images), bench.answers(bench.model, bench.images))


def measure_modes(bench: Bench, attacked: Tensor) -> Check:
    """Logits as an attack meets them against those of a decision, of images and attacked images, under one sample."""
    if not can_be_fixed(bench):
        text = "the model's dice cannot be fixed, so attack and decision were not compared: give it a method reseed(seed)"
        return Check("same answers", "suspicious", text)
    shown = torch.cat([bench.images, attacked])
    with torch.enable_grad(), fixed(bench.model, bench.seed), full_float32(shown.device):
        parts = (part.detach().requires_grad_() for part in shown.split(bench.max_batch))
        with_gradient = torch.cat([bench.model(part).detach().float() for part in parts])
    return check_modes(with_gradient, bench.answers(bench.model, shown), bench.spread)


def measure_agreement(bench: Bench, images: Tensor, name: str = "finite differences") -> Check:
    """Central differences of the margin, under one draw that all evaluations share, against the gradient's prediction.

    Args:
        images: where: the images, or attacked ones, for a gradient may be right at the ones and wrong on the way.
    """
    settings, dimensions = bench.settings, images[0].numel()
    step = settings.eps / 64 if settings.norm == "linf" else settings.eps / 16 / sqrt(dimensions)
    generator = torch.Generator(images.device).manual_seed(bench.seed)
    jitter = torch.rand(images.shape, generator=generator, device=images.device) * 2 - 1
    # not at the image itself: where neighbours are equal, as on a black background, max pooling has a kink
    origin = (images + 4 * step * jitter).clamp(step, 1 - step)  # both sides of it are images
    model = scaled(bench.model, bench.spread)

    def value(points: Tensor) -> Tensor:
        return smooth_margin(bench.answers(model, points), bench.labels)

    if not can_be_fixed(bench):
        text = "the model's dice cannot be fixed, so gradient and loss were not compared: give it a method reseed(seed)"
        return Check(name, "suspicious", text)
    with fixed(bench.model, bench.seed):
        gradient = input_gradient(
            attackable(model), origin, bench.labels, loss=smooth_margin, max_batch=bench.max_batch
        ).gradient
    predicted, measured = [], []
    for _ in range(settings.directions):
        direction = (torch.rand(origin.shape, generator=generator, device=origin.device) < 0.5).float() * 2 - 1
        predicted.append((gradient * direction).flatten(1).sum(dim=1))
        measured.append((value(origin + step * direction) - value(origin - step * direction)) / (2 * step))
    return check_agreement(torch.stack(predicted), torch.stack(measured), name)


def measure_draws(bench: Bench, calls: int = 12, copies: int = 12, images: int = 4) -> Check:
    model = scaled(bench.model, bench.spread)
    throw_anew(bench.model, bench.seed)
    shown, labels = bench.images[:images].repeat(copies, 1, 1, 1), bench.labels[:images].repeat(copies)
    with torch.no_grad():
        values = torch.stack([smooth_margin(model(shown), labels) for _ in range(calls)])
    return check_draws(values.unflatten(1, (copies, images)), bench.settings.significance)


def measure_unbounded(bench: Bench, eps: float) -> Check:
    """From the image itself: a random start in so large a ball would destroy the image without any gradient."""
    size = eps * bench.widest
    adversarial = bench.run(replace(bench.attack, eps=size, alpha=None, decay=False, momentum=0.0, start="clean"))
    logits = bench.logits(adversarial, seed=bench.seed + 1)[0]
    right = logits.argmax(dim=1) == bench.labels
    return check_unbounded(right, logits.shape[1], eps, bench.settings.significance)


def measure_eot(bench: Bench, wrong: Tensor) -> Check:
    """More draws a gradient must not weaken the attack; an attack with a single draw must not gain by more."""
    settings = bench.settings
    efforts = {1: None, bench.draws: wrong, 2 * bench.draws: None} if bench.draws > 1 else {1: wrong, 8: None}
    for effort in efforts:
        if efforts[effort] is None:
            efforts[effort] = bench.wrong(bench.run(replace(bench.attack, eot_samples=effort)))
    check = check_effort("EOT", "draws a gradient", efforts, bench.num_draws, settings.significance)
    p_value = paired_p_value(list(efforts.values())[-1], efforts[1])
    if bench.draws > 1 or check.verdict != "passed":
        return replace(check, evidence=f"{check.evidence}; more than one draw matters: {p_text(p_value)}")
    text = f"{check.evidence}; an attack that averages nothing is no measure of a random model ({p_text(p_value)})"
    return Check("EOT", outcome_of(p_value, settings.significance), text)
