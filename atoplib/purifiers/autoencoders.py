"""Three purifiers without gates: the decoder that redraws colour photographs from the features of a robust
classifier, the normalised residual encoder and decoder that learns all by itself, and the plain denoising
autoencoder, to hold the others against."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.classifiers import Normalize, SmallResNet
from atoplib.parameters import at_least, between, check_settings
from atoplib.purifiers.gated import check_size, soft_clip

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
    The output is tanh, smooth everywhere. ``width=64`` costs 0.29 GFLOP an image at 32 px.

    Args:
        width: channels at 1/fold, twice as many at 1/(2 fold); above 16 a multiple of 16.
        blocks: residual blocks at 1/(2 fold); there is one more before and one after them at 1/fold.
        fold: edge of the squares of pixels that are folded into channels before the first convolution.

    Raises:
        ValueError: for an option out of range; in ``forward``, for a size that 2 * fold does not divide.
    """

    def __init__(self, width: int = 64, blocks: int = 4, fold: int = 2) -> None:
        super().__init__()
        check_settings(width=(width, at_least(1)), blocks=(blocks, between(0, 100)), fold=(fold, at_least(1)))
        self.fold = fold
        self.stem = nn.Conv2d(5 * fold**2, width, 3, padding=1)
        self.encode = ResidualBlock(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.context = _zeroed(nn.Linear(2 * width, 2 * width))
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
        # What the image shows as a whole can be drawn everywhere.
        pooled = F.relu(self.context_norm(coarse)).mean(dim=(2, 3))
        coarse = self.redraw(coarse + self.context(pooled)[:, :, None, None])
        decoded = self.decode(F.pixel_shuffle(self.up(coarse), 2))
        return torch.tanh(F.pixel_shuffle(self.to_rgb(F.relu(self.norm(decoded))), self.fold))


def encoder_weights(classifier: nn.Module) -> dict[str, Tensor]:
    """Those of a frozen ``SmallResNet`` behind its ``Normalize`` without its head."""
    return {name: weight for name, weight in classifier.state_dict().items() if ".head." not in name}


class RobustEncoderPurifier(nn.Module):
    """Redraw the image from what an adversarially trained classifier sees in it, and from nothing else.

    The encoder is a ``SmallResNet`` without its head, frozen from the start (``take_encoder``); what is
    trained is the decoder, which reads its features at 1/2, 1/4 and 1/8 of the image, and their mean. No
    pixel of the input reaches the output by another way: features that a perturbation hardly moves are what
    the classifier behind it gets, and only the decoder has to learn. A missing pixel is mid-grey to the
    encoder. With ``width=64`` and an encoder of 46 it costs 0.52 GFLOP an image at 32 px.

    Args:
        encoder_width, stem_stride: of the classifier that ``take_encoder`` is given. Where its stem has
            stride 2, all its features are at half of these sizes.
        width: channels of the decoder at 1/2, twice as many at 1/4; above 16 a multiple of 16.
        blocks: residual blocks at 1/4; there is one more at 1/2.

    Raises:
        ValueError: for an option out of range; in ``forward``, for a size that 8 * stem_stride does not
            divide.

    Source: Ballarin et al. 2025 (CARSO), whose purifier, too, sees the representation of a robust classifier
    and never pixels.
    """

    def __init__(
        self, encoder_width: int = 46, stem_stride: int = 1, width: int = 64, blocks: int = 2
    ) -> None:
        super().__init__()
        check_settings(encoder_width=(encoder_width, at_least(1)), stem_stride=(stem_stride, at_least(1)))
        check_settings(width=(width, at_least(1)), blocks=(blocks, between(0, 100)))
        self.fold = 2 * stem_stride
        encoder = SmallResNet(1, encoder_width, stem_stride, folded=True)
        del encoder.head
        self.encoder = nn.Sequential(Normalize([0.0] * 3, [1.0] * 3), encoder).requires_grad_(False)
        self.from_coarse = nn.Conv2d(8 * encoder_width, 2 * width, 1)
        self.context = nn.Linear(8 * encoder_width, 2 * width)
        self.from_middle = nn.Conv2d(4 * encoder_width, 2 * width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.up = nn.Conv2d(2 * width, 4 * width, 1)
        self.from_fine = nn.Conv2d(2 * encoder_width, width, 1)
        self.decode, self.norm = ResidualBlock(width), _group_norm(width)
        self.to_rgb = nn.Conv2d(width, 3 * self.fold**2, 3, padding=1)

    def take_encoder(self, classifier: nn.Module) -> None:
        """Copy the weights of a trained ``SmallResNet`` behind its ``Normalize``, which ``freezing.freeze``
        has freed from its batch normalisation.

        Raises:
            ValueError: for any other network, or one of another width or stride.
        """
        try:
            fits = classifier[1].stem[0].stride == self.encoder[1].stem[0].stride
            self.encoder.load_state_dict(encoder_weights(classifier))
        except Exception:  # somebody's network
            fits = False
        if not fits:
            raise ValueError(
                "the encoder must be a small_resnet of the width and stem_stride that purifier_options say "
                f"(encoder_width {self.from_fine.in_channels // 2}, stem_stride {self.fold // 2}), without "
                "its batch normalisation (freezing.freeze)"
            )

    def forward(self, inputs: Float[Tensor, "batch 5 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild an image: masked RGB in [-1, 1], a plane of ones and the mask -> RGB in [-1, 1]."""
        check_size(inputs, 4 * self.fold)
        normalize, encoder = self.encoder
        fine, middle, coarse = encoder.features(normalize((inputs[:, :3] + 1) / 2))
        context = self.context(coarse.mean(dim=(2, 3)))[:, :, None, None]
        x = self.from_middle(middle) + F.interpolate(self.from_coarse(coarse), scale_factor=2.0) + context
        x = F.pixel_shuffle(self.up(self.blocks(x)), 2) + self.from_fine(fine)
        return torch.tanh(F.pixel_shuffle(self.to_rgb(F.relu(self.norm(self.decode(x)))), self.fold))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // GROUP_SIZE), channels)


def _zeroed(layer: nn.Module) -> nn.Module:
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


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
        # 8 levels take images of 256 px at least
        check_settings(width=(width, at_least(1)), levels=(levels, between(1, 8)))
        self.levels, widths = levels, [width * 2**level for level in range(levels)]
        down = [_convolved(before, after, stride=2) for before, after in pairwise([5, *widths])]
        up = [_convolved(before, after) for before, after in pairwise([*widths[::-1], width])]
        self.encoder, self.bottleneck = nn.Sequential(*down), _convolved(widths[-1], widths[-1])
        self.decoder = nn.Sequential(*(nn.Sequential(nn.Upsample(scale_factor=2.0), layer) for layer in up))
        self.to_rgb = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, inputs: Float[Tensor, "batch 5 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild an image: masked RGB in [-1, 1], a plane of ones and the mask -> RGB in [-1, 1].

        Raises ValueError unless height and width are divisible by 2**levels.
        """
        check_size(inputs, 2**self.levels)
        return soft_clip(self.to_rgb(self.decoder(self.bottleneck(self.encoder(inputs)))))


def _convolved(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.ELU())
