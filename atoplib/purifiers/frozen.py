"""A trained GatedUNet in the form that attacks call thousands of times: nothing of it is trained, nothing
computed twice."""

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
    images lie in memory, which takes a third of the time of ``pixel_unshuffle``; what the first convolution
    makes of the plane of ones is computed once, and neither that plane nor the mask gets a gradient, for no
    attack moves them. Gradients of gradients are refused.

    Args:
        unet: it is left as it is.
    """

    def __init__(self, unet: GatedUNet) -> None:
        super().__init__()
        self.unet = deepcopy(unet).to(memory_format=torch.channels_last)
        first, last, fold = unet.encode1.conv, unet.to_rgb, unet.fold
        colours, ones, mask = first.weight.detach().split([3 * fold**2, fold**2, fold**2], dim=1)
        self.from_colours = _convolution(colours[:, _pixel_order(fold)], None)
        self.from_mask = _convolution(mask, None)
        self.from_ones = _convolution(ones.sum(dim=1, keepdim=True), first.bias)
        self.to_rgb = _convolution(last.weight[_pixel_order(fold)], last.bias[_pixel_order(fold)])
        self.requires_grad_(False).eval()

    def forward(self, inputs: Float[Tensor, "batch 5 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """As ``GatedUNet``: masked RGB in [-1, 1], a plane of ones and the mask -> RGB in [-1, 1]; errors as
        there."""
        return self.rebuild(inputs[:, :3], inputs[:, 4:].detach())

    def rebuild(
        self, visible: Float[Tensor, "batch 3 height width"], mask: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """``forward`` of the planes that differ from call to call: masked RGB in [-1, 1], the mask (1 =
        missing)."""
        unet, fold, (height, width) = self.unet, self.unet.fold, visible.shape[2:]
        check_size(visible, 4 * fold)
        if unet.front is not None:
            visible = visible + unet.front(visible)
        with torch.no_grad():
            ones = torch.ones(1, 1, height // fold, width // fold, dtype=visible.dtype, device=visible.device)
            constant = self.from_mask(folded(mask, fold)) + self.from_ones(ones)
        features, gate = (self.from_colours(folded(visible, fold)) + constant).chunk(2, dim=1)
        level1 = unet.decode(unet.encode1.activation(features) * torch.sigmoid(gate))
        return _SoftClip.apply(unet.corrected(visible, unfolded(self.to_rgb(level1), fold)))


def frozen_unet(unet: GatedUNet) -> FrozenGatedUNet | None:
    """A ``GatedUNet`` in eval mode as a ``FrozenGatedUNet``, where that is proved to be the same function: no
    hooks and no parametrisations, and the same images from probe images (``contract.same_answers``); None
    elsewhere."""
    if copy_of(unet) is unet or any(is_changed(part) for part in unet.modules()):
        return None
    try:
        frozen = FrozenGatedUNet(unet)
    except (AttributeError, RuntimeError):  # a part of it was replaced
        return None
    probe = probe_images(4, 5, 8 * unet.fold, 8 * unet.fold)
    probe[:, 3], probe[:, 4] = 1, probe[:, 4].round()  # the plane of ones, and a mask
    return frozen if same_answers(unet, frozen, [probe]) else None


class _SoftClip(torch.autograd.Function):
    """0.9 * hardtanh(x) + 0.1 * x: the identity within [-1, 1], slope 0.1 outside."""

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


def _pixel_order(fold: int) -> Tensor:
    """Where ``pixel_unshuffle`` puts the channels (row, column, colour) of a folded square."""
    return torch.arange(3 * fold**2).view(3, fold**2).T.flatten()


def _convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 3x3 convolution of stride 1 with copies of these weights."""
    out_channels, in_channels = weight.shape[:2]
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, device="meta")
    convolution.weight = nn.Parameter(weight.detach().clone(memory_format=torch.channels_last))
    convolution.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return convolution
