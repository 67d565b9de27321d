"""The paper's purifier: DeepFillv2, a two-stage inpainting network, with the names that public weights use.

Yu et al. 2019, "Free-Form Image Inpainting with Gated Convolution"; the contextual attention is that of Yu et
al. 2018, "Generative Image Inpainting with Contextual Attention", section 4.1. Module names follow the public
PyTorch weights.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from atoplib.parameters import at_least, check_settings
from atoplib.purifiers.gated import GatedConv2d, GatedUpConv2d, check_size

SOFTMAX_SCALE = 10.0
MIN_PATCH_NORM = 1e-4
DILATIONS = (1, 2, 4, 8, 16)


class DeepFillV2(nn.Module):
    """DeepFillv2 generator: a coarse stage, then a fine stage with a contextual-attention branch.

    Input: (batch, 5, height, width): RGB in [-1, 1] with missing pixels set to 0, a plane of ones, the mask
    (1 = missing), which may differ from image to image. Output: (coarse, fine), each (batch, 3, height,
    width) in [-1, 1] and at least float32, also under autocast. Height and width: multiples of 8, not
    necessarily equal.

    The public weights have ``width`` 48: 4.1 M parameters, 27.7 G multiply-adds (55 GFLOP) for a 256 px
    image.

    Raises ValueError for a width below 4 and for an input of another size.
    """

    def __init__(self, width: int = 48):
        super().__init__()
        check_settings(width=(width, at_least(4)))
        w, dilations = width, enumerate((*DILATIONS, 1, 1), start=1)
        self.stage1 = nn.Sequential(
            OrderedDict(
                conv1=GatedConv2d(5, w // 2, 5),
                down_block1=_down_block(w // 2, w, w),
                down_block2=_down_block(w, 2 * w, 2 * w),
                **{f"conv_bn{i}": GatedConv2d(2 * w, 2 * w, 3, dilation=rate) for i, rate in dilations},
                up_block1=_up_block(2 * w, w, w),
                up_block2=_up_block(w, w // 2, w // 4),
                conv_to_rgb=TanhConv2d(w // 4, 3),
            )
        )
        self.stage2 = FineStage(width)

    def forward(
        self, x: Float[Tensor, "batch 5 height width"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
        check_size(x, 8)
        rgb, mask = x[:, :3], x[:, 4:]
        coarse = self.stage1(x)
        return coarse, self.stage2(coarse.to(x.dtype) * mask + rgb * (1 - mask), mask)


class FineStage(nn.ModuleDict):
    """Second stage: a dilated branch and a contextual-attention branch on the same image, joined and decoded.

    Input: the image with its holes filled by the coarse stage (batch, 3, height, width) in [-1, 1], and the
    mask (batch, 1, height, width), 1 = missing. Output: RGB in [-1, 1].
    """

    def __init__(self, width: int):
        w, dilations = width, enumerate(DILATIONS, start=1)
        super().__init__(
            {
                "conv_conv1": GatedConv2d(3, w // 2, 5),
                "conv_down_block1": _down_block(w // 2, w // 2, w),
                "conv_down_block2": _down_block(w, w, 2 * w),
                **{f"conv_conv_bn{i}": GatedConv2d(2 * w, 2 * w, 3, dilation=rate) for i, rate in dilations},
                "ca_conv1": GatedConv2d(3, w // 2, 5),
                "ca_down_block1": _down_block(w // 2, w // 2, w),
                "ca_down_block2": _down_block(w, 2 * w, 2 * w),
                "ca_conv_bn1": GatedConv2d(2 * w, 2 * w, 3, activation="relu"),
                "contextual_attention": ContextualAttention(),
                "ca_conv_bn4": GatedConv2d(2 * w, 2 * w, 3),
                "ca_conv_bn5": GatedConv2d(2 * w, 2 * w, 3),
                "conv_bn6": GatedConv2d(4 * w, 2 * w, 3),
                "conv_bn7": GatedConv2d(2 * w, 2 * w, 3),
                "up_block1": _up_block(2 * w, w, w),
                "up_block2": _up_block(w, w // 2, w // 4),
                "conv_to_rgb": TanhConv2d(w // 4, 3),
            }
        )

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], mask: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        dilated = self["conv_down_block2"](self["conv_down_block1"](self["conv_conv1"](image)))
        for index in range(1, len(DILATIONS) + 1):
            dilated = self[f"conv_conv_bn{index}"](dilated)
        attended = self["ca_down_block2"](self["ca_down_block1"](self["ca_conv1"](image)))
        attended = self["contextual_attention"](self["ca_conv_bn1"](attended), mask)
        attended = self["ca_conv_bn5"](self["ca_conv_bn4"](attended))
        joined = self["conv_bn7"](self["conv_bn6"](torch.cat((dilated, attended), dim=1)))
        return self["conv_to_rgb"](self["up_block2"](self["up_block1"](joined)))


def _down_block(in_channels: int, middle_channels: int, out_channels: int) -> nn.Sequential:
    """Gated 3x3 of stride 2 to ``middle_channels``, then gated 3x3 to ``out_channels``."""
    return nn.Sequential(
        OrderedDict(
            conv1_downsample=GatedConv2d(in_channels, middle_channels, 3, stride=2),
            conv2=GatedConv2d(middle_channels, out_channels, 3),
        )
    )


def _up_block(in_channels: int, middle_channels: int, out_channels: int) -> nn.Sequential:
    """Gated upsampling by 2 to ``middle_channels``, then gated 3x3 to ``out_channels``."""
    return nn.Sequential(
        OrderedDict(
            conv1_upsample=GatedUpConv2d(in_channels, middle_channels),
            conv2=GatedConv2d(middle_channels, out_channels, 3),
        )
    )


class TanhConv2d(nn.Module):
    """Plain 3x3 convolution and tanh, which gives values in [-1, 1], at least float32."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels h w"]:
        return torch.tanh(_at_least_float32(self.conv(x)))


