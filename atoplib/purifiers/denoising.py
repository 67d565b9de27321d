"""DenoisingAutoencoder: the plain way to rebuild an image, to hold the others against."""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.purifiers.gated import check_size

MOST_LEVELS = 8  # 2**8 px: deeper than any image here


class DenoisingAutoencoder(nn.Module):
    """A convolutional autoencoder that learns to undo noise: encoder, bottleneck, decoder, and no way around
    them.

    Every level halves the image and doubles the channels; the decoder mirrors it with nearest upsampling.
    Unlike a U-Net it has no long skips and adds nothing to its input, so all of the output went through the
    bottleneck, which has width * 2**(levels - 1) channels at 1/2**levels of the edges.

    It goes with any transform; noise alone, as in the source, is ``rt2`` with missing_rate 0. The output is
    the identity within [-1, 1] and has slope 0.1 outside, as GatedUNet's.

    Args:
        width: channels after the first halving.
        levels: how often the image is halved.

    Raises:
        ValueError: for a width below 1 or levels outside 1..8.

    Source: Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders"; in
    front of a classifier: Gu & Rigazio 2014, Meng & Chen 2017 (MagNet).
    """

    def __init__(self, width: int = 24, levels: int = 2) -> None:
        super().__init__()
        if width < 1 or not 1 <= levels <= MOST_LEVELS:
            raise ValueError(
                f"width must be at least 1 and levels lie in 1..{MOST_LEVELS}, got width={width}, "
                f"levels={levels}"
            )
        self.levels = levels
        widths = [width * 2**level for level in range(levels)]
        down = [nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise([5, *widths])]
        self.encoder = nn.ModuleList(down)
        self.bottleneck = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        up = [nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise([*widths[::-1], width])]
        self.decoder = nn.ModuleList(up)
        self.to_rgb = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, inputs: Float[Tensor, "batch 5 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild an image: masked RGB in [-1, 1], a plane of ones and the mask -> RGB in [-1, 1].

        Raises ValueError unless height and width are divisible by 2**levels.
        """
        check_size(inputs, 2**self.levels)
        code = inputs
        for convolution in self.encoder:
            code = F.elu(convolution(code))
        code = F.elu(self.bottleneck(code))
        for convolution in self.decoder:
            code = F.elu(convolution(F.interpolate(code, scale_factor=2.0)))
        output = self.to_rgb(code)
        return 0.9 * F.hardtanh(output) + 0.1 * output
