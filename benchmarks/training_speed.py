"""How fast a step of notebook 3 is, and what share of the machine's own convolution speed it reaches.

    python -m benchmarks.training_speed [--threads N] [--repetitions N] [--paper-batch 2] [--skip-paper]

The step is that of the notebook's cells, made as ``training.fit`` makes it (augmentation, attack, forward,
backward, clipping, optimizer, moving average), on fresh networks and random images: neither changes what it
costs. Settings: the recipe ``cifar10`` at 32 px, attacked through the pipeline (PGD-2) and on the
classifier alone (FGSM); and ``cifar10-paper``: DeepFillV2, discriminator and a large ResNet at 256 px. The
convolution peak (3x3, 64 channels, 32 px, batch 64, forward and backward) and the steps are timed in turn,
so that a machine that slows down slows all of them down.
"""

import argparse
import ast
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from atoplib import classifiers, purifiers
from atoplib.data import Split
from atoplib.parameters import read
from atoplib.pipeline import AToPPipeline
from atoplib.training import compute_dtype, flops
from atoplib.training.loop import _Training
from atoplib.transforms import Transform
from benchmarks.report import synchronize

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "03_finetune_atop.ipynb"
STEP = {"eps": 8 / 255, "ramp_epochs": 0}
TRANSFER = STEP | dict(threat_model="transfer", attack_steps=1)
PAPER = TRANSFER | dict(target="adversarial", classification_weight=0.05, gan_weight=1.0)
FIT = dict(
    epochs=10**6,
    optimizer="adam",
    learning_rate=1e-4,
    schedule="constant",
    weight_decay=0.0,
    betas=(0.9, 0.999),
    grad_clip=1.0,
    ema_decay=0.99,
    padding=2,
    flip=True,
    max_steps=None,
    seed=0,
)


def step_of_notebook(**names: object) -> Callable:
    """The function ``step`` that the notebook's cells define, with all that they import and define and its
    ``weights``."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    tree = ast.parse("\n".join(line for line in "\n".join(code).splitlines() if not line.startswith("%")))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree.body = [
        statement
        for statement in tree.body
        if isinstance(statement, kinds) or ast.unparse(statement).startswith("weights = ")
    ]
    exec(compile(tree, NOTEBOOK, "exec"), names)
    return names["step"]


def fine_tuning(
    parameters: dict, size: int, batch: int, dtype: str, device: torch.device, paper: bool = False
) -> Callable:
    """One step of ``fit``, ready to be called again and again."""
    torch.manual_seed(0)
    name, options = ("resnet18_large", {}) if paper else ("small_resnet", {"width": 24})
    classifier = classifiers.build(name, num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, **options).to(
        device
    )
    purifier = (
        purifiers.build("deepfill_v2", width=48)
        if paper
        else purifiers.build("gated_unet", width=24, pixel_width=8)
    )
    networks: dict[str, nn.Module] = {"purifier": purifier.to(device)}
    p = read(NOTEBOOK, parameters)
    if p.gan_weight:
        networks["discriminator"] = purifiers.PatchDiscriminator(64).to(device)
    pipeline = AToPPipeline(Transform("rt2", 0.1, 0.1), networks["purifier"], classifier.eval(), seed=None)
    step = step_of_notebook(pipeline=pipeline, frozen_ones=[pipeline.classifier], p=p, **networks)
    images = torch.randint(256, (8 * batch, 3, size, size), dtype=torch.uint8)
    training = _Training(
        step,
        networks,
        Split(images, torch.randint(10, (8 * batch,))),
        FIT | dict(batch_size=batch, dtype=dtype),
        None,
        {},
    )
    next_batch = partial(next, training.batches())
    return lambda: training.advance(*next_batch())


def convolution(dtype: torch.dtype, device: torch.device) -> Callable:
    """A 3x3 convolution alone, forward and backward, channels-last."""
    make = partial(torch.randn, dtype=dtype, device=device)
    x, gradient = (make(64, 64, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x, weight = x.requires_grad_(), make(64, 64, 3, 3).requires_grad_()
    return lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), gradient)


def seconds_of(call: Callable, device: torch.device, least: float = 0.2) -> float:
    """Seconds of a call, the mean over as many as take ``least`` seconds together."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < least:
        call()
        calls += 1
    synchronize(device)
    return (time.perf_counter() - started) / calls


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repetitions", type=int, default=5, help="timed rounds after the warm-up (default 5)"
    )
    parser.add_argument("--threads", type=int, help="threads of the processor (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-paper", action="store_true", help="leave the paper's setting at 256 px out")
    parser.add_argument(
        "--paper-batch", type=int, default=2, help="its batch size (default 2; the paper has 8)"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, rows = torch.device(options.device), []
    for dtype in ("float32", "bfloat16"):
        if compute_dtype(dtype, device) in (torch.float32, compute_dtype("auto", device)):
            rows.append(("convolution peak", dtype, 64, convolution(compute_dtype(dtype, device), device)))
            rows.append(("32 px, PGD-2, white-box", dtype, 64, fine_tuning(STEP, 32, 64, dtype, device)))
            rows.append(("32 px, FGSM, transfer", dtype, 64, fine_tuning(TRANSFER, 32, 64, dtype, device)))
            if not options.skip_paper:
                batch = options.paper_batch
                rows.append(
                    (
                        "256 px, as published",
                        dtype,
                        batch,
                        fine_tuning(PAPER, 256, batch, dtype, device, paper=True),
                    )
                )
    counted = [flops(call) for *_, call in rows]  # the slow first call, in which kernels are chosen
    seconds = [[seconds_of(call, device) for *_, call in rows] for _ in range(options.repetitions)]
    speeds = [
        count / median(values) for count, values in zip(counted, zip(*seconds, strict=True), strict=True)
    ]
    peaks = {
        dtype: speed
        for (name, dtype, *_), speed in zip(rows, speeds, strict=True)
        if name == "convolution peak"
    }
    print(
        "| what | dtype | images/s (slowest to fastest) | GFLOP/image | share of the peak |\n"
        "|---|---|---:|---:|---:|"
    )
    for (name, dtype, batch, _), count, speed, *values in zip(rows, counted, speeds, *seconds, strict=True):
        rates = [batch / value for value in sorted(values, reverse=True)]
        middle = f"{median(rates):.3g} ({rates[0]:.3g} to {rates[-1]:.3g})"
        print(
            f"| {name} | {dtype} | {middle} | {count / batch / 1e9:.3g} | "
            f"{100 * speed / peaks[dtype]:.0f} % |"
        )


if __name__ == "__main__":
    main()
