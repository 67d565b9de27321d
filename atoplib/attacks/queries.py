"""What attacks share: the border, decisions by votes, several attempts in turn, and a search through logits
alone."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from atoplib.attacks.eot import StepCallback, make_generator
from atoplib.attacks.losses import TINY, margin, target_margin
from atoplib.contract import Adapted, prepare
from atoplib.decisions import (
    ANY,
    RULES,
    Model,
    check_finite,
    correct,
    fixed_sample,
    is_random,
    sample_logits,
    supports_fixed_sample,
)
from atoplib.parameters import at_least, check_counts, check_settings, one_of

FINALISTS = 20  # candidates of an image that are compared again
# The steps that it reports at most; (positions of the images to attack, callback) -> adversarial images at
# these positions.
Attempt = tuple[int, Callable[[Tensor, StepCallback | None], Tensor]]


class Finite(Adapted):
    """A model as an attack calls it: ContractError (a ValueError) in every pass whose logits are not finite,
    for such an image has neither a class nor a gradient, and would be taken for one that withstands."""

    def forward(self, images: Float[Tensor, "batch channels height width"], *others: Any) -> Tensor:
        return check_finite(self.network(images, *others)[None])[0]


def prepare_attack(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    targets: Int[Tensor, " batch"] | None = None,
    *,
    differentiable: bool = True,
) -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
    """``contract.prepare``, and a model whose logits are checked in every pass (``Finite``); a function that
    is no module stays as it is. The targets, if any, are the last. ValueError unless each is a class of the
    model and not the image's own."""
    checked = isinstance(model, nn.Module) and not isinstance(model, Finite)
    model, images, labels = prepare(model, images, labels, differentiable=differentiable)
    model = Finite(model) if checked else model
    if targets is not None:
        targets = torch.as_tensor(targets, device=labels.device)
        classes = sample_logits(model, images[:1]).shape[2]
        known = targets.shape == labels.shape and not targets.is_floating_point()
        if not known or int(targets.min()) < 0 or int(targets.max()) >= classes or (targets == labels).any():
            raise ValueError(
                f"targets must be {len(labels)} classes of 0..{classes - 1}, none of them the image's own, "
                f"got {targets} for the labels {labels}"
            )
        targets = targets.long()
    return model, images.detach(), labels, targets


def check_rule(model: Model, images: Tensor, rule: str, votes: int, max_batch: int) -> tuple[bool, int]:
    """Whether the model is random, and the number of votes that a decision needs: one for a deterministic
    model.

    Raises:
        ValueError: for an unknown rule; for a random model that is judged by a single sample, with which
            every image counts as broken once an attack has tried often enough, however weak the attack.
    """
    check_settings(rule=(rule, one_of(ANY, *RULES)), votes=(votes, at_least(1)))
    random = is_random(model, images, max_batch=max_batch)
    if random and (votes < 2 or rule == "single"):
        raise ValueError(
            f"the model is random, but rule {rule!r} with {votes} votes rests on a single sample, which says "
            "little of an image; use several votes, as in rule='any', votes=10"
        )
    return random, votes if random else 1


