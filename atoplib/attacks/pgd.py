"""FGSM and PGD, with EOT for random models."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.eot import Loss, cross_entropy, input_gradient
from atoplib.attacks.norms import NORMS, project, random_start, steepest_step
from atoplib.verdicts import Model

StepCallback = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True)
class PGDSettings:
    """Projected gradient ascent (Madry et al. 2018, section 2.1).

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]): 8/255 = 0.0314, l2 0.5.
        norm: ``linf`` or ``l2``.
        steps: iterations, at least 1.
        alpha: step size in the same units; None: 2.5 * eps / steps, and eps for a single step.
        eot_samples: draws of the model that each gradient is averaged over, at least 1.
        start: ``random`` (uniform in the ball) or ``clean``.
        stop_after: an image leaves the batch once every draw has been wrong in so many steps in a row, which saves the time
            of images that are broken anyhow; 0: never.
    """

    eps: float
    norm: str = "linf"
    steps: int = 20
    alpha: float | None = None
    eot_samples: int = 1
    start: str = "random"
    stop_after: int = 0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; allowed: {', '.join(NORMS)}")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps must be above 0, got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps of the linf norm must be at most 1 (images lie in [0, 1]), got {self.eps}; 8/255?")
        if self.steps < 1 or self.eot_samples < 1:
            raise ValueError(f"steps and eot_samples must be at least 1, got {self.steps} and {self.eot_samples}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be above 0 (or None), got {self.alpha}")
        if self.stop_after < 0:
            raise ValueError(f"stop_after must be 0 (never) or more, got {self.stop_after}")
        if self.start not in ("random", "clean"):
            raise ValueError(f"unknown start {self.start!r}; allowed: random, clean")

    @property
    def step_size(self) -> float:
        """alpha, or its default."""
        if self.alpha is not None:
            return self.alpha
        return self.eps if self.steps == 1 else 2.5 * self.eps / self.steps


def ascend(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: PGDSettings,
    *,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """The bare loop of PGD on any callable, without checks: what training uses on every batch. Arguments as ``pgd``."""
    adversarial = images.detach()
    if settings.start == "random":
        adversarial = random_start(images, settings.eps, settings.norm, generator)
    adversarial = adversarial.clone()
    active = torch.arange(len(images), device=images.device)
    wrong_in_a_row = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    losses = torch.zeros(len(images), device=images.device)
    for step in range(settings.steps):
        if len(active) == 0:
            break
        found = input_gradient(
            model,
            adversarial[active],
            labels[active],
            loss=loss,
            eot_samples=settings.eot_samples,
            max_batch=max_batch,
        )
        moved = adversarial[active] + settings.step_size * steepest_step(found.gradient, settings.norm)
        adversarial[active] = project(moved, images[active], settings.eps, settings.norm)
        losses[active] = found.loss
        if callback is not None:
            callback(step + 1, settings.steps, adversarial.clone(), losses.clone())
        if settings.stop_after:
            wrong_in_a_row[active] = torch.where(found.right > 0, 0, wrong_in_a_row[active] + 1)
            active = active[wrong_in_a_row[active] < settings.stop_after]
    return adversarial.detach()


def pgd(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: PGDSettings,
    *,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by projected gradient ascent; the last iterate, whether or not it succeeded.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random.
        images: in [0, 1].
        labels: true classes.
        generator: of the random start, on the images' device; the model's own dice are not touched.
        loss: (logits, labels) -> one value an image, to be raised.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (step, steps, adversarial, loss of each image) after every step.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: for a model in train mode, images outside [0, 1] or NaN, labels without a logit.

    Source: Madry et al. 2018, section 2.1; EOT: Athalye et al. 2018, section 4.2.
    """
    check_attack(model, images, labels)
    adversarial = ascend(
        model, images, labels, settings, generator=generator, loss=loss, max_batch=max_batch, callback=callback
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
