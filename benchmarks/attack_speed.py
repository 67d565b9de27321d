"""How fast PGD + EOT through the pipeline is, against torchattacks' EOTPGD, and whether both find the same errors.

    python -m benchmarks.attack_speed runs/mnist --dataset mnist5k --eps 0.3 [--images 64] [--steps 20] [--eot 20]

Four rows, on the trained AToP pipeline of an experiment, the same images, budget and number of steps and draws: EOTPGD on
the pipeline as plain float32 (NCHW, nothing folded); EOTPGD and our PGD on the pipeline as notebook 4 attacks it
(channels-last, folded normalisation, bfloat16 where the machine is faster with it); and our PGD that lets broken images
leave. Robust accuracy is a majority of 10 fresh draws, in float32. The result is Markdown on the standard output.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchattacks
from torch import Tensor, nn

from atoplib import data, runs
from atoplib.attacks import PGDSettings, pgd
from atoplib.checkpoints import load_checkpoint
from atoplib.classifiers import fold_batch_norms
from atoplib.pipeline import AToPPipeline, load_pipeline
from atoplib.training import compute_dtype
from atoplib.verdicts import Verdict, judge, reseed, wilson_interval
from benchmarks.report import find_device, machine_facts, markdown, number, positive, synchronize


class Row(NamedTuple):
    """An attack that was timed: its name, what it attacked, seconds, and which images survived it."""

    attack: str
    form: str
    seconds: float
    right: Tensor


def load(experiment: Path, device: torch.device, *, fast: bool) -> AToPPipeline:
    """The experiment's AToP pipeline: as notebook 4 attacks it, or plain."""
    trained = runs.find_run(experiment, "01_train_classifier", adversarial=False)
    tuned = runs.find_run(experiment, "03_finetune_atop")
    classifier, _ = load_checkpoint(trained / "classifier.safetensors", kind="classifier", device=device)
    if fast:
        classifier = fold_batch_norms(classifier)
    pipeline = load_pipeline(tuned / "purifier.safetensors", classifier, device=device)
    return pipeline.to(memory_format=torch.channels_last if fast else torch.contiguous_format)


def timed(
    name: str,
    form: str,
    pipeline: AToPPipeline,
    images: Tensor,
    labels: Tensor,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> Row:
    """Attack once, after a warm-up on two images; then judge in float32."""
    device = images.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        attack(pipeline, images[:2], labels[:2])
        reseed(pipeline, 1)
        synchronize(device)
        started = time.perf_counter()
        adversarial = attack(pipeline, images, labels)
        synchronize(device)
    seconds = time.perf_counter() - started
    reseed(pipeline, 2)
    return Row(name, form, seconds, judge(pipeline, adversarial, labels, Verdict("majority", 10)))


def table(rows: Sequence[Row]) -> str:
    """Speed of each row, its ratio to the first, and what survived."""
    lines = []
    for row in rows:
        count, right = len(row.right), int(row.right.sum())
        low, high = wilson_interval(right, count)
        lines.append(
            (
                row.attack,
                row.form,
                number(count / row.seconds),
                number(rows[0].seconds / row.seconds),
                f"{100 * right / count:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            )
        )
    return markdown(("attack", "pipeline", "images/s", "ratio", "robust accuracy %"), lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print machine facts and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="a folder of runs with a classifier and a fine-tuned purifier")
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--eot", type=positive, default=20)
    parser.add_argument("--max-batch", type=positive, default=256)
    parser.add_argument("--device", type=find_device, default="auto")
    options = parser.parse_args(argv)
    device, dtype = options.device, compute_dtype("auto", options.device)
    facts = machine_facts(device)
    test = data.load_dataset(options.dataset, data_dir=options.data_dir, max_train=1, max_test=options.images).test
    plain_images, labels = data.to_float(test.images.to(device)), test.labels.to(device)
    fast_images = plain_images.contiguous(memory_format=torch.channels_last)
    step_size = PGDSettings(options.eps, steps=options.steps).step_size

    def theirs(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            attack = torchattacks.EOTPGD(
                model, eps=options.eps, alpha=step_size, steps=options.steps, eot_iter=options.eot, random_start=True
            )
            return attack(images, labels)

    def ours(stop_after: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        settings = PGDSettings(
            options.eps, steps=options.steps, alpha=step_size, eot_samples=options.eot, stop_after=stop_after
        )

        def attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            generator = torch.Generator(device).manual_seed(0)
            return pgd(model, images, labels, settings, generator=generator, max_batch=options.max_batch)

        return attack

    fast = f"{str(dtype).removeprefix('torch.')} channels-last, folded"
    plan = [
        ("torchattacks EOTPGD", "float32 NCHW", False, plain_images, theirs, torch.float32),
        ("torchattacks EOTPGD", fast, True, fast_images, theirs, dtype),
        ("atoplib PGD + EOT", fast, True, fast_images, ours(0), dtype),
        ("atoplib PGD + EOT, broken images leave", fast, True, fast_images, ours(3), dtype),
    ]
    rows = []
    for name, form, is_fast, images, attack, row_dtype in plan:
        print(f"{name}, {form}", file=sys.stderr, flush=True)
        pipeline = load(options.experiment, device, fast=is_fast)
        rows.append(timed(name, form, pipeline, images, labels, attack, row_dtype))
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print(table(rows), end="\n\n")
    print(
        f"PGD-{options.steps} + EOT-{options.eot}, l_inf {options.eps:.4g}, {len(labels)} images; ratio: to the first row."
    )


if __name__ == "__main__":
    main()
