"""The attacks by name, all with one signature: (model, images, labels, settings, *, generator, max_batch, callback)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from atoplib.attacks.norms import NORMS
from atoplib.attacks.pgd import PGDSettings, pgd


class Attack(NamedTuple):
    """An attack: its function, the dataclass of its settings, and the norms that its eps can be measured in."""

    function: Callable[..., Tensor]
    settings: Callable[..., Any]
    norms: tuple[str, ...] = NORMS


ATTACKS: dict[str, Attack] = {
    "pgd": Attack(pgd, PGDSettings),
}
