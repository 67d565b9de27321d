"""Certified l2 radii by randomized smoothing (Cohen, Rosenfeld, Kolter 2019).

RT2 and RT3 begin with x + n, n ~ N(0, sigma^2) for each pixel and channel, a new n in each draw. Clip, mask, purifier and
classifier only ever read x + n; the mask does not depend on it. So the majority vote over infinitely many draws is Cohen's
smoothed classifier with all that follows as its base classifier, which may be random (their theorem 1), and the radius
sigma * Phi^-1(p_A) holds for it. It is a statement about that vote; the vote over a few draws only estimates it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.attacks.checks import require_eval_mode
from atoplib.progress import Report
from atoplib.transforms import TransformSettings
from atoplib.verdicts import Model, full_float32, wilson_interval


@dataclass(frozen=True)
class SmoothingSettings:
    """How an image is certified (Cohen et al. 2019, section 3.2, CERTIFY).

    Attributes:
        noise_std: sigma of the noise, images in [0, 1]; must be the model's own.
        n0: draws that choose the class, at least 1.
        n: further draws that bound its probability, at least 1; 100,000 in the paper, 1,000 for a first look. All of them
            right certify sigma * Phi^-1(alpha^(1/n)), no more: 2.46 sigma for 1,000 draws, 3.81 sigma for 100,000.
        alpha: probability, in (0, 1/2), that the certificate of an image is wrong.
        max_batch: copies of images that are in memory at once.
        stop_hopeless: leave an image once no outcome of its remaining draws could certify it; the result is the same.
    """

    noise_std: float
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    max_batch: int = 512
    stop_hopeless: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.noise_std < float("inf"):
            raise ValueError(f"noise_std must be above 0, got {self.noise_std}: nothing is certified without noise")
        for name in ("n0", "n", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 1/2), got {self.alpha}; 0.001 is usual")
        if self.alpha ** (1 / self.n) <= 0.5:
            fewest = floor(log(self.alpha) / log(0.5)) + 1
            raise ValueError(f"{self.n} draws certify nothing at alpha {self.alpha}: n must be at least {fewest}")


class Certificates(NamedTuple):
    """What holds for each image, wrong with probability at most alpha each.

    Attributes:
        classes: the smoothed model's class within the radius; the most frequent one where it abstained.
        radii: l2, in units of the image ([0, 1]); 0 where it abstained. Float64.
        abstained: no class could be shown to have more than half of the probability.
    """

    classes: Int[Tensor, " batch"]
    radii: Float[Tensor, " batch"]
    abstained: Bool[Tensor, " batch"]


class CertifiedPoint(NamedTuple):
    """Certified accuracy at an l2 radius, with its 95 % interval over the images (Wilson)."""

    radius: float
    accuracy: float
    low: float
    high: float


class NoisyInput(nn.Module):
    """f(x + n), n ~ N(0, noise_std^2): gives noise to a classifier that has none of its own, so that it can be certified.

    Args:
        classifier: any module (B, 3, H, W) -> logits; it reads x + n without a clip.
        noise_std: sigma, images in [0, 1].
        seed: of the module's own dice.
    """

    def __init__(self, classifier: nn.Module, noise_std: float, *, seed: int = 0) -> None:
        super().__init__()
        if not 0 < noise_std < float("inf"):
            raise ValueError(f"noise_std must be above 0, got {noise_std}")
        self.classifier = classifier
        self.noise_std = noise_std
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the dice anew."""
        self.seed = seed
        self._generator: torch.Generator | None = None

    def extra_repr(self) -> str:
        return f"noise_std={self.noise_std}"

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        if self._generator is None or self._generator.device != images.device:
            self._generator = torch.Generator(images.device).manual_seed(self.seed)
        noise = torch.randn(images.shape, generator=self._generator, device=images.device)
        return self.classifier(images + self.noise_std * noise)


def input_noise(model: nn.Module) -> float:
    """sigma of the normal noise that a model adds to its input before anything else: an AToPPipeline, a NoisyInput.

    A pipeline that averages k draws in a pass reads k noises, and so k times a perturbation: together it is sqrt(k) times as
    long, as if a single noise were sigma / sqrt(k), which is returned.

    Raises:
        ValueError: for RT1, no transform or sigma 0, which certify nothing; for a module that does not tell its noise.
    """
    if isinstance(model, NoisyInput):
        return model.noise_std
    transform = getattr(model, "transform", None)
    if not isinstance(transform, TransformSettings):
        raise ValueError(
            f"{type(model).__name__} does not say how much noise it adds to its input, so no radius is known for it: "
            f"give an AToPPipeline with rt2 or rt3, or wrap a classifier without noise as NoisyInput(classifier, noise_std)"
        )
    if transform.name not in ("rt2", "rt3") or transform.noise_std == 0:
        raise ValueError(
            f"the transform {transform.name!r} with noise_std {transform.noise_std} adds no noise to the image: "
            f"only rt2 and rt3 with noise_std above 0 can be certified"
        )
    return transform.noise_std / getattr(model, "copies", 1) ** 0.5


