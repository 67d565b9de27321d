"""DiffPure: drown the perturbation in noise, then let a diffusion model walk back to an image.

Nie et al. 2022, "Diffusion Models for Adversarial Purification", arXiv 2205.07460. The network is a ``UNet2DModel`` of the
library diffusers, an optional extra that is imported only when such a purifier is built.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SMALL_UNET: Mapping[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "add_attention": False,
}
"""What the U-Net is where nothing else is asked for: grey digits of 32 px, folded by 4."""
MOST_BLOCKS = 100
MOST_LEVELS = 100_000
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class MissingDiffusers(RuntimeError):
    """The optional extra cannot be imported; the message says how to get it."""


def import_diffusers() -> tuple[type, type]:
    """``UNet2DModel`` and ``DDPMScheduler`` of the library diffusers, which takes seconds to import.

    Raises:
        MissingDiffusers: if it is not installed or cannot be imported.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise MissingDiffusers(
            f"the purifier 'diffusion' needs the library diffusers, an optional extra, which cannot be imported ({error}): "
            f"install it with pip install 'diffusers>=0.30'"
        ) from error
    return UNet2DModel, DDPMScheduler


def make_unet(config: Mapping[str, Any]) -> nn.Module:
    """A fresh ``UNet2DModel``; blocks without attention where ``config`` names none.

    Raises:
        ValueError: for settings that it does not take.
    """
    widths, layers = config.get("block_out_channels", ()), config.get("layers_per_block", 2)
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= MOST_BLOCKS or not 1 <= layers <= MOST_BLOCKS:
        raise ValueError(
            f"unet needs block_out_channels, a list of 1..{MOST_BLOCKS} numbers, and layers_per_block in 1..{MOST_BLOCKS}; "
            f"got {widths!r} and {layers!r}"
        )
    blocks = {"down_block_types": ("DownBlock2D",) * len(widths), "up_block_types": ("UpBlock2D",) * len(widths)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    unet_class, _ = import_diffusers()
    try:
        return unet_class(**{**blocks, **given})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"diffusers' UNet2DModel cannot be built with unet = {dict(config)}: {error}") from error


def signal_levels(config: Mapping[str, Any]) -> Float[Tensor, " levels"]:
    """The share of an image's variance that is left after 0, 1, ..., T steps of noise (alpha bar), float64 on the CPU.

    Args:
        config: of diffusers' ``DDPMScheduler``; only what is in ``SCHEDULE`` is read.

    Raises:
        ValueError: for an unknown schedule.

    Source: Ho et al. 2020, section 2, equation 4.
    """
    chosen = {name: config[name] for name in SCHEDULE if name in config}
    if not 1 <= chosen.get("num_train_timesteps", 1000) <= MOST_LEVELS:
        raise ValueError(f"num_train_timesteps must lie in 1..{MOST_LEVELS}, got {chosen['num_train_timesteps']}")
    _, scheduler_class = import_diffusers()
    try:
        with torch.device("cpu"):  # a module that is built on the meta device reads its settings, too
            betas = scheduler_class(**chosen).betas.double()
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"diffusers' DDPMScheduler cannot be built with schedule = {chosen}: {error}") from error
    return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 - betas).cumprod(0)])


def noised(
    images: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    level: Float[Tensor, "*batch"] | float,
) -> Float[Tensor, "batch channels height width"]:
    """sqrt(level) * x + sqrt(1 - level) * n, images on [-1, 1], ``noise`` standard normal.

    Args:
        level: alpha bar, one for all images or one an image.

    Source: Ho et al. 2020, equation 4; Nie et al. 2022, equation 4.
    """
    if isinstance(level, float):  # as a tensor it would be copied to the device
        return sqrt(level) * images + sqrt(1 - level) * noise
    level = level.to(images.dtype).view(-1, 1, 1, 1)
    return level.sqrt() * images + (1 - level).sqrt() * noise


