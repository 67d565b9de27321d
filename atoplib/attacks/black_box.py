"""An attack through logits alone: Square, a random search with squares."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from atoplib.attacks.eot import StepCallback
from atoplib.attacks.norms import Ball
from atoplib.attacks.queries import Search, new_seed
from atoplib.decisions import Model, supports_fixed_sample
from atoplib.parameters import above, at_least, check_counts, check_settings, one_of

FIRST_SHARE = 0.8  # of the pixels, that the first squares cover; as in AutoAttack
# The share of pixels is halved after so many of 10,000 queries (Andriushchenko et al. 2020, supplement B).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    queries: int = 5000,
    schedule: int | None = None,
    first_share: float = FIRST_SHARE,
    eot_samples: int = 1,
    ask_again: int = 20,
    rule: str = "any",
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images by random search; each image has squares of its own, and leaves once it is broken.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. No gradient is asked for.
        images: in [0, 1].
        labels: true classes.
        eps: radius in units of the image.
        norm: ``linf`` or ``l2``.
        queries: values asked for each image, at least 1. The first is the image's own, the second that of the
            stripes or tiles from which the search starts.
        schedule: queries that the published schedule of shares, made for 10,000, is stretched over; None:
            ``queries``. 10,000 is the schedule as published, of which AutoAttack runs the first 5,000
            queries.
        first_share: share of the pixels that the first squares cover.
        eot_samples: samples of the model that each value is averaged over, at least 1.
        ask_again: of a random model, the value of the best point so far is measured anew after so many
            queries: the best of many noisy values is too good, and nothing would ever be accepted again. Not
            counted; 0: never. A model with common random numbers (``supports_fixed_sample``) is asked in
            every query instead, with the candidate's own sample: the difference of two points is then seen
            through the noise.
        rule, votes: by which an image counts as broken and leaves; asked only where the mean margin says so.
        targets: class that each image is driven to; None: any other.
        seed: of stripes, places and signs; None: torch's global generator.
        max_batch: copies of images (images x samples) in memory at once.
        callback: (query, queries, adversarial, margin of each image) after every query.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``contract.prepare``; for settings out of range.

    Source: Andriushchenko et al. 2020, algorithms 1 to 3.
    """
    schedule = queries if schedule is None else schedule
    check_settings(
        norm=(norm, one_of("linf", "l2")), ask_again=(ask_again, at_least(0)),
        first_share=(first_share, above(0, 1)),
    )  # fmt: skip
    check_counts(queries=queries, schedule=schedule)
    search = Search(
        model, images, labels, targets=targets, eot_samples=eot_samples, rule=rule, votes=votes, seed=seed,
        max_batch=max_batch,
    )  # fmt: skip
    ball, generator = Ball(search.images, eps, norm), search.generator
    fixed = search.random and supports_fixed_sample(search.model)
    first, propose = (_stripes, _squares) if norm == "linf" else (_tiles, _pairs)
    for query in range(1, queries + 1):
        points, origin, sample = search.adversarial[search.active], search.images[search.active], None
        if search.random and not fixed and ask_again and query % ask_again == 0:
            search.margins[search.active] = search.margin(points)
        if query == 1:
            candidates = origin  # what is misclassified as it is needs no attack
        elif query == 2:
            candidates = first(origin, eps, generator)
        else:
            candidates = propose(
                points, origin, eps, share_of_pixels(query, schedule, first_share), generator
            )
            sample = new_seed(search.model, generator, origin.device) if fixed else None
        margins = search.margin(candidates, sample)
        if sample is not None:
            search.margins[search.active] = search.margin(points, sample)
        search.keep(candidates, margins, torch.ones_like(margins, dtype=torch.bool) if query == 2 else None)
        if callback is not None:
            callback(query, queries, search.adversarial.clone(), search.margins.clone())
        if len(search.active) == 0:
            break
    return ball.check(search.adversarial)


def share_of_pixels(query: int, schedule: int, first_share: float = FIRST_SHARE) -> float:
    """The share of the pixels that the squares of query number ``query`` (from 1) cover."""
    return first_share / 2 ** sum(int(query / schedule * 10_000) > limit for limit in HALVINGS)


def _signs(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=device) * 2.0 - 1


