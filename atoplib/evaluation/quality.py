"""Is it still a purifier? Its images beside the clean ones, and classified by networks that it never met."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.decisions import full_float32, reseed
from atoplib.evaluation.results import named_percents
from atoplib.pipeline import AToPPipeline


@torch.no_grad()
def purification_quality(
    pipeline: AToPPipeline,
    images: Float[Tensor, "batch 3 height width"],
    clean: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    classifiers: Mapping[str, nn.Module],
    seed: int = 0,
    max_batch: int = 256,
) -> dict[str, float]:
    """PSNR and SSIM of g(t(images)) against ``clean``, and how many of them each classifier gets right; one
    sample an image.

    A purifier that was trained against a classifier must stay a purifier: its PSNR near that of AP, and its
    gain visible to a classifier of another architecture, never seen in fine-tuning.

    Args:
        pipeline: in eval mode.
        images: what is purified, clean or adversarial, in [0, 1].
        clean: the same images without perturbation.
        classifiers: by name, in eval mode, images in [0, 1] -> logits.

    Returns:
        ``psnr`` (dB) and ``ssim`` (Wang et al. 2004; at most 1), means over the images; for each classifier
        its accuracy in percent under its name, with the 95 % interval as ``NAME_low`` and ``NAME_high``.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    reseed(pipeline, seed)
    with full_float32(images.device):
        purified = torch.cat([pipeline.purify(part) for part in images.split(max_batch)]).float()
        parts = purified.split(max_batch)
        answers = {name: torch.cat([f(x).argmax(dim=1) for x in parts]) for name, f in classifiers.items()}
    picture = purified.clamp(0, 1)  # what a person sees; classifiers get what the pipeline hands to its own
    found = {
        "psnr": float(peak_signal_noise_ratio(picture, clean, data_range=1.0, dim=(1, 2, 3))),
        "ssim": float(structural_similarity_index_measure(picture, clean, data_range=1.0)),
    }
    for name, predicted in answers.items():
        found |= named_percents(name, int((predicted == labels).sum()), len(labels))
    return found
