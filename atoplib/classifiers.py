"""Image classifiers: (B, 3, H, W) in [0, 1] -> logits. Normalisation is the first layer, so no attack ever
needs to know it.

Any other ``torch.nn.Module`` of that signature takes a classifier's place; wrap one that expects normalised
input as ``nn.Sequential(Normalize(mean, std), model)``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.parameters import above, check_settings


class Normalize(nn.Module):
    """Subtract ``mean`` and divide by ``std``, one value a channel, both for images in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if mean is None or std is None:
            raise ValueError("mean and std belong together: give both, or none")
        check_settings(std=(min(std), above(0)))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        return (images - self.mean) / self.std


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, folded: bool = False
) -> nn.Sequential:
    """A convolution without bias, followed by batch normalisation; ``folded``: one with bias, in which that
    is contained (``freezing.fold_batch_norms``)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=folded),
        nn.Identity() if folded else nn.BatchNorm2d(out_channels),
    )


def _pooled_relu(x: Tensor) -> Tensor:
    """2x2 maximum of relu(x), with its gradients bit by bit: pooled first, which leaves the relu a quarter of
    the values."""
    return F.relu(F.max_pool2d(x, 2), inplace=True)


def _residual_part(width: int, folded: bool) -> nn.Sequential:
    first, second = (conv_norm(width, width, folded=folded) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))


class SmallResNet(nn.Module):
    """A fast ResNet for 32 px: widths w, 2w, 4w, 8w at 32, 16, 8 and 4 px, residual blocks where they pay
    most.

    Each change of resolution is a max-pooling after a convolution: on CIFAR-10 that learns faster than
    strides do, for the same work. ``stem_stride=2`` leaves the full resolution at once, for digits.
    ``width=24`` costs 0.107 GFLOP an image. ``folded``: without batch normalisation, as ``freezing.freeze``
    makes it of a trained one.
    """

    def __init__(self, num_classes: int, width: int = 24, stem_stride: int = 1, folded: bool = False) -> None:
        super().__init__()
        self.stem = conv_norm(3, width, stride=stem_stride, folded=folded)
        self.down1 = conv_norm(width, 2 * width, folded=folded)
        self.block1 = _residual_part(2 * width, folded)
        self.down2 = conv_norm(2 * width, 4 * width, folded=folded)
        self.down3 = conv_norm(4 * width, 8 * width, folded=folded)
        self.block3 = _residual_part(8 * width, folded)
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor, Tensor]:
        """At 1/2, 1/4 and 1/8 of the image: 2w, 4w and 8w channels."""
        x = F.relu(self.stem(x), inplace=True)
        x = _pooled_relu(self.down1(x))
        fine = x + self.block1(x)
        middle = _pooled_relu(self.down2(fine))
        x = _pooled_relu(self.down3(middle))
        return fine, middle, x + self.block3(x)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x)[-1].mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Pre-activation residual block of a wide ResNet (Zagoruyko & Komodakis 2016, figure 1d, without
    dropout)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels h w"]:
        activated = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WideResNet-``depth``-``widen_factor`` for 32 px (Zagoruyko & Komodakis 2016, table 1), depth 6n + 4."""

    def __init__(self, num_classes: int, depth: int = 28, widen_factor: int = 10) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
        for group, (before, after) in enumerate(pairwise(widths)):
            layers.append(WideBlock(before, after, stride=2 if group else 1))
            layers += [WideBlock(after, after, stride=1) for _ in range(blocks - 1)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x).mean(dim=(2, 3)))


def _resnet(depth: int, large: bool, num_classes: int) -> nn.Module:
    """torchvision's ResNet, freshly initialised: ``large`` with the ImageNet stem, for images of 128 px and
    more; else with a 3x3 stem of stride 1 and no max-pooling, for 32 px."""
    # Here: the other classifiers do without its three seconds of import.
    from torchvision.models import get_model

    model = get_model(f"resnet{depth}", weights=None, num_classes=num_classes)
    if not large:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "small_resnet": SmallResNet,
    "wide_resnet_28_10": lambda num_classes: WideResNet(num_classes, 28, 10),
    "wide_resnet_70_16": lambda num_classes: WideResNet(num_classes, 70, 16),
    **{f"resnet{depth}": partial(_resnet, depth, False) for depth in (18, 34, 50)},
    **{f"resnet{depth}_large": partial(_resnet, depth, True) for depth in (18, 34, 50)},
}


def build(
    name: str, *, num_classes: int, mean: Sequence[float] | None, std: Sequence[float] | None, **options: Any
) -> nn.Module:
    """Build the classifier ``name``, freshly initialised, with normalisation as its first layer.

    Args:
        name: a key of ``CLASSIFIERS`` (``*_large`` for images of 128 px and more, the others for 32 px), or
            ``"package.module:function"``, which is called with the options, and with ``num_classes`` if it
            takes that.
        num_classes: number of logits.
        mean, std: per channel, of images in [0, 1] (``data.channel_statistics``); None: no normalisation.
        options: what the architecture itself takes, such as ``width`` of ``small_resnet``.

    Raises:
        ValueError: for an unknown name, or an option that the architecture lacks.
    """
    if ":" not in name and name not in CLASSIFIERS:
        raise ValueError(
            f"unknown classifier {name!r}; allowed: {', '.join(CLASSIFIERS)}, or 'package.module:function'"
        )
    network = build_custom(CLASSIFIERS.get(name, name), options, num_classes, name)
    return network if mean is None and std is None else nn.Sequential(Normalize(mean, std), network)


def build_custom(
    factory: str | Callable[..., nn.Module],
    options: Mapping[str, Any],
    num_classes: int | None = None,
    name: str = "",
) -> nn.Module:
    """The network that a callable or ``"package.module:function"`` makes with these options.

    ``num_classes`` is handed on where the factory takes it and the options do not name it; ``name`` is what
    an error calls the factory.

    Raises:
        ValueError: where it cannot be found, cannot build, or makes no ``nn.Module``.
    """
    name = name or (factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory)))
    try:
        function = resolve_name(factory) if isinstance(factory, str) else factory
        takes = signature(function).parameters.values()
        if num_classes and any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in takes):
            options = {"num_classes": num_classes, **options}
        network = function(**options)
    except Exception as error:  # somebody's code, or a name that does not exist
        raise ValueError(
            f"{name} cannot build a network with the options {dict(options)}: {error} (a factory is a "
            "function or 'package.module:function', such as 'torchvision.models:resnet18')"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, but it returned a {type(network).__name__}")
    return network
