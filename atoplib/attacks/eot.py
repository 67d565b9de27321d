"""Expectation over transformation (EOT): gradients averaged over the draws of a random model."""

from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atoplib.attacks.losses import Loss, cross_entropy
from atoplib.verdicts import Model


class InputGradient(NamedTuple):
    """Means over the draws, for each image: gradient of the loss, the loss, and the share of draws that are right."""

    gradient: Float[Tensor, "batch 3 height width"]
    loss: Float[Tensor, " batch"]
    right: Float[Tensor, " batch"]


def input_gradient(
    model: Model,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    loss: Loss = cross_entropy,
    targets: Int[Tensor, " batch"] | None = None,
    eot_samples: int = 1,
    joint: bool = False,
    max_batch: int = 512,
) -> InputGradient:
    """Gradient of each image's loss, averaged over ``eot_samples`` draws of the model.

    Draws and images stand in one batch, at most ``max_batch`` of them at once: memory depends on neither number. The model
    must throw new dice for each image of its batch, as ``AToPPipeline`` does.

    Args:
        model: images in [0, 1] -> logits.
        loss: (logits, labels) -> one value an image; (logits, labels, targets), if there are targets.
        targets: the class that a targeted loss drives each image to.
        joint: raise -log of the mean probability of the true class over the draws, in place of ``loss``: the cross-entropy of a
            defence that averages its draws. A mean of cross-entropies pulls most where a draw is wrong already; this one where
            a draw is still right. ``max_batch`` is exceeded where it is below ``eot_samples``.

    Source: Athalye et al. 2018, section 4.2.
    """
    if joint:
        return _joint_gradient(model, images, labels, eot_samples, max_batch)
    total = torch.zeros_like(images)
    value = torch.zeros(len(images), device=images.device)
    right = torch.zeros(len(images), device=images.device)
    classes = (labels,) if targets is None else (labels, targets)
    index = torch.arange(eot_samples * len(images), device=images.device) % len(images)
    for part in index.split(max_batch):
        copies = images.detach()[part].requires_grad_()
        with torch.enable_grad():
            logits = model(copies)
            losses = loss(logits, *(chosen[part] for chosen in classes))
            (gradient,) = torch.autograd.grad(losses.sum(), copies)
        total.index_add_(0, part, gradient)
        value.index_add_(0, part, losses.detach().to(value.dtype))
        right.index_add_(0, part, (logits.detach().argmax(dim=1) == labels[part]).float())
    return InputGradient(total / eot_samples, value / eot_samples, right / eot_samples)


def _joint_gradient(
    model: Model, images: Tensor, labels: Tensor, eot_samples: int, max_batch: int
) -> InputGradient:
    """``input_gradient`` of -log mean softmax: all draws of an image stand in one batch."""
    found = []
    for part in torch.arange(len(images), device=images.device).split(max(1, max_batch // eot_samples)):
        copies = images.detach()[part].repeat(eot_samples, 1, 1, 1)
        if images.is_contiguous(memory_format=torch.channels_last):
            copies = copies.contiguous(memory_format=torch.channels_last)
        copies.requires_grad_()
        with torch.enable_grad():
            logits = model(copies).float().unflatten(0, (eot_samples, len(part)))
            sure = logits.log_softmax(dim=2).gather(2, labels[part].expand(eot_samples, -1)[..., None])[..., 0]
            losses = log(eot_samples) - sure.logsumexp(dim=0)
            (gradient,) = torch.autograd.grad(losses.sum(), copies)
        right = (logits.detach().argmax(dim=2) == labels[part]).float().mean(dim=0)
        found.append((gradient.unflatten(0, (eot_samples, len(part))).sum(dim=0), losses.detach(), right))
    return InputGradient(*(torch.cat(values) for values in zip(*found, strict=True)))
