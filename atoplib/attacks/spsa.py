"""SPSA: a gradient estimated from pairs of values, through logits alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.eot import StepCallback
from atoplib.attacks.norms import FINITE, Ball, check_settings
from atoplib.attacks.queries import Search, at_rows, mean_margin, new_seed
from atoplib.decisions import Model
from atoplib.parameters import above, at_least


def spsa(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 100,
    samples: int = 128,
    delta: float = 0.01,
    learning_rate: float = 0.01,
    eot_samples: int = 1,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images by Adam on an estimated gradient of the margin; an image leaves once it is broken.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. No gradient is asked for.
        images: in [0, 1].
        labels: true classes.
        eps: radius in units of the image.
        norm: ``linf``, ``l2`` or ``l1``.
        steps: iterations of Adam, at least 1.
        samples: values that each gradient is estimated from, in antithetic pairs: at least 2.
        delta: distance of the probes along each pixel, in units of the image.
        learning_rate: of Adam, in the same units.
        eot_samples: samples of the model that each value is averaged over, at least 1.
        rule, votes: by which an image counts as broken and leaves; asked only where the mean margin says so.
        targets: class that each image is driven to; None: any other.
        seed: of the probes; None: torch's global generator.
        max_batch: copies of images (images x probes x samples) in memory at once.
        callback: (step, steps, adversarial, mean margin of each image's probes) after every step.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``contract.prepare``; for settings out of range.

    Source: Uesato et al. 2018, section 3, algorithm 1 (Spall 1992).
    """
    check_settings(
        steps=(steps, at_least(1)), samples=(samples, at_least(2)), delta=(delta, above(0, FINITE))
    )
    check_settings(learning_rate=(learning_rate, above(0, FINITE)))
    search = Search(
        model, images, labels, targets=targets, eot_samples=eot_samples, rule=rule, votes=votes, seed=seed,
        max_batch=max_batch,
    )  # fmt: skip
    ball, adversarial = Ball(search.images, eps, norm), search.adversarial
    first, second = torch.zeros_like(adversarial), torch.zeros_like(adversarial)
    search.margins.zero_()
    for step in range(1, steps + 1):
        search.let_go(search.margin(adversarial[search.active]) > 0)
        rows = search.active
        if len(rows) == 0:
            break
        gradient, search.margins[rows] = estimate_gradient(
            search.model, adversarial[rows], **search.aims(), **search.values, samples=samples, delta=delta,
            generator=search.generator,
        )  # fmt: skip
        first[rows] = 0.9 * first[rows] + 0.1 * gradient
        second[rows] = 0.999 * second[rows] + 0.001 * gradient.square()
        # tiny, not 1e-8 as usual: the step must not depend on the scale of the logits
        ascent = (first[rows] / (1 - 0.9**step)) / ((second[rows] / (1 - 0.999**step)).sqrt() + 1e-30)
        adversarial[rows] = ball.rows(rows).project(adversarial[rows] + learning_rate * ascent)
        if callback is not None:
            callback(step, steps, adversarial.clone(), search.margins.clone())
    ball.check(adversarial)
    return adversarial


def estimate_gradient(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    samples: int,
    delta: float,
    eot_samples: int = 1,
    targets: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
    max_batch: int = 256,
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"]]:
    """The gradient of each image's margin from ``samples`` values, and their mean.

    Each pair lies on either side of the image along a direction of random signs v: (m(x + delta v) - m(x -
    delta v)) / (2 delta) * v, averaged over the pairs. Probes are clipped to [0, 1], where the model is
    defined. Both of a pair meet the same sample of the model where it can be fixed: else the noise would
    drown the difference.
    """
    pairs, gradient = samples // 2, torch.zeros_like(images)
    total = torch.zeros(len(images), device=images.device)
    for part in (torch.arange(pairs * len(images), device=images.device) % len(images)).split(max_batch):
        signs = torch.randint(2, (len(part), *images.shape[1:]), generator=generator, device=images.device)
        signs = signs * 2.0 - 1
        options = {"eot_samples": eot_samples, "max_batch": max_batch, "targets": at_rows(targets, part)}
        options |= {"seed": new_seed(model, generator, images.device)}
        upper, lower = (
            mean_margin(model, (images[part] + step * signs).clamp(0, 1), labels[part], **options)
            for step in (delta, -delta)
        )
        slope = ((upper - lower) / (2 * delta)).to(gradient.dtype)
        gradient.index_add_(0, part, slope.view(-1, 1, 1, 1) * signs.to(gradient.dtype))
        total.index_add_(0, part, (upper + lower) / 2)
    return gradient / pairs, total / pairs
