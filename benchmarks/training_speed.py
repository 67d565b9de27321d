"""How fast a fine-tuning step is, and what share of the machine's own convolution speed it reaches.

    python -m benchmarks.training_speed [--threads N] [--repetitions N] [--device cpu] [--paper-batch 8] [--skip-paper]

Three things are measured in turn, round after round, so that a machine that slows down slows all of them down:

- the convolution peak: 3x3, 64 channels, 32 px, batch 64, forward and backward, nothing else;
- a whole fine-tuning step of the recipe ``cifar10`` at 32 px, as ``training.fit`` makes it (augmentation, attack,
  forward, backward, clipping, optimizer, moving average), attacked through the pipeline (PGD-2) and on the classifier alone;
- the step of the recipe ``cifar10-paper``: DeepFillV2, discriminator and a large ResNet at 256 px, FGSM on the classifier.

Each runs in float32 with NCHW tensors, in float32 with channels-last ones, and in bfloat16 with channels-last ones where
the processor has instructions for it. Work is counted, not assumed: torch's FlopCounterMode around one whole step (2 a
multiply-add; convolutions and matrix products only). The result is Markdown on the standard output.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.attacks import PGDSettings
from atoplib.batch import make_plan, read_recipe
from atoplib.classifiers import build_classifier
from atoplib.data import augment, to_float
from atoplib.flops import count_flops
from atoplib.losses import Objective
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import PatchDiscriminator, build_purifier
from atoplib.training import Batch, FineTuningAttack, TrainingSettings, Updater, compute_dtype, purifier_step
from atoplib.training.loop import MovingAverage
from atoplib.transforms import TransformSettings
from benchmarks.report import find_device, machine_facts, markdown, number, positive, synchronize

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
THROUGH_THE_PIPELINE = {"attack_sees": "pipeline", "attack_steps": 2}
EMULATED_REPETITIONS = 2  # of what the processor has no instructions for: seconds a convolution, and not worth more


@dataclass(frozen=True)
class Format:
    """What convolutions compute with: dtype and order of the dimensions in memory."""

    name: str
    dtype: torch.dtype
    memory: torch.memory_format


FORMATS = (
    Format("float32 NCHW", torch.float32, torch.contiguous_format),
    Format("float32 channels-last", torch.float32, torch.channels_last),
    Format("bfloat16 channels-last", torch.bfloat16, torch.channels_last),
)


def is_native(form: Format, device: torch.device) -> bool:
    """Whether the machine has instructions for the dtype, or only emulates it."""
    return form.dtype == torch.float32 or compute_dtype("auto", device) == form.dtype


@dataclass(frozen=True)
class Workload:
    """Something to be timed.

    Attributes:
        name: of the row; workloads that differ in the format only share it.
        images: how many one call works on.
        call: does the work once.
        flops: of one call, 2 a multiply-add; None: to be counted.
        max_repetitions: time it so often at most; None: as often as the others.
    """

    name: str
    form: Format
    images: int
    call: Callable[[], None]
    flops: int | None = None
    max_repetitions: int | None = None


@dataclass(frozen=True)
class Measurement:
    """A workload's result: ``seconds`` of one call, once a repetition; images and FLOPs of one call."""

    name: str
    form: Format
    images: int
    flops: int
    seconds: tuple[float, ...]

    def per_second(self, amount: float) -> tuple[float, float, float]:
        """An amount of one call as a rate: at the median, the slowest and the fastest repetition."""
        return amount / median(self.seconds), amount / max(self.seconds), amount / min(self.seconds)

    @property
    def flops_per_second(self) -> float:
        """At the median repetition."""
        return self.flops / median(self.seconds)


