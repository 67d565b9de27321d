"""What a defence costs: to train, and for every decision."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.flops import count_flops
from atoplib.verdicts import draw_logits, is_random

REPETITIONS = 5
UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Cost:
    """What one defence costs.

    Attributes:
        defence: its name.
        training: FLOPs of all trainings that its robustness is owed to: of its classifier, and of the purifier's adversarial
            fine-tuning, attacks included; None where one of them was not recorded.
        pretraining: FLOPs of the purifier's pre-training (AP), apart; 0 where there is no purifier, None if not recorded.
        forward: FLOPs of one forward pass of one image, 2 a multiply-add.
        passes: forward passes of a vote; 1 where every pass gives the same.
        milliseconds: of one decision on one image by one forward pass, in batches.
        vote_milliseconds: of one by a vote.
    """

    defence: str
    training: int | None
    pretraining: int | None
    forward: int
    passes: int
    milliseconds: float
    vote_milliseconds: float


def total(*flops: int | None) -> int | None:
    """The sum of costs, None where one is not known."""
    return None if None in flops else sum(flops)


def measure_cost(
    defence: str,
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    training: int | None = None,
    pretraining: int | None = 0,
    num_draws: int = 10,
    max_batch: int = 512,
) -> Cost:
    """Count one forward pass, and time decisions: after a round to warm up, the fastest of five over all images, which other
    work disturbs least.

    Args:
        defence, training, pretraining: as in ``Cost``, handed on.
        model: in eval mode, images in [0, 1] -> logits.
        num_draws: forward passes of a vote, if the model is random.
        max_batch: copies of images that are in memory at once.
    """
    passes = num_draws if is_random(model, images, max_batch=max_batch) else 1
    forward = count_flops(lambda: draw_logits(model, images[:1])) if len(images) else 0

    def milliseconds(draws: int) -> float:
        seconds = []
        for _ in range(1 + REPETITIONS):
            started = time.perf_counter()
            draw_logits(model, images, num_draws=draws, max_batch=max_batch)
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)
            seconds.append(time.perf_counter() - started)
        return 1e3 * min(seconds[1:]) / len(images)

    once = milliseconds(1)
    return Cost(defence, training, pretraining, forward, passes, once, milliseconds(passes) if passes > 1 else once)


def cost_table(costs: Sequence[Cost]) -> str:
    """Markdown: a line a defence, its training in TFLOP, its decisions in passes, MFLOP and ms; what is not known a dash."""
    lines = [
        "| defence | training, TFLOP | pre-training apart, TFLOP | MFLOP a pass | ms a decision, one pass | passes a vote | "
        "ms a decision, vote |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for item in costs:
        training, pretraining = (
            UNKNOWN if flops is None else f"{flops / 1e12:.3g}" for flops in (item.training, item.pretraining)
        )
        speeds = f"{item.forward / 1e6:.3g} | {item.milliseconds:.3g} | {item.passes} | {item.vote_milliseconds:.3g}"
        lines.append(f"| {item.defence} | {training} | {pretraining} | {speeds} |")
    return "\n".join(lines)
