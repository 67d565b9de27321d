"""How fast PGD + EOT through the pipeline is, against torchattacks' EOTPGD, and whether both find the same errors.

    python -m benchmarks.attack_speed runs/mnist --dataset mnist5k --eps 0.3 [--images 64] [--steps 20] [--eot 20]
    python -m benchmarks.attack_speed pretrained:cifar10 --dataset cifar10 --eps 8/255 --images 16 --steps 5 --rounds 3

On the trained AToP pipeline of an experiment (or one that comes with the kit), the same images, budget and number of steps
and draws: EOTPGD on the pipeline as plain float32 (NCHW, nothing folded), and on the one that ``pipeline.for_attacks`` makes
of it; our PGD on that, and once more where broken images leave. Where the machine is faster with bfloat16, the last three
follow in bfloat16. Seconds are those of the processes' clock on a CPU, which other work on the machine lengthens little,
and of the wall elsewhere; with several rounds, each runs all rows in turn and the fastest of each row counts. Robust
accuracy is a majority of 10 fresh draws, in float32. The result is Markdown on the standard output.
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
from atoplib.parameters import LATEST
from atoplib.pipeline import AToPPipeline, for_attacks, load_pipeline
from atoplib.pretrained import load_pretrained
from atoplib.training import compute_dtype
from atoplib.verdicts import Verdict, judge, reseed, wilson_interval
from benchmarks.report import find_device, machine_facts, markdown, number, positive, radius, synchronize


class Plan(NamedTuple):
    """A row of the table before it is measured: an attack on a pipeline, both with their names in words."""

    attack: str
    form: str
    pipeline: AToPPipeline
    images: Tensor
    run: Callable[[nn.Module, Tensor, Tensor], Tensor]
    dtype: torch.dtype


class Row(NamedTuple):
    """An attack that was timed: its name, what it attacked, wall and processor seconds, and which images survived it."""

    attack: str
    form: str
    seconds: float
    processor_seconds: float
    right: Tensor

    def cost(self, device: torch.device) -> float:
        """The seconds that tell attacks apart best: the processor's, unless another device does the work."""
        return self.processor_seconds if device.type == "cpu" else self.seconds


def load(experiment: Path | str, device: torch.device, *, fast: bool) -> AToPPipeline:
    """The AToP pipeline of an experiment, or of ``pretrained:NAME``: prepared for attacks, or plain."""
    known = str(experiment).removeprefix("pretrained:")
    if known != str(experiment):
        pipeline = load_pretrained(known, "atop", device=device)
    else:
        trained = runs.find_run(Path(experiment), "01_train_classifier", **LATEST["undefended"])
        tuned = runs.find_run(Path(experiment), "03_finetune_atop")
        classifier, _ = load_checkpoint(trained / "classifier.safetensors", kind="classifier", device=device)
        pipeline = load_pipeline(tuned / "purifier.safetensors", classifier, device=device)
    return for_attacks(pipeline) if fast else pipeline.to(memory_format=torch.contiguous_format)


def measured(plan: Plan, labels: Tensor) -> Row:
    """Attack once, after a warm-up on two images; then judge in float32."""
    device, pipeline = labels.device, plan.pipeline
    with torch.autocast(device.type, dtype=plan.dtype, enabled=plan.dtype != torch.float32):
        plan.run(pipeline, plan.images[:2], labels[:2])
        reseed(pipeline, 1)
        synchronize(device)
        started = time.perf_counter(), time.process_time()
        adversarial = plan.run(pipeline, plan.images, labels)
        synchronize(device)
        seconds, processor_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    reseed(pipeline, 2)
    right = judge(pipeline, adversarial.float(), labels, Verdict("majority", 10))
    return Row(plan.attack, plan.form, seconds, processor_seconds, right)


def table(rows: Sequence[Row], device: torch.device) -> str:
    """Speed of each row by the wall's clock, the ratio of its cost to the first's, and what survived."""
    lines = []
    for row in rows:
        count, right = len(row.right), int(row.right.sum())
        low, high = wilson_interval(right, count)
        lines.append(
            (
                row.attack,
                row.form,
                number(count / row.seconds),
                number(rows[0].cost(device) / row.cost(device)),
                f"{100 * right / count:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            )
        )
    return markdown(("attack", "pipeline", "images/s", "ratio", "robust accuracy %"), lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print machine facts and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "experiment", help="a folder of runs with a classifier and a fine-tuned purifier; or pretrained:mnist"
    )
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--eps", type=radius, default=0.3, help="l_inf, such as 0.3 or 8/255")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--eot", type=positive, default=20)
    parser.add_argument("--max-batch", type=positive, default=512)
    parser.add_argument("--rounds", type=positive, default=1)
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

    plain, fast = (load(options.experiment, device, fast=fast) for fast in (False, True))
    plans = [Plan("torchattacks EOTPGD", "float32 NCHW", plain, plain_images, theirs, torch.float32)]
    for row_dtype in dict.fromkeys((torch.float32, dtype)):
        form = f"{str(row_dtype).removeprefix('torch.')}, for attacks"
        plans += [
            Plan("torchattacks EOTPGD", form, fast, fast_images, theirs, row_dtype),
            Plan("atoplib PGD + EOT", form, fast, fast_images, ours(0), row_dtype),
            Plan("atoplib PGD + EOT, broken images leave", form, fast, fast_images, ours(3), row_dtype),
        ]
    rounds = []
    for turn in range(options.rounds):
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
        rounds.append([measured(plan, labels) for plan in plans])
    rows = [min(row, key=lambda turn: turn.cost(device)) for row in zip(*rounds, strict=True)]
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print(table(rows, device), end="\n\n")
    print(
        f"PGD-{options.steps} + EOT-{options.eot}, l_inf {options.eps:.4g}, {len(labels)} images; "
        f"ratio: to the first row, of {'processor' if device.type == 'cpu' else 'wall'} time."
    )


if __name__ == "__main__":
    main()