def convolution(form: Format, device: torch.device, *, channels: int = 64, size: int = 32, batch: int = 64) -> Workload:
    """A 3x3 convolution alone, forward and backward (to images and weights): its work is three times the forward's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(form.dtype, memory_format=form.memory)

    images = normal(batch, channels, size, size).requires_grad_()
    weight = normal(channels, channels, 3, 3).requires_grad_()
    gradient = normal(batch, channels, size, size)

    def call() -> None:
        torch.autograd.grad(F.conv2d(images, weight, padding=1), (images, weight), gradient)

    name = f"3x3 convolution, {channels} channels, {size} px, batch {batch}"
    flops = 3 * 2 * batch * size**2 * channels**2 * 9
    rare = None if is_native(form, device) else EMULATED_REPETITIONS
    return Workload(name, form, batch, call, flops, rare)


@dataclass(frozen=True)
class FineTuning:
    """Everything that decides what a fine-tuning step costs.

    Attributes:
        images: edge in pixels.
        classifier, purifier: names of ``build_classifier`` and ``build_purifier``, with their options.
        discriminator_width: of the discriminator, which is there if the objective has a GAN term.
    """

    image_size: int
    classifier: str
    purifier: str
    transform: TransformSettings
    objective: Objective
    attack: FineTuningAttack
    training: TrainingSettings
    classifier_options: dict[str, Any] = field(default_factory=dict)
    purifier_options: dict[str, Any] = field(default_factory=dict)
    discriminator_width: int = 64

    @property
    def name(self) -> str:
        """For people: networks, image size, attack, batch."""
        purifier, attack = build_purifier(self.purifier, **self.purifier_options), self.attack.attack
        options = ", ".join(f"{name} {value}" for name, value in self.purifier_options.items())
        method = f"PGD-{attack.steps}" if attack.start == "random" or attack.steps > 1 else "FGSM"
        method += f" x {attack.eot_samples} draws" if attack.eot_samples > 1 else ""
        seen = "through the pipeline" if self.attack.sees == "pipeline" else "on the classifier alone"
        return (
            f"{type(purifier).__name__} ({options}) + {self.classifier}, {self.image_size} px, "
            f"{method} {seen}, batch {self.training.batch_size}"
        )


def recipe_settings(recipe: str, **changes: Any) -> FineTuning:
    """The fine-tuning step of a CIFAR-10 recipe in ``notebooks/recipes``; without an ``image_size`` that is 32 px."""
    jobs = make_plan(read_recipe(NOTEBOOKS / "recipes" / f"{recipe}.yaml"), NOTEBOOKS, changes)
    stages = {job.name: job.parameters for job in jobs}
    classifier, purifier = stages["01_train_classifier"], stages["02_pretrain_purifier"]
    tuning = stages["03_finetune_atop"]
    return FineTuning(
        image_size=tuning.image_size or 32,
        classifier=classifier.classifier,
        classifier_options=classifier.classifier_options,
        purifier=purifier.purifier,
        purifier_options=purifier.purifier_options,
        transform=tuning.transform_settings,
        objective=tuning.objective,
        attack=tuning.attack,
        training=tuning.training,
        discriminator_width=tuning.discriminator_width,
    )


def on_the_classifier_alone(setting: FineTuning) -> FineTuning:
    """The same step with the paper's attack: FGSM on f (Lin et al. 2024)."""
    attack = PGDSettings(eps=8 / 255, steps=1, start="clean")
    return replace(setting, attack=FineTuningAttack(attack, "classifier"))


def with_batch(setting: FineTuning, batch_size: int) -> FineTuning:
    """The same step on another number of images."""
    return replace(setting, training=replace(setting.training, batch_size=batch_size))


def smoke_sized(setting: FineTuning) -> FineTuning:
    """The same step, on so few and small images that it takes a fraction of a second."""
    size = min(setting.image_size, 64)
    purifier = setting.purifier_options | {"width": 4}
    classifier = setting.classifier_options | ({"width": 4} if "width" in setting.classifier_options else {})
    setting = replace(setting, image_size=size, discriminator_width=4)
    setting = replace(setting, classifier_options=classifier, purifier_options=purifier)
    return with_batch(setting, min(setting.training.batch_size, 4))


