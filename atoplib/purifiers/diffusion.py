"""DiffPure: drown the perturbation in noise, then let a diffusion model go back to an image.

Nie et al. 2022, "Diffusion Models for Adversarial Purification", arXiv 2205.07460. The network is a
``UNet2DModel`` of the library diffusers, an optional extra that is imported only when such a purifier is
built.
"""

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atoplib.parameters import above, at_least, between, check_settings, one_of
from atoplib.purifiers.gated import check_size

# What the U-Net is where nothing else is asked for: grey digits of 32 px, folded by 4.
SMALL_UNET: Mapping[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "add_attention": False,
}
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def _import_diffusers() -> tuple[type, type]:
    """``UNet2DModel`` and ``DDPMScheduler`` of the library diffusers, which takes seconds to import."""
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"purifier 'diffusion' needs: pip install 'diffusers>=0.30' ({error})") from error
    return UNet2DModel, DDPMScheduler


def _make_unet(config: Mapping[str, Any]) -> nn.Module:
    """A fresh ``UNet2DModel``; blocks without attention where ``config`` names none."""
    count = len(config["block_out_channels"])
    blocks = {f"{way}_block_types": (f"{way.capitalize()}Block2D",) * count for way in ("down", "up")}
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return _import_diffusers()[0](**{**blocks, **tuples})


def signal_levels(config: Mapping[str, Any]) -> Float[Tensor, " levels"]:
    """The fraction of an image's variance left after 0, 1, ..., T steps of noise (alpha bar), float64 on the
    CPU.

    Args:
        config: of diffusers' ``DDPMScheduler``; only what is in ``SCHEDULE`` is used.

    Raises:
        ValueError: for too many steps. NotImplementedError: of diffusers, for an unknown schedule.

    Source: Ho et al. 2020, section 2, equation 4.
    """
    chosen = {name: config[name] for name in SCHEDULE if name in config}
    check_settings(num_train_timesteps=(chosen.get("num_train_timesteps", 1000), between(1, 100_000)))
    with torch.device("cpu"):  # a module that is built on the meta device needs its settings, too
        betas = _import_diffusers()[1](**chosen).betas.double()
    return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 - betas).cumprod(0)])


