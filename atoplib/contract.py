"""The border: what comes from outside (model, images, labels) is adapted and checked here, once, in one sentence each.

Inside, a model is a module (B, C, H, W) float32 in [0, 1] -> float32 logits (B, classes). Any other network becomes one by
``adapt``; ``prepare`` also checks that it, the images and the labels can be attacked. Nothing of the kit is imported here.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PROBABILITY_TOLERANCE = 5e-3  # of the sum of one image's outputs; a softmax in bfloat16 misses 1 by nearly as much
SAME_FUNCTION = 1e-4  # largest difference of two networks' answers on probe images, relative to the largest answer
PROBE_SIZES = ((32, 32), (28, 28), (64, 64), (224, 224), (96, 96), (128, 128), (24, 40), (299, 299))  # most usual first
NORMALISATION = "atoplib.classifiers", "Normalize"
TRUSTED = ("atoplib.", "torch.nn.modules.", "torchvision.models.")  # whose layers take images in any memory format
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class ContractError(ValueError):
    """A model, images or labels that the kit cannot use; the message says why, and what to do."""


class Adapted(nn.Module):
    """Any network or callable as (B, C, H, W) float32 in [0, 1] -> float32 logits (B, classes); made by ``adapt``.

    The images are copied for every pass, contiguous (a network may flatten by ``view``, and may work in place), in the
    dtype of the network's own weights. float64 images give float64 logits. Everything else is the network's: its mode,
    its random numbers (``reseed``, ``fixed_draws``) and any other attribute.
    """

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        super().__init__()
        if isinstance(network, nn.Module):
            self.network = network
        else:
            object.__setattr__(self, "network", network)

    @property
    def training(self) -> bool:
        """The network's own mode."""
        return getattr(self.__dict__.get("_modules", {}).get("network"), "training", False)

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing of its own is switched: ``train`` and ``eval`` switch the network, which is a part of this one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("network", self.__dict__.get("network"))
            if network is None or name.startswith("__"):
                raise
            return getattr(network, name)

    def forward(self, images: Float[Tensor, "batch channels height width"], *others: Any) -> Float[Tensor, "..."]:
        own = floating_dtype(self.network) or images.dtype
        given = torch.empty_like(images, dtype=own, memory_format=torch.contiguous_format)
        given = given.copy_(images)
        logits = first_tensor(self.network(given, *others))
        return logits.to(torch.promote_types(images.dtype, torch.float32))


def adapt(model: Callable[[Tensor], Any]) -> nn.Module:
    """A model as the kit calls it: images (B, C, H, W) float32 in [0, 1] -> float32 logits (B, classes).

    Modules of the kit's own types in float32, and what was adapted before, come back as they are; anything else in a thin
    wrapper (``Adapted``) that shares its weights and its mode.

    Raises:
        ContractError: for what cannot be called.
    """
    if isinstance(model, Adapted) or (isinstance(model, nn.Module) and of_the_kit(model)):
        return model
    if not callable(model):
        raise ContractError(f"a model must be a module or a function, images -> logits, but this is a {type(model).__name__}")
    return Adapted(model)


def of_the_kit(model: nn.Module) -> bool:
    """Whether a module keeps the contract by itself: an exact type of the kit, or its normalisation and then nothing but
    layers of the kit, torch and torchvision; with weights in float32."""
    kind = type(model)
    if floating_dtype(model) not in (None, torch.float32):
        return False
    if kind.__module__.startswith("atoplib."):
        return True
    first = type(model[0]) if kind is nn.Sequential and len(model) else kind
    return (first.__module__, first.__qualname__) == NORMALISATION and of_known_layers(model)


def of_known_layers(model: nn.Module) -> bool:
    """Whether every part is of an exact type of the kit, torch or torchvision, none of which cares for memory formats."""
    return all(type(part).__module__.startswith(TRUSTED) for part in model.modules())


def floating_dtype(model: Any) -> torch.dtype | None:
    """The floating dtype of a module's first weight (or buffer); None where it has none."""
    if not isinstance(model, nn.Module):
        return None
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.dtype
    return None