def fine_tuning(setting: FineTuning, form: Format, device: torch.device) -> Workload:
    """A whole fine-tuning step on fresh networks and random images: neither changes what it costs.

    A call does what ``training.fit`` does in a step; only the order of the dimensions is the format's. It raises
    RuntimeError once the loss is not finite, because such a step measures nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = build_classifier(
            setting.classifier, num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, **setting.classifier_options
        )
        networks: dict[str, nn.Module] = {"purifier": build_purifier(setting.purifier, **setting.purifier_options)}
        if setting.objective.gan_weight:
            networks["discriminator"] = PatchDiscriminator(setting.discriminator_width)
        shape = (setting.training.batch_size, 3, setting.image_size, setting.image_size)
        pixels = torch.randint(256, shape, dtype=torch.uint8).to(device)
        labels = torch.randint(10, shape[:1]).to(device)
    classifier.to(device, memory_format=form.memory)
    networks = {name: network.to(device, memory_format=form.memory) for name, network in networks.items()}

    training = setting.training
    pipeline = AToPPipeline(setting.transform, networks["purifier"], classifier).train()
    step = purifier_step(pipeline, setting.objective, attack=setting.attack, discriminator=networks.get("discriminator"))
    updater = Updater(networks, training)
    averaged = MovingAverage(networks["purifier"], training.ema_decay) if training.ema_decay else None
    generator = torch.Generator(device).manual_seed(0)
    epoch = max(setting.objective.warmup_epochs, setting.attack.ramp_epochs)  # every term, the full attack
    autocast = form.dtype != torch.float32

    def call() -> None:
        images = to_float(augment(pixels, generator=generator, padding=training.padding, flip=training.flip))
        batch = Batch(images.contiguous(memory_format=form.memory), labels, generator, epoch)
        updater.set_learning_rate(training.learning_rate)
        with torch.autocast(device.type, dtype=form.dtype, enabled=autocast):
            losses = step(batch, updater)
        if averaged is not None:
            averaged.update_parameters(networks["purifier"])
        if not isfinite(float(losses["loss"].detach())):
            raise RuntimeError(f"the loss of '{setting.name}' in {form.name} is not finite: its speed says nothing")

    rare = None if is_native(form, device) else EMULATED_REPETITIONS
    return Workload(setting.name, form, training.batch_size, call, max_repetitions=rare)


def seconds_of(call: Callable[[], None], times: int, device: torch.device) -> float:
    """Wall-clock seconds of one call, the mean over ``times`` of them."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / times


