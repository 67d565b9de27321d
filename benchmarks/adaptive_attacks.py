"""Whether an attack that knows AToP from within beats PGD + EOT on a trained pipeline.

    python -m benchmarks.adaptive_attacks runs/mnist --dataset mnist5k --eps 0.3 [--images 200] [--steps 40] [--eot 10]
    python -m benchmarks.adaptive_attacks pretrained:cifar10 --dataset folder:PATH --eps 8/255 --images 128

Every attack takes the same images, budget, steps, step size (eps / 3 unless given) and draws a gradient; one that starts
warm gives half of its steps to that. An image's accuracy is the share of fresh draws (20) that read its last iterate
correctly, the same draws for every attack. APGD chooses its own steps, and keeps an image once the majority of as many draws
as a gradient has is wrong. The difference from PGD + EOT is paired by image, with its 95 % interval; "the better of both" is
what an attacker has who takes, on each image, the one of the two that hurts more. The result is Markdown on the standard
output.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atoplib import data
from atoplib.attacks import APGDSettings, PGDSettings, apgd
from atoplib.attacks.adaptive import AdaptiveSettings, adaptive
from atoplib.pipeline import AToPPipeline
from atoplib.verdicts import Verdict, draw_logits, reseed
from benchmarks.attack_speed import load
from benchmarks.report import find_device, machine_facts, markdown, positive, radius

DISTANCE = 10.0  # weight of the squared distance of purified images beside the cross-entropy
Z = 1.959964


class Row(NamedTuple):
    """An attack: its name in words, its seconds, and for each image the share of draws that still read it correctly."""

    attack: str
    seconds: float
    right: Tensor


def variants(base: PGDSettings) -> Mapping[str, AdaptiveSettings | APGDSettings]:
    """The attacks by their names in words, PGD + EOT first."""
    half = replace(base, steps=base.steps - base.steps // 2)
    auto = APGDSettings(
        base.eps, base.norm, steps=base.steps, eot_samples=base.eot_samples, verdict=Verdict("majority", base.eot_samples)
    )
    return {
        "PGD + EOT": AdaptiveSettings(base),
        "draws fixed for 5 steps": AdaptiveSettings(base, fixed_for=5),
        "draws fixed throughout": AdaptiveSettings(base, fixed_for=0),
        "margin": AdaptiveSettings(base, cross_entropy=0.0, margin=1.0),
        "cross-entropy + margin": AdaptiveSettings(base, margin=1.0),
        f"cross-entropy + {DISTANCE:g} x distance": AdaptiveSettings(base, distance=DISTANCE),
        "distance alone": AdaptiveSettings(base, cross_entropy=0.0, distance=1.0),
        "warm start from the classifier, half of the steps": AdaptiveSettings(half, warm_steps=base.steps // 2),
        "APGD, cross-entropy": auto,
        "APGD, DLR": replace(auto, loss="dlr"),
    }


def measured(
    name: str,
    settings: AdaptiveSettings | APGDSettings,
    pipeline: AToPPipeline,
    images: Tensor,
    labels: Tensor,
    *,
    num_draws: int,
    max_batch: int,
    seed: int,
) -> Row:
    """Attack, then judge."""
    generator = torch.Generator(images.device).manual_seed(seed)
    reseed(pipeline, seed)
    started = time.perf_counter()
    attack = adaptive if isinstance(settings, AdaptiveSettings) else apgd
    adversarial = attack(pipeline, images, labels, settings, generator=generator, max_batch=max_batch)
    seconds = time.perf_counter() - started
    reseed(pipeline, seed + 1)
    classes = draw_logits(pipeline, adversarial, num_draws=num_draws, max_batch=max_batch).argmax(dim=2)
    return Row(name, seconds, (classes == labels).double().mean(dim=0).cpu())


def table(rows: Sequence[Row]) -> str:
    """Accuracy of each, the paired difference from the first, and accuracy under the better of both; all in per cent."""
    first, lines = rows[0].right, []
    for row in rows:
        difference = 100 * (row.right - first)
        half = Z * float(difference.std()) / len(difference) ** 0.5
        both = 100 * float(torch.minimum(row.right, first).mean())
        against = "–" if row is rows[0] else f"{float(difference.mean()):+.1f} ± {half:.1f}"
        lines.append((row.attack, f"{100 * float(row.right.mean()):.1f}", against, f"{both:.1f}", f"{row.seconds:.0f}"))
    return markdown(("attack", "accuracy %", "against PGD + EOT", "the better of both %", "s"), lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="a folder of runs with classifier and fine-tuned purifier; or pretrained:mnist")
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--eps", type=radius, default=0.3, help="such as 0.3 or 8/255")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--alpha", type=radius, help="the step size; default eps / 3")
    parser.add_argument("--images", type=positive, default=200)
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--eot", type=positive, default=10, help="draws a gradient")
    parser.add_argument("--draws", type=positive, default=20, help="of the verdict")
    parser.add_argument("--max-batch", type=positive, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=find_device, default="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Attack by each, and print machine facts and the table."""
    options = arguments(argv)
    facts = machine_facts(options.device)
    test = data.load_dataset(options.dataset, data_dir=options.data_dir, max_train=10, max_test=options.images).test
    images = data.to_float(test.images.to(options.device)).contiguous(memory_format=torch.channels_last)
    labels = test.labels.to(options.device)
    pipeline = load(options.experiment, options.device, fast=True)
    alpha = options.eps / 3 if options.alpha is None else options.alpha
    base = PGDSettings(options.eps, options.norm, steps=options.steps, alpha=alpha, eot_samples=options.eot)
    rows = []
    for name, settings in variants(base).items():
        how = {"num_draws": options.draws, "max_batch": options.max_batch, "seed": options.seed}
        rows.append(measured(name, settings, pipeline, images, labels, **how))
        print(f"{name}: {100 * float(rows[-1].right.mean()):.1f} %", file=sys.stderr, flush=True)
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print(table(rows), end="\n\n")
    print(
        f"{options.norm} {options.eps:.4g}, {options.steps} steps of {alpha:.4g}, {options.eot} draws a gradient, "
        f"{len(labels)} images, {options.draws} fresh draws each; one seed ({options.seed})."
    )


if __name__ == "__main__":
    main()
