"""Work that is counted, not assumed."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class NoModules(nullcontext):
    """Tells a FlopCounterMode that everything happens in one place, so that it keeps the total only."""

    parents = frozenset({"Global"})


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of the convolutions and matrix products in a call, backward passes included, 2 a multiply-add."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # its own hooks every module, which an attack's gradient at the input does not bear
    with counter:
        call()
    return counter.get_total_flops()


def training_total(metrics: Mapping[str, Any]) -> int | None:
    """FLOPs of a training and of all that it started from, as the metrics in a checkpoint's header tell them; None if they
    do not.
    """
    own, before = metrics.get("train_flops"), metrics.get("start_flops", 0)
    return None if own is None or before is None else own + before