def first_tensor(output: Any) -> Tensor:
    """The logits in whatever a network returns: itself, ``logits`` of a dict or an object, the first of a tuple or list.

    Raises:
        ContractError: where there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if "logits" in output or len(output) == 1:
            return first_tensor(output["logits"] if "logits" in output else next(iter(output.values())))
        raise ContractError(
            f"the model returns a dict with the keys {sorted(map(str, output))}, but none is called logits; wrap it in a "
            f"module that returns the logits alone"
        )
    if hasattr(output, "logits"):
        return first_tensor(output.logits)
    if isinstance(output, tuple | list) and output:
        return first_tensor(output[0])
    raise ContractError(
        f"the model returns a {type(output).__name__}; allowed are logits (batch, classes), a tuple or list that begins with "
        f"them, or a dict or object with logits"
    )


def check_eval_mode(model: nn.Module) -> None:
    """Raise ContractError if a model or a part of it is in train mode: batch statistics and dropout falsify a decision."""
    wrong = next((name or "the model itself" for name, part in model.named_modules() if part.training), None)
    if wrong is not None:
        raise ContractError(f"the model must be in eval mode to be attacked, but {wrong} is in train mode; call model.eval()")


def check_same_device(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise ContractError unless model, images and labels are on one device; a model without weights is on any."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if devices and images.device not in devices:
        names = " and ".join(sorted(str(device) for device in devices))
        raise ContractError(f"the model is on {names}, but the images are on {images.device}; move them with images.to(...)")
    if labels.device != images.device:
        raise ContractError(f"the images are on {images.device}, but the labels are on {labels.device}; move them together")


def as_tensors(images: Any, labels: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """numpy arrays and lists as tensors on ``device``: images in float32, labels in int64; tensors as they are."""
    if not isinstance(images, Tensor):
        array = np.asarray(images)
        images = torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array.copy()).to(device)
    if not isinstance(labels, Tensor):
        array = np.asarray(labels)
        labels = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array.copy()).to(device)
    return images, labels


def check_labels(labels: Tensor, count: int) -> None:
    """Raise ContractError unless there is one class, an int64, for each of ``count`` images."""
    if labels.ndim != 1:
        advice = "labels.squeeze(1)" if labels.ndim == 2 and labels.shape[1] == 1 else "labels.argmax(dim=1) if they are one-hot"
        raise ContractError(f"labels must be one class an image, of shape ({count},), got {tuple(labels.shape)}: use {advice}")
    if len(labels) != count:
        raise ContractError(f"{count} images, but {len(labels)} labels")
    if labels.dtype != torch.int64:
        raise ContractError(f"labels must be int64, got {labels.dtype}; use labels.long() if they are whole numbers")


def check_images(images: Tensor) -> None:
    """Raise ContractError unless these are images (B, C, H, W), floating, at least one, in [0, 1], without NaN."""
    if images.ndim != 4:
        raise ContractError(f"images must have the shape (batch, channels, height, width), got {tuple(images.shape)}")
    if len(images) == 0:
        raise ContractError("there are no images to attack")
    if not images.is_floating_point():
        raise ContractError(f"images must be floating numbers in [0, 1], got {images.dtype}; use images.float() / 255 for bytes")
    if images.dtype in (torch.float16, torch.bfloat16):
        raise ContractError(
            f"images must be float32, got {images.dtype}, whose steps are as large as perturbations; use images.float() (the "
            f"model may keep its dtype)"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ContractError(f"images must lie in [0, 1] without NaN, got values from {low:.4g} to {high:.4g}")


def check_logits(logits: Tensor, images: Tensor) -> None:
    """Raise ContractError unless these are finite logits (B, classes) of at least two classes, and no probabilities."""
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1):
        raise ContractError(
            f"the model returns one logit an image, {tuple(logits.shape)}, but one for each class is needed: make two of z by "
            f"torch.cat([torch.zeros_like(z), z], dim=1) with z of shape (batch, 1), which is the same decision"
        )
    if logits.ndim != 2 or len(logits) != len(images):
        raise ContractError(f"the model must return logits of shape (batch, classes), got {tuple(logits.shape)}")
    if not logits.is_floating_point() or not torch.isfinite(logits).all():
        raise ContractError("the model returns logits that are not finite; an attack would follow no gradient")
    if (logits >= 0).all() and (logits.float().sum(dim=1) - 1).abs().max() < PROBABILITY_TOLERANCE:
        raise ContractError(
            "the model returns probabilities (none below 0, their sum 1), whose gradients vanish where it is sure; "
            "an attack needs the logits before the softmax"
        )


def check_model(model: nn.Module, images: Tensor, *, differentiable: bool = False) -> int:
    """The number of a model's classes, from one pass on the first image.

    Raises:
        ContractError: if it cannot take the images, returns no usable logits, or (with ``differentiable``) passes no
            gradient to the images.
    """
    probe = images[:1].detach().clone().requires_grad_(differentiable)
    try:
        with torch.set_grad_enabled(differentiable):
            logits = model(probe)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        advice = "" if images.shape[1] != 3 else "; one of a single channel needs a layer in front: images.mean(1, keepdim=True)"
        raise ContractError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}: {_first_line(error)}. Give it images of its "
            f"own size and channels{advice}"
        ) from error
    check_logits(logits.detach(), probe)
    if differentiable:
        try:
            reached = logits.requires_grad and torch.autograd.grad(logits.sum(), probe, allow_unused=True)[0] is not None
        except RuntimeError as error:
            raise ContractError(f"{NOT_DIFFERENTIABLE} ({_first_line(error)})") from error
        if not reached:
            raise ContractError(NOT_DIFFERENTIABLE)
    return logits.shape[1]


NOT_DIFFERENTIABLE = (
    "the model is not differentiable: no gradient arrives at the images. Use BPDA (attacks.BPDA for a pipeline, "
    "attacks.IdentityBackward(preprocess, classifier) for another defence), or an attack without gradients (square, spsa)"
)


def prepare(
    model: Callable[[Tensor], Any],
    images: Float[Tensor, "batch channels height width"] | Any,
    labels: Int[Tensor, " batch"] | Any,
    *,
    differentiable: bool = False,
) -> tuple[nn.Module, Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
    """A model, images and labels from outside, as an attack can use them; the model makes one pass on one image.

    Args:
        model: in eval mode, images -> logits (``adapt``); may be random.
        images: in [0, 1]; a tensor or numpy array.
        labels: one class an image; a tensor or numpy array.
        differentiable: whether the attack needs the gradient to the images.

    Raises:
        ContractError (a ValueError): with what is wrong and what to do, for a model in train mode, or that returns a single
            logit, probabilities, or what is not finite; images outside [0, 1]; labels that are not (N,) int64 of the
            model's classes; more than one device; with ``differentiable``, a model that no gradient passes.
    """
    adapted = adapt(model)
    check_eval_mode(model if isinstance(model, nn.Module) else adapted)
    weights = (*adapted.parameters(), *adapted.buffers())
    images, labels = as_tensors(images, labels, weights[0].device if weights else torch.device("cpu"))
    check_same_device(adapted, images, labels)
    check_images(images)
    check_labels(labels, len(images))
    classes = check_model(adapted, images, differentiable=differentiable)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ContractError(
            f"labels must lie in 0..{classes - 1} for this model, got {int(labels.min())}..{int(labels.max())}"
        )
    return adapted, images, labels


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or parametrisations (spectral and weight norm, pruning) of this very module change what it does."""
    return any(getattr(module, name, None) for name in HOOKS) or hasattr(module, "parametrizations")


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; or the model itself, where it cannot be copied (compiled, or weights that a hook computes)."""
    if any(hasattr(part, "_orig_mod") for part in model.modules()):
        return model
    try:
        return deepcopy(model)
    except Exception:  # whatever somebody's network, its generators and handles raise
        return model


def same_answers(
    first: nn.Module, second: nn.Module, probes: Iterable[Float[Tensor, "batch channels height width"]] | None = None
) -> bool:
    """Whether two networks give the same answers, up to rounding, on the first of ``probes`` that both take.

    ``probes`` are fixed images in [0, 1] of usual sizes, where none are given.

    False where there is no such size, and for a network whose own random numbers differ from call to call.
    """
    tensors = (*first.parameters(), *first.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    for images in (probe_images(4, 3, *size) for size in PROBE_SIZES) if probes is None else probes:
        try:
            answers = [_answer(network, images.to(device)) for network in (first, second)]
        except Exception:  # not an image of a size that it takes
            continue
        expected, answer = answers
        return (
            expected.shape == answer.shape
            and bool(expected.isfinite().all())
            and float((answer - expected).abs().max()) <= SAME_FUNCTION * max(float(expected.abs().max()), 1e-6)
        )
    return False


def probe_images(*shape: int) -> Float[Tensor, "*shape"]:
    """The same values in [0, 1] in every process."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _answer(network: nn.Module, images: Tensor) -> Tensor:
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(images.device.type, enabled=False):
        torch.manual_seed(0)
        return adapt(network)(images).float()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
