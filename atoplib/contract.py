"""The border: what comes from outside (model, images, labels) is adapted and checked here, once.

Inside, a model is a module (B, C, H, W) float32 in [0, 1] -> float32 logits (B, classes). Any other network
becomes one by ``adapt``; ``prepare`` also checks that it, the images and the labels can be attacked.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.probing import undisturbed

PROBABILITY_TOLERANCE = 5e-3  # of the sum of an image's outputs; a softmax in bfloat16 misses 1 by as much
BATCH_TOLERANCE = 0.02  # largest effect of another image of the batch, relative to the largest logit
KNOWN = ("atoplib.", "torch.nn.modules.", "torchvision.models.")  # layers that take any memory format
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ContractError(ValueError):
    """A model, images or labels that the kit cannot use; the message says why, and what to do."""


class Adapted(nn.Module):
    """Any network or callable as a model of the kit; made by ``adapt``.

    A network is given a copy of the images for every pass, contiguous (it may flatten by ``view``, and may
    work in place), in the dtype of its own weights; float64 images give float64 logits. A plain function is
    called as it is. Mode, random numbers (``reseed``, ``fixed_sample``), any attribute are the network's.
    """

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network  # a part of this one, if it is a module

    @property
    def training(self) -> bool:
        """The network's own mode."""
        return getattr(self.network, "training", False)

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing of its own is switched: ``train`` and ``eval`` switch the network, which is a part of this
        one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network" or name.startswith("__"):
                raise
            return getattr(self.network, name)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], *others: Any
    ) -> Float[Tensor, "..."]:
        if not isinstance(self.network, nn.Module):
            return _first_tensor(self.network(images, *others))
        dtype = _floating_dtype(self.network) or images.dtype
        inputs = torch.empty_like(images, dtype=dtype, memory_format=torch.contiguous_format).copy_(images)
        logits = _first_tensor(self.network(inputs, *others))
        return logits.to(torch.promote_types(images.dtype, torch.float32))


def adapt(model: Callable[[Tensor], Any]) -> nn.Module:
    """A model as the kit calls it: images (B, C, H, W) float32 in [0, 1] -> float32 logits (B, classes).

    Modules of the kit's own types in float32, and what was adapted before, come back as they are; anything
    else in a thin wrapper (``Adapted``) that shares its weights and its mode.

    Raises:
        ContractError: for what cannot be called.
    """
    if isinstance(model, Adapted) or (isinstance(model, nn.Module) and _keeps_contract(model)):
        return model
    if not callable(model):
        raise ContractError(
            f"a model must be a module or a function, images -> logits, not a {type(model).__name__}"
        )
    return Adapted(model)


def _keeps_contract(model: nn.Module) -> bool:
    """Whether a module keeps the contract by itself: of the kit's own type, or a sequence of known layers
    that begins with one, such as ``Normalize``; in float32, its output changed by no hook and no forward of
    its own."""
    if (
        _floating_dtype(model) not in (None, torch.float32)
        or model._forward_hooks
        or "forward" in vars(model)
    ):
        return False
    first = model[0] if type(model) is nn.Sequential and len(model) else model
    return type(first).__module__.startswith("atoplib.") and (first is model or of_known_layers(model))


def of_known_layers(model: nn.Module) -> bool:
    """Whether every part is of an exact type of the kit, torch or torchvision, none of which cares for memory
    formats, and does what its type does."""
    return all(type(part).__module__.startswith(KNOWN) and not is_changed(part) for part in model.modules())


def is_changed(module: nn.Module) -> bool:
    """Whether hooks, parametrisations (spectral and weight norm, pruning) or a forward that was replaced in
    this very module change what its type does."""
    hooked = any(getattr(module, name, None) for name in HOOKS)
    return hooked or hasattr(module, "parametrizations") or "forward" in vars(module)


