"""The defence as one module: random transform -> purifier -> frozen classifier."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.checkpoints import CheckpointError, load_checkpoint
from atoplib.classifiers import fold_batch_norms, to_channels_last
from atoplib.contract import adapt, copy_of
from atoplib.purifiers import FrozenGatedUNet, GatedUNet, frozen_unet, stage_outputs
from atoplib.shares import WHOLE, Share
from atoplib.transforms import Draw, TransformSettings, assemble, corrupt, sample_draw, visible_part

AVERAGES = ("images", "logits")


class AToPPipeline(nn.Module):
    """f(g(t(x))): (B, 3, H, W) in [0, 1] -> logits, differentiable end to end (Lin et al. 2024, figure 1).

    Every forward pass throws new dice, a draw of its own for each image of the batch; so a batch that holds an image k
    times gets k independent draws. The dice come from a generator of the pipeline's own on the images' device, never from
    the global one.

    Args:
        transform: what destroys the perturbation.
        purifier: any module (B, 5, H, W) -> (B, 3, H, W) in [-1, 1], or a tuple of stages, the result last. One that throws
            dice of its own says so by ``noise_planes``, and is given that many standard normal planes an image.
        classifier: any module (B, 3, H, W) in [0, 1] -> logits (``contract.adapt``). It is frozen: no gradient to its
            weights, and it stays in eval mode whatever mode the pipeline is put in.
        seed: of the pipeline's generator.
    """

    def __init__(self, transform: TransformSettings, purifier: nn.Module, classifier: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.transform = transform
        self.purifier = purifier
        self.classifier = adapt(classifier).requires_grad_(False).eval()
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def train(self, mode: bool = True) -> "AToPPipeline":
        """Put the purifier into train or eval mode; the classifier stays in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def extra_repr(self) -> str:
        return f"transform={self.transform}"

    def reseed(self, seed: int, share: Share = WHOLE) -> None:
        """Start the pipeline's random numbers anew from ``seed``; ``share`` says which part of a batch it will be given."""
        self.seed = seed
        self._share = share
        self._generators.clear()

    @contextmanager
    def fixed_draws(self, seed: int) -> Iterator[None]:
        """Within the block every call on a batch of one shape uses the same draw, a function of ``seed`` alone."""
        kept, outer = self._generators, self._fixed_seed
        self._generators, self._fixed_seed = {}, seed
        try:
            yield
        finally:
            self._generators, self._fixed_seed = kept, outer

    _fixed_seed: int | None = None
    _share: Share = WHOLE

    def draw(self, images: Float[Tensor, "batch 3 height width"]) -> Draw:
        """Throw the dice for these images, the next of the pipeline's sequence (or the fixed ones)."""
        device = images.device
        if self._fixed_seed is not None:
            generator = torch.Generator(device).manual_seed(self._fixed_seed)
        else:
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(self.seed)
            generator = self._generators[device]
        draw = sample_draw(
            self.transform, images.shape, generator=generator, device=device, dtype=images.dtype, share=self._share
        )
        if not self.purifier_noise:
            return draw
        shape = draw.masks.shape[0] * draw.masks.shape[1], self.purifier_noise, *images.shape[2:]
        inner = self._share.throw(torch.randn, shape, generator=generator, device=device).to(images.dtype)
        return draw._replace(inner=inner.unflatten(0, draw.masks.shape[:2]))

    @property
    def purifier_noise(self) -> int:
        """Standard normal planes that the purifier wants for each image: 0 for one that throws no dice."""
        return getattr(self.purifier, "noise_planes", 0)

    def rebuild(
        self, given: Float[Tensor, "copies 5 height width"], draw: Draw
    ) -> tuple[Float[Tensor, "copies 3 height width"], ...]:
        """What the purifier makes of the planes of ``transforms.corrupt``, every stage of it, [-1, 1], the result last."""
        own = () if draw.inner is None else (draw.inner.flatten(0, 1),)
        return stage_outputs(self.purifier(given, *own))

    def purify_stages(
        self, images: Float[Tensor, "batch 3 height width"], draw: Draw
    ) -> tuple[Float[Tensor, "batch 3 height width"], ...]:
        """Every stage of the purifier's output for one draw, [-1, 1], the result last."""
        if isinstance(self.purifier, FrozenGatedUNet):
            outputs = (self.purifier.rebuild(visible_part(images, draw), draw.masks.flatten(0, 1)),)
        else:
            outputs = self.rebuild(corrupt(images, draw), draw)
        return tuple(assemble(stage.to(torch.promote_types(stage.dtype, torch.float32)), draw) for stage in outputs)

    def purify(
        self, images: Float[Tensor, "batch 3 height width"], draw: Draw | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """g(t(x)), in and out in [0, 1] (out as far as g keeps its range); a ``draw`` given is used instead of new dice."""
        result = self.purify_stages(images, self.draw(images) if draw is None else draw)[-1]
        return to_unit(result)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], draw: Draw | None = None
    ) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.purify(images, draw))


