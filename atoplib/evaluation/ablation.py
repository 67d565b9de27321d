"""Ablation without training: the same purifier under other random transforms and averages, each attacked as it then is.

A ``Setting`` says what is changed, a ``Cell`` what was measured of it. An average over masks is inside the pipeline that is
attacked (``AveragedPipeline``), so that no cell is judged by an attack on another one.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks import PGDSettings, pgd
from atoplib.checkpoints import write_json
from atoplib.evaluation.store import attack_seed, hashed, verdict_seed
from atoplib.fingerprints import code_hash, environment, model_fingerprint, tensor_fingerprint
from atoplib.pipeline import AToPPipeline, AveragedPipeline
from atoplib.progress import Report
from atoplib.runs import read_json
from atoplib.transforms import TransformSettings
from atoplib.verdicts import draw_logits, is_random, reseed, right_by, wilson_interval

FEWEST_EOT_SAMPLES = 2
"""Of a gradient through an average over many masks: with one draw, nothing would say whether an image is always wrong."""
VOTES = ("majority", "worst_of_n")


@dataclass(frozen=True)
class Setting:
    """What is changed of a pipeline when it is used, its weights as they are.

    Attributes:
        transform: in place of the one that the purifier was trained with.
        copies: independent draws (mask and noise) that are averaged inside.
        average: ``images`` or ``logits``, see ``AveragedPipeline``.
    """

    transform: TransformSettings
    copies: int = 1
    average: str = "images"

    @property
    def num_masks(self) -> int:
        """Masks that one image passes: those of RT3's partition, else the copies."""
        return self.copies * (self.transform.num_masks if self.transform.name == "rt3" else 1)

    @property
    def missing_rate(self) -> float:
        """Share of the patches that each mask misses."""
        rates = {"none": 0.0, "rt3": 1 / self.transform.num_masks}
        return rates.get(self.transform.name, self.transform.missing_rate)

    @property
    def noise_std(self) -> float:
        """Sigma of the noise that is really added, images in [0, 1]."""
        return self.transform.noise_std if self.transform.name in ("rt2", "rt3") else 0.0

    def applied_to(self, pipeline: AToPPipeline) -> AveragedPipeline:
        """The pipeline with this setting, in eval mode; it shares the networks of the one given."""
        parts = self.transform, pipeline.purifier, pipeline.classifier
        return AveragedPipeline(*parts, copies=self.copies, average=self.average, seed=pipeline.seed).eval()


@dataclass(frozen=True)
class Vote:
    """Accuracy by a vote over so many draws, a share with its 95 % interval; ``attack`` is ``clean`` or ``white-box``."""

    verdict: str
    draws: int
    attack: str
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """What was measured of one setting of one defence.

    Attributes:
        defence: its name.
        transform, missing_rate, noise_std, num_masks, average: the setting.
        images, draws, eot_samples: images, draws of each verdict, draws of each gradient (of a whole average each).
        distance: between the purified clean and the purified adversarial image under the same dice: mean absolute
            difference over pixels and channels, in 1/255.
        input_distance: the same before purification.
        clean, robust: accuracy of one draw (the mean over ``draws``) without and under PGD + EOT through this very
            pipeline, shares; ``_low`` and ``_high``: 95 % Wilson interval over the images.
        seconds: all of it.
        votes: accuracy against the number of draws, where it was asked for.
    """

    defence: str
    transform: str
    missing_rate: float
    noise_std: float
    num_masks: int
    average: str
    images: int
    draws: int
    eot_samples: int
    distance: float
    input_distance: float
    clean: float
    clean_low: float
    clean_high: float
    robust: float
    robust_low: float
    robust_high: float
    seconds: float
    votes: tuple[Vote, ...] = ()


def mask_surface(
    base: TransformSettings,
    *,
    missing_rates: Sequence[float],
    mask_counts: Sequence[int],
    partitions: Sequence[int],
    average: str = "images",
) -> list[Setting]:
    """The settings of missing rate x number of masks.

    Args:
        base: RT1 or RT2; its noise and grid hold for all.
        missing_rates, mask_counts: every combination of them, averaged over so many independent masks.
        partitions: numbers N of RT3's masks, each missing 1/N of the patches.

    Raises:
        ValueError: if ``base`` has no masks of its own, or for a value that ``TransformSettings`` refuses.
    """
    if base.name not in ("rt1", "rt2"):
        raise ValueError(f"masks can be averaged for rt1 and rt2, not for {base.name!r}; RT3's are the partitions")
    averaged = [
        Setting(replace(base, missing_rate=rate), copies, average) for rate in missing_rates for copies in mask_counts
    ]
    return averaged + [Setting(replace(base, name="rt3", num_masks=count), 1, average) for count in partitions]


