"""The decisions of a random model: several samples of it, the vote over them, and when an image counts as
correct."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import sqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from atoplib.contract import ContractError, adapt, check_labels
from atoplib.parameters import ParameterError, at_least, between, check_counts, check_settings, one_of

# Images (B, C, H, W) in [0, 1] -> logits (B, classes); may be random.
Model = Callable[[Tensor], Tensor]

# By which accuracies are reported: what a user of the model meets (the first sample), two votes over the
# samples, and every sample correct (an attacker may try again).
RULES = ("single", "majority", "mean_softmax", "worst_of_n")
# At least one sample is correct: by which an attack goes on, whatever is reported, for there is something
# left to break.
ANY = "any"

PROBES = 8  # a model of few possible samples often gives one image the same one twice


def correct(
    logits: Float[Tensor, "samples batch classes"], labels: Int[Tensor, " batch"], rule: str = "single"
) -> Bool[Tensor, " batch"]:
    """Which images are classified correctly by ``rule``, one of ``RULES`` or ``any`` (at least one sample is
    correct).

    Raises:
        ValueError: for an unknown rule, or labels that are not (batch,).

    Source: the N-evaluation of DiffHammer (Wang et al. 2024) and DiffBreak (Kassis et al. 2025).
    """
    check_labels(labels, logits.shape[1])
    if rule in ("worst_of_n", ANY):
        right = logits.argmax(dim=2) == labels
        return right.any(dim=0) if rule == ANY else right.all(dim=0)
    return vote(logits, rule) == labels


def vote(logits: Float[Tensor, "samples batch classes"], rule: str = "majority") -> Int[Tensor, " batch"]:
    """The class of each image: ``single`` (of the first sample), ``majority`` (ties to the lower class) or
    ``mean_softmax``.

    Raises:
        ValueError: for another rule.
    """
    check_settings(vote=(rule, one_of(*VOTES)))
    return VOTES[rule](logits)


# Logits (samples, batch, classes) -> classes (batch,).
VOTES: dict[str, Callable[[Tensor], Tensor]] = {
    "single": lambda logits: logits[0].argmax(dim=1),
    "majority": lambda logits: F.one_hot(logits.argmax(dim=2), logits.shape[2]).sum(dim=0).argmax(dim=1),
    "mean_softmax": lambda logits: logits.softmax(dim=2).mean(dim=0).argmax(dim=1),
}


_SWITCH = threading.Lock()
_BLOCKS: dict[str, list] = {}  # device: how many blocks of ``full_float32`` are entered, what was set before


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within the block float32 is computed as float32: no autocast, no TF32, nor what
    ``torch.set_float32_matmul_precision`` allows, whose short mantissas may flip a close decision."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    on_cuda = device.type == "cuda"
    settings = (cudnn.conv, cudnn.rnn, cuda.matmul) if on_cuda else (mkldnn.conv, mkldnn.matmul)
    with torch.autocast(device.type, enabled=False):
        with _SWITCH:  # the settings are those of all threads: the last block to end puts them back
            block = _BLOCKS.setdefault(device.type, [0, [setting.fp32_precision for setting in settings]])
            block[0] += 1
            if on_cuda:  # the older switch, too: a model that reads it fails where the two contradict
                cudnn.allow_tf32 = False
            for setting in settings:
                setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            with _SWITCH:
                block[0] -= 1
                if block[0] == 0:
                    before = _BLOCKS.pop(device.type)[1]
                    if on_cuda:
                        cudnn.allow_tf32 = before[:2] == ["tf32", "tf32"]
                    for setting, precision in zip(settings, before, strict=True):
                        setting.fp32_precision = precision


@torch.no_grad()
def sample_logits(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    *,
    num_samples: int = 1,
    max_batch: int = 512,
) -> Float[Tensor, "samples batch classes"]:
    """Logits of ``num_samples`` forward passes an image, samples and images in one batch, in ``full_float32``
    also where an attack computes in less (autocast): decisions rest on them.

    Args:
        model: images in [0, 1] -> logits, random for each image of its batch by itself, or deterministic.
        max_batch: copies of images that are in memory at once.

    Raises:
        ValueError: for num_samples < 1, or as ``check_finite``.
    """
    check_counts(num_samples=num_samples)
    model = adapt(model)
    index = torch.arange(num_samples * len(images), device=images.device) % max(1, len(images))
    with full_float32(images.device):
        logits = torch.cat([model(images[part]).float() for part in index.split(max_batch)])
    return check_finite(logits.unflatten(0, (num_samples, len(images))))


def check_finite(logits: Float[Tensor, "samples batch classes"]) -> Float[Tensor, "samples batch classes"]:
    """The logits themselves; ContractError (a ValueError) where one is not finite: it belongs to no class."""
    wrong = (~logits.isfinite()).any(dim=2).any(dim=0)
    if wrong.any():
        count, first = int(wrong.sum()), int(wrong.nonzero()[0])
        raise ContractError(
            f"the model returns logits that are not finite for {count} of {len(wrong)} images (the first is "
            f"number {first} of the batch); such an image has no class"
        )
    return logits


@torch.no_grad()
def is_random(
    model: Model, images: Float[Tensor, "batch channels height width"], *, max_batch: int = 512
) -> bool:
    """Whether a model is random, so that an attack needs EOT and a decision several samples.

    It is if two passes over ``PROBES`` images differ; fewer images are used several times.
    """
    model = adapt(model)
    probes = images[torch.arange(PROBES, device=images.device) % len(images)].split(max_batch)
    return any(not torch.equal(model(part), model(part)) for part in probes)


def _parts_with(method: str, model: Any) -> list[Any]:
    """The parts of a model (or itself, if it is no module) that have a method of this name."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return [part for part in parts if callable(getattr(part, method, None))]


