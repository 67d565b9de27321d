"""A trained network as attacks use it: copied, frozen, and faster where that is proved to be the same
function."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from atoplib.contract import adapt, check_eval_mode, device_of, is_changed, of_known_layers
from atoplib.probing import PROBE_SIZES, probe_images, undisturbed

SAME_FUNCTION = 1e-4  # largest difference of two networks' answers, relative to the largest answer


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a trained model to attack: the same function up to rounding, frozen, in less time.

    Batch normalisations are folded into convolutions, and known layers are channels-last, each where that is
    proved to be the same function (``fold_batch_norms``, ``to_channels_last``). A pipeline freezes itself
    (``freeze_for_attack``). A model that cannot be copied is frozen in place.

    Raises:
        ValueError: in train mode.
    """
    if hasattr(model, "freeze_for_attack"):
        return model.freeze_for_attack()
    frozen = to_channels_last(fold_batch_norms(model))
    for weight in frozen.parameters():  # a scripted module has no requires_grad_
        weight.requires_grad_(False)
    return frozen


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy whose convolutions take up the batch normalisation behind them in the same ``nn.Sequential``.

    The same function up to rounding, for a model that is not trained any more: attacks need a tenth less
    time. It is done for exact types without hooks, parametrisations or a forward of their own, and kept where
    the copy gives the same logits on probe images (``same_answers``); otherwise the copy is as the model is
    (the model itself, where it cannot be copied).

    Raises:
        ValueError: for a model in train mode, whose normalisation is no fixed function.
    """
    check_eval_mode(model)
    copied = copy_of(model)
    if copied is model:
        return model
    blocks = [block for block in copied.modules() if type(block) is nn.Sequential and not is_changed(block)]
    pairs = [(block, i) for block in blocks for i in range(len(block) - 1) if _can_fold(*block[i : i + 2])]
    for block, i in pairs:
        block[i], block[i + 1] = fuse_conv_bn_eval(block[i], block[i + 1]), nn.Identity()
    copied.eval()  # the new parts, too
    return copied if not pairs or same_answers(model, copied) else copy_of(model)


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    exact = type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None
    return exact and not (is_changed(convolution) or is_changed(norm))


def to_channels_last(model: nn.Module) -> nn.Module:
    """The model itself, channels-last, which is faster, where it is ``of_known_layers``: somebody's network
    may flatten by ``view``, which takes contiguous images alone."""
    return model.to(memory_format=torch.channels_last) if of_known_layers(model) else model


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; the model itself, where it cannot be copied (compiled, or weights that a hook
    computes)."""
    if any(hasattr(part, "_orig_mod") for part in model.modules()):
        return model
    try:
        with torch.no_grad():  # the copy of a scripted module would remember where its weights come from
            return deepcopy(model)
    except Exception:  # whatever somebody's network, its generators and handles raise
        return model


def same_answers(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks give the same answers, up to rounding, on probe images of the first usual size
    that both take; False where they take none."""
    for images in (probe_images(4, 3, *size) for size in PROBE_SIZES):
        try:
            expected, answer = (_answer(network, images) for network in (first, second))
        except Exception:  # not an image of a size that it takes
            continue
        if expected.shape != answer.shape or not expected.isfinite().all():
            return False
        tolerance = SAME_FUNCTION * max(float(expected.abs().max()), 1e-6)
        return float((answer - expected).abs().max()) <= tolerance
    return False


def _answer(network: nn.Module, images: Tensor) -> Tensor:
    device = device_of(network)
    with undisturbed(network), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        return adapt(network)(images.to(device)).float()