def noise_sweep(base: TransformSettings, noise_stds: Sequence[float], average: str = "images") -> list[Setting]:
    """The settings of a sweep over the noise level (RT2 and RT3), everything else as in ``base``; one mask an image."""
    return [Setting(replace(base, noise_std=noise_std), 1, average) for noise_std in noise_stds]


def attack_on(setting: Setting, attack: PGDSettings) -> PGDSettings:
    """The attack on a setting at about the same cost: its ``eot_samples`` count passes through the purifier.

    An average over M masks takes M passes a draw, and its gradient is already a mean over M. So it gets 1/M of the draws,
    but at least ``FEWEST_EOT_SAMPLES``, and an image leaves only after as many wrong draws in a row as elsewhere.
    """
    samples = max(min(FEWEST_EOT_SAMPLES, attack.eot_samples), attack.eot_samples // setting.num_masks)
    patience = ceil(attack.stop_after * attack.eot_samples / samples)
    return replace(attack, eot_samples=samples, stop_after=patience)


@torch.no_grad()
def purified_distance(
    pipeline: AToPPipeline,
    clean: Float[Tensor, "batch 3 height width"],
    adversarial: Float[Tensor, "batch 3 height width"],
    *,
    seed: int = 0,
    max_batch: int = 256,
) -> float:
    """Mean absolute difference of g(t(clean)) and g(t(adversarial)) over images, pixels and channels, in 1/255.

    Both see the same dice, so that only the perturbation tells them apart: 0 where nothing of it survives.

    Args:
        clean, adversarial: the same images in [0, 1], without and with perturbation.
        seed: of the dice.
        max_batch: images at once.
    """
    total = 0.0
    parts = zip(clean.split(max_batch), adversarial.split(max_batch), strict=True)
    for number, (one, other) in enumerate(parts):
        with pipeline.fixed_draws(verdict_seed(seed, number)):
            total += float((pipeline.purify(one) - pipeline.purify(other)).abs().sum(dtype=torch.float64))
    return 255 * total / clean.numel()


def vote_curve(
    logits: Float[Tensor, "draws batch classes"], labels: Int[Tensor, " batch"], counts: Sequence[int], *, attack: str
) -> list[Vote]:
    """Accuracy by each of ``VOTES`` over n draws, for every n in ``counts``: the mean over the groups of n that there are.

    Raises:
        ValueError: for a count beyond the number of draws.
    """
    votes = []
    for verdict in VOTES:
        for count in counts:
            if not 1 <= count <= len(logits):
                raise ValueError(f"a vote takes 1 to {len(logits)} draws here, got {count}")
            groups = logits[: len(logits) // count * count].unflatten(0, (-1, count))
            right = sum(float(right_by(group, labels, verdict).sum()) for group in groups) / len(groups)
            interval = wilson_interval(right, len(labels))
            votes.append(Vote(verdict, count, attack, right / len(labels), *interval))
    return votes


def measure_cell(
    defence: str,
    pipeline: AToPPipeline,
    setting: Setting,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    attack: PGDSettings,
    *,
    num_draws: int = 5,
    vote_counts: Sequence[int] = (),
    seed: int = 0,
    max_batch: int = 256,
    callback: Callable[[int, int], None] | None = None,
) -> Cell:
    """Attack a pipeline in one setting, and measure it clean and attacked.

    Args:
        defence: the name in the cell.
        pipeline: gives the networks, in eval mode; its own transform does not count.
        images, labels: in [0, 1]; true classes; on the pipeline's device.
        attack: PGD; its ``eot_samples`` are passes through the purifier, see ``attack_on``.
        num_draws: draws of a verdict.
        vote_counts: numbers of draws to vote over; so many draws are made as the largest asks for.
        max_batch: passes through the purifier that are in memory at once.
        callback: (step, steps) of the attack.

    Raises:
        ValueError: as ``attacks.pgd``, or for num_draws < 1.
    """
    started = time.monotonic()
    defended = setting.applied_to(pipeline)
    at_once = max(1, max_batch // setting.num_masks)
    random = is_random(defended, images, max_batch=at_once)
    chosen = attack_on(setting, attack) if random else replace(attack, eot_samples=1)
    reseed(defended, attack_seed(seed, 0))
    generator = torch.Generator(images.device).manual_seed(attack_seed(seed, 0))
    report = None if callback is None else lambda step, steps, *_: callback(step, steps)
    adversarial = pgd(defended, images, labels, chosen, generator=generator, max_batch=at_once, callback=report)

    draws = max([num_draws, *vote_counts]) if random else 1
    logits = {}
    for name, shown in (("clean", images), ("white-box", adversarial)):
        reseed(defended, verdict_seed(seed, 0))
        logits[name] = draw_logits(defended, shown, num_draws=draws, max_batch=at_once)
    right = {name: float((drawn.argmax(dim=2) == labels).sum()) / draws for name, drawn in logits.items()}
    clean, robust = (wilson_interval(count, len(labels)) for count in right.values())
    counts = [count for count in vote_counts if count <= draws]
    return Cell(
        defence=defence,
        transform=setting.transform.name,
        missing_rate=setting.missing_rate,
        noise_std=setting.noise_std,
        num_masks=setting.num_masks,
        average=setting.average,
        images=len(labels),
        draws=draws,
        eot_samples=chosen.eot_samples,
        distance=purified_distance(defended, images, adversarial, seed=seed, max_batch=at_once),
        input_distance=255 * float((images - adversarial).abs().mean()),
        clean=right["clean"] / len(labels),
        clean_low=clean[0],
        clean_high=clean[1],
        robust=right["white-box"] / len(labels),
        robust_low=robust[0],
        robust_high=robust[1],
        seconds=time.monotonic() - started,
        votes=tuple(vote for name, drawn in logits.items() for vote in vote_curve(drawn, labels, counts, attack=name)),
    )


def ablate(
    pipelines: Mapping[str, AToPPipeline],
    settings: Iterable[Setting],
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    attack: PGDSettings,
    *,
    num_draws: int = 5,
    vote_counts: Sequence[int] = (),
    seed: int = 0,
    max_batch: int = 256,
    directory: Path | None = None,
    progress: Report | None = None,
) -> dict[tuple[str, Setting], Cell]:
    """Measure every defence in every setting, and in the one that it was trained in (that one with its votes).

    Args:
        pipelines: by name, in eval mode.
        settings: a setting that stands there twice is measured once.
        vote_counts: numbers of draws to vote over, for the setting of the training.
        directory: where finished cells are kept; the same call goes on there. None keeps nothing.
        progress: called with steps of the attacks done and in all.

    Returns:
        cells by defence and setting. Other arguments and errors as ``measure_cell``.
    """
    shared = {"attack": asdict(attack), "draws": num_draws, "seed": seed, "max_batch": max_batch}
    shared |= {"images": tensor_fingerprint(images), "labels": tensor_fingerprint(labels)}
    shared |= {"code": code_hash("atoplib.evaluation.ablation"), "environment": environment(images.device)}
    wanted = {
        (name, setting): tuple(vote_counts) if setting == Setting(pipeline.transform) else ()
        for name, pipeline in pipelines.items()
        for setting in dict.fromkeys([Setting(pipeline.transform), *settings])
    }
    cells = {}
    for number, ((name, setting), counts) in enumerate(wanted.items()):

        def report(step: int, steps: int, number: int = number) -> None:
            if progress is not None:
                progress(attack.steps * number + attack.steps * step // steps, attack.steps * len(wanted), "steps", {})

        pipeline = pipelines[name]
        identity = {**shared, "defence": name, "votes": counts, "model": model_fingerprint(setting.applied_to(pipeline))}
        path = None if directory is None else directory / f"cell-{hashed(repr(identity)):016x}.json"
        cell = None if path is None else read_cell(path)
        if cell is None:
            cell = measure_cell(
                name,
                pipeline,
                setting,
                images,
                labels,
                attack,
                num_draws=num_draws,
                vote_counts=counts,
                seed=seed,
                max_batch=max_batch,
                callback=report,
            )
            if path is not None:
                write_json(path, asdict(cell))
        cells[name, setting] = cell
        report(1, 1)
    return cells


def read_cell(path: Path) -> Cell | None:
    """A cell that was kept, None where there is none or it is damaged."""
    content: dict[str, Any] = read_json(path) or {}
    try:
        return Cell(**{**content, "votes": tuple(Vote(**vote) for vote in content["votes"])})
    except (KeyError, TypeError):
        return None
