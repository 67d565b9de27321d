"""Losses of AToP, each a pure function of one equation: reconstruction and GAN.

    L(g) = L_rec(g(t(x_in)), x) + w * L_gan + s * CE(f(g(t(x_in))), y)

(Lin et al. 2024, equations 4 to 6) with x_in = x for AP (s = 0) and FT-clean, x_in = x_adv for FT-adv, is
written in the training step of notebook 3. Images are on the [-1, 1] scale that purifiers write.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from atoplib.parameters import check_settings, one_of

GAN_LOSSES = ("hinge", "least_squares")


def reconstruction_loss(
    outputs: tuple[Float[Tensor, "batch 3 height width"], ...], target: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Mean absolute difference to ``target``, summed over the purifier's outputs (coarse and fine, weight 1
    each).

    Source: Lin et al. 2024, equation 4 (L1 on [-1, 1]); Yu et al. 2019, section 3.4.
    """
    return torch.stack([(output - target).abs().mean() for output in outputs]).sum()


def psnr_floor_loss(
    output: Float[Tensor, "batch 3 height width"], target: Float[Tensor, "batch 3 height width"], floor: float
) -> Float[Tensor, ""]:
    """Decibels by which images are rebuilt worse than a PSNR of ``floor``, mean over the images; 0 for those
    that are better: what robustness costs in fidelity is bounded, and not paid for beyond.

    Both images are on [-1, 1]: PSNR = -10 log10(mean squared difference / 4).
    """
    squared = (output - target).square().mean(dim=(1, 2, 3)) / 4
    return F.relu(floor + 10 * (squared + 1e-8).log10()).mean()


def discriminator_loss(
    real: Float[Tensor, "batch scores"], fake: Float[Tensor, "batch scores"], kind: str = "hinge"
) -> Float[Tensor, ""]:
    """What the discriminator minimises; ``fake`` scores must come from a detached image.

    hinge: mean relu(1 - real) + mean relu(1 + fake) (Yu et al. 2019, section 3.3).
    least_squares: (mean (real - 1)^2 + mean fake^2) / 2 (Mao et al. 2017, equation 9).

    Raises:
        ValueError: for an unknown kind.
    """
    check_settings(kind=(kind, one_of(*GAN_LOSSES)))
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def generator_loss(scores: Float[Tensor, "batch scores"], kind: str = "hinge") -> Float[Tensor, ""]:
    """What the purifier minimises to fool the discriminator; ``scores`` are of its output, with their graph.

    hinge: -mean scores (Yu et al. 2019, section 3.3). least_squares: mean (scores - 1)^2 / 2 (Mao et al.
    2017, eq. 9).

    Raises:
        ValueError: for an unknown kind.
    """
    check_settings(kind=(kind, one_of(*GAN_LOSSES)))
    return -scores.mean() if kind == "hinge" else (scores - 1).square().mean() / 2
