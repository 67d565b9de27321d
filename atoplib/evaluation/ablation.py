"""Ablation without training: the same purifier under other random transforms and averages, each attacked as
it then is.

An average over masks is inside the pipeline that is attacked (``AToPPipeline(copies=...)``), so that no row
is judged by an attack on another one.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks import pgd
from atoplib.decisions import correct, fixed_sample, is_random, reseed, sample_logits, wilson_interval
from atoplib.files import read_json, write_json
from atoplib.hashing import code_hash, environment, json_hash, model_hash, tensor_hash
from atoplib.pipeline import AToPPipeline
from atoplib.progress import Report
from atoplib.transforms import Transform

FEWEST_EOT_SAMPLES = 2
"""Of a gradient through an average over many masks: with one sample, nothing would say whether an image is
always wrong."""


COLUMNS = (
    *("defence", "transform", "missing_rate", "noise_std", "num_masks", "average"),
    *("images", "num_samples", "eot_samples", "clean", "clean_low", "clean_high"),
    *("robust", "robust_low", "robust_high", "distance", "input_distance", "seconds"),
)


class Setting(NamedTuple):
    """What is changed of a pipeline when it is used, its weights as they are: its transform, and over how
    many samples of it (mask and noise) it averages inside."""

    transform: Transform
    copies: int = 1

    @property
    def num_masks(self) -> int:
        """Masks that one image passes: those of RT3's partition, else the copies."""
        return self.copies * (self.transform.num_masks if self.transform.name == "rt3" else 1)

    def describe(self) -> dict[str, Any]:
        """As columns of a frame: ``transform``, ``missing_rate``, ``noise_std`` (as it is really added) and
        ``num_masks``."""
        transform = self.transform
        rate = {"none": 0.0, "rt3": 1 / transform.num_masks}.get(transform.name, transform.missing_rate)
        noise_std = transform.noise_std if transform.name in ("rt2", "rt3") else 0.0
        row = {"transform": transform.name, "missing_rate": rate, "noise_std": noise_std}
        return row | {"num_masks": self.num_masks}


def mask_grid(
    base: Transform,
    missing_rates: Sequence[float],
    mask_counts: Sequence[int],
    partitions: Sequence[int] = (),
) -> list[Setting]:
    """The settings of missing rate x number of masks.

    Args:
        base: RT1 or RT2; its noise and grid hold for all.
        missing_rates, mask_counts: every combination of them, averaged over so many independent masks.
        partitions: numbers N of RT3's masks, each missing 1/N of the patches.

    Raises:
        ValueError: if ``base`` has no masks of its own, or for a value that ``Transform`` refuses.
    """
    if base.name not in ("rt1", "rt2"):
        raise ValueError(
            f"masks can be averaged for rt1 and rt2, not for {base.name!r}; RT3's are the partitions"
        )
    averaged = [
        Setting(replace(base, missing_rate=rate), copies) for rate in missing_rates for copies in mask_counts
    ]
    return averaged + [Setting(replace(base, name="rt3", num_masks=count)) for count in partitions]