def noised(
    images: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    level: Float[Tensor, "batch 1 1 1"] | float,
) -> Float[Tensor, "batch channels height width"]:
    """sqrt(level) * x + sqrt(1 - level) * n, images on [-1, 1], ``noise`` standard normal.

    Args:
        level: alpha bar, one for all images or one an image.

    Source: Ho et al. 2020, equation 4; Nie et al. 2022, equation 4.
    """
    return level**0.5 * images + (1 - level) ** 0.5 * noise


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

    eta = 1 is ancestral sampling, as in DDPM (exactly so from a level to the one before it), eta = 0 is DDIM,
    which is deterministic. What is predicted of the clean image is not clipped: a clip would hide gradients
    from an attack.

    Args:
        predicted: the noise that the network predicts for ``noisy``.
        noise: standard normal, needed where the step is random.

    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16.
    """
    spread = eta * sqrt((1 - next_level) / (1 - level) * (1 - level / next_level))
    clean = (noisy - sqrt(1 - level) * predicted) / sqrt(level)
    result = sqrt(next_level) * clean + sqrt(max(0.0, 1 - next_level - spread**2)) * predicted
    return result if spread == 0 else result + spread * noise


class DiffusionPurifier(nn.Module):
    """DiffPure: noise up to t*, then ``steps`` steps of denoising back to an image; all of it has a gradient.

    It destroys the perturbation by itself, so it goes with the transform ``none`` (what a mask hides is
    mid-grey to it). Its noise is part of the pipeline's sample, ``noise_planes`` standard normal planes for
    each image, so that an attack and an evaluation control it as they do masks and noise.
    ``pretraining_loss`` is its own: a U-Net that predicts noise.

    Args:
        unet: settings of diffusers' ``UNet2DModel`` that differ from ``SMALL_UNET``. Its channels follow from
            ``channels`` and ``fold``.
        channels: 3, or 1 for grey images: the colours are averaged on the way in and alike on the way out.
        fold: edge of the squares of pixels that are folded into channels before the U-Net; 1 where it was
            trained elsewhere.
        schedule: settings of diffusers' ``DDPMScheduler`` that differ from its own, ``SCHEDULE``.
        t_star: how far the noise goes, as a fraction of the schedule's steps, in (0, 1].
        steps: of the way back; each is one pass through the U-Net.
        eta: 1 for DDPM's random steps, 0 for DDIM's, in [0, 1].
        checkpointing: keep only the images between the steps for the gradient and compute the rest again: the
            memory of one step instead of all, for a third more time.

    Raises:
        ImportError: without the optional extra.
        ValueError: for settings that are not allowed.

    Source: Nie et al. 2022, section 3.1 (equations 4 and 5), with the steps of Song et al. 2021 for the way
    back.
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
        check_settings(
            channels=(channels, one_of(1, 3)), fold=(fold, at_least(1)), t_star=(t_star, above(0, 1)),
            eta=(eta, between(0, 1)),
        )  # fmt: skip
        planes = {"in_channels": channels * fold**2, "out_channels": channels * fold**2}
        levels = signal_levels(schedule or {})
        farthest = round(t_star * (len(levels) - 1))
        check_settings(steps=(steps, between(1, farthest)))  # as many as there are noise levels up to t_star
        self.unet = _make_unet({**SMALL_UNET, **(unet or {}), **planes})
        self.register_buffer("levels", levels.float(), persistent=False)
        self.times = [round(farthest * (steps - step) / steps) for step in range(steps + 1)]
        self.path = levels[self.times].tolist()
        self.channels, self.fold, self.steps, self.eta = channels, fold, steps, eta
        self.checkpointing = checkpointing
        self.options = json.loads(json.dumps({
            "unet": unet or {}, "schedule": schedule or {}, "channels": channels, "fold": fold,
            "t_star": t_star, "steps": steps, "eta": eta, "checkpointing": checkpointing,
        }))  # fmt: skip

    @property
    def noise_planes(self) -> int:
        """Planes of noise for each image: the first for the way there, one (of each channel) for every random
        step back."""
        return self.channels * (self.steps if self.eta else 1)  # the last step is never random

    def predict(
        self, noisy: Float[Tensor, "batch channels height width"], times: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The noise that the U-Net predicts for images after ``times`` (1..T) steps of it."""
        folded = F.pixel_unshuffle(noisy, self.fold)
        # Diffusers counts from 0.
        return F.pixel_shuffle(self.unet(folded, times - 1).sample.to(noisy.dtype), self.fold)

    def _step_back(self, noisy: Tensor, step: int, noise: Tensor | None) -> Tensor:
        """Step ``step`` of the way back."""
        times = torch.full((len(noisy),), self.times[step], device=noisy.device)
        level, next_level = self.path[step], self.path[step + 1]
        return reverse_step(noisy, self.predict(noisy, times), level, next_level, eta=self.eta, noise=noise)

    def forward(
        self, inputs: Float[Tensor, "batch 5 height width"], noise: Float[Tensor, "batch planes height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Purify: RGB in [-1, 1] (and a plane of ones and a mask, which it ignores) -> RGB, about in [-1, 1].

        Args:
            noise: standard normal, ``noise_planes`` planes an image, its own for each.

        Raises:
            ValueError: for a size that the U-Net cannot halve.
        """
        first, *others = noise.split(self.channels, dim=1)
        state = noised(self._prepared(inputs[:, :3]), first, self.path[0])
        for step in range(self.steps):
            arguments = state, step, others[step] if step < len(others) else None
            if self.checkpointing and torch.is_grad_enabled():
                state = checkpoint(self._step_back, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self._step_back(*arguments)
        return state.expand(-1, 3, -1, -1)

    def pretraining_loss(
        self,
        images: Float[Tensor, "batch 3 height width"],
        times: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the predicted noise.

        Args:
            images: on [-1, 1].
            times: uniform in [0, 1): how far each image goes through the whole schedule.
            noise: standard normal.

        Raises ValueError as ``forward`` does. Source: Ho et al. 2020, equation 14 (L_simple).
        """
        noise = noise[:, : self.channels]
        steps = (times * (len(self.levels) - 1)).long() + 1
        noisy = noised(self._prepared(images), noise, self.levels[steps].view(-1, 1, 1, 1))
        return (self.predict(noisy, steps) - noise).square().mean()

    def _prepared(self, images: Tensor) -> Tensor:
        """Images as the U-Net takes them, in colour or the mean of the colours; ValueError for a size that it
        cannot fold and halve."""
        check_size(images, self.fold * 2 ** (len(self.unet.config["block_out_channels"]) - 1))
        return images if self.channels == 3 else images.mean(dim=1, keepdim=True)


def load_diffusers(
    source: str | Path, *, local_files_only: bool = True, **settings: Any
) -> DiffusionPurifier:
    """A purifier around a diffusion model that diffusers saved, in eval mode.

    Args:
        source: a folder as ``DDPMPipeline.save_pretrained`` writes it (``unet/`` and ``scheduler/``, or both
            configurations side by side), or a name on the hub.
        local_files_only: never download: a name on the hub must be in the local cache. False downloads what
            is missing.
        settings: of ``DiffusionPurifier``: ``t_star``, ``steps``, ``eta``, ``checkpointing``.

    Returns:
        the purifier; its ``options`` are those for ``checkpoints.save``.

    Raises:
        ImportError: without the optional extra.
        ValueError: for a model that predicts anything but the noise of images with 1 or 3 channels.
        OSError: if there is no such model, no ``scheduler_config.json``, or only weights that would have to
            be unpickled.
    """
    unet_class, scheduler_class = _import_diffusers()
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
            f"{source} predicts {kind!r} with {channels[0]} channels in and {channels[1]} out; allowed: "
            "'epsilon' (the noise) with 1 or 3 in and as many out"
        )
    chosen = {name: schedule[name] for name in SCHEDULE if name in schedule}
    purifier = DiffusionPurifier(config, channels[0], 1, chosen, **settings)
    purifier.unet.load_state_dict(unet.state_dict())
    return purifier.eval()
