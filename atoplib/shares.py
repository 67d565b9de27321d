"""Which images of a batch a process computes, when several processes train together.

Random numbers are thrown for the whole batch by every process, which then keeps those of its own images: so that each image
meets the dice that it would meet if one process trained alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process computes: ``images`` images that stand together, the ``rank``-th such part.

    Attributes:
        rank: number of the process, from 0, which alone writes files.
        processes: that train together.
        images: of this process in a batch; only needed where there are several processes.
    """

    rank: int = 0
    processes: int = 1
    images: int = 0

    def __post_init__(self) -> None:
        if self.processes < 1 or not 0 <= self.rank < self.processes:
            raise ValueError(f"rank must lie in 0..{self.processes - 1} and processes be at least 1, got {self}")
        if self.processes > 1 and self.images < 1:
            raise ValueError(f"images must be at least 1 where several processes share a batch, got {self.images}")

    def own(self, whole: Tensor) -> Tensor:
        """The rows of a tensor of the whole batch that belong to this process's images."""
        return whole if self.processes == 1 else whole[self.rank * self.images : (self.rank + 1) * self.images]

    def throw(
        self,
        dice: Callable[..., Tensor],
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        """Random numbers for this process's images, out of those of the whole batch.

        Args:
            dice: ``torch.rand`` or ``torch.randn``.
            shape: (rows, ...), a row for each image of this process, or several rounds of such rows, as an attack that
                averages over draws stacks them. Rows that are no whole rounds get dice that fit no other number of
                processes, yet are as random.
        """
        if self.processes == 1:
            return dice(*shape, generator=generator, device=device)
        rows = self.images if shape[0] % self.images == 0 else shape[0]
        whole = dice(shape[0] * self.processes, *shape[1:], generator=generator, device=device)
        return whole.view(-1, self.processes, rows, *shape[1:])[:, self.rank].reshape(shape)


WHOLE = Share()
"""One process computes all."""
