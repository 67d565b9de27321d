"""A trained GatedUNet in the form that attacks call thousands of times: nothing of it is trained, nothing
computed twice."""

from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from atoplib.contract import copy_of, is_changed, same_answers
from atoplib.probing import probe_images
from atoplib.purifiers.gated import GatedUNet, check_size


class FrozenGatedUNet(nn.Module):
    """What a ``GatedUNet`` computes, and its gradients to the visible pixels, up to rounding; in less time.

    Its weights are copies without gradients. Squares of pixels are folded in the order in which channels-last
    images lie in memory, which takes a third of the time of ``pixel_unshuffle``; neither the plane of ones
    nor the mask gets a gradient, for no attack moves them. Gradients of gradients are refused.

    Args:
        unet: it is left as it is.
    """

    def __init__(self, unet: GatedUNet) -> None:
        super().__init__()
        self.unet = deepcopy(unet).to(memory_format=torch.channels_last)
        first, last, fold = unet.encode1.conv, unet.to_rgb, unet.fold
        order, colours = _pixel_order(fold, 3), 3 * fold**2
        self.from_colours = _convolution(first.weight[:, :colours][:, order], None)
        self.from_others = _convolution(first.weight[:, colours:][:, _pixel_order(fold, 2)], first.bias)
        self.to_rgb = _convolution(last.weight[order], last.bias[order])
        self.requires_grad_(False).eval()

    def forward(self, inputs: Float[Tensor, "batch 5 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """As ``GatedUNet``: masked RGB in [-1, 1], a plane of ones and the mask -> RGB in [-1, 1]; errors as
        there."""
        unet, fold, visible = self.unet, self.unet.fold, inputs[:, :3]
        check_size(inputs, 4 * fold)
        if unet.front is not None:
            visible = _SoftClip.apply(visible + unet.front(visible))
        with torch.no_grad():
            constant = self.from_others(folded(inputs[:, 3:], fold))
        features, gate = (self.from_colours(folded(visible, fold)) + constant).chunk(2, dim=1)
        level1 = unet.decode(unet.encode1.activation(features) * torch.sigmoid(gate))
        return _SoftClip.apply(unet.corrected(visible, unfolded(self.to_rgb(level1), fold)))


def freeze_purifier(purifier: nn.Module) -> nn.Module:
    """A copy in eval mode: a ``GatedUNet`` as a ``FrozenGatedUNet``, where that is proved to be the same
    function (no hooks and no parametrisations, and the same images from probe images:
    ``contract.same_answers``)."""
    copied = copy_of(purifier)
    if (
        type(purifier) is GatedUNet
        and copied is not purifier
        and not any(map(is_changed, purifier.modules()))
    ):
        probe = probe_images(4, 5, 8 * purifier.fold, 8 * purifier.fold)
        probe[:, 3], probe[:, 4] = 1, probe[:, 4].round()  # the plane of ones, and a mask
        with suppress(AttributeError, RuntimeError):  # a part of it was replaced
            frozen = FrozenGatedUNet(purifier)
            return frozen if same_answers(purifier, frozen, [probe]) else copied
    return copied


class _SoftClip(torch.autograd.Function):
    """``gated.soft_clip``, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.hardtanh(x).mul_(0.9).add_(x, alpha=0.1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, x, -1.0, 1.0).mul_(0.9).add_(gradient, alpha=0.1)


def folded(
    planes: Float[Tensor, "batch planes height width"], fold: int
) -> Float[Tensor, "batch folded_planes rows columns"]:
    """``pixel_unshuffle`` with its channels in another order: row, column, plane; the result is
    channels-last."""
    batch, count, height, width = planes.shape
    rows, columns = height // fold, width // fold
    squares = planes.permute(0, 2, 3, 1).reshape(batch, rows, fold, columns, fold * count).transpose(2, 3)
    return squares.reshape(batch, rows, columns, fold * fold * count).permute(0, 3, 1, 2)


def unfolded(
    planes: Float[Tensor, "batch folded_planes rows columns"], fold: int
) -> Float[Tensor, "batch planes height width"]:
    """The inverse of ``folded``."""
    batch, _, rows, columns = planes.shape
    squares = planes.permute(0, 2, 3, 1).reshape(batch, rows, columns, fold, -1).transpose(2, 3)
    return squares.reshape(batch, rows * fold, columns * fold, -1).permute(0, 3, 1, 2)


def _pixel_order(fold: int, planes: int) -> Tensor:
    """Where ``pixel_unshuffle`` puts the channels (row, column, plane) of a folded square."""
    return torch.arange(planes * fold**2).view(planes, fold**2).T.flatten()


def _convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 3x3 convolution of stride 1 with copies of these weights."""
    out_channels, in_channels = weight.shape[:2]
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, device="meta")
    convolution.weight = nn.Parameter(weight.detach().clone(memory_format=torch.channels_last))
    convolution.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return convolution
