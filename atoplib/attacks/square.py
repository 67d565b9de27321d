"""Square: random search with squares, through logits alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.norms import check_ball
from atoplib.attacks.pgd import StepCallback
from atoplib.attacks.queries import can_hold, mean_margin, new_seed, still_standing
from atoplib.verdicts import STANDING, Verdict, is_random

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of pixels is halved after so many of 10,000 queries (Andriushchenko et al. 2020, supplement B)."""


@dataclass(frozen=True)
class SquareSettings:
    """Square attack (Andriushchenko et al. 2020).

    Attributes:
        eps: radius of the ball, in units of the image ([0, 1]).
        norm: ``linf`` or ``l2``.
        queries: values asked for each image, at least 1. The first is the image's own, the second that of the stripes or
            tiles from which the search starts.
        first_share: share p of the pixels that the first squares cover, in (0, 1]; 0.8 as in AutoAttack.
        eot_samples: draws of the model that each value is averaged over, at least 1.
        verdict: by which an image counts as broken and leaves; asked only where the mean margin says so.
        ask_again: of a random model, the value of the best point so far is measured anew after so many queries: the
            best of many noisy values is too good, and nothing would ever be accepted again. Not counted; 0: never. A model
            whose dice can be held (``fixed_draws``, as an ``AToPPipeline`` has) is asked in every query instead, with the
            candidate's own draws: the difference of two points is then seen through the noise.
        schedule: queries that the published schedule of shares, made for 10,000, is stretched over; None: ``queries``.
            10,000 is the schedule as published, of which AutoAttack runs the first 5,000 queries.
    """

    eps: float
    norm: str = "linf"
    queries: int = 5000
    first_share: float = 0.8
    eot_samples: int = 1
    verdict: Verdict = Verdict(STANDING, num_draws=10)
    ask_again: int = 20
    schedule: int | None = None

    def __post_init__(self) -> None:
        check_ball(self.eps, self.norm)
        if self.queries < 1 or self.eot_samples < 1:
            raise ValueError(f"queries and eot_samples must be at least 1, got {self.queries} and {self.eot_samples}")
        if not 0 < self.first_share <= 1:
            raise ValueError(f"first_share must lie in (0, 1], got {self.first_share}")
        if self.schedule is not None and self.schedule < 1:
            raise ValueError(f"schedule must be at least 1 (or None: queries), got {self.schedule}")
        if self.ask_again < 0:
            raise ValueError(f"ask_again must be 0 (never) or more, got {self.ask_again}")


def share_of_pixels(query: int, settings: SquareSettings) -> float:
    """The share p that the squares of query number ``query`` (from 1) cover, by the settings' schedule."""
    position = int(query / (settings.schedule or settings.queries) * 10_000)
    return settings.first_share / 2 ** sum(position > limit for limit in HALVINGS)


