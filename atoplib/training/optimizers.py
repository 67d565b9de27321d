"""What a step of a training is made of: optimizer, schedule of the learning rate, moving average,
precision."""

from itertools import chain
from math import cos, pi

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("one_cycle", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions compute in: ``auto`` takes bfloat16 where the processor has instructions
    for it.

    On a processor without them bfloat16 is emulated, ten times slower than float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        native = abilities.get("amx_bf16") or abilities.get("avx512_bf16")
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def learning_rate_at(step: int, total: int, *, peak: float, schedule: str = "one_cycle") -> float:
    """The learning rate of step ``step`` (from 0) of ``total``: ``constant``, ``cosine`` (down to 0), or
    ``one_cycle`` (linear up over the first fifth, then linear down to 0)."""
    done = (step + 0.5) / total
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * (1 + cos(pi * done)) / 2
    return peak * (done / 0.2 if done < 0.2 else (1 - done) / 0.8)


def make_optimizer(
    module: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """``sgd`` (Nesterov momentum 0.9) or ``adam`` for one network; weight decay for tensors of two and more
    dimensions only.

    Raises:
        ValueError: if nothing in the network is to be trained.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"no weight of this {type(module).__name__} requires a gradient: there is nothing to train in it"
        )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.Adam(groups, lr=learning_rate, betas=betas)


class MovingAverage(AveragedModel):
    """Exponential moving average of weights and buffers, its decay growing from 0 so that early weights are
    forgotten.

    The count of updates stays with the host, so that none of them waits for the device, as those of its
    base class do.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights that a model has now."""
        count = int(self.n_averaged)
        rate = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        pairs = list(zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model)), strict=True))
        floating = [(old, new) for old, new in pairs if old.is_floating_point()]
        torch._foreach_lerp_([old for old, _ in floating], [new for _, new in floating], 1 - rate)
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)
        self.n_averaged += 1
