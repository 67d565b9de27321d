"""ResidualPurifier: a normalised residual encoder and decoder that redraws the image, for colour
photographs."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.purifiers.gated import check_size

GROUP_SIZE = 16  # channels that share mean and variance


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), (B, C, H, W) -> (B, C, H, W).

    Group normalisation is the same function in training, attack and evaluation, where the running statistics
    of batch normalisation, made of attacked images, misfit clean ones. The last convolution starts at 0, so
    that a fresh block is the identity.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 4e.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _group_norm(channels), _group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ResidualPurifier(nn.Module):
    """Encode the image at 1/fold and 1/(2 fold) of its size, and decode it again.

    Every pixel of the output is drawn from the low resolution, so that no perturbation passes with gain 1.
    The output is tanh, smooth everywhere. ``width=64`` costs 0.25 GFLOP an image at 32 px.

    Args:
        width: channels at 1/fold, twice as many at 1/(2 fold); above 16 a multiple of 16.
        blocks: residual blocks at 1/(2 fold); there is one more before and one after them at 1/fold.
        fold: edge of the squares of pixels that are folded into channels before the first convolution.
        context: add a linear function of the mean of the lowest level's features to all of its places, and
            one more block after it: what the image shows as a whole can then be drawn everywhere.

    Raises:
        ValueError: for an option out of range; in ``forward``, for a size that 2 * fold does not divide.
    """

    def __init__(self, width: int = 64, blocks: int = 4, fold: int = 2, context: bool = True) -> None:
        super().__init__()
        uneven = width > GROUP_SIZE and width % GROUP_SIZE
        if width < 1 or uneven or not 0 <= blocks <= 100 or fold < 1:
            raise ValueError(
                f"width must lie in 1..{GROUP_SIZE} or be a multiple of {GROUP_SIZE}, blocks in 0..100 and "
                f"fold at least 1; got width={width}, blocks={blocks}, fold={fold}"
            )
        self.fold = fold
        self.stem = nn.Conv2d(5 * fold**2, width, 3, padding=1)
        self.encode = ResidualBlock(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.context = _zeroed(nn.Linear(2 * width, 2 * width)) if context else None
        if context:
            self.context_norm, self.redraw = _group_norm(2 * width), ResidualBlock(2 * width)
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.decode = ResidualBlock(width)
        self.norm = _group_norm(width)
        self.to_rgb = nn.Conv2d(width, 3 * fold**2, 3, padding=1)

    def forward(self, inputs: Float[Tensor, "batch 5 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild an image: masked RGB in [-1, 1], a plane of ones and the mask -> RGB in [-1, 1]."""
        check_size(inputs, 2 * self.fold)
        fine = self.encode(self.stem(F.pixel_unshuffle(inputs, self.fold)))  # (B, width, H / fold, W / fold)
        coarse = self.blocks(self.down(fine))  # (B, 2 width, H / (2 fold), W / (2 fold))
        if self.context is not None:
            pooled = F.relu(self.context_norm(coarse)).mean(dim=(2, 3))
            coarse = self.redraw(coarse + self.context(pooled)[:, :, None, None])
        decoded = self.decode(F.pixel_shuffle(self.up(coarse), 2))
        return torch.tanh(F.pixel_shuffle(self.to_rgb(F.relu(self.norm(decoded))), self.fold))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // GROUP_SIZE), channels)


def _zeroed(layer: nn.Module) -> nn.Module:
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer
