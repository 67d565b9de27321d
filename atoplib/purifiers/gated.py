"""Gated convolutions (Yu et al. 2019, "Free-Form Image Inpainting with Gated Convolution", section 3.1)."""

from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Function, and the gain that keeps the mean square of a gated convolution's output at that of its input: of
# ``activation(a) * sigmoid(b)`` it is 1 where a and b are normal with this standard deviation.
ACTIVATIONS = {"elu": (F.elu, 2.24), "relu": (F.relu, 2.35)}


def check_size(images: Tensor, factor: int) -> None:
    """Raise ValueError unless ``factor`` divides height and width of images (..., height, width)."""
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"this purifier needs height and width divisible by {factor}, got {height} x {width}: "
            "resize or pad the images"
        )


def fresh_weights(convolution: nn.Conv2d, *, std: float) -> None:
    """Normal weights, no bias. On the meta device, where nothing has a value, torch would take seconds to do
    nothing."""
    if not convolution.weight.is_meta:
        nn.init.normal_(convolution.weight, std=std)
        nn.init.zeros_(convolution.bias)


class GatedConv2d(nn.Module):
    """A convolution whose output is multiplied by a learned gate: ``activation(a) * sigmoid(b)``.

    One convolution with bias makes 2 * out_channels channels, the first half is a, the second half b. The
    padding is zeros, symmetric, ``dilation * (kernel_size - 1) / 2``, so that stride 1 keeps height and width
    and stride 2 halves them (rounding up). Parameters: ``conv.weight``, ``conv.bias``.

    Fresh weights are normal with standard deviation gain / sqrt(fan_in), biases zero. (torch's own start
    shrinks a gated layer's output to less than a third: after DeepFillv2's seventeen layers nothing of the
    image is left.)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        activation: str = "elu",
    ):
        super().__init__()
        self.activation, gain = ACTIVATIONS[activation]
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, 2 * out_channels, kernel_size, stride, padding, dilation)
        fresh_weights(self.conv, std=gain / sqrt(self.conv.weight[0].numel()))

    def forward(
        self, x: Float[Tensor, "batch in_channels h w"]
    ) -> Float[Tensor, "batch out_channels h_out w_out"]:
        features, gate = self.conv(x).chunk(2, dim=1)
        return self.activation(features) * torch.sigmoid(gate)


class GatedUpConv2d(nn.Module):
    """Nearest upsampling by 2, then a gated 3x3 convolution. Parameters: ``conv.conv.weight``,
    ``conv.conv.bias``."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = GatedConv2d(in_channels, out_channels, 3)

    def forward(
        self, x: Float[Tensor, "batch in_channels h w"]
    ) -> Float[Tensor, "batch out_channels 2*h 2*w"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
