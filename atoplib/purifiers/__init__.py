"""Purifiers g: networks that rebuild an image from what a random transform left of it.

A purifier is any module (B, 5, H, W) -> (B, 3, H, W) or a tuple of such (coarse, fine; the last one is the
result). Input: masked RGB on the [-1, 1] scale, a plane of ones, the mask (1 = missing). Output: RGB in [-1,
1]. One that is random itself has an attribute ``noise_planes`` and is also given that many standard normal
planes an image, (B, noise_planes, H, W).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from atoplib.parameters import check_settings, one_of
from atoplib.purifiers.autoencoders import ResidualPurifier, RobustEncoderPurifier, encoder_weights
from atoplib.purifiers.deepfill import DeepFillV2, PatchDiscriminator
from atoplib.purifiers.diffusion import DiffusionPurifier, load_diffusers
from atoplib.purifiers.gated import GatedUNet

__all__ = [
    "PURIFIERS",
    "DeepFillV2",
    "DiffusionPurifier",
    "GatedUNet",
    "PatchDiscriminator",
    "ResidualPurifier",
    "RobustEncoderPurifier",
    "build",
    "encoder_weights",
    "load_diffusers",
]

PURIFIERS: dict[str, Callable[..., nn.Module]] = {
    "gated_unet": GatedUNet,
    "residual": ResidualPurifier,
    "robust_encoder": RobustEncoderPurifier,
    "deepfill_v2": DeepFillV2,
    "diffusion": DiffusionPurifier,
}


def build(name: str, **options: Any) -> nn.Module:
    """Build the purifier ``name`` (a key of ``PURIFIERS``), freshly initialised.

    Args:
        options: what the architecture itself takes, such as ``width``.

    Raises:
        ValueError: for an unknown name or an option that the architecture lacks.
        ImportError: for ``diffusion`` without the optional extra.
    """
    check_settings(purifier=(name, one_of(*PURIFIERS)))
    try:
        return PURIFIERS[name](**options)
    except (TypeError, NotImplementedError, ZeroDivisionError, IndexError) as error:  # of diffusers, too
        raise ValueError(f"purifier {name!r} does not take the options {options}: {error}") from error
