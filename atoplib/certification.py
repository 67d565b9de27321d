"""Certified l2 radii by randomized smoothing (Cohen, Rosenfeld, Kolter 2019).

RT2 and RT3 begin with x + n, n ~ N(0, sigma^2) for each pixel and channel, a new n in each sample. Clip,
mask, purifier and classifier see nothing but x + n; the mask does not depend on it. So the majority vote over
infinitely many samples is Cohen's smoothed classifier with all that follows as its base classifier, which may
be random (their theorem 1), and the radius sigma * Phi^-1(p_A) holds for it. It is a statement about that
vote; the vote over a few samples only estimates it.
"""

from collections.abc import Sequence
from math import floor, inf, log, sqrt
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor, nn

from atoplib.contract import prepare
from atoplib.decisions import reseed, sample_logits
from atoplib.evaluation.results import percents
from atoplib.parameters import above, check_settings
from atoplib.progress import Report
from atoplib.transforms import Transform


class Certificates(NamedTuple):
    """What holds for each image, wrong with probability at most alpha each.

    Attributes:
        classes: the smoothed model's class within the radius; the most frequent one where it abstained.
        radii: l2, in units of the image ([0, 1]); 0 where it abstained (no class could be shown to have more
            than half of the probability). Float64.
    """

    classes: Int[Tensor, " batch"]
    radii: Float[Tensor, " batch"]