def _floating_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating dtype of a module's first weight (or buffer); None where it has none."""
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def device_of(model: nn.Module) -> torch.device:
    """Where a module computes: the device of its parameters or buffers, the CPU if it has none."""
    return next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _first_tensor(output: Any) -> Tensor:
    """The logits in what a network returns: itself, ``logits`` of a dict or object, the first of a tuple."""
    if isinstance(output, Tensor):
        kind = "complex" if output.is_complex() else "sparse" if output.layout != torch.strided else ""
        _require(
            not kind,
            f"the model returns {kind} logits, but they must be real and dense: use logits.real or "
            "logits.abs() of complex ones, logits.to_dense() of sparse ones",
        )
        return output
    first = output[0] if isinstance(output, tuple | list) and output else None
    inner = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", first)
    if inner is None:
        raise ContractError(
            f"the model returns a {type(output).__name__}; allowed are logits (batch, classes), a tuple or "
            "list that begins with them, or a dict or object with logits; wrap it in a module that returns so"
        )
    return _first_tensor(inner)


def prepare(
    model: Callable[[Tensor], Any],
    images: Float[Tensor, "batch channels height width"] | Any,
    labels: Int[Tensor, " batch"] | Any,
    *,
    differentiable: bool = False,
) -> tuple[nn.Module, Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
    """A model, images and labels from outside, as an attack can use them; costs a pass on one image, and two
    on a pair where the types of its parts do not tell that images do not meet.

    A callable that is no module (``partial(pipeline, sample=t)`` in a training step, where every pass counts)
    is not probed, and nothing is checked that would wait for the GPU: values of images, range of labels.

    Args:
        model: in eval mode, images -> logits (``adapt``); may be random.
        images: in [0, 1]; a tensor or numpy array.
        labels: one class an image; a tensor or numpy array.
        differentiable: whether the attack needs the gradient to the images.

    Raises:
        ContractError (a ValueError): for a model in train mode, or that returns a single logit,
            probabilities, or what is not finite, or what depends on the other images of the batch; images
            outside [0, 1]; labels that are not (N,) int64 of its classes; several devices; with
            ``differentiable``, a model that no gradient passes.
    """
    adapted, is_module = adapt(model), isinstance(model, nn.Module)
    check_eval_mode(adapted)
    weights = (*adapted.parameters(), *adapted.buffers())
    device = device_of(adapted)
    images, labels = _as_tensor(images, "f", np.float32, device), _as_tensor(labels, "iu", np.int64, device)
    _require(
        not weights or images.device in {tensor.device for tensor in weights},
        f"the model is on {device}, the images are on {images.device}; use images.to({str(device)!r})",
    )
    _require(
        labels.device == images.device,
        f"the images are on {images.device}, the labels on {labels.device}; move them together",
    )
    check_images(images, values=is_module)
    check_labels(labels, len(images))
    if is_module:
        classes = _check_answer(adapted, images[:1], differentiable)
        if not (isinstance(model, Adapted) or _treats_images_apart(adapted)):
            _check_batch(adapted, images[:1])
        low, high = int(labels.min()), int(labels.max())
        _require(
            low >= 0 and high < classes,
            f"labels must lie in 0..{classes - 1} for this model, got {low}..{high}",
        )
    return adapted, images, labels


def _as_tensor(values: Any, kinds: str, dtype: type, device: torch.device) -> Tensor:
    """Tensors as they are; arrays and lists on ``device``, those of numpy's ``kinds`` in ``dtype``."""
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    return torch.from_numpy(array.astype(dtype) if array.dtype.kind in kinds else array.copy()).to(device)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def check_eval_mode(model: nn.Module) -> None:
    """Raise ContractError where a part is in train mode: batch statistics and dropout falsify a decision."""
    wrong = next((name or "the model itself" for name, part in model.named_modules() if part.training), None)
    _require(
        wrong is None,
        f"the model must be in eval mode, but {wrong} is in train mode; call model.eval(); one "
        "of torch.export has no such mode: give the network that was exported",
    )


def check_images(images: Tensor, *, values: bool = True) -> None:
    """Raise ContractError unless these are images (B, C, H, W), B > 0, with ``values`` also in [0, 1]."""
    _require(
        images.ndim == 4,
        f"images must have the shape (batch, channels, height, width), got {tuple(images.shape)}",
    )
    _require(len(images) > 0, "there are no images to attack")
    _require(
        images.dtype in (torch.float32, torch.float64),
        f"images must be float32 in [0, 1], got {images.dtype}; use images.float(), for bytes "
        "images.float() / 255 (the steps of half precision are as large as perturbations)",
    )
    if values:
        low, high = float(images.min()), float(images.max())
        _require(
            low >= 0 and high <= 1,
            f"images must lie in [0, 1] without NaN, got values from {low:.4g} to {high:.4g}",
        )


def check_labels(labels: Tensor, count: int) -> None:
    """Raise ContractError unless there is one class, an int64, for each of ``count`` images."""
    _require(
        labels.shape == (count,),
        f"labels must be one class an image, ({count},), got {tuple(labels.shape)}: use labels.squeeze(1), "
        "or labels.argmax(dim=1) if they are one-hot",
    )
    _require(
        labels.dtype == torch.int64,
        f"labels must be int64, got {labels.dtype}; use labels.long() if they are whole numbers",
    )


def check_logits(logits: Tensor, images: Tensor) -> None:
    """Raise ContractError unless these are finite logits (B, classes), two or more, and no probabilities."""
    _require(
        logits.shape not in ((len(images),), (len(images), 1)),
        f"the model returns one logit an image, {tuple(logits.shape)}, but one for each class is needed: "
        "make two of z by torch.cat([torch.zeros_like(z), z], dim=1) with z of shape (batch, 1), the same "
        "decision",
    )
    _require(
        logits.ndim == 2 and len(logits) == len(images),
        f"the model must return logits of shape (batch, classes), got {tuple(logits.shape)}",
    )
    _require(
        logits.is_floating_point() and bool(torch.isfinite(logits).all()),
        "the model returns logits that are not finite; an attack would follow no gradient",
    )
    of_one = (logits.float().sum(dim=1) - 1).abs().max() < PROBABILITY_TOLERANCE
    _require(
        not (of_one and (logits >= 0).all()),
        "the model returns probabilities (none below 0, their sum 1), whose gradients vanish where it is "
        "sure; an attack needs the logits before the softmax",
    )


def _check_answer(model: nn.Module, image: Tensor, differentiable: bool) -> int:
    """The number of a model's classes, from one pass on one image; ContractError where it cannot be used."""
    probe = image.detach().clone().requires_grad_(differentiable)
    try:
        with torch.set_grad_enabled(differentiable):
            logits = model(probe)
    except ContractError:
        raise
    except Exception as error:  # whatever somebody's forward raises
        raise ContractError(
            f"the model cannot take images of shape {tuple(image.shape[1:])}: {first_line(error)}. Give it "
            "images of its own size and channels; one of a single channel needs a layer in front: "
            "images.mean(1, keepdim=True)"
        ) from error
    check_logits(logits.detach(), probe)
    if differentiable:
        try:
            torch.autograd.grad(logits, probe, torch.ones_like(logits))
        except RuntimeError as error:
            raise ContractError(
                "the model is not differentiable: no gradient arrives at the images. Use BPDA "
                "(attacks.bpda(model) for a pipeline), or an attack without gradients (square): "
                f"{first_line(error)}"
            ) from error
    return logits.shape[1]


def _treats_images_apart(model: nn.Module) -> bool:
    """Whether the types of its parts tell that no image of a batch meets another."""
    meeting = (nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention)  # but for running statistics
    return of_known_layers(model) and all(
        getattr(part, "running_mean", None) is not None
        for part in model.modules()
        if isinstance(part, meeting)
    )


def _check_batch(model: nn.Module, image: Tensor) -> None:
    """Raise ContractError where the logits of an image depend on the other one of its batch.

    The image is paired with itself and with its negative, from the same random numbers: batches of one shape,
    so that rounding in any precision and random draws are alike. Of a model that answers the same pair in two
    ways nothing is known.
    """

    def beside(other: Tensor) -> Tensor:
        with undisturbed(model):
            return model(torch.cat([image, other]))[0]

    first, second = beside(image), beside(1 - image)
    differs = (second - first).abs().max() > BATCH_TOLERANCE * first.abs().max()
    _require(
        not (differs and torch.equal(beside(image), first) and torch.equal(beside(1 - image), second)),
        "the model's logits of an image depend on the other images of its batch, and so would decisions; "
        "give batch normalisations the running statistics of a training (track_running_stats=True), and take "
        "other statistics over each image by itself",
    )


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
