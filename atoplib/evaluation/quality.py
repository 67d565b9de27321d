"""What an accuracy does not say: the purified images beside the clean ones, and classified by networks that
the purifier never met; how far a perturbation comes through."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.decisions import fixed_sample, full_float32, reseed
from atoplib.evaluation.results import percents
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
    metrics = {
        "psnr": float(peak_signal_noise_ratio(picture, clean, data_range=1.0, dim=(1, 2, 3))),
        "ssim": float(structural_similarity_index_measure(picture, clean, data_range=1.0)),
    }
    for name, predicted in answers.items():
        metrics |= dict(
            zip(
                (name, f"{name}_low", f"{name}_high"),
                percents(int((predicted == labels).sum()), len(labels)),
                strict=True,
            )
        )
    return metrics


@torch.no_grad()
def purified_distance(
    pipeline: AToPPipeline,
    clean: Float[Tensor, "batch 3 height width"],
    adversarial: Float[Tensor, "batch 3 height width"],
    *,
    seed: int = 0,
    max_batch: int = 256,
) -> float:
    """Mean absolute difference of g(t(clean)) and g(t(adversarial)) over images, pixels and channels, in
    1/255.

    Both get the same sample of t, so that only the perturbation tells them apart: 0 where nothing of it
    survives.
    """
    total = 0.0
    pairs = zip(clean.split(max_batch), adversarial.split(max_batch), strict=True)
    for number, (one, other) in enumerate(pairs):
        with fixed_sample(pipeline, seed + number):
            total += float((pipeline.purify(one) - pipeline.purify(other)).abs().sum(dtype=torch.float64))
    return 255 * total / clean.numel()