def square(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: SquareSettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by random search; each image has squares of its own, and leaves once it is broken.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. No gradient is asked for.
        images: in [0, 1].
        labels: true classes.
        generator: of stripes, places and signs, on the images' device.
        max_batch: copies of images (images x draws) that are in memory at once.
        callback: (query, queries, adversarial, margin of each image) after every query.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``pgd``.

    Source: Andriushchenko et al. 2020, algorithms 1 to 3.
    """
    model, images, labels = check_attack(model, images, labels)
    random = (settings.ask_again > 0 or can_hold(model)) and is_random(model, images, max_batch=max_batch)
    held = random and can_hold(model)
    first, propose = (_stripes, _squares) if settings.norm == "linf" else (_tiles, _pairs)

    def value(points: Tensor, targets: Tensor, seed: int | None = None) -> Tensor:
        how = {"eot_samples": settings.eot_samples, "max_batch": max_batch, "seed": seed}
        return mean_margin(model, points, targets, **how)

    adversarial = images.detach().clone()
    margins = torch.full((len(images),), -torch.inf, device=images.device)
    active = torch.arange(len(images), device=images.device)
    for query in range(1, settings.queries + 1):
        points, origin, targets = adversarial[active], images[active], labels[active]
        if random and not held and settings.ask_again and query % settings.ask_again == 0:
            margins[active] = value(points, targets)
        if query == 1:
            candidates = origin  # what is misread as it is needs no attack
        elif query == 2:
            candidates = first(origin, settings.eps, generator)
        else:
            share = share_of_pixels(query, settings)
            candidates = propose(points, origin, settings.eps, share, generator)
        if held and query > 2:
            seed = new_seed(generator, images.device)
            found, margins[active] = value(candidates, targets, seed), value(points, targets, seed)
        else:
            found = value(candidates, targets)
        better = found > margins[active] if query != 2 else torch.ones_like(targets, dtype=torch.bool)
        points = torch.where(better.view(-1, 1, 1, 1), candidates, points)
        adversarial[active] = points
        margins[active] = torch.where(better, found, margins[active])
        if callback is not None:
            callback(query, settings.queries, adversarial.clone(), margins.clone())
        suspects = better & (margins[active] > 0)
        active = active[still_standing(model, points, targets, suspects, settings.verdict, max_batch=max_batch)]
        if len(active) == 0:
            break
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial


def _signs(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=device) * 2.0 - 1


def _windows(
    images: Tensor, side: int, generator: torch.Generator | None
) -> tuple[Int[Tensor, "batch height 1"], Int[Tensor, "batch 1 width"], Bool[Tensor, "batch 1 height width"]]:
    """A window of side x side pixels at a place of its own in each image: row and column within it, and where it is."""
    batch, _, height, width = images.shape
    top = torch.randint(height - side + 1, (batch, 1, 1), generator=generator, device=images.device)
    left = torch.randint(width - side + 1, (batch, 1, 1), generator=generator, device=images.device)
    rows = torch.arange(height, device=images.device).view(1, -1, 1) - top
    columns = torch.arange(width, device=images.device).view(1, 1, -1) - left
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return rows, columns, inside[:, None]


def _side(images: Tensor, share: float, smallest: int = 1) -> int:
    """Edge of a square that covers ``share`` of an image."""
    height, width = images.shape[2:]
    return min(max(round((share * height * width) ** 0.5), smallest), height, width)


def _stripes(images: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """linf start: vertical stripes of +-eps, one pixel wide."""
    batch, channels, _, width = images.shape
    return (images + eps * _signs((batch, channels, 1, width), generator, images.device)).clamp(0, 1)


def _squares(points: Tensor, images: Tensor, eps: float, share: float, generator: torch.Generator | None) -> Tensor:
    """linf: one square of each image becomes +-eps, one sign a channel (algorithm 2)."""
    batch, channels = images.shape[:2]
    *_, inside = _windows(images, _side(images, share), generator)
    signs = _signs((batch, channels, 1, 1), generator, images.device)
    return torch.where(inside, (images + eps * signs).clamp(0, 1), points)


def _hill(height: int, width: int, device: torch.device) -> Float[Tensor, "height width"]:
    """A pyramid over a rectangle, of l2 norm 1: sum of 1 / k^2 over the rings that reach a pixel (section 3.4)."""
    rings = max(height, width) // 2 + 1
    heights = (1 / torch.arange(rings, 0, -1, device=device) ** 2.0).cumsum(dim=0).flip(0)
    rows = (torch.arange(height, device=device) - height // 2).abs()
    columns = (torch.arange(width, device=device) - width // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :])
    values = heights[distance]
    return values / values.norm()


def _hill_and_valley(side: int, device: torch.device) -> Float[Tensor, "side side"]:
    """A hill over the upper half of a square and a valley over the lower one, of l2 norm 1."""
    upper = _hill(side // 2, side, device)
    pattern = torch.cat([upper, -_hill(side - side // 2, side, device)])
    return pattern / pattern.norm()


def _to_sphere(perturbation: Tensor, eps: float) -> Tensor:
    return perturbation * (eps / perturbation.flatten(1).norm(dim=1).clamp_min(1e-12)).view(-1, 1, 1, 1)


def _tiles(images: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """l2 start: five by five tiles, each a hill beside a valley of a random direction and sign (supplement B)."""
    batch, channels, height, width = images.shape
    side = max(2, min(height, width) // 5)
    down, across = height // side, width // side
    pattern = _hill_and_valley(side, images.device)
    turned = torch.randint(2, (batch, 1, down, across, 1, 1), generator=generator, device=images.device).bool()
    tiles = torch.where(turned, pattern.T, pattern) * _signs((batch, channels, down, across, 1, 1), generator, images.device)
    tiles = tiles.transpose(3, 4).reshape(batch, channels, down * side, across * side)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    perturbation = torch.zeros_like(images)
    perturbation[:, :, top : top + down * side, left : left + across * side] = tiles
    return (images + _to_sphere(perturbation, eps)).clamp(0, 1)


def _pairs(points: Tensor, images: Tensor, eps: float, share: float, generator: torch.Generator | None) -> Tensor:
    """l2: one window of each image hands its norm, and what eps leaves over, to another one (algorithm 3)."""
    batch, channels = images.shape[:2]
    side = _side(images, share, smallest=min(3, *images.shape[2:]))
    rows, columns, inside = _windows(images, side, generator)
    *_, emptied = _windows(images, side, generator)
    old = points - images

    def energy(part: Tensor, dim: tuple[int, ...]) -> Tensor:
        return part.square().sum(dim=dim, keepdim=True)

    pattern = _hill_and_valley(side, images.device)
    turned = torch.randint(2, (batch, 1, 1), generator=generator, device=images.device).bool()
    rows, columns = rows.clamp(0, side - 1), columns.clamp(0, side - 1)
    new = torch.where(turned, pattern[columns, rows], pattern[rows, columns])[:, None]
    kept = old * inside
    new = new * _signs((batch, channels, 1, 1), generator, images.device)
    new = (new + kept / energy(kept, (2, 3)).sqrt().clamp_min(1e-12)) * inside
    free = (eps**2 - energy(old, (1, 2, 3))).clamp_min(0)
    moved = energy(old * (inside | emptied), (1, 2, 3))
    new = new / energy(new, (2, 3)).sqrt().clamp_min(1e-12) * ((free + moved) / channels).sqrt()
    perturbation = torch.where(inside, new, torch.where(emptied, 0.0, old))
    return (images + _to_sphere(perturbation, eps)).clamp(0, 1)
