"""An attack that knows AToP from within: its draws, its purifier's output, its bare classifier.

On the defence of the recipe ``mnist`` none of its turns beats PGD + EOT beyond chance (``benchmarks/adaptive_attacks.py``;
the table stands in docs/experiments.md): they are a choice because another defence may be weaker to one of them.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.eot import cross_entropy
from atoplib.attacks.losses import margin
from atoplib.attacks.norms import project, random_start, steepest_step
from atoplib.attacks.pgd import PGDSettings, StepCallback, ascend

PARTS = ("purify", "classifier", "fixed_draws", "draw")


@dataclass(frozen=True)
class AdaptiveSettings:
    """PGD + EOT through the pipeline, with up to four turns that only somebody who knows AToP can take.

    Attributes:
        base: PGD's settings; ``stop_after`` must be 0, and ``start`` is where the warm start begins, if there is one.
        cross_entropy, margin, distance: weights of the loss that is raised, at least 0 and not all 0. ``distance`` counts
            the mean squared distance a pixel ([0, 1]) of the purified image from the purified clean image.
        fixed_for: so many steps in a row use the same draws (common random numbers), which are thrown anew afterwards;
            1: fresh draws in each step; 0: one set for the whole attack, which is then optimised jointly.
        warm_steps: steps of PGD on the classifier alone (no transform, no purifier, no EOT) that the attack starts from.
    """

    base: PGDSettings
    cross_entropy: float = 1.0
    margin: float = 0.0
    distance: float = 0.0
    fixed_for: int = 1
    warm_steps: int = 0

    def __post_init__(self) -> None:
        weights = (self.cross_entropy, self.margin, self.distance)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ValueError(
                f"the weights cross_entropy, margin and distance must be at least 0 and one of them above, got {weights}"
            )
        if self.fixed_for < 0 or self.warm_steps < 0:
            raise ValueError(f"fixed_for and warm_steps must be at least 0, got {self.fixed_for} and {self.warm_steps}")
        if self.base.stop_after:
            raise ValueError(
                f"stop_after must be 0 here, got {self.base.stop_after}: the draws are fixed for a batch that stays whole"
            )


def adaptive(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: AdaptiveSettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images of an attack adapted to AToP; the last iterate. Arguments, result and errors as ``pgd``.

    Args:
        model: an ``AToPPipeline``, or whatever has its ``purify``, ``classifier``, ``draw`` and ``fixed_draws``.
        generator: of the random start and of the seeds of fixed draws.

    Raises:
        ValueError: also for a model without those parts, or one that averages logits.

    Source: Tramer et al. 2020, "On Adaptive Attacks to Adversarial Example Defenses", section 3 (attack the parts; a loss
    that is consistent with the goal). Draws fixed through an optimisation: common random numbers.
    """
    missing = [part for part in PARTS if not hasattr(model, part)]
    if missing:
        raise ValueError(
            f"the adaptive attack needs an AToPPipeline; {type(model).__name__} has no {', '.join(missing)}: use pgd"
        )
    if getattr(model, "copies", 1) > 1 and model.average == "logits":
        raise ValueError("the adaptive attack reads one purified image a pass, but this pipeline averages logits; use pgd")
    model, images, labels = check_attack(model, images, labels)
    base = settings.base
    adversarial = _start(model, images, labels, settings, generator, max_batch)
    target = _purified_mean(model, images, base.eot_samples, max_batch) if settings.distance else None
    seed = 0
    for step in range(base.steps):
        if settings.fixed_for != 1 and (step == 0 or (settings.fixed_for and step % settings.fixed_for == 0)):
            seed = int(torch.randint(2**31, (), generator=generator, device=images.device))
        gradient, losses = _mean_gradient(
            model, adversarial, labels, settings, target=target, seed=None if settings.fixed_for == 1 else seed,
            max_batch=max_batch,
        )  # fmt: skip
        moved = adversarial + base.step_size * steepest_step(gradient, base.norm)
        adversarial = project(moved, images, base.eps, base.norm)
        if callback is not None:
            callback(step + 1, base.steps, adversarial.clone(), losses)
    check_budget(adversarial, images, base.eps, base.norm)
    return adversarial


def _start(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: AdaptiveSettings,
    generator: torch.Generator | None,
    max_batch: int,
) -> Tensor:
    """Where the attack begins: the image, a random point, or the result of a transfer attack."""
    base = settings.base
    if settings.warm_steps:
        warm = PGDSettings(base.eps, base.norm, settings.warm_steps, start=base.start)
        return ascend(model.classifier, images, labels, warm, generator=generator, max_batch=max_batch)
    if base.start == "random":
        return random_start(images, base.eps, base.norm, generator)
    return images.detach().clone()


def _parts(count: int, draws: int, max_batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Which image stands where in the batches of draws and images."""
    return (torch.arange(draws * count, device=device) % count).split(max_batch)


@torch.no_grad()
def _purified_mean(model: nn.Module, images: Tensor, draws: int, max_batch: int) -> Tensor:
    """The purified images, averaged over fresh draws."""
    total = torch.zeros_like(images)
    for part in _parts(len(images), draws, max_batch, images.device):
        total.index_add_(0, part, model.purify(images[part]).to(total.dtype))
    return total / draws


def _mean_gradient(
    model: nn.Module,
    adversarial: Tensor,
    labels: Tensor,
    settings: AdaptiveSettings,
    *,
    target: Tensor | None,
    seed: int | None,
    max_batch: int,
) -> tuple[Tensor, Tensor]:
    """Gradient and value of the mixed loss of each image, averaged over the draws: those of ``seed``, or fresh ones."""
    draws = settings.base.eot_samples
    total = torch.zeros_like(adversarial)
    value = torch.zeros(len(adversarial), device=adversarial.device)
    for number, part in enumerate(_parts(len(adversarial), draws, max_batch, adversarial.device)):
        copies = adversarial.detach()[part].requires_grad_()
        # another seed for each part: one seed gives batches of one shape the same draw
        dice = nullcontext() if seed is None else model.fixed_draws(seed + number)
        with torch.enable_grad(), dice:
            purified = model.purify(copies)
            losses = torch.zeros(len(part), device=copies.device)
            if target is not None:
                losses = losses + settings.distance * (purified.float() - target[part]).square().mean(dim=(1, 2, 3))
            if settings.cross_entropy or settings.margin:
                logits = model.classifier(purified)
                losses = losses + settings.cross_entropy * cross_entropy(logits, labels[part])
                losses = losses + settings.margin * margin(logits, labels[part])
            (gradient,) = torch.autograd.grad(losses.sum(), copies)
        total.index_add_(0, part, gradient)
        value.index_add_(0, part, losses.detach())
    return total / draws, value / draws