def lower_bound(successes: ArrayLike, trials: int, alpha: float) -> NDArray[np.float64]:
    """One-sided lower confidence bound of a share, at level 1 - alpha (Clopper & Pearson 1934); 0 for no success.

    Raises:
        ValueError: unless 0 <= successes <= trials, trials >= 1 and 0 < alpha < 1.
    """
    successes = np.asarray(successes, dtype=np.float64)
    if trials < 1 or not ((successes >= 0) & (successes <= trials)).all():
        raise ValueError(f"successes must lie in 0..trials and trials be at least 1, got {successes} of {trials}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    return np.where(successes == 0, 0.0, betaincinv(np.maximum(successes, 1), trials - successes + 1, alpha))


def count_votes(
    model: Model, images: Float[Tensor, "batch 3 height width"], num_draws: int, *, max_batch: int = 512
) -> Int[Tensor, "batch classes"]:
    """How often each image is given each class in ``num_draws`` draws; logits are counted at once and never kept.

    Raises:
        ValueError: where logits are not finite.
    """
    index = torch.arange(num_draws * len(images), device=images.device) % len(images)
    votes, finite = None, torch.ones((), dtype=torch.bool, device=images.device)
    for part in index.split(max_batch):
        with full_float32(images.device):
            logits = model(images[part])
        finite &= torch.isfinite(logits).all()
        if votes is None:
            votes = torch.zeros(len(images), logits.shape[1], dtype=torch.int64, device=images.device)
        votes.index_add_(0, part, F.one_hot(logits.argmax(dim=1), logits.shape[1]))
    if votes is None:
        raise ValueError("there are no images, or no draws, to count votes of")
    if not finite:
        raise ValueError("the model returns logits that are not finite; their vote means nothing")
    return votes


@torch.no_grad()
def certify(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    settings: SmoothingSettings,
    *,
    progress: Report | None = None,
) -> Certificates:
    """Class and certified l2 radius of each image, for the majority vote of a model that adds noise to its input.

    Images are independent of each other: a caller who wants to stop and go on certifies them batch by batch, with
    ``verdicts.reseed(model, seed + number of the batch)`` before each.

    Args:
        model: an ``AToPPipeline`` with RT2 or RT3, or a ``NoisyInput``; in eval mode.
        images: in [0, 1].
        progress: called with draws an image done and in all, and the share of images that may still be certified.

    Raises:
        ValueError: for a model in train mode, without noise, with other noise than ``settings.noise_std``, with fixed
            draws, or with logits that are not finite; for images outside [0, 1].

    Source: Cohen et al. 2019, section 3.2 (CERTIFY), theorem 1; Clopper & Pearson 1934.
    """
    _check(model, images, settings)
    n, device = settings.n, images.device
    classes = count_votes(model, images, settings.n0, max_batch=settings.max_batch).argmax(dim=1)
    needed = int((lower_bound(np.arange(n + 1), n, settings.alpha) <= 0.5).sum())  # n + 1: out of reach with n draws
    right = torch.zeros(len(images), dtype=torch.int64, device=device)
    active = torch.arange(len(images), device=device)
    done = 0
    while done < n and len(active):
        draws = min(n - done, max(1, settings.max_batch // len(active)))
        votes = count_votes(model, images[active], draws, max_batch=settings.max_batch)
        right[active] += votes.gather(1, classes[active].unsqueeze(1)).squeeze(1)
        done += draws
        hopeful = done - right[active] <= n - needed
        if settings.stop_hopeless:
            active = active[hopeful]
        if progress is not None:
            progress(done if len(active) else n, n, "draws", {"certifiable": int(hopeful.sum()) / len(images)})
    bounds = torch.from_numpy(lower_bound(right.cpu().numpy(), n, settings.alpha))
    abstained = bounds <= 0.5
    radii = torch.where(abstained, 0.0, settings.noise_std * torch.special.ndtri(bounds))
    return Certificates(classes, radii.to(device), abstained.to(device))


def certified_accuracy(
    certificates: Certificates, labels: Int[Tensor, " batch"], radii: Sequence[float]
) -> tuple[CertifiedPoint, ...]:
    """The share of images that are right and stay right under every perturbation of l2 norm up to each radius.

    An abstention counts as an error. The interval is about the choice of the images; that each certificate may be wrong
    with probability alpha is not in it.

    Args:
        certificates: of images with these ``labels``; batches of them can be joined by ``torch.cat`` field by field.
        radii: l2, in units of the image ([0, 1]), at least 0 each.

    Raises:
        ValueError: for no image, labels of another number, no radius, or a negative one.
    """
    if not len(labels) or len(labels) != len(certificates.classes):
        raise ValueError(f"{len(certificates.classes)} certificates, but {len(labels)} labels; give one each, at least one")
    if not len(radii) or not min(radii) >= 0:
        raise ValueError(f"radii must be at least 0 each, and at least one be given; got {list(radii)}")
    correct = (certificates.classes == labels) & ~certificates.abstained
    held = torch.where(correct, certificates.radii, 0.0).cpu().numpy()
    counts = [int((held > radius).sum()) for radius in radii]
    points = zip(radii, counts, strict=True)
    return tuple(CertifiedPoint(r, count / len(held), *wilson_interval(count, len(held))) for r, count in points)


def _check(model: nn.Module, images: Tensor, settings: SmoothingSettings) -> None:
    require_eval_mode(model)
    noise_std = input_noise(model)
    if noise_std != settings.noise_std:
        raise ValueError(f"the model's noise_std is {noise_std}, the settings say {settings.noise_std}: they must agree")
    if len(images) == 0:
        raise ValueError("there are no images to certify")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1] without NaN, got values from {low:.4g} to {high:.4g}")
    if not isinstance(model, NoisyInput) and torch.equal(model.draw(images[:1]).noise, model.draw(images[:1]).noise):
        raise ValueError("the model's draws are fixed, and one draw again and again certifies nothing: leave fixed_draws")