class ContextualAttention(nn.Module):
    """Rebuilds features from patches of the unmasked part of the same image (Yu et al. 2018, section 4.1).

    Input: features (batch, channels, h, w) with even h and w, mask (batch, 1, 4 * h, 4 * w), 1 = missing.
    Output: like the features. L = h * w / 4 patches are compared with L positions: an L x L matrix for each
    image, L = 1024 at 256 px. An image without any valid patch gets zeros.
    """

    def __init__(self):
        super().__init__()
        # Constant and not used: _fuse_scores adds the same three terms four times as fast as a convolution
        # with it. It is here because public files hold it.
        self.register_buffer("fuse_weight", torch.eye(3).view(1, 1, 3, 3))

    def forward(
        self, features: Float[Tensor, "batch channels h w"], mask: Float[Tensor, "batch 1 mask_h mask_w"]
    ) -> Float[Tensor, "batch channels h w"]:
        h, w = features.shape[-2:]
        # bfloat16's eight bits, times the softmax scale, would pick the patches at random.
        with torch.autocast(features.device.type, enabled=False):
            scores = _fuse_scores(_match_scores(_at_least_float32(features)), h // 2, w // 2)
            # A patch is valid where the mask, at 1/8 of the size, is zero over its whole 3x3 window. The pool
            # pads with minus infinity: cells outside the image count as not masked.
            masked = F.max_pool2d(mask[:, :, ::8, ::8], 3, stride=1, padding=1)
            valid = (masked == 0).flatten(2).mT.to(scores.dtype)  # batch, L, 1
            weights = torch.softmax(SOFTMAX_SCALE * scores * valid, dim=1) * valid
        patches = F.unfold(features, kernel_size=4, stride=2, padding=1)  # batch, 16 * channels, L
        pasted = patches @ weights.to(patches.dtype)
        # Every pixel is covered by four patches.
        return F.fold(pasted, output_size=(h, w), kernel_size=4, stride=2, padding=1) / 4


def _match_scores(features: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch patches positions"]:
    """Correlation of every normalised 3x3 patch of the half-size features with the window at every
    position."""
    windows = F.unfold(features[:, :, ::2, ::2], kernel_size=3, padding=1)  # batch, 9 * channels, L
    norms = torch.linalg.vector_norm(windows, dim=1, keepdim=True).clamp(min=MIN_PATCH_NORM)
    return (windows / norms).mT @ windows


def _fuse_scores(
    scores: Float[Tensor, "batch patches positions"], rows: int, columns: int
) -> Float[Tensor, "batch patches positions"]:
    """Adds the scores of the neighbouring pairs, first along rows, then along columns, so that matches
    agree."""
    by_columns = _swap_raster_order(_add_diagonal_neighbours(scores), rows, columns)
    return _swap_raster_order(_add_diagonal_neighbours(by_columns), columns, rows)


def _add_diagonal_neighbours(scores: Float[Tensor, "batch n m"]) -> Float[Tensor, "batch n m"]:
    """Convolution with the 3x3 identity, zero padding."""
    padded = F.pad(scores, (1, 1, 1, 1))
    return padded[:, :-2, :-2] + scores + padded[:, 2:, 2:]


def _swap_raster_order(
    scores: Float[Tensor, "batch n n"], rows: int, columns: int
) -> Float[Tensor, "batch n n"]:
    """Renumbers patches and positions of a rows x columns grid from row-major to column-major order."""
    return scores.reshape(-1, rows, columns, rows, columns).permute(0, 2, 1, 4, 3).reshape(scores.shape)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PatchDiscriminator(nn.Sequential):
    """The critic of the inpainting GAN (SN-PatchGAN: Yu et al. 2019, section 3.2): scores every patch of an
    image, one value for each position and channel of the last feature map.

    Six 5x5 convolutions of stride 2, each with spectral norm and a leaky relu of slope 0.2 (the last one
    too), widths w, 2w, 4w, 4w, 4w, 4w. Input: (batch, 4, height, width), RGB in [-1, 1] and the mask plane (1
    = missing), of any size from 1 px on; output: (batch, 4 * w * ceil(height / 64) * ceil(width / 64)) scores
    for a hinge loss.
    """

    def __init__(self, width: int = 64):
        widths = [4, width, 2 * width, *[4 * width] * 4]
        convs = [nn.Conv2d(c_in, c_out, 5, stride=2, padding=2) for c_in, c_out in pairwise(widths)]
        super().__init__(
            *(nn.Sequential(spectral_norm(conv), nn.LeakyReLU(0.2)) for conv in convs), nn.Flatten()
        )

    def forward(self, images: Float[Tensor, "batch 4 height width"]) -> Float[Tensor, "batch scores"]:
        # in float32: on maps of one pixel, oneDNN's bfloat16 gradient of weights reads memory that nobody has
        # written (torch 2.14, AMX): one training in five met a NaN
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(images.float())