def reseed(model: Any, seed: int) -> None:
    """Start the random numbers of a model anew, where it or a part of it has any (a method ``reseed``, as
    ``AToPPipeline``)."""
    for part in _parts_with("reseed", model):
        part.reseed(seed)


@contextmanager
def seeded(model: Any, seed: int, device: torch.device) -> Iterator[None]:
    """Within the block a model's random numbers, and torch's global ones, start from ``seed``; the global
    ones are afterwards as they were."""
    reseed(model, seed)
    with forked_rng(device):
        torch.manual_seed(seed)
        yield


def supports_fixed_sample(model: Any) -> bool:
    """Whether a model's random numbers can be fixed: it or a part of it has a method ``fixed_sample``, as
    ``AToPPipeline``."""
    return bool(_parts_with("fixed_sample", model))


@contextmanager
def fixed_sample(model: Any, seed: int) -> Iterator[None]:
    """Within the block a random model that supports it uses the same sample in every call on batches of one
    shape (common random numbers), a function of ``seed``; any other model is used as it is."""
    with ExitStack() as stack:
        for part in _parts_with("fixed_sample", model):
            stack.enter_context(part.fixed_sample(seed))
        yield


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), within [0, 1]; ``successes`` may be a mean over
    repetitions.

    Raises:
        ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    check_settings(trials=(trials, at_least(1)), successes=(successes, between(0, trials)))
    proportion, spread = successes / trials, z * z / trials
    centre = (proportion + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(proportion * (1 - proportion) / trials + spread / (4 * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """A block whose random numbers leave torch's generators, the CPU's and this device's, as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA if there is a GPU), ``cpu``, ``cuda`` or ``cuda:N``, as a device.

    Raises:
        ValueError: for another name, or a GPU that is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    check_settings(
        device=(name if number and not number.isdecimal() else kind, one_of("auto", "cpu", "cuda"))
    )
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device {name!r} is not available here ({torch.cuda.device_count()} GPUs); use auto or cpu"
        )
    return device