class NoisyInput(nn.Module):
    """f(x + n), n ~ N(0, noise_std^2): gives noise to a classifier that has none of its own, so that it can
    be certified.

    Args:
        classifier: any module (B, 3, H, W) -> logits; it is given x + n without a clip.
        noise_std: sigma, images in [0, 1], above 0.
        seed: of the module's own random numbers.
    """

    def __init__(self, classifier: nn.Module, noise_std: float, *, seed: int = 0) -> None:
        super().__init__()
        check_settings(noise_std=(noise_std, above(0)))
        self.classifier, self.noise_std, self.training = classifier, noise_std, classifier.training
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the random numbers anew."""
        self.seed, self._generators = seed, {}

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        if images.device not in self._generators:
            self._generators[images.device] = torch.Generator(images.device).manual_seed(self.seed)
        noise = torch.randn(images.shape, generator=self._generators[images.device], device=images.device)
        return self.classifier(images + self.noise_std * noise)


def input_noise(model: nn.Module) -> float:
    """sigma of the normal noise that a model adds to its input before anything else: an AToPPipeline, a
    NoisyInput.

    A pipeline that averages k samples in a pass adds k noises, and so has k times a perturbation: together it
    is sqrt(k) times as long, as if a single noise were sigma / sqrt(k), which is returned.

    Raises:
        ValueError: for RT1, no transform or sigma 0, which certify nothing; for a module that does not tell
            its noise.
    """
    if isinstance(model, NoisyInput):
        return model.noise_std
    transform = getattr(model, "transform", Transform("none"))
    if transform.name not in ("rt2", "rt3") or transform.noise_std == 0:
        raise ValueError(
            f"{type(model).__name__} does not say how much noise it adds to its input: give a pipeline with "
            f"rt2 or rt3 and noise_std above 0, or wrap a classifier as NoisyInput(classifier, noise_std)"
        )
    return transform.noise_std / sqrt(model.copies)


def lower_bound(successes: int | np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """One-sided lower confidence bound of a proportion, at level 1 - alpha (Clopper & Pearson 1934); 0 for no
    success."""
    return np.where(
        np.equal(successes, 0), 0.0, betaincinv(np.maximum(successes, 1), trials - successes + 1.0, alpha)
    )


@torch.no_grad()
def certify(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    max_batch: int = 512,
    progress: Report | None = None,
) -> Certificates:
    """Class and certified l2 radius of each image, for the majority vote of a model that adds noise to its
    input.

    An image is left once no outcome of its remaining samples could certify it.

    Args:
        model: an ``AToPPipeline`` with RT2 or RT3, or a ``NoisyInput``; in eval mode.
        images: in [0, 1].
        n0: samples that choose the class, at least 1.
        n: further samples that bound its probability; 100,000 in the paper, 1,000 for a first look. All of
            them correct certify sigma * Phi^-1(alpha^(1/n)), no more: 2.46 sigma for 1,000 samples, 3.81
            sigma for 100,000.
        alpha: probability, in (0, 1/2), that the certificate of an image is wrong.
        seed: of the model's random numbers.
        max_batch: copies of images that are in memory at once.
        progress: called with samples an image done and in all, and the share of images that may still be
            certified.

    Raises:
        ValueError: for a model in train mode, without noise, with a fixed sample, or with logits that are not
            finite; for images outside [0, 1]; for a number out of its range.

    Source: Cohen et al. 2019, section 3.2 (CERTIFY), theorem 1; Clopper & Pearson 1934.
    """
    fewest = 1 + floor(log(alpha) / log(0.5)) if 0 < alpha < 0.5 else inf
    if min(n0, max_batch) < 1 or n < fewest:
        raise ValueError(
            f"n0 must be at least 1, max_batch at least 1, alpha in (0, 1/2), and n at least {fewest} (fewer "
            f"samples certify nothing at alpha {alpha}); got n0 {n0}, max_batch {max_batch}, n {n}"
        )
    noise_std = input_noise(model)
    prepare(model, images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
    if not isinstance(model, NoisyInput) and torch.equal(
        model.sample(images[:1]).noise, model.sample(images[:1]).noise
    ):
        raise ValueError(
            "the model's sample is fixed, and one sample over and over certifies nothing: leave fixed_sample"
        )
    reseed(model, seed)
    logits = sample_logits(model, images, num_samples=n0, max_batch=max_batch)
    classes = logits.argmax(dim=2).mode(dim=0).values
    needed = int((lower_bound(np.arange(n + 1), n, alpha) <= 0.5).sum())  # correct samples, of n
    right, active, done = torch.zeros_like(classes), torch.arange(len(images), device=images.device), 0
    while done < n and len(active):
        samples = min(n - done, max(1, max_batch // len(active)))
        logits = sample_logits(model, images[active], num_samples=samples, max_batch=max_batch)
        right[active] += (logits.argmax(dim=2) == classes[active]).sum(dim=0)
        done += samples
        active = active[done - right[active] <= n - needed]
        if progress is not None:
            progress(done if len(active) else n, n, "samples", {"certifiable": len(active) / len(images)})
    bounds = torch.from_numpy(lower_bound(right.cpu().numpy(), n, alpha)).to(images.device)
    return Certificates(classes, torch.where(bounds <= 0.5, 0.0, noise_std * torch.special.ndtri(bounds)))


def certified_accuracy(
    certificates: Certificates, labels: Int[Tensor, " batch"], radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
) -> pd.DataFrame:
    """The share of images that are correct and stay so under every perturbation of l2 norm up to each radius.

    An abstention counts as an error. The interval is about the choice of the images; that each certificate
    may be wrong with probability alpha is not in it.

    Args:
        certificates: of images with these ``labels``.
        radii: l2, in units of the image ([0, 1]), at least 0 each.

    Returns:
        columns ``radius``, ``accuracy``, ``low``, ``high``, in percent, with the 95 % interval of Wilson.

    Raises:
        ValueError: for another number of labels, or a radius that is none.
    """
    if labels.shape != certificates.classes.shape or not all(0 <= radius < inf for radius in radii):
        raise ValueError(
            f"there must be one label for each of {len(certificates.classes)} certificates, and radii of at "
            f"least 0, got labels {tuple(labels.shape)} and radii {list(radii)}"
        )
    held = torch.where(certificates.classes == labels, certificates.radii, 0.0).cpu().numpy()
    return pd.DataFrame(
        [(float(radius), *percents(int((held > radius).sum()), len(held))) for radius in radii],
        columns=["radius", "accuracy", "low", "high"],
    )
