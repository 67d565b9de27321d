"""Two purifiers without gates: the decoder that redraws colour photographs from the features of a robust
classifier, and the normalised residual encoder and decoder that learns all by itself."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.classifiers import Normalize, SmallResNet
from atoplib.parameters import at_least, between, check_settings
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
