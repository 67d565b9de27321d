"""Work that is counted, not assumed."""

from collections.abc import Callable
from contextlib import nullcontext

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
