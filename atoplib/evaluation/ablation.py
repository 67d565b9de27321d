"""Ablation without training: the same purifier under other random transforms and averages, each attacked as
it then is.

An average over masks is inside the pipeline that is attacked (``AToPPipeline(copies=...)``), so that no row
is judged by an attack on another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.decisions import correct, fixed_sample
from atoplib.evaluation.measure import evaluate
from atoplib.evaluation.protocols import Protocol, Row
from atoplib.evaluation.results import named_percents, percents
from atoplib.hashing import json_hash
from atoplib.pipeline import AToPPipeline
from atoplib.progress import Report
from atoplib.transforms import Transform


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
        name, own = self.transform.name, self.transform
        rate = {"none": 0.0, "rt3": 1 / own.num_masks}.get(name, own.missing_rate)
        noise = own.noise_std if name in ("rt2", "rt3") else 0.0
        return {"transform": name, "missing_rate": rate, "noise_std": noise, "num_masks": self.num_masks}


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
    """
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
        run_dir: each setting's evaluation is kept in a folder of it; the same call goes on there.
        progress: called with steps of the attacks done and in all.

    Returns:
        a row a setting and defence: ``defence``, ``transform``, ``missing_rate``, ``noise_std``,
        ``num_masks``, ``average``, ``images``, ``num_samples``, ``passes`` of the attack on an image;
        ``clean`` and ``robust``, accuracy of one sample (the mean over ``num_samples``) in percent with 95 %
        Wilson intervals over the images (``clean_low``, ...); ``distance`` between the purified clean and
        adversarial images, in 1/255; ``seconds``.

    Raises:
        ValueError: as ``evaluate``.
    """
    rows, settings = [], list(dict.fromkeys(settings))
    for number, setting in enumerate(settings):

        def report(done: int, total: int, *_: Any, number: int = number) -> None:
            if progress is not None:
                progress(steps * number + steps * done // total, steps * len(settings), "steps")

        models = {
            name: AToPPipeline(
                setting.transform,
                own.purifier,
                own.classifier,
                copies=setting.copies,
                average=average,
                seed=seed,
            ).eval()
            for name, own in pipelines.items()
        }
        samples, patience = equal_cost(setting.num_masks, eot_samples, early_stop)
        pgd = {"steps": steps, "alpha": alpha, "eot_samples": samples, "early_stop": patience}
        at_once = max(1, max_batch // setting.num_masks)
        found = evaluate(
            models,
            images,
            labels,
            protocol=Protocol("ablation", "one attack", (Row("pgd", options=pgd),), votes=num_samples),
            eps={norm: eps},
            norm=norm,
            seed=seed,
            max_batch=at_once,
            run_dir=run_dir and run_dir / json_hash([list(pipelines), repr(setting), average]),
            keep_images=True,
            progress=report,
        )
        frame = found.frame[found.frame["rule"] == "single"].set_index(["defence", "attack"])
        for name, model in models.items():
            robust, count = frame.loc[(name, "PGD")], len(labels)
            row = {"defence": name, **setting.describe(), "average": average, "images": count}
            row |= {"num_samples": robust["votes"], "passes": robust["passes"]}
            for attack, what in (("clean", "clean"), ("PGD", "robust")):
                row |= named_percents(what, frame.loc[(name, attack), "sample_mean"] / 100 * count, count)
            adversarial = found.adversarial(name, "PGD").to(images.device)
            row["distance"] = purified_distance(model, images, adversarial, seed=seed + 1, max_batch=at_once)
            rows.append(row | {"seconds": frame.loc[name, "seconds"].sum()})
    return pd.DataFrame(rows)


def equal_cost(num_masks: int, eot_samples: int, early_stop: int) -> tuple[int, int]:
    """EOT samples and early stop of an attack on an average over ``num_masks`` at about the cost of one on a
    single mask.

    Such an average takes M passes a sample, and its gradient is already a mean over M. So it gets 1/M of the
    samples, but at least two (one would not say whether an image is always wrong), and an image leaves only
    after as many misclassified samples in a row as elsewhere.
    """
    samples = max(min(2, eot_samples), eot_samples // num_masks)
    return samples, ceil(early_stop * eot_samples / samples)


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
    parts = clean.split(max_batch), adversarial.split(max_batch)
    for number, (one, other) in enumerate(zip(*parts, strict=True)):
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
    for rule, count in product(rules, counts):
        groups = logits[: len(logits) // count * count].unflatten(0, (-1, count))
        right = sum(float(correct(group, labels, rule).sum()) for group in groups) / len(groups)
        rows.append([rule, count, *percents(right, len(labels))])
    return pd.DataFrame(rows, columns=["rule", "num_samples", "accuracy", "low", "high"])