def reverse_step(
    noisy: Float[Tensor, "batch channels height width"],
    predicted: Float[Tensor, "batch channels height width"],
    level: float,
    next_level: float,
    *,
    eta: float = 1.0,
    noise: Float[Tensor, "batch channels height width"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One step from much noise to less, for any two levels (alpha bar).

    eta = 1 is ancestral sampling, as in DDPM (exactly so from a level to the one before it), eta = 0 is DDIM, which throws
    no dice. What is predicted of the clean image is not clipped: a clip would hide gradients from an attack.

    Args:
        predicted: the noise that the network sees in ``noisy``.
        noise: standard normal, needed where the step is random.

    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16.
    """
    spread = eta * sqrt((1 - next_level) / (1 - level) * (1 - level / next_level))
    clean = (noisy - sqrt(1 - level) * predicted) / sqrt(level)
    result = sqrt(next_level) * clean + sqrt(max(0.0, 1 - next_level - spread**2)) * predicted
    return result if spread == 0 else result + spread * noise


class DiffusionPurifier(nn.Module):
    """DiffPure: noise up to t*, then ``steps`` steps of denoising back to an image; all of it has a gradient.

    It destroys the perturbation by itself, so it goes with the transform ``none`` (what a mask hides is mid-grey to it). Its
    noise is thrown by the pipeline, ``noise_planes`` standard normal planes for each image, so that an attack and a verdict
    control it as they do the dice of a transform. ``pretraining_loss`` is its own: a U-Net that predicts noise.

    Args:
        unet: settings of diffusers' ``UNet2DModel`` that differ from ``SMALL_UNET``. Its channels follow from ``channels``
            and ``fold``.
        channels: 3, or 1 for grey images: the colours are averaged on the way in and alike on the way out.
        fold: edge of the squares of pixels that are folded into channels before the U-Net; 1 where it was trained elsewhere.
        schedule: settings of diffusers' ``DDPMScheduler`` that differ from its own, ``SCHEDULE``.
        t_star: how far the noise goes, as a share of the schedule's steps, in (0, 1].
        steps: of the way back; each is one pass through the U-Net.
        eta: 1 for DDPM's random steps, 0 for DDIM's, in [0, 1].
        checkpointing: keep only what stands between the steps for the gradient and compute the rest again: the memory of
            one step instead of all, for a third more time.

    Raises:
        MissingDiffusers: without the optional extra.
        ValueError: for settings that are not allowed.

    Source: Nie et al. 2022, section 3.1 (equations 4 and 5), with the steps of Song et al. 2021 for the way back.
    """

    def __init__(
        self,
        unet: Mapping[str, Any] | None = None,
        channels: int = 1,
        fold: int = 4,
        schedule: Mapping[str, Any] | None = None,
        t_star: float = 0.25,
        steps: int = 5,
        eta: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if channels not in (1, 3) or fold < 1:
            raise ValueError(f"channels must be 1 or 3 and fold at least 1, got channels={channels}, fold={fold}")
        if not 0 < t_star <= 1 or not 0 <= eta <= 1:
            raise ValueError(f"t_star must lie in (0, 1] and eta in [0, 1], got t_star={t_star}, eta={eta}")
        planes = {"in_channels": channels * fold**2, "out_channels": channels * fold**2}
        differing = {name: value for name, value in (unet or {}).items() if name in planes and value != planes[name]}
        if differing:
            raise ValueError(f"unet's channels must be channels * fold**2 = {planes['in_channels']}, got {differing}")
        levels = signal_levels(schedule or {})
        farthest = round(t_star * (len(levels) - 1))
        if not 1 <= steps <= farthest:
            raise ValueError(
                f"steps must lie in 1..{farthest}, the noise levels up to t_star={t_star} of {len(levels) - 1}; got {steps}"
            )
        self.unet = make_unet({**SMALL_UNET, **(unet or {}), **planes})
        self.register_buffer("levels", levels.float(), persistent=False)
        self.times = [round(farthest * (steps - step) / steps) for step in range(steps + 1)]
        self.path = levels[self.times].tolist()
        self.channels, self.fold, self.t_star, self.steps, self.eta = channels, fold, t_star, steps, eta
        self.checkpointing = checkpointing
        self.options = {
            "unet": plain(unet or {}),
            "channels": channels,
            "fold": fold,
            "schedule": plain(schedule or {}),
            "t_star": t_star,
            "steps": steps,
            "eta": eta,
            "checkpointing": checkpointing,
        }

    @property
    def noise_planes(self) -> int:
        """Planes of noise for each image: the first for the way there, one (of each channel) for every random step back."""
        return self.channels * (self.steps if self.eta else 1)  # the last step is never random

    def extra_repr(self) -> str:
        return f"channels={self.channels}, fold={self.fold}, times={self.times}, path={self.path}, eta={self.eta}"

    def predict(
        self, noisy: Float[Tensor, "batch channels height width"], times: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The noise that the U-Net sees in images that met ``times`` (1..T) steps of it."""
        seen = F.pixel_unshuffle(noisy, self.fold)
        return F.pixel_shuffle(self.unet(seen, times - 1).sample.to(noisy.dtype), self.fold)  # diffusers counts from 0

    def step_back(self, noisy: Tensor, step: int, noise: Tensor | None) -> Tensor:
        """Step ``step`` of the way back."""
        times = torch.full((len(noisy),), self.times[step], device=noisy.device)
        level, next_level = self.path[step], self.path[step + 1]
        return reverse_step(noisy, self.predict(noisy, times), level, next_level, eta=self.eta, noise=noise)

    def forward(
        self,
        inputs: Float[Tensor, "batch 5 height width"],
        noise: Float[Tensor, "batch planes height width"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """Purify: RGB in [-1, 1] (and a plane of ones and a mask, which it does not read) -> RGB, about in [-1, 1].

        Args:
            noise: standard normal, ``noise_planes`` planes an image, its own for each.

        Raises:
            ValueError: for a number of planes other than ``noise_planes``, or a size that the U-Net cannot halve.
        """
        if noise.shape[1] != self.noise_planes:
            raise ValueError(f"this purifier needs {self.noise_planes} planes of noise an image, got {noise.shape[1]}")
        self.check_size(*inputs.shape[2:])
        images = self.own_channels(inputs[:, :3])
        first, *others = noise.split(self.channels, dim=1)
        state = noised(images, first, self.path[0])
        for step in range(self.steps):
            arguments = state, step, others[step] if step < len(others) else None
            if self.checkpointing and torch.is_grad_enabled():
                state = checkpoint(self.step_back, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self.step_back(*arguments)
        return state.expand(-1, 3, -1, -1)

    def pretraining_loss(
        self,
        images: Float[Tensor, "batch 3 height width"],
        shares: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the predicted noise.

        Args:
            images: on [-1, 1].
            shares: uniform in [0, 1): how far each image goes through the whole schedule.
            noise: standard normal.

        Raises ValueError as ``forward`` does. Source: Ho et al. 2020, equation 14 (L_simple).
        """
        self.check_size(*images.shape[2:])
        noise = noise[:, : self.channels]
        times = (shares * (len(self.levels) - 1)).long() + 1
        noisy = noised(self.own_channels(images), noise, self.levels[times])
        return (self.predict(noisy, times) - noise).square().mean()

    def own_channels(self, images: Tensor) -> Tensor:
        """Images as the U-Net knows them: in colour, or the mean of the colours."""
        return images if self.channels == 3 else images.mean(dim=1, keepdim=True)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless the U-Net can fold and halve an image of this size."""
        needed = self.fold * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if height % needed or width % needed:
            raise ValueError(f"this purifier needs height and width divisible by {needed}, got {height} x {width}")


def load_diffusers(source: str | Path, *, local_files_only: bool = True, **settings: Any) -> DiffusionPurifier:
    """A purifier around a diffusion model that diffusers saved, in eval mode.

    Args:
        source: a folder as ``DDPMPipeline.save_pretrained`` writes it (``unet/`` and ``scheduler/``, or both configurations
            side by side), or a name on the hub.
        local_files_only: never download: a name on the hub must be in the local cache. False downloads what is missing.
        settings: of ``DiffusionPurifier``: ``t_star``, ``steps``, ``eta``, ``checkpointing``.

    Returns:
        the purifier; its ``options`` are what ``save_checkpoint`` wants to know of it.

    Raises:
        MissingDiffusers: without the optional extra.
        ValueError: for a model that predicts anything but the noise of images with 1 or 3 channels.
        OSError: if there is no such model, no ``scheduler_config.json``, or only weights that would have to be unpickled.
    """
    unet_class, scheduler_class = import_diffusers()
    local = {"local_files_only": local_files_only}
    try:
        schedule, folder = scheduler_class.load_config(source, subfolder="scheduler", **local), "unet"
    except OSError:
        schedule, folder = scheduler_class.load_config(source, **local), None
    unet = unet_class.from_pretrained(source, subfolder=folder, use_safetensors=True, **local)
    kind = schedule.get("prediction_type", "epsilon")
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    channels = config["in_channels"], config["out_channels"]
    if kind != "epsilon" or channels not in ((1, 1), (3, 3)):
        raise ValueError(
            f"{source} predicts {kind!r} with {channels[0]} channels in and {channels[1]} out; allowed: 'epsilon' (the "
            f"noise) with 1 or 3 in and as many out"
        )
    chosen = {name: schedule[name] for name in SCHEDULE if name in schedule}
    purifier = DiffusionPurifier(plain(config), channels[0], 1, plain(chosen), **settings)
    purifier.unet.load_state_dict(unet.state_dict())
    return purifier.eval()


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them: lists in place of tuples."""

    def of(value: Any) -> Any:
        return [of(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {name: of(value) for name, value in settings.items()}
