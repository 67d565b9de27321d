"""SPSA: a gradient estimated from pairs of values, through logits alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.norms import check_ball, project
from atoplib.attacks.pgd import StepCallback
from atoplib.attacks.queries import can_hold, mean_margin, new_seed, still_standing
from atoplib.verdicts import STANDING, Verdict


@dataclass(frozen=True)
class SPSASettings:
    """Simultaneous perturbation stochastic approximation (Uesato et al. 2018, section 3).

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]).
        norm: ``linf`` or ``l2``.
        steps: iterations of Adam, at least 1.
        samples: values that each gradient is estimated from, in antithetic pairs: even, at least 2.
        delta: distance of the probes along each pixel, in units of the image.
        learning_rate: of Adam, in the same units.
        eot_samples: draws of the model that each value is averaged over, at least 1.
        verdict: by which an image counts as broken and leaves; asked only where the mean margin says so.
    """

    eps: float
    norm: str = "linf"
    steps: int = 100
    samples: int = 128
    delta: float = 0.01
    learning_rate: float = 0.01
    eot_samples: int = 1
    verdict: Verdict = Verdict(STANDING, num_draws=10)

    def __post_init__(self) -> None:
        check_ball(self.eps, self.norm)
        if self.steps < 1 or self.eot_samples < 1:
            raise ValueError(f"steps and eot_samples must be at least 1, got {self.steps} and {self.eot_samples}")
        if self.samples < 2 or self.samples % 2:
            raise ValueError(f"samples must be even (they come in pairs) and at least 2, got {self.samples}")
        if not 0 < self.delta < float("inf") or not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"delta and learning_rate must be above 0, got {self.delta} and {self.learning_rate}")


def spsa(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: SPSASettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by Adam on an estimated gradient of the margin; an image leaves once it is broken.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. No gradient is asked for.
        images: in [0, 1].
        labels: true classes.
        generator: of the probes, on the images' device.
        max_batch: copies of images (images x probes x draws) that are in memory at once.
        callback: (step, steps, adversarial, mean margin of each image's probes) after every step.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``pgd``.

    Source: Uesato et al. 2018, section 3, algorithm 1 (Spall 1992).
    """
    model, images, labels = check_attack(model, images, labels)
    adversarial = images.detach().clone()
    first, second = torch.zeros_like(adversarial), torch.zeros_like(adversarial)
    margins = torch.zeros(len(images), device=images.device)
    active = torch.arange(len(images), device=images.device)
    for step in range(1, settings.steps + 1):
        points, targets = adversarial[active], labels[active]
        suspects = mean_margin(model, points, targets, eot_samples=settings.eot_samples, max_batch=max_batch) > 0
        active = active[still_standing(model, points, targets, suspects, settings.verdict, max_batch=max_batch)]
        if len(active) == 0:
            break
        gradient, margins[active] = estimate_gradient(
            model, adversarial[active], labels[active], settings, generator=generator, max_batch=max_batch
        )
        first[active] = 0.9 * first[active] + 0.1 * gradient
        second[active] = 0.999 * second[active] + 0.001 * gradient.square()
        ascent = (first[active] / (1 - 0.9**step)) / ((second[active] / (1 - 0.999**step)).sqrt() + 1e-8)
        moved = adversarial[active] + settings.learning_rate * ascent
        adversarial[active] = project(moved, images[active], settings.eps, settings.norm)
        if callback is not None:
            callback(step, settings.steps, adversarial.clone(), margins.clone())
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial


def estimate_gradient(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: SPSASettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, " batch"]]:
    """The gradient of each image's margin from ``samples`` values, and their mean.

    Each pair stands on either side of the image along a direction of random signs v: (m(x + delta v) - m(x - delta v)) /
    (2 delta) * v, averaged over the pairs. Probes are clipped to [0, 1], where the model is defined. Both of a pair meet the
    same dice where a model's can be held (``fixed_draws``): else the noise would drown the difference.
    """
    pairs = settings.samples // 2
    gradient = torch.zeros_like(images)
    total = torch.zeros(len(images), device=images.device)
    index = torch.arange(pairs * len(images), device=images.device) % len(images)
    for part in index.split(max_batch):
        signs = torch.randint(2, (len(part), *images.shape[1:]), generator=generator, device=images.device) * 2.0 - 1
        seed = new_seed(generator, images.device) if can_hold(model) else None
        how = {"eot_samples": settings.eot_samples, "max_batch": max_batch, "seed": seed}
        above, below = (
            mean_margin(model, (images[part] + step * signs).clamp(0, 1), labels[part], **how)
            for step in (settings.delta, -settings.delta)
        )
        slope = (above - below) / (2 * settings.delta)
        gradient.index_add_(0, part, slope.view(-1, 1, 1, 1) * signs)
        total.index_add_(0, part, (above + below) / 2)
    return gradient / pairs, total / pairs
