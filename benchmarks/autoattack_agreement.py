"""Whether our AutoAttack (version standard) agrees with the original one, and which is faster.

    python benchmarks/autoattack_agreement.py folder:PATH [--images 32] [--norm linf] [--eps 0.003] [--queries 5000]

PATH holds test/CLASS/IMAGE: CIFAR-10 images of 32 px, class folders named so that they sort as in CIFAR-10. The model is
the ResNet-18 ``examples/model_test.pt`` that the original ships (package ``pyautoattack``). Its weights are hardly robust:
linf 8/255 breaks every image in the first part, so the default eps is one that leaves some standing. Both attack the same
images part by part, each on those that its own parts before left standing. The result is Markdown on the standard output.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyautoattack
import torch
from pyautoattack.examples.resnet import ResNet18
from torch import Tensor, nn

from atoplib.attacks import AutoAttackSettings, autoattack_parts
from atoplib.data import load_dataset, to_float
from atoplib.verdicts import judge

NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class Row:
    """After one part of the attack: images still read correctly, by ours and by the original; seconds of each."""

    part: str
    ours: Tensor
    original: Tensor
    seconds: float
    original_seconds: float

    @property
    def differing(self) -> int:
        """Images that one has broken and the other has not."""
        return int((self.ours != self.original).sum())


def compare(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: AutoAttackSettings,
    *,
    seed: int = 0,
    max_batch: int = 512,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Run both part by part on a deterministic model; images in [0, 1]."""
    generator = torch.Generator(images.device).manual_seed(seed)
    original = pyautoattack.AutoAttack(model, eps=settings.eps, norm=NORMS[settings.norm], seed=seed, device=images.device)
    original.square.n_queries = settings.queries
    for attack in (original.apgd, original.apgd_targeted, original.fab):
        attack.n_iter = settings.steps
    original.apgd_targeted.n_target_classes = original.fab.n_target_classes = settings.num_targets

    def run_ours(name: str, chosen: Tensor) -> Tensor:
        part = autoattack_parts(settings)[name]
        given = (images[chosen], labels[chosen], part.settings)
        return part.attack(model, *given, generator=generator, max_batch=max_batch)

    def run_original(name: str, chosen: Tensor) -> Tensor:
        original.attacks_to_run = [name]
        return original.run_standard_evaluation(images[chosen], labels[chosen], batch_size=max_batch)[0]

    standing = {run: judge(model, images, labels) for run in (run_ours, run_original)}
    rows = [Row("none", *standing.values(), 0.0, 0.0)]
    for name in autoattack_parts(settings):
        seconds = []
        for run, right in standing.items():
            started = time.perf_counter()
            chosen = right.nonzero().squeeze(1)
            if len(chosen):
                found = run(name, chosen)
                standing[run] = right.clone()
                standing[run][chosen] = judge(model, found, labels[chosen])
            seconds.append(time.perf_counter() - started)
        rows.append(Row(name, *standing.values(), *seconds))
        report(f"{name}: {int(rows[-1].ours.sum())} and {int(rows[-1].original.sum())} of {len(images)} images stand")
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of all parts, and a row of their sum."""
    lines = ["| after | robust, ours | robust, original | differing images | s, ours | s, original | original / ours |"]
    lines.append("| --- |" + " ---: |" * 6)
    for row in rows:
        ours, original = (100 * float(right.float().mean()) for right in (row.ours, row.original))
        ratio = f"{row.original_seconds / row.seconds:.2f}" if row.seconds else "–"
        times = f"{row.seconds:.1f} | {row.original_seconds:.1f} | {ratio}"
        lines.append(f"| {row.part} | {ours:.1f} % | {original:.1f} % | {row.differing} | {times} |")
    ours, original = sum(row.seconds for row in rows), sum(row.original_seconds for row in rows)
    lines.append(f"| **all** | | | {rows[-1].differing} | {ours:.1f} | {original:.1f} | {original / ours:.2f} |")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="folder:PATH with test/CLASS/IMAGE of CIFAR-10")
    parser.add_argument("--images", type=int, default=32, help="test images, the first of the set's fixed subset")
    parser.add_argument("--norm", choices=NORMS, default="linf")
    parser.add_argument("--eps", type=float, help="default 0.003 for linf, 0.1 for l2")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB (default 100, as AutoAttack)")
    parser.add_argument("--targets", type=int, default=9, help="of APGD-T and FAB-T (default 9, as AutoAttack)")
    parser.add_argument("--queries", type=int, default=5000, help="of Square (default 5000, as AutoAttack)")
    parser.add_argument("--max-batch", type=int, default=512)
    parser.add_argument("--threads", type=int, help="threads of the processor (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and print the table."""
    options = arguments(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = ResNet18()
    weights = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model = model.to(options.device).eval()
    with tempfile.TemporaryDirectory() as cache:
        test = load_dataset(options.dataset, data_dir=cache, max_test=options.images, max_train=10).test
        images, labels = to_float(test.images).to(options.device), test.labels.to(options.device)
    eps = options.eps or {"linf": 0.003, "l2": 0.1}[options.norm]
    settings = AutoAttackSettings(
        eps, options.norm, steps=options.steps, num_targets=options.targets, queries=options.queries
    )
    print(f"{len(images)} images, {settings}")
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    rows = compare(
        model,
        images,
        labels,
        settings,
        max_batch=options.max_batch,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(table(rows))


if __name__ == "__main__":
    main()
