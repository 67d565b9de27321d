"""How fast PGD + EOT through the pipeline is, against torchattacks' EOTPGD, and whether both find the same
errors.

    python -m benchmarks.attack_speed mnist [--images 64] [--steps 20] [--eot 20] [--rounds 2]
    python -m benchmarks.attack_speed cifar10 --data folder:PATH --eps 8/255 --images 16

On the AToP pipeline that comes with the kit, the same images, radius, steps and samples: EOTPGD on the
pipeline as it is, in float32, and on the one that ``freeze_for_attack`` makes of it; our PGD on that, and
once more where broken images leave; the last three in bfloat16, too, where the machine is faster with it.
Ratios are of processor seconds on a CPU, which other work on the machine lengthens little. Robust accuracy is
a majority of 10 fresh samples, in float32.
"""

import argparse
import time
from functools import partial

import torch
import torchattacks

from atoplib import attacks, data, decisions
from atoplib.attacks.pgd import step_sizes
from atoplib.parameters import convert
from atoplib.pretrained import load_pretrained
from atoplib.training import compute_dtype
from benchmarks.report import machine_facts, markdown, number, positive, synchronize


def main() -> None:
    """Measure, and print machine facts and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a data set whose AToP comes with the kit: mnist, cifar10")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--eps", type=partial(convert, "eps", kind=float), default=0.3)
    parser.add_argument("--device", type=decisions.pick_device, default="auto")
    for name, default in {"images": 64, "steps": 20, "eot": 20, "max-batch": 512, "rounds": 1}.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    o = parser.parse_args()
    images, labels = (tensor.to(o.device) for tensor in data.load_images(o.data, o.images))
    plain = load_pretrained(o.weights, "AToP", device=o.device)
    alpha = step_sizes(o.eps, o.steps)[0]

    def eotpgd(model, images, labels):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            attack = torchattacks.EOTPGD(model, eps=o.eps, alpha=alpha, steps=o.steps, eot_iter=o.eot)
            return attack(images, labels)

    def ours(early_stop):
        options = dict(eps=o.eps, alpha=alpha, steps=o.steps, eot_samples=o.eot, early_stop=early_stop)
        return lambda model, x, y: attacks.pgd(model, x, y, **options, max_batch=o.max_batch)

    runs = {"torchattacks EOTPGD": eotpgd, "PGD + EOT": ours(0), "PGD + EOT, broken images leave": ours(3)}
    frozen = plain.freeze_for_attack()
    rows = [("torchattacks EOTPGD", "as it is", plain, torch.float32)]
    for dtype in dict.fromkeys((torch.float32, compute_dtype("auto", o.device))):
        rows += [(name, "frozen", frozen, dtype) for name in runs]
    seconds = {row: float("inf") for row in range(len(rows))}
    correct = {}
    for row, (name, _, model, dtype) in [item for _ in range(o.rounds) for item in enumerate(rows)]:
        with torch.autocast(o.device.type, dtype=dtype, enabled=dtype != torch.float32):
            runs[name](model, images[:2], labels[:2])  # warm-up
            decisions.reseed(model, 1)
            synchronize(o.device)
            clock = time.process_time if o.device.type == "cpu" else time.perf_counter
            started = clock()
            adversarial = runs[name](model, images, labels)
            synchronize(o.device)
            seconds[row] = min(seconds[row], clock() - started)
        logits = decisions.sample_logits(plain, adversarial.float(), num_samples=10)
        correct[row] = int(decisions.correct(logits, labels, "majority").sum())
    lines = []
    for row, (name, form, _, dtype) in enumerate(rows):
        low, high = decisions.wilson_interval(correct[row], len(labels))
        accuracy = f"{100 * correct[row] / len(labels):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        speeds = number(len(labels) / seconds[row]), number(seconds[0] / seconds[row])
        lines.append((name, f"{form}, {str(dtype).removeprefix('torch.')}", *speeds, accuracy))
    print("\n".join(f"- {name}: {value}" for name, value in machine_facts(o.device).items()), end="\n\n")
    print(markdown(("attack", "pipeline", "images/s", "ratio", "robust accuracy %"), lines), end="\n\n")
    print(f"PGD-{o.steps} + EOT-{o.eot}, linf {o.eps:.4g}, {len(labels)} images of {o.data}.")


if __name__ == "__main__":
    main()
