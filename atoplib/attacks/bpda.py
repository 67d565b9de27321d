"""BPDA: the defence as it is on the way forward, the identity in its place on the way back (Athalye et al.
2018, 4.1).

What ``bpda`` returns is a model like any other, so that every attack runs on it: ``pgd(bpda(pipeline),
images, labels, eps=8 / 255, steps=50, alpha=2 / 255, eot_samples=15)`` is the attack of Hill, Mitchell & Zhu
2021, section 4 (they decide by the mean of 150 samples). The decision is the defence's own.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class _StraightThrough(torch.autograd.Function):
    """``value``, bit by bit, whose gradient goes to ``source`` as if it were ``source``."""

    @staticmethod
    def forward(ctx, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class IdentityBackward(nn.Module):
    """``classifier(preprocess(x))`` with the identity backward through ``preprocess``: (B, C, H, W) in [0, 1]
    -> logits.

    Args:
        preprocess: any callable that keeps the images' shape; it need not be differentiable.
        classifier: any module, images -> logits.

    Raises:
        ValueError: where the shape changes, for then the identity is no approximation of anything.
    """

    def __init__(self, preprocess: Callable[[Tensor], Tensor], classifier: nn.Module) -> None:
        super().__init__()
        # a method's module is a part of this one, so that its mode, device and random numbers are found
        self.owner = owner if isinstance(owner := getattr(preprocess, "__self__", None), nn.Module) else None
        self.preprocess, self.classifier = preprocess, classifier
        self.training = False  # a wrapper has no mode of its own; what it holds is not switched

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        with torch.no_grad():
            processed = self.preprocess(images)
        if processed.shape != images.shape:
            raise ValueError(
                "the identity can replace a step that keeps its shape only, but "
                f"{tuple(images.shape)} became {tuple(processed.shape)}"
            )
        return self.classifier(_StraightThrough.apply(images, processed))


def bpda(pipeline: nn.Module) -> IdentityBackward:
    """An ``AToPPipeline`` with the identity backward through transform and purifier; it is not copied.

    The logits are the pipeline's own, bit by bit, and so are the random numbers: both sample from the same
    sequence.

    Raises:
        ValueError: for what is no pipeline, or one that averages logits over several samples (their mean is
            that of no purified image).
    """
    if not hasattr(pipeline, "purify") or not hasattr(pipeline, "classifier"):
        raise ValueError(
            f"bpda needs an AToPPipeline, but a {type(pipeline).__name__} has no purify and classifier; use "
            "attacks.IdentityBackward(preprocess, classifier)"
        )
    if getattr(pipeline, "copies", 1) > 1 and pipeline.average == "logits":
        raise ValueError("bpda cannot attack a pipeline that averages logits; build it with average='images'")
    return IdentityBackward(pipeline.purify, pipeline.classifier)
