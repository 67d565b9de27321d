"""Losses of AToP: reconstruction, GAN, and the objective that adversarially trains a purifier.

Images are on the [-1, 1] scale that purifiers write, unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

VARIANTS = ("ap", "ft_clean", "ft_adv")
TARGETS = ("clean", "adversarial")
GAN_LOSSES = ("hinge", "least_squares")


def reconstruction_loss(
    stages: tuple[Float[Tensor, "batch 3 height width"], ...], target: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Mean absolute difference to ``target``, summed over the purifier's stages (coarse and fine, weight 1 each).

    Source: Lin et al. 2024, equation 4 (L1 on [-1, 1]); Yu et al. 2019, section 3.4.
    """
    return torch.stack([(stage - target).abs().mean() for stage in stages]).sum()


def discriminator_loss(
    real: Float[Tensor, "batch scores"], fake: Float[Tensor, "batch scores"], kind: str = "hinge"
) -> Float[Tensor, ""]:
    """What the discriminator minimises; ``fake`` scores must come from a detached image.

    hinge: mean relu(1 - real) + mean relu(1 + fake) (Yu et al. 2019, section 3.3).
    least_squares: (mean (real - 1)^2 + mean fake^2) / 2 (Mao et al. 2017, equation 9).
    """
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "least_squares":
        return ((real - 1).square().mean() + fake.square().mean()) / 2
    raise ValueError(f"unknown GAN loss {kind!r}; allowed: {', '.join(GAN_LOSSES)}")


def generator_loss(fake: Float[Tensor, "batch scores"], kind: str = "hinge") -> Float[Tensor, ""]:
    """What the purifier minimises to fool the discriminator; ``fake`` keeps its graph, or there is no gradient.

    hinge: -mean fake (Yu et al. 2019, section 3.3). least_squares: mean (fake - 1)^2 / 2 (Mao et al. 2017, equation 9).
    """
    if not fake.requires_grad and torch.is_grad_enabled():
        raise ValueError("the generator's GAN loss got scores of a detached image: it would have no gradient")
    if kind == "hinge":
        return -fake.mean()
    if kind == "least_squares":
        return (fake - 1).square().mean() / 2
    raise ValueError(f"unknown GAN loss {kind!r}; allowed: {', '.join(GAN_LOSSES)}")


@dataclass(frozen=True)
class Objective:
    """Which form of L(g) = L_rec(g(t(x_in)), x_target) + L_gan + s * CE(f(g(t(x_adv))), y) is minimised.

    Attributes:
        variant: ``ap`` (x_in clean, no classification term: inpainting alone), ``ft_clean`` (x_in clean, classification
            term on the clean input) or ``ft_adv`` (x_in = x_adv).
        target: what FT-adv rebuilds, ``clean`` (the authors' log) or ``adversarial`` (the paper's equation 5).
        classification_weight: s.
        warmup_epochs: epochs at the start without the classification term.
        gan_weight, gan_loss: weight of L_gan (0 trains no discriminator) and its kind.

    Source: Lin et al. 2024, equations 4 to 6 and appendix.
    """

    variant: str = "ft_adv"
    target: str = "clean"
    classification_weight: float = 0.1
    warmup_epochs: float = 0
    gan_weight: float = 0.0
    gan_loss: str = "hinge"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("variant", self.variant, VARIANTS),
            ("target", self.target, TARGETS),
            ("gan_loss", self.gan_loss, GAN_LOSSES),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}; allowed: {', '.join(allowed)}")
        for name in ("classification_weight", "warmup_epochs", "gan_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")

    def weight_of_classification(self, epoch: float) -> float:
        """s at this point of the training: 0 for AP and during the warm-up."""
        return 0.0 if self.variant == "ap" or epoch < self.warmup_epochs else self.classification_weight

    @property
    def needs_adversarial(self) -> bool:
        """Whether x_adv is made at all."""
        return self.variant == "ft_adv"


def atop_loss(
    objective: Objective,
    *,
    stages: tuple[Float[Tensor, "batch 3 height width"], ...],
    clean: Float[Tensor, "batch 3 height width"],
    adversarial: Float[Tensor, "batch 3 height width"] | None = None,
    logits: Float[Tensor, "batch classes"] | None = None,
    labels: Int[Tensor, " batch"] | None = None,
    discriminate: Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch scores"]] | None = None,
    epoch: float = 0,
) -> dict[str, Float[Tensor, ""]]:
    """L(g) and its terms, for one batch whose terms share one draw of t.

    Args:
        stages: the purifier's outputs for t(x_in), [-1, 1], the result last.
        clean, adversarial: x and x_adv in [0, 1]; the latter only for the target ``adversarial``.
        logits: f(g(t(x_adv))) (of the clean input for FT-clean); needed once the classification term applies.
        labels: y.
        discriminate: an image on [-1, 1] -> the discriminator's scores; needed if ``gan_weight`` is not 0. It is called
            here, so that the scores are those of the result and the GAN term's gradient arrives at the purifier.
        epoch: how far the training is, in epochs.

    Returns:
        ``loss`` (the weighted sum, with gradient) and the unweighted terms ``reconstruction``, ``classification``, ``gan``.

    Raises:
        ValueError: if a term applies whose input is missing.

    Source: Lin et al. 2024, equations 4 to 6.
    """
    if objective.needs_adversarial and objective.target == "adversarial":
        if adversarial is None:
            raise ValueError("target 'adversarial' needs the adversarial images")
        target = adversarial
    else:
        target = clean
    terms = {"reconstruction": reconstruction_loss(stages, target * 2 - 1)}
    loss = terms["reconstruction"]
    weight = objective.weight_of_classification(epoch)
    if weight:
        if logits is None or labels is None:
            raise ValueError("the classification term applies, but logits or labels are missing")
        terms["classification"] = F.cross_entropy(logits, labels)
        loss = loss + weight * terms["classification"]
    if objective.gan_weight:
        if discriminate is None:
            raise ValueError("gan_weight is not 0, but there is no discriminator to score the result")
        if not stages[-1].requires_grad and torch.is_grad_enabled():
            raise ValueError("the purifier's output is detached: the GAN term would have no gradient")
        terms["gan"] = generator_loss(discriminate(stages[-1]), objective.gan_loss)
        loss = loss + objective.gan_weight * terms["gan"]
    return {"loss": loss, **terms}
