"""A trained network as attacks use it: copied, frozen, and faster where that is the same function."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from atoplib.contract import check_eval_mode, of_known_layers


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a trained model to attack: the same function up to rounding, frozen, in less time.

    Of known layers (``of_known_layers``) batch normalisations are folded into convolutions, and all are
    channels-last (``fold_batch_norms``, ``to_channels_last``). A pipeline freezes itself
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
    time. It is done where every layer is known (``of_known_layers``): what somebody's ``forward`` does with
    its layers nobody knows. The model itself comes back where it cannot be copied.

    Raises:
        ValueError: for a model in train mode, whose normalisation is no fixed function.
    """
    check_eval_mode(model)
    copied = copy_of(model)
    if copied is model or not of_known_layers(model):
        return copied
    for block in [block for block in copied.modules() if type(block) is nn.Sequential]:
        for i in range(len(block) - 1):
            if _can_fold(*block[i : i + 2]):
                block[i], block[i + 1] = fuse_conv_bn_eval(block[i], block[i + 1]), nn.Identity()
    return copied.eval()  # the new parts, too


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    return type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None


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
