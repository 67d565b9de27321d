"""Is it still a purifier? Its pictures beside the clean ones, and read by a classifier that it never saw."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.pipeline import AToPPipeline
from atoplib.verdicts import full_float32, reseed, wilson_interval


@dataclass(frozen=True)
class Quality:
    """What a purifier made of some images, against the clean ones.

    Attributes:
        psnr: peak signal-to-noise ratio in dB, the mean over the images.
        ssim: structural similarity (Wang et al. 2004), at most 1, the mean over the images.
        accuracy: by classifier, the share of purified images that it reads correctly; low, high: its 95 % interval.
    """

    psnr: float
    ssim: float
    accuracy: dict[str, tuple[float, float, float]]


@torch.no_grad()
def purification_quality(
    pipeline: AToPPipeline,
    shown: Float[Tensor, "batch 3 height width"],
    clean: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    readers: dict[str, nn.Module],
    seed: int = 0,
    max_batch: int = 256,
) -> Quality:
    """PSNR and SSIM of g(t(shown)) against ``clean``, and what each of ``readers`` reads in it; one draw an image.

    A purifier that was trained against a classifier must stay a purifier: its PSNR near that of AP, and its gain visible
    to a classifier of another architecture, never seen in fine-tuning.

    Args:
        pipeline: in eval mode.
        shown: what goes in, clean or adversarial, in [0, 1].
        clean: the same images without perturbation.
        readers: classifiers by name, in eval mode, images in [0, 1] -> logits.

    Raises:
        ValueError: for shapes that differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if shown.shape != clean.shape:
        raise ValueError(f"the images shown and the clean ones differ in shape: {tuple(shown.shape)}, {tuple(clean.shape)}")
    reseed(pipeline, seed)
    with full_float32(shown.device):
        purified = torch.cat([pipeline.purify(part) for part in shown.split(max_batch)]).float()
    picture = purified.clamp(0, 1)  # what a person sees; readers get what the pipeline hands to its classifier
    every = (1, 2, 3)
    psnr = peak_signal_noise_ratio(picture, clean, data_range=1.0, dim=every)
    ssim = structural_similarity_index_measure(picture, clean, data_range=1.0)
    accuracy = {}
    for name, reader in readers.items():
        with full_float32(shown.device):
            read = torch.cat([reader(part).argmax(dim=1) for part in purified.split(max_batch)])
        right = int((read == labels).sum())
        accuracy[name] = (right / len(labels), *wilson_interval(right, len(labels)))
    return Quality(float(psnr), float(ssim), accuracy)
