"""BPDA: the defence as it is on the way forward, the identity in its place on the way back.

A wrapper is a model like any other, so every attack runs on it: ``pgd(BPDA(pipeline), images, labels, HILL_PGD)``. The
verdict belongs to the defence itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.attacks.pgd import PGDSettings
from atoplib.transforms import assemble, corrupt
from atoplib.verdicts import Verdict, reseed

THROUGH = ("both", "transform", "purifier")

HILL_PGD = PGDSettings(eps=8 / 255, steps=50, alpha=2 / 255, eot_samples=15)
HILL_VERDICT = Verdict("mean_softmax", num_draws=150)
"""The setting of Hill, Mitchell & Zhu 2021, section 4: 50 steps of 2/255 from a random point, cross-entropy averaged over 15
draws; the verdict is the mean over 150 (they average logits, ``Verdict`` the softmax)."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(source: Float[Tensor, "*shape"], value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``value``, bit by bit, whose gradient goes to ``source`` as if it were ``source`` (Athalye et al. 2018, section 4.1).

    Raises:
        ValueError: where the shapes differ, for then the identity is no approximation of anything.
    """
    if source.shape != value.shape:
        raise ValueError(
            f"the identity can stand in for a step that keeps its shape only, but {tuple(source.shape)} became "
            f"{tuple(value.shape)}"
        )
    return _StraightThrough.apply(source, value)


class IdentityBackward(nn.Module):
    """``classifier(preprocess(x))`` with the identity backward through ``preprocess``: (B, 3, H, W) in [0, 1] -> logits.

    Args:
        preprocess: any callable that keeps the images' shape; it need not be differentiable.
        classifier: any module, images -> logits.
    """

    def __init__(self, preprocess: Callable[[Tensor], Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.classifier = preprocess, classifier
        # a wrapper has no mode of its own; what it holds is not switched
        self.training = classifier.training or getattr(preprocess, "training", False)

    def reseed(self, seed: int) -> None:
        """Start the dice of ``preprocess`` anew, where it has any."""
        reseed(self.preprocess, seed)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        with torch.no_grad():
            processed = self.preprocess(images)
        return self.classifier(straight_through(images, processed))


class BPDA(nn.Module):
    """An ``AToPPipeline`` with the identity backward through its transform, its purifier, or both.

    The logits are the pipeline's own, bit by bit, and so are the dice: both draw from the same sequence.

    Args:
        pipeline: whose ``draw``, ``purify``, ``rebuild`` and ``classifier`` are used; it is not copied.
        through: ``both``; ``transform`` (the purifier's true gradient, then the identity: masks and clipping stop nothing);
            ``purifier`` (the identity, then the transform's true gradient: missing pixels get none).

    Raises:
        ValueError: for an unknown ``through``, or ``purifier`` with RT3, of which every input pixel is dropped: each patch
            of its result was masked in the copy that it comes from, so the gradient would be zero everywhere. Also for a
            pipeline that averages several draws.

    Source: Athalye et al. 2018, section 4.1.
    """

    def __init__(self, pipeline: nn.Module, through: str = "both") -> None:
        super().__init__()
        if through not in THROUGH:
            raise ValueError(f"unknown through {through!r}; allowed: {', '.join(THROUGH)}")
        if through == "purifier" and pipeline.transform.name == "rt3":
            raise ValueError(
                "BPDA through the purifier alone has no gradient with rt3, which keeps only what was masked: "
                "take through='both' or 'transform'"
            )
        if getattr(pipeline, "copies", 1) > 1:
            raise ValueError(f"BPDA is for a pipeline of one draw a pass, but this one averages {pipeline.copies}")
        self.pipeline, self.through = pipeline, through
        self.training = pipeline.training

    def reseed(self, seed: int) -> None:
        """Start the pipeline's dice anew."""
        self.pipeline.reseed(seed)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        return self.pipeline.classifier(self.purify(images))

    def purify(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """g(t(x)) as the pipeline computes it, with the gradient of ``through``."""
        pipeline, draw = self.pipeline, self.pipeline.draw(images)
        if self.through == "both":
            with torch.no_grad():
                purified = pipeline.purify(images, draw)
            return straight_through(images, purified)
        visible, rest = corrupt(images, draw).split((3, 2), dim=1)
        if self.through == "transform":
            scaled = (images * 2 - 1).repeat(len(draw.masks), 1, 1, 1)  # one copy a mask, as corrupt lays them out
            visible = straight_through(scaled, visible.detach())
            output = pipeline.rebuild(torch.cat([visible, rest], dim=1), draw)[-1]
        else:
            with torch.no_grad():
                output = pipeline.rebuild(torch.cat([visible, rest], dim=1), draw)[-1]
            output = straight_through(visible, output)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return (assemble(output, draw) + 1) / 2
