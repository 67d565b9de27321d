"""What the masking checks share: attacks on one model and its images, all under the same random numbers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import pgd
from atoplib.attacks.norms import Ball
from atoplib.decisions import Model, fixed_sample, full_float32, reseed, sample_logits

SPREAD = 3.0  # of an ordinary network's logits: cross-entropy neither saturates nor is linear


def smooth_margin(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log-sum-exp of the other logits minus the label's: as smooth as cross-entropy, but it never
    saturates."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    logits = logits.float()
    return logits.masked_fill(own, -inf).logsumexp(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


class Attackable(nn.Module):
    """A model as an attack needs it, however it hides: logits of a given spread (their scale decides nothing,
    so it shall change no check), that depend on the images; with ``repaired``, a gradient that is zero where
    the model gives none that is finite: an attack then stays where it is."""

    def __init__(self, model: Model, spread: float, repaired: bool = True) -> None:
        super().__init__()
        self.model, self.factor, self.repaired = model, SPREAD / spread, repaired
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        images = images.view_as(images)
        if self.repaired and images.requires_grad:
            images.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        return self.model(images).float() * self.factor + 0 * images.flatten(1).sum(dim=1, keepdim=True)


@dataclass
class Probe:
    """One model and its images, with what every attack on them shares."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    attack: dict[str, Any]  # of pgd
    num_samples: int  # of a decision
    random: bool
    seed: int
    max_batch: int

    def __post_init__(self) -> None:
        self.eps, self.norm = self.attack["eps"], self.attack["norm"]
        # the norm of a change of every value by 1
        self.widest = 1.0 if self.norm == "linf" else sqrt(self.images[0].numel())
        self.spread = spread_of(self.answers(self.model, self.images))
        self.can_be_fixed = torch.equal(*(self.answers(self.model, self.images) for _ in range(2)))

    def start_random_numbers(self, seed: int) -> None:
        """Every random number that a model may use, from ``seed``."""
        torch.manual_seed(seed)
        reseed(self.model, seed)

    @contextmanager
    def same_sample(self) -> Iterator[None]:
        """The same random numbers in each such block."""
        self.start_random_numbers(self.seed)
        with fixed_sample(self.model, self.seed):
            yield

    @torch.no_grad()
    def answers(self, model: Model, images: Tensor) -> Tensor:
        """Logits (batch, classes) of one sample that all such calls share."""
        with self.same_sample(), full_float32(images.device):
            return torch.cat([model(part).float() for part in images.split(self.max_batch)])

    def run(
        self,
        *,
        function: Callable[..., Tensor] = pgd,
        target: Model | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> Tensor:
        """Adversarial images by the main attack with ``changes``, or by another ``function``, on ``target``
        (the model itself if None)."""
        seed = self.seed if seed is None else seed
        spread = self.spread if target is None else spread_of(self.answers(target, self.images))
        attackable = Attackable(self.model if target is None else target, spread)
        self.start_random_numbers(seed)
        own = self.attack if function is pgd else {k: self.attack[k] for k in ("eps", "norm", "eot_samples")}
        options = {**own, "seed": seed, "max_batch": self.max_batch, **changes}
        found = function(attackable, self.images, self.labels, **options)
        Ball(self.images, options["eps"], self.norm).check(found)
        return found

    def logits(self, images: Tensor, seed: int) -> Tensor:
        self.start_random_numbers(seed)
        return sample_logits(self.model, images, num_samples=self.num_samples, max_batch=self.max_batch)

    def wrong(self, images: Tensor) -> Tensor:
        """Misclassified samples an image; the same random numbers for every attack."""
        return (self.logits(images, self.seed + 1).argmax(dim=2) != self.labels).sum(dim=0)

    def hardest(self, candidates: Iterable[Tensor]) -> Tensor:
        """Of several perturbations, each image's most harmful, by random numbers that no decision uses."""
        best, reached = self.images, torch.full((len(self.images),), -inf, device=self.images.device)
        for images in candidates:
            logits = self.logits(images, self.seed + 2) * (SPREAD / self.spread)
            gained = torch.stack([smooth_margin(sample, self.labels) for sample in logits]).mean(dim=0)
            best = torch.where((gained > reached).view(-1, 1, 1, 1), images, best)
            reached = torch.maximum(gained, reached)
        return best


def spread_of(logits: Float[Tensor, "batch classes"]) -> float:
    """The standard deviation of an image's logits over the classes, in the mean over the images; 1 where it
    is zero."""
    return float(logits.float().std(dim=1).mean()) or 1.0