def _windows(
    images: Tensor, side: int, generator: torch.Generator | None
) -> tuple[Int[Tensor, "batch height 1"], Int[Tensor, "batch 1 width"], Bool[Tensor, "batch 1 height width"]]:
    """A window of side x side pixels somewhere in each image: row and column within it, and where it is."""
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


def _squares(
    points: Tensor, images: Tensor, eps: float, share: float, generator: torch.Generator | None
) -> Tensor:
    """linf: one square of each image becomes +-eps, one sign a channel (algorithm 2)."""
    batch, channels = images.shape[:2]
    *_, inside = _windows(images, _side(images, share), generator)
    signs = _signs((batch, channels, 1, 1), generator, images.device)
    return torch.where(inside, (images + eps * signs).clamp(0, 1), points)


def _hill(height: int, width: int, device: torch.device) -> Float[Tensor, "height width"]:
    """A pyramid over a rectangle, of l2 norm 1: sum of 1 / k^2 over the rings that reach a pixel (section
    3.4)."""
    rings = max(height, width) // 2 + 1
    heights = (1 / torch.arange(rings, 0, -1, device=device) ** 2.0).cumsum(dim=0).flip(0)
    rows, columns = ((torch.arange(side, device=device) - side // 2).abs() for side in (height, width))
    values = heights[torch.maximum(rows[:, None], columns)]
    return values / values.norm()


def _hill_and_valley(side: int, device: torch.device) -> Float[Tensor, "side side"]:
    """A hill over the upper half of a square and a valley over the lower one, of l2 norm 1."""
    pattern = torch.cat([_hill(side // 2, side, device), -_hill(side - side // 2, side, device)])
    return pattern / pattern.norm()


def _to_sphere(perturbation: Tensor, eps: float) -> Tensor:
    size = perturbation.flatten(1).norm(dim=1, dtype=torch.float64)  # else a large one leaves the ball
    return perturbation * (eps / size.clamp_min(1e-12)).to(perturbation.dtype).view(-1, 1, 1, 1)


def _tiles(images: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """l2 start: five by five tiles, each a hill beside a valley of a random direction and sign (supplement
    B)."""
    batch, channels, height, width = images.shape
    side = max(2, min(height, width) // 5)
    down, across = height // side, width // side
    pattern = _hill_and_valley(side, images.device)
    turned = _signs((batch, 1, down, across, 1, 1), generator, images.device) > 0
    signs = _signs((batch, channels, down, across, 1, 1), generator, images.device)
    tiles = (torch.where(turned, pattern.T, pattern) * signs).transpose(3, 4)
    tiles = tiles.reshape(batch, channels, down * side, across * side)
    below, beside = height - down * side, width - across * side
    perturbation = F.pad(tiles, (beside // 2, beside - beside // 2, below // 2, below - below // 2))
    return (images + _to_sphere(perturbation, eps)).clamp(0, 1)


def _pairs(
    points: Tensor, images: Tensor, eps: float, share: float, generator: torch.Generator | None
) -> Tensor:
    """l2: one window of each image hands its norm, and what eps leaves over, to another one (algorithm 3)."""
    batch, channels = images.shape[:2]
    side = _side(images, share, smallest=min(3, *images.shape[2:]))
    rows, columns, inside = _windows(images, side, generator)
    *_, emptied = _windows(images, side, generator)
    old, pattern = points - images, _hill_and_valley(side, images.device)
    turned = _signs((batch, 1, 1), generator, images.device) > 0
    rows, columns = rows.clamp(0, side - 1), columns.clamp(0, side - 1)
    new = torch.where(turned, pattern[columns, rows], pattern[rows, columns])[:, None]
    new = new * _signs((batch, channels, 1, 1), generator, images.device)
    new = (new + F.normalize((old * inside).flatten(2), dim=2).view_as(old)) * inside
    free = (eps**2 - old.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0)
    moved = (old * (inside | emptied)).square().sum(dim=(1, 2, 3), keepdim=True)
    new = F.normalize(new.flatten(2), dim=2).view_as(old) * ((free + moved) / channels).sqrt()
    perturbation = torch.where(inside, new, torch.where(emptied, 0.0, old))
    return (images + _to_sphere(perturbation, eps)).clamp(0, 1)
