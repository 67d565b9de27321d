"""The critic of the inpainting GAN (SN-PatchGAN: Yu et al. 2019, section 3.2)."""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores every patch of an image, one value for each position and channel of the last feature map.

    Six 5x5 convolutions of stride 2, each with spectral norm and a leaky relu of slope 0.2 (the last one
    too), widths w, 2w, 4w, 4w, 4w, 4w. Input: (batch, 4, height, width), RGB in [-1, 1] and the mask plane (1
    = missing), of any size from 1 px on; output: (batch, 4 * w * ceil(height / 64) * ceil(width / 64)) scores
    for a hinge loss.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        widths = [4, width, 2 * width, *[4 * width] * 4]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(c_in, c_out, 5, stride=2, padding=2)) for c_in, c_out in pairwise(widths)
        )

    def forward(
        self, images_and_mask: Float[Tensor, "batch 4 height width"]
    ) -> Float[Tensor, "batch scores"]:
        x = images_and_mask
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        return x.flatten(1)