class AveragedPipeline(AToPPipeline):
    """f(mean_i g(t_i(x))): the mean over several independent draws t_i, masks and noise, as one module to attack.

    The average is inside: every forward pass throws ``copies`` dice for each image, and gradients flow through all of them.
    With ``copies`` = 1 it is the pipeline itself.

    Args:
        transform, purifier, classifier, seed: as ``AToPPipeline`` takes them.
        copies: draws that are averaged, at least 1; so many times the cost of a pass.
        average: ``images`` (purified images, read once) or ``logits`` (each is read, then the logits are averaged).

    Raises:
        ValueError: for copies < 1 or an unknown average.
    """

    def __init__(
        self,
        transform: TransformSettings,
        purifier: nn.Module,
        classifier: nn.Module,
        *,
        copies: int = 1,
        average: str = "images",
        seed: int = 0,
    ) -> None:
        super().__init__(transform, purifier, classifier, seed=seed)
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        if average not in AVERAGES:
            raise ValueError(f"unknown average {average!r}; allowed: {', '.join(AVERAGES)}")
        self.copies = copies
        self.average = average

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, copies={self.copies}, average={self.average}"

    def purify(
        self, images: Float[Tensor, "batch 3 height width"], draw: Draw | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """The mean of g(t_i(x)), in and out in [0, 1]; a ``draw`` given is used alone, without an average."""
        return self._mean(self._each(images)) if draw is None else super().purify(images, draw)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], draw: Draw | None = None
    ) -> Float[Tensor, "batch classes"]:
        if draw is not None or self.average == "images":
            return super().forward(images, draw)
        return self._mean(self.classifier(self._each(images)))

    def _each(self, images: Tensor) -> Tensor:
        """Every copy purified, copy by copy: (copies * batch, 3, height, width)."""
        return super().purify(images.repeat(self.copies, 1, 1, 1))

    def _mean(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (self.copies, -1)).mean(dim=0)


def load_pipeline(
    purifier_path: Path, classifier: nn.Module, *, device: torch.device | str = "cpu", seed: int = 0
) -> AToPPipeline:
    """The pipeline of a saved purifier, in eval mode, with the random transform that it was trained with.

    Args:
        purifier_path: a checkpoint whose header holds ``transform``, the fields of ``TransformSettings``.
        classifier: any module, images in [0, 1] -> logits, on ``device``.

    Raises:
        FileNotFoundError, CheckpointError: as ``checkpoints.load_checkpoint``, or if the header names no transform.
    """
    purifier, header = load_checkpoint(purifier_path, kind="purifier", device=device)
    try:
        transform = TransformSettings(**header["transform"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{purifier_path} does not say which random transform it belongs to ({error})") from error
    purifier = purifier.to(memory_format=torch.channels_last)
    return AToPPipeline(transform, purifier, classifier, seed=seed).eval()


def for_attacks(pipeline: AToPPipeline) -> AToPPipeline:
    """A copy of a trained pipeline to attack: the same function and gradients up to rounding, frozen, in less time.

    The classifier takes up its batch normalisations (``fold_batch_norms``), a ``GatedUNet`` becomes a ``FrozenGatedUNet``
    where that gives the same images, any other purifier is copied as it is; no weight gets a gradient, and what consists of
    known layers is channels-last. The copy throws the dice that a pipeline throws that was just given the seed of this one.

    Raises:
        ValueError: for a pipeline in train mode.
    """
    if pipeline.training:
        raise ValueError("only a pipeline in eval mode can be prepared for attacks; call pipeline.eval()")
    copied = copy(pipeline)
    copied._modules = dict(pipeline._modules)
    copied._generators = {}
    frozen = frozen_unet(pipeline.purifier) if type(pipeline.purifier) is GatedUNet else None
    copied.purifier = to_channels_last(copy_of(pipeline.purifier) if frozen is None else frozen)
    copied.classifier = to_channels_last(fold_batch_norms(pipeline.classifier))
    return copied.requires_grad_(False).eval()


def to_unit(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """From the purifier's [-1, 1] to the [0, 1] that classifiers read. Not clipped: a purifier without tanh may overshoot
    by a little, and a clip would zero gradients that an attack needs."""
    return (images + 1) / 2
