"""How fast the explorer answers: from a control's change to the bytes of the new pictures.

    python -m benchmarks.explorer_latency [--recipe cifar10] [--repetitions 50] [--threads N] [--device auto] [--smoke]

The networks are those of a recipe, untrained (their weights do not change the speed), on random images of 32 px or of the
recipe's size; EOT 1, 10 votes. Three knobs are turned in turn, each time to a value that was not seen before:

- the transform's noise, under an attack on the classifier, which need not run again;
- the same under PGD-10 through the pipeline: until the preview (the earlier attack through the new transform);
- the seed, so that PGD-10 runs through the whole pipeline again.

The browser's own time is not in it. On a machine that has other work to do, the fastest repetition and the process's own
processor time say more than the median. The result is Markdown on the standard output.
"""

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from ipywidgets import ValueWidget

from atoplib.batch import make_plan, read_recipe
from atoplib.classifiers import build_classifier, fold_batch_norms
from atoplib.data import Dataset, Split
from atoplib.explorer import Explorer
from atoplib.explorer.widgets import make_explorer
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import build_purifier
from benchmarks.report import find_device, machine_facts, markdown, positive

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
AIMS = {"transform knob, transfer": 100, "transform knob, preview": 100, "PGD-10 through the pipeline": 500}  # milliseconds


def build(recipe: str, device: torch.device) -> tuple[AToPPipeline, int]:
    """The recipe's pipeline, untrained, and the images' size."""
    jobs = make_plan(read_recipe(NOTEBOOKS / "recipes" / f"{recipe}.yaml"), NOTEBOOKS, {})
    stages = {job.name: job.parameters for job in jobs}
    first, second, third = (stages[name] for name in ("01_train_classifier", "02_pretrain_purifier", "03_finetune_atop"))
    statistics = {"num_classes": 10, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    classifier = fold_batch_norms(build_classifier(first.classifier, **statistics, **first.classifier_options).eval())
    classifier = classifier.to(memory_format=torch.channels_last)  # as notebook 5 has it
    purifier = build_purifier(second.purifier, **second.purifier_options).to(memory_format=torch.channels_last)
    return AToPPipeline(third.transform_settings, purifier, classifier).to(device).eval(), third.image_size or 32


def random_images(size: int, count: int = 8) -> Dataset:
    """Images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % 10)
    return Dataset("noise", split, split, tuple("0123456789"))


class Answer(NamedTuple):
    """What an answer took: seconds on the clock, and of all the processor's cores."""

    seconds: float
    busy: float


def time_until_shown(explorer: Explorer, control: ValueWidget, value: float, *, preview: bool) -> Answer:
    """From the change of a control to new pictures: the first ones, or those whose attack is adapted."""
    shown, ends = threading.Event(), []

    def note(_change: dict) -> None:
        if not shown.is_set() and (preview or explorer.view.adapted):
            ends.append(Answer(time.perf_counter(), time.process_time()))
            shown.set()

    explorer.pictures.observe(note, "value")
    started = Answer(time.perf_counter(), time.process_time())
    control.value = value
    if not shown.wait(600) or explorer.view is None:
        raise RuntimeError("the explorer showed no picture within 10 minutes")
    explorer.pictures.unobserve(note, "value")
    explorer.worker.wait()
    return Answer(*(end - start for end, start in zip(ends[0], started, strict=True)))


def measure(explorer: Explorer, repetitions: int) -> dict[str, list[Answer]]:
    """What each way to turn a knob took, after one warm-up."""
    noise, seed, sees = (explorer.controls[name] for name in ("noise_std", "seed", "attack_sees"))
    explorer.refresh()
    explorer.worker.wait()
    times: dict[str, list[Answer]] = {name: [] for name in AIMS}
    for number in range(repetitions + 1):
        level = 0.2 + 0.7 * number / (repetitions + 1)  # never that of the recipes, or nothing would change
        turns = (
            ("classifier", noise, level, False),
            ("pipeline", noise, level + 1e-3, True),
            ("pipeline", seed, number + 1, False),
        )
        for name, (target, control, value, preview) in zip(AIMS, turns, strict=True):
            sees.value = target
            explorer.worker.wait()
            times[name].append(time_until_shown(explorer, control, value, preview=preview))
    return {name: measured[1:] for name, measured in times.items()}


def table(times: dict[str, list[Answer]]) -> str:
    """The fastest, the median and the slowest of each, and the median processor time, against what is aimed at."""
    rows = []
    for name, measured in times.items():
        seconds = [answer.seconds for answer in measured]
        numbers = min(seconds), median(seconds), max(seconds), median(answer.busy for answer in measured)
        rows.append((name, *(f"{1000 * number:.0f}" for number in numbers), str(AIMS[name])))
    head = ("from the control to the pictures", "fastest ms", "median ms", "slowest ms", "processor ms", "aim ms")
    return markdown(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print machine facts and table."""
    parser = argparse.ArgumentParser(description="How fast the explorer answers.")
    parser.add_argument("--recipe", default="cifar10", help="whose networks (default: cifar10)")
    parser.add_argument("--repetitions", type=positive, default=50)
    parser.add_argument("--threads", type=positive, help="of torch (default: torch's own choice)")
    parser.add_argument("--device", type=find_device, default="auto")
    parser.add_argument("--smoke", action="store_true", help="few repetitions, small networks: the numbers mean nothing")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recipe, repetitions = ("mnist", 2) if options.smoke else (options.recipe, options.repetitions)
    pipeline, size = build(recipe, options.device)
    explorer = make_explorer(pipeline, random_images(size), eps=8 / 255, steps=10, eot_samples=1, num_draws=10)
    facts = machine_facts(options.device)
    times = measure(explorer, repetitions)
    if options.smoke:
        print("**Smoke run: small networks, the numbers mean nothing.**\n")
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print(table(times), end="\n\n")
    print(f"Recipe {recipe}, {size} px, EOT 1, 10 votes; medians of {repetitions} repetitions after a warm-up.")


if __name__ == "__main__":
    main()
