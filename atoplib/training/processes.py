"""Several processes that train one network, each on its share of every batch: what they tell each other.

torchrun starts the processes and watches over them; torch.distributed carries the numbers (gloo between processors, NCCL
between GPUs). Gradients are averaged here, between the backward pass and the clipping, and not by DistributedDataParallel,
nor by Lightning Fabric or accelerate, which wrap the network in it: it wants every forward pass to be followed by a backward
pass to the weights, and an attack in the training goes through the network again and again for the images' gradient alone.
What is left of such an engine, the launcher and the collectives, is torch's own.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from atoplib.shares import WHOLE, Share

PATIENCE = timedelta(hours=2)  # for the first process: it may download data, while the others wait
Result = TypeVar("Result")


@contextmanager
def joined(batch_size: int, *, device: torch.device) -> Iterator[Share]:
    """This process's share of every batch, as torchrun's environment says; alone without torchrun.

    Args:
        batch_size: of all processes together.
        device: where this process computes.

    Raises:
        ValueError: if the processes cannot share a batch equally.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = share_of(batch_size, int(os.environ.get("RANK", 0)), processes)
    if processes == 1:
        yield share
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield share
    dist.destroy_process_group()  # not after an error: it would wait for the others


def share_of(batch_size: int, rank: int, processes: int) -> Share:
    """One process's share of every batch; raises ValueError if a batch cannot be shared equally."""
    if processes == 1:
        return WHOLE
    if batch_size % processes:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared equally by {processes} processes; choose a multiple of {processes}"
        )
    return Share(rank, processes, batch_size // processes)


def average_over_processes(tensors: Iterable[Tensor], share: Share) -> None:
    """Replace tensors of one dtype by their means over the processes, the same bits in each; alone it does nothing."""
    tensors = list(tensors)
    if share.processes == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message
    dist.all_reduce(flat)
    flat /= share.processes
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def any_process(answer: bool, share: Share) -> bool:
    """Whether one of the processes says yes: what only one of them was told, all must do at once."""
    if share.processes == 1:
        return answer
    count = torch.tensor(int(answer))
    dist.all_reduce(count)
    return bool(count)


def by_the_first(compute: Callable[[], Result], share: Share) -> Result:
    """What a function returns in the first process, which alone calls it."""
    if share.processes == 1:
        return compute()
    found: list[Any] = [compute() if share.rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def first_then_others(compute: Callable[[], Result], share: Share) -> Result:
    """What a function returns in this process; the first one is done with it before the others begin."""
    if share.processes == 1:
        return compute()
    result = compute() if share.rank == 0 else None
    dist.barrier()
    return compute() if share.rank else result


def begin_together(networks: Iterable[nn.Module], share: Share) -> None:
    """Give all processes the first one's weights, and batch normalisations the statistics of the whole batch.

    Raises:
        ValueError: for a normalisation over the batch that is no ``BatchNorm2d``.
    """
    if share.processes == 1:
        return
    for network in networks:
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = WholeBatchNorm2d  # in place: optimizers and averages know its tensors
            elif isinstance(module, _NormBase) and not isinstance(module, WholeBatchNorm2d | nn.InstanceNorm2d):
                raise ValueError(
                    f"several processes cannot train a {type(module).__name__}: only BatchNorm2d is computed over the whole "
                    f"batch. Train with processes = 1, or replace it"
                )
        with torch.no_grad():
            for tensor in chain(network.parameters(), network.buffers()):
                whole = tensor.contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over the processes; its gradient is the mean of theirs."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / dist.get_world_size()

    backward = forward


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' images, as ``nn.SyncBatchNorm``, which runs on GPUs only.

    Every process must have as many images. In eval mode, which needs no one else, it is ``nn.BatchNorm2d``.
    """

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = MeanOverProcesses.apply(values.mean(dim=(0, 2, 3)))
        centred = values - mean.view(1, -1, 1, 1)
        variance = MeanOverProcesses.apply(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            count = dist.get_world_size() * x.numel() / x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)