def measure(
    workloads: Sequence[Workload],
    *,
    repetitions: int,
    device: torch.device,
    min_seconds: float = 0.2,
    report: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Warm every workload up, then time all of them in turn, round after round.

    Args:
        repetitions: rounds, at least 1.
        min_seconds: a repetition calls a workload so often that it takes about this long.
        report: called with a line when something begins.
    """
    flops, times, seconds = [], [], []
    for workload in workloads:
        report(f"warming up: {workload.name}, {workload.form.name}")
        counted = count_flops(workload.call)  # the slow first call, in which kernels are chosen and memory is taken
        flops.append(counted if workload.flops is None else workload.flops)
        if workload.max_repetitions is None:
            times.append(max(1, ceil(min_seconds / seconds_of(workload.call, 1, device))))
        else:
            times.append(1)
        seconds.append([])
    for repetition in range(repetitions):
        report(f"repetition {repetition + 1} of {repetitions}")
        for workload, calls, values in zip(workloads, times, seconds, strict=True):
            if workload.max_repetitions is None or repetition < workload.max_repetitions:
                values.append(seconds_of(workload.call, calls, device))
    return [
        Measurement(workload.name, workload.form, workload.images, count, tuple(values))
        for workload, count, values in zip(workloads, flops, seconds, strict=True)
    ]


def peak_of(peaks: Iterable[Measurement], dtype: torch.dtype) -> float:
    """The machine's convolution peak in a dtype, FLOPs a second: that of the faster order of dimensions."""
    return max(peak.flops_per_second for peak in peaks if peak.form.dtype == dtype)


def with_range(values: tuple[float, float, float]) -> str:
    """``median (slowest to fastest)``."""
    return f"{number(values[0])} ({number(values[1])} to {number(values[2])})"


def peak_table(peaks: Sequence[Measurement], device: torch.device) -> str:
    """GFLOP/s of the convolution in every format."""
    rows = [
        (
            peak.name,
            peak.form.name + ("" if is_native(peak.form, device) else ", emulated"),
            with_range(peak.per_second(peak.flops / 1e9)),
            str(len(peak.seconds)),
        )
        for peak in peaks
    ]
    return markdown(("convolution peak, forward and backward", "format", "GFLOP/s", "repetitions"), rows)


def step_table(steps: Sequence[Measurement], peaks: Sequence[Measurement]) -> str:
    """Speed of every fine-tuning step, and its share of the convolution peak in the same dtype."""
    rows = [
        (
            step.name,
            step.form.name,
            with_range(step.per_second(step.images)),
            number(step.flops / step.images / 1e9),
            number(step.flops_per_second / 1e9),
            f"{100 * step.flops_per_second / peak_of(peaks, step.form.dtype):.1f} %",
        )
        for step in steps
    ]
    return markdown(("fine-tuning step", "format", "images/s", "GFLOP/image", "GFLOP/s", "share of the peak"), rows)


def ratio_table(steps: Sequence[Measurement], paper: str | None) -> str:
    """Ratios of images/s: every format over float32 NCHW, every step over the one named ``paper`` in its fastest format."""
    speeds = {(step.name, step.form.name): step.per_second(step.images)[0] for step in steps}
    baseline = FORMATS[0].name
    rows = []
    for (name, form), speed in speeds.items():
        if form != baseline:
            rows.append((name, f"{form} over {baseline}", number(speed / speeds[name, baseline])))
    fastest = max((speed for (name, _), speed in speeds.items() if name == paper), default=0.0)
    for (name, form), speed in speeds.items():
        if paper is not None and name != paper:
            rows.append((name, f"{form} over the paper's setting at its fastest", number(speed / fastest)))
    return markdown(("images/s of", "compared", "ratio"), rows)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=positive, default=5, help="timed rounds after the warm-up (default 5)")
    parser.add_argument("--threads", type=positive, help="threads of the processor (default: torch's choice)")
    parser.add_argument("--device", type=find_device, default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--skip-paper", action="store_true", help="leave the paper's setting at 256 px out")
    parser.add_argument("--paper-batch", type=positive, default=2, help="its batch size (default 2; the paper has 8)")
    parser.add_argument("--all-dtypes", action="store_true", help="time steps in bfloat16 even where it is emulated")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs; the numbers mean nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print machine facts and tables."""
    options = arguments(argv)
    device = options.device
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = machine_facts(device)

    native, paper = (
        recipe_settings("cifar10", **THROUGH_THE_PIPELINE),
        with_batch(recipe_settings("cifar10-paper"), options.paper_batch),
    )
    settings = [native, on_the_classifier_alone(native), *([] if options.skip_paper else [paper])]
    sizes = {}
    if options.smoke:
        settings = [smoke_sized(setting) for setting in settings]
        sizes = {"channels": 8, "size": 8, "batch": 4}
    forms = [form for form in FORMATS if options.all_dtypes or is_native(form, device)]
    peaks = [convolution(form, device, **sizes) for form in FORMATS]
    steps = [fine_tuning(setting, form, device) for setting in settings for form in forms]
    results = measure(
        [*peaks, *steps],
        repetitions=options.repetitions,
        device=device,
        min_seconds=0 if options.smoke else 0.2,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    peak_results, step_results = results[: len(peaks)], results[len(peaks) :]

    if options.smoke:
        print("**Smoke run: tiny sizes, the numbers mean nothing.**\n")
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print(peak_table(peak_results, device), end="\n\n")
    print(step_table(step_results, peak_results), end="\n\n")
    print(ratio_table(step_results, None if options.skip_paper else settings[-1].name), end="\n\n")
    print(
        f"Medians of {options.repetitions} repetitions after warm-up (slowest to fastest in brackets). GFLOP: convolutions "
        "and matrix products, counted, 2 a multiply-add. Share: of the peak in the same dtype, the faster order of "
        "dimensions."
    )


if __name__ == "__main__":
    main()