def ablate(
    pipelines: Mapping[str, AToPPipeline],
    settings: Sequence[Setting],
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 20,
    alpha: float | None = None,
    eot_samples: int = 8,
    early_stop: int = 3,
    num_samples: int = 5,
    average: str = "images",
    seed: int = 0,
    max_batch: int = 256,
    run_dir: Path | None = None,
    progress: Report | None = None,
) -> pd.DataFrame:
    """Attack every pipeline in every setting by PGD + EOT through this very setting, and measure it clean and
    attacked.

    Args:
        pipelines: by name, in eval mode; they give the networks.
        settings: one that is there twice is measured once.
        images, labels: in [0, 1]; true classes; on the pipelines' device.
        eps, norm, steps, alpha, early_stop: as in ``attacks.pgd``.
        eot_samples: passes through the purifier that each gradient is averaged over, see ``equal_cost``.
        num_samples: samples of a decision where the setting is random.
        average: of several copies, ``images`` or ``logits``.
        max_batch: passes through the purifier that are in memory at once.
        run_dir: where finished rows are kept; the same call goes on there. None keeps nothing.
        progress: called with steps of the attacks done and in all.

    Returns:
        a row a defence and setting: ``defence``, ``transform``, ``missing_rate``, ``noise_std``,
            ``num_masks``, ``average``,
        ``images``, ``num_samples``, ``eot_samples``; ``clean`` and ``robust``, accuracy of one sample (the
        mean over ``num_samples``) in percent with 95 % Wilson intervals over the images (``clean_low``, ...);
        ``distance`` between the purified clean and adversarial images and ``input_distance`` before
        purification, in 1/255; ``seconds``.

    Raises:
        ValueError: as ``attacks.pgd``.
    """
    attack = {"eps": eps, "norm": norm, "steps": steps, "alpha": alpha, "seed": seed}
    options = {"eot_samples": eot_samples, "early_stop": early_stop, "num_samples": num_samples}
    options["max_batch"] = max_batch
    shared = {**attack, **options, "images": tensor_hash(images), "labels": tensor_hash(labels)}
    shared |= {"code": code_hash(__name__), "environment": environment(images.device)}
    wanted = [(name, setting) for name in pipelines for setting in dict.fromkeys(settings)]
    rows = []
    for number, (name, setting) in enumerate(wanted):

        def report(step: int, of: int, *_: Any, number: int = number) -> None:
            if progress is not None:
                progress(steps * number + steps * step // of, steps * len(wanted), "steps")

        networks = pipelines[name].purifier, pipelines[name].classifier
        kwargs = {"copies": setting.copies, "average": average, "seed": seed}
        model = AToPPipeline(setting.transform, *networks, **kwargs).eval()
        facts = {"defence": name, **setting.describe(), "average": average}
        key = json_hash({**shared, **facts, "setting": repr(setting), "model": model_hash(model)})
        path = None if run_dir is None else run_dir / f"row-{key}.json"
        row = None if path is None else read_json(path)
        if row is None:
            row = facts | _measure(
                model, setting.num_masks, images, labels, attack, **options, callback=report
            )
            if path is not None:
                write_json(path, row)
        rows.append(row)
        report(1, 1)
    return pd.DataFrame(rows, columns=COLUMNS)


def equal_cost(num_masks: int, eot_samples: int, early_stop: int) -> tuple[int, int]:
    """EOT samples and early stop of an attack on an average over ``num_masks`` at about the cost of one on a
    single mask.

    Such an average takes M passes a sample, and its gradient is already a mean over M. So it gets 1/M of the
    samples, but at least ``FEWEST_EOT_SAMPLES``, and an image leaves only after as many misclassified samples
    in a row as elsewhere.
    """
    samples = max(min(FEWEST_EOT_SAMPLES, eot_samples), eot_samples // num_masks)
    return samples, ceil(early_stop * eot_samples / samples)


def _measure(
    model: AToPPipeline,
    num_masks: int,
    images: Tensor,
    labels: Tensor,
    attack: dict[str, Any],
    *,
    eot_samples: int,
    early_stop: int,
    num_samples: int,
    max_batch: int,
    callback: Any = None,
) -> dict[str, Any]:
    started, seed = time.monotonic(), attack["seed"]
    at_once = max(1, max_batch // num_masks)
    random = is_random(model, images, max_batch=at_once)
    eot_samples, early_stop = equal_cost(num_masks, eot_samples, early_stop) if random else (1, early_stop)
    samples = num_samples if random else 1
    reseed(model, seed)
    cost = {"eot_samples": eot_samples, "early_stop": early_stop, "max_batch": at_once}
    adversarial = pgd(model, images, labels, **attack, **cost, callback=callback)
    row = {"images": len(labels), "num_samples": samples, "eot_samples": eot_samples}
    for name, shown in (("clean", images), ("robust", adversarial)):
        reseed(model, seed + 1)  # random numbers that the attack has not seen, the same for both
        logits = sample_logits(model, shown, num_samples=samples, max_batch=at_once)
        count = float((logits.argmax(dim=2) == labels).sum()) / samples
        low, high = wilson_interval(count, len(labels))
        row |= {name: 100 * count / len(labels), f"{name}_low": 100 * low, f"{name}_high": 100 * high}
    row["distance"] = purified_distance(model, images, adversarial, seed=seed + 1, max_batch=at_once)
    row["input_distance"] = 255 * float((images - adversarial).abs().mean())
    return {**row, "seconds": time.monotonic() - started}


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
    parts = zip(clean.split(max_batch), adversarial.split(max_batch), strict=True)
    for number, (one, other) in enumerate(parts):
        with fixed_sample(pipeline, seed + number):
            total += float((pipeline.purify(one) - pipeline.purify(other)).abs().sum(dtype=torch.float64))
    return 255 * total / clean.numel()


def vote_curve(
    logits: Float[Tensor, "samples batch classes"],
    labels: Int[Tensor, " batch"],
    counts: Sequence[int],
    rules: Sequence[str] = ("majority", "worst_of_n"),
) -> pd.DataFrame:
    """Accuracy in percent by each rule over n samples, for every n in ``counts``: the mean over the groups of
    n there are.

    Returns:
        columns ``rule``, ``num_samples``, ``accuracy``, ``low``, ``high``.

    Raises:
        ValueError: for a count beyond the number of samples.
    """
    if not all(1 <= count <= len(logits) for count in counts):
        raise ValueError(f"a vote takes 1 to {len(logits)} samples here, got {list(counts)}")
    rows = []
    for rule in rules:
        for count in counts:
            groups = logits[: len(logits) // count * count].unflatten(0, (-1, count))
            right = sum(float(correct(group, labels, rule).sum()) for group in groups) / len(groups)
            percents = [100 * share for share in (right / len(labels), *wilson_interval(right, len(labels)))]
            rows.append([rule, count, *percents])
    return pd.DataFrame(rows, columns=["rule", "num_samples", "accuracy", "low", "high"])