def broken_samples(
    logits: Float[Tensor, "samples batch classes"],
    labels: Int[Tensor, " batch"],
    targets: Int[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "samples batch"]:
    """Which samples are misclassified; with targets, which are classified as those."""
    return logits.argmax(dim=2) != labels if targets is None else logits.argmax(dim=2) == targets


def broken_by(
    logits: Float[Tensor, "samples batch classes"],
    labels: Int[Tensor, " batch"],
    targets: Int[Tensor, " batch"] | None = None,
    rule: str = ANY,
) -> Bool[Tensor, " batch"]:
    """Which images are misclassified (with targets: classified as their target) by ``rule``."""
    if targets is None:
        return ~correct(logits, labels, rule)
    # what is a success of the model here is one of the attacker
    return correct(logits, targets, {ANY: "worst_of_n", "worst_of_n": ANY}.get(rule, rule))


def broken(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    targets: Int[Tensor, " batch"] | None = None,
    rule: str = ANY,
    votes: int = 1,
    max_batch: int = 256,
) -> Bool[Tensor, " batch"]:
    """``broken_by`` of ``votes`` new samples."""
    return broken_by(
        sample_logits(model, images, num_samples=votes, max_batch=max_batch), labels, targets, rule
    )


def at_rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """``values[rows]``, where there are values."""
    return None if values is None else values[rows]


def strongest_attempt(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    attempts: Sequence[Attempt],
    *,
    rule: str = ANY,
    votes: int = 10,
    targets: Int[Tensor, " batch"] | None = None,
    max_batch: int = 256,
    callback: StepCallback | None = None,
    taken: Callable[[Tensor], None] = id,
) -> Float[Tensor, "batch channels height width"]:
    """Make the attempts one after the other, each on those images alone that are not yet misclassified.

    Args:
        rule, votes: how an image counts as correct: by ``any`` as long as one of so many votes is (the
            strongest choice), or by one of ``decisions.RULES``. A deterministic model gets one vote.
        targets: where given, an image counts as correct until it is classified as its target.
        callback: of all images and the steps of all attempts.
        taken: called with the positions of the images whose last candidates are the best so far.

    Returns:
        for an image that was misclassified, what did it (the image itself where it is wrong); for any other
        the candidate of the fewest correct votes, and among equals that of the largest margin. Candidates are
        compared on fresh votes.

    Raises:
        ValueError: as ``check_rule``.
    """
    random, votes = check_rule(model, images, rule, votes, max_batch)
    samples = partial(sample_logits, model, num_samples=votes, max_batch=max_batch)

    def judge(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each image is still correct, and how near it is to an error: votes lost, then the mean
        margin."""
        aims, many, flat = at_rows(targets, rows), labels[rows].repeat(len(logits)), logits.flatten(0, 1)
        margins = margin(flat, many) if aims is None else target_margin(flat, many, aims.repeat(len(logits)))
        mean = margins.double().unflatten(0, logits.shape[:2]).mean(dim=0)
        lost = broken_samples(logits, labels[rows], aims).double().sum(dim=0)
        return ~broken_by(logits, labels[rows], aims, rule), 2 * lost + mean / (mean.abs() + spread[rows])

    def report(done: int, rows: Tensor, step: int, _steps: int, points: Tensor, losses: Tensor) -> None:
        shown, values = adversarial.clone(), losses.new_zeros(len(images))
        shown[rows], values[rows] = points, losses
        callback(done + step, sum(length for length, _ in attempts), shown, values)

    adversarial, clean, done = images.clone(), samples(images), 0
    spread = clean.double().std(dim=2).mean(dim=0) + TINY  # so that no scale of the logits weighs the margin
    remaining, scores = judge(clean, torch.arange(len(images), device=images.device))
    for number, (length, run) in enumerate(attempts):
        rows = remaining.nonzero().squeeze(1)
        if len(rows) == 0:
            break
        candidates = run(rows, callback and partial(report, done, rows))
        if random and number:  # asked again, so that luck keeps none
            scores[rows] = (scores[rows] + judge(samples(adversarial[rows]), rows)[1]) / 2
        remaining[rows], strength = judge(samples(candidates), rows)
        better = ~remaining[rows] | (strength > scores[rows])
        adversarial[rows] = torch.where(better.view(-1, 1, 1, 1), candidates, adversarial[rows])
        scores[rows] = torch.where(better, strength, scores[rows])
        taken(rows[better])
        done += length
    return adversarial


@torch.no_grad()
def mean_margin(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    targets: Int[Tensor, " batch"] | None = None,
    eot_samples: int = 1,
    max_batch: int = 256,
    seed: int | None = None,
) -> Float[Tensor, " batch"]:
    """Margin of each image, above 0 where it is misclassified (with targets: classified as its target),
    averaged over ``eot_samples`` samples of the model, without any gradient.

    Args:
        seed: of common random numbers: two calls with one seed meet the same samples, so that the difference
            of two points is seen through the noise. For models that ``supports_fixed_sample``; None: new
            samples.
    """
    total = torch.zeros(len(images), device=images.device)
    index = torch.arange(eot_samples * len(images), device=images.device) % max(1, len(images))
    for number, rows in enumerate(index.split(max_batch)):
        # another seed for each part: one seed gives batches of one shape the same samples
        with nullcontext() if seed is None else fixed_sample(model, seed + number):
            logits = model(images[rows])
        gap = margin(logits, labels[rows]) if targets is None else -margin(logits, targets[rows])
        total.index_add_(0, rows, gap.to(total.dtype))
    return total / eot_samples


def new_seed(model: Model, generator: torch.Generator | None, device: torch.device) -> int | None:
    """A seed for ``mean_margin``; None where the model has no sample that can be fixed."""
    if supports_fixed_sample(model):
        return int(torch.randint(2**31, (), generator=generator, device=device))


class Search:
    """A batch under attack through logits alone: each image's best point so far, until votes call it broken.

    Attributes:
        random: whether the model is.
        adversarial, margins: the best points so far, and their mean margins.
        active: positions of the images that are not broken yet.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None,
        eot_samples: int,
        rule: str,
        votes: int,
        seed: int | torch.Generator | None,
        max_batch: int,
    ) -> None:
        check_counts(eot_samples=eot_samples)
        model, images, labels, targets = prepare_attack(model, images, labels, targets, differentiable=False)
        self.model, self.images, self.labels, self.targets = model, images, labels, targets
        self.random, votes = check_rule(model, images, rule, votes, max_batch)
        self.generator = make_generator(seed, images.device)
        self.values = {"eot_samples": eot_samples, "max_batch": max_batch}
        self.decision = {"rule": rule, "votes": votes, "max_batch": max_batch}
        self.adversarial = images.detach().clone()
        self.margins = torch.full((len(images),), -torch.inf, device=images.device)
        self.active = torch.arange(len(images), device=images.device)

    def margin(self, points: Tensor, seed: int | None = None) -> Tensor:
        """``mean_margin`` of points of the active images."""
        labels, targets = self.labels[self.active], at_rows(self.targets, self.active)
        return mean_margin(self.model, points, labels, targets=targets, seed=seed, **self.values)

    def keep(self, points: Tensor, margins: Tensor, better: Tensor | None = None) -> None:
        """Take the points of a larger margin (or those that are ``better``) for the best; let go the images
        that they break."""
        rows = self.active
        better = margins > self.margins[rows] if better is None else better
        self.adversarial[rows] = torch.where(better.view(-1, 1, 1, 1), points, self.adversarial[rows])
        self.margins[rows] = torch.where(better, margins, self.margins[rows])
        self.let_go(better & (margins > 0))

    def let_go(self, suspects: Tensor) -> None:
        """Of the active images those that suspicion falls on, where votes confirm it; the others cost
        nothing."""
        gone, rows = suspects.clone(), self.active[suspects]
        if len(rows) > 0:
            points, targets = self.adversarial[rows], at_rows(self.targets, rows)
            gone[suspects] = broken(self.model, points, self.labels[rows], targets=targets, **self.decision)
        self.active = self.active[~gone]

    def try_all(
        self, candidate: Callable[[int, Tensor], Tensor], count: int, callback: StepCallback | None
    ) -> Float[Tensor, "batch channels height width"]:
        """Of ``count`` candidates, (number, positions of images) -> images in [0, 1], the one of the largest
        mean margin for each image, or the first that breaks it.

        All candidates meet the same samples of a model where these can be fixed (for a batch of one size: the
        best so far meet those of a smaller one anew once an image has left); only what a candidate breaks
        by the mean margin is decided by votes, with new samples. The best of many noisy values is too good:
        of a random model the ``FINALISTS`` of each image are compared again, on votes
        (``strongest_attempt``).
        """
        seed, judged = new_seed(self.model, self.generator, self.images.device), len(self.active)
        values = torch.full((count, len(self.images)), -torch.inf, device=self.images.device)
        for number in range(count):
            if self.random and len(self.active) < judged:
                judged = len(self.active)
                self.margins[self.active] = self.margin(self.adversarial[self.active], seed)
            points = candidate(number, self.active)
            margins = values[number, self.active] = self.margin(points, seed)
            self.keep(points, margins)
            if callback is not None:
                callback(number + 1, count, self.adversarial.clone(), self.margins.clone())
            if len(self.active) == 0:
                break
        left = self.active
        if self.random and count > 1 and len(left):

            def finalist(numbers: Tensor, rows: Tensor, _report: StepCallback | None) -> Tensor:
                points = self.images[left[rows]]
                for number in numbers[rows].unique().tolist():
                    points[numbers[rows] == number] = candidate(number, left[rows][numbers[rows] == number])
                return points

            best = values[:, left].topk(min(FINALISTS, count), dim=0).indices
            self.adversarial[left] = strongest_attempt(
                self.model, self.images[left], self.labels[left],
                [(1, partial(finalist, numbers)) for numbers in best],
                targets=at_rows(self.targets, left), **self.decision,
            )  # fmt: skip
        return self.adversarial
