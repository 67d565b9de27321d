"""The defence as one module: random transform -> purifier -> frozen classifier; and its mixture with a
classifier."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib import checkpoints
from atoplib.contract import adapt, check_eval_mode
from atoplib.freezing import copy_of, fold_batch_norms, freeze, to_channels_last
from atoplib.parameters import above, at_least, between, check_settings, one_of
from atoplib.transforms import Transform, TransformSample, assemble, corrupt, sample_transform


class AToPPipeline(nn.Module):
    """f(g(t(x))): (B, 3, H, W) in [0, 1] -> logits, differentiable end to end (Lin et al. 2024, figure 1).

    Every forward pass takes a new sample of t, its own for each image of the batch; so a batch that holds an
    image k times gets k independent samples.

    Args:
        transform: what destroys the perturbation.
        purifier: any module (B, 5, H, W) -> (B, 3, H, W) in [-1, 1], or a tuple of such, the result last. One
            that is random itself says so by ``noise_planes``, and is also given that many standard normal
            planes an image.
        classifier: any module (B, 3, H, W) in [0, 1] -> logits (``contract.adapt``). It is frozen in place:
            no gradient to its weights, and it stays in eval mode whatever mode the pipeline is put in.
        copies: samples of t whose results are averaged in every forward pass; gradients flow through all of
            them.
        average: ``images`` (the purified images, classified once) or ``logits``.
        seed: of a random generator of the pipeline's own on the images' device; None: torch's global
            generator.

    Raises:
        ValueError: for copies < 1 or an unknown average.
    """

    _fixed_seed: int | None = None

    def __init__(
        self,
        transform: Transform,
        purifier: nn.Module,
        classifier: Callable[[Tensor], Any],
        *,
        copies: int = 1,
        average: str = "images",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        check_settings(copies=(copies, at_least(1)), average=(average, one_of("images", "logits")))
        self.transform, self.copies, self.average, self.seed = transform, copies, average, seed
        self.purifier = purifier
        self.classifier = adapt(classifier).requires_grad_(False).eval()
        self.training = purifier.training
        self._generators: dict[torch.device, torch.Generator] = {}

    def train(self, mode: bool = True) -> "AToPPipeline":
        """Put the purifier into train or eval mode; the classifier stays in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose random numbers start from the seed (a generator cannot be copied), and whose parts
        and hooks are its own."""
        state = {
            name: copy(value) if isinstance(value, dict) else value for name, value in vars(self).items()
        }
        return {**state, "_generators": {}}

    def reseed(self, seed: int | None) -> None:
        """Start the pipeline's random numbers anew from ``seed``."""
        self.seed = seed
        self._generators.clear()

    @contextmanager
    def fixed_sample(self, seed: int) -> Iterator[None]:
        """Within the block every call on a batch of one shape uses the same sample, a function of ``seed``
        alone."""
        outer, self._fixed_seed = self._fixed_seed, seed
        try:
            yield
        finally:
            self._fixed_seed = outer

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self._fixed_seed is not None:
            return torch.Generator(device).manual_seed(self._fixed_seed)
        if self.seed is None:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def sample(self, images: Float[Tensor, "batch 3 height width"]) -> TransformSample:
        """A new sample of t for these images (or the fixed one); with several copies, for the batch copy by
        copy."""
        return sample_transform(
            self.transform,
            (self.copies * len(images), *images.shape[1:]),
            generator=self._generator(images.device),
            device=images.device,
            dtype=images.dtype,
            noise_planes=getattr(self.purifier, "noise_planes", 0),
        )

    def outputs(
        self, images: Float[Tensor, "batch 3 height width"], sample: TransformSample | None = None
    ) -> tuple[Float[Tensor, "batch 3 height width"], ...]:
        """Every output of the purifier (coarse, fine), in [-1, 1], the result last; with several copies their
        mean.

        ``sample`` is one that ``sample`` returned for this batch, or one with a single row an image; None: a
        new one.
        """
        return tuple(self._mean(output, images) for output in self._each(images, sample))

    def purify(
        self, images: Float[Tensor, "batch 3 height width"], sample: TransformSample | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """g(t(x)), in and out in [0, 1] (out as far as g keeps its range); ``sample`` as in ``outputs``."""
        return to_unit(self.outputs(images, sample)[-1])

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], sample: TransformSample | None = None
    ) -> Float[Tensor, "batch ..."]:
        """What the classifier answers: logits (B, classes); with ``nn.Identity`` the purified images."""
        if self.average == "images":
            return self.classifier(self.purify(images, sample))
        return self._mean(self.classifier(to_unit(self._each(images, sample)[-1])), images)

    def _each(self, images: Tensor, sample: TransformSample | None) -> tuple[Tensor, ...]:
        """The outputs for every copy, copy by copy: (copies * batch, 3, height, width), at least float32."""
        sample = self.sample(images) if sample is None else sample
        if self.copies > 1 and sample.masks.shape[1] == self.copies * len(images):
            images = images.repeat(self.copies, 1, 1, 1)
        noise = () if sample.purifier_noise is None else (sample.purifier_noise.flatten(0, 1),)
        result = self.purifier(corrupt(images, sample), *noise)
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        return tuple(assemble(o.to(torch.promote_types(o.dtype, torch.float32)), sample) for o in outputs)

    def _mean(self, values: Tensor, images: Tensor) -> Tensor:
        return values if len(values) == len(images) else values.unflatten(0, (self.copies, -1)).mean(dim=0)

    def with_transform(self, **changes: Any) -> "AToPPipeline":
        """The same purifier and classifier (the weights are shared) behind a transform with some settings
        changed."""
        changed = copy(self)
        changed.transform = replace(self.transform, **changes)
        return changed

    def freeze_for_attack(self) -> "AToPPipeline":
        """A copy to attack: the same function and gradients up to rounding, frozen, in less time.

        A classifier of known layers takes up its batch normalisations, and known layers are channels-last.
        Its samples are those of a pipeline that was just given the seed of this one.

        Raises:
            ValueError: in train mode.
        """
        check_eval_mode(self)
        frozen = copy(self)
        frozen.purifier = to_channels_last(copy_of(self.purifier))
        frozen.classifier = to_channels_last(fold_batch_norms(self.classifier))
        return frozen.requires_grad_(False).eval()


class Mixed(nn.Module):
    """log((1 - alpha) * softmax(natural(x)) + alpha * softmax(s * defended(x))): a compromise of accuracy and
    robustness.

    Any two models, images in [0, 1] -> logits of the same classes, both put into eval mode; differentiable
    through both, random where one is. For attacks by one branch's gradient alone there are ``mixed.natural``
    and ``mixed.defended``.

    Args:
        alpha: weight of the defended model, in [0, 1].
        scale: s > 0 of the defended model's logits; above 1 it counts where it is confident, which robust
            models are more often when they are correct.

    Raises:
        ValueError: for alpha or scale out of range.

    Source: Bai et al. 2024, "MixedNUTS", with its transformation of the robust logits reduced to the scale.
    """

    def __init__(
        self, natural: nn.Module, defended: nn.Module, alpha: float = 0.5, scale: float = 1.0
    ) -> None:
        super().__init__()
        check_settings(alpha=(alpha, between(0, 1)), scale=(scale, above(0, 1e9)))
        self.natural, self.defended = adapt(natural), adapt(defended)
        self.alpha, self.scale = alpha, scale
        self.eval()

    def freeze_for_attack(self) -> "Mixed":
        """The same mixture of the branches as ``freezing.freeze`` makes them."""
        return Mixed(freeze(self.natural), freeze(self.defended), self.alpha, self.scale)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        # The mixture of log-probabilities, so that what is 0 in float32 keeps a gradient.
        weights = torch.tensor([1 - self.alpha, self.alpha], dtype=images.dtype, device=images.device).log()
        natural = self.natural(images).log_softmax(dim=1)
        defended = (self.scale * self.defended(images)).log_softmax(dim=1)
        if natural.shape != defended.shape:
            raise ValueError(
                f"the models give logits of {natural.shape[1]} and {defended.shape[1]} classes, but only two "
                "of the same classes can be mixed"
            )
        return torch.stack([weights[0] + natural, weights[1] + defended]).logsumexp(dim=0)


def load_pipeline(
    purifier_path: Path, classifier: nn.Module, *, device: torch.device | str = "cpu", seed: int | None = 0
) -> AToPPipeline:
    """The pipeline of a saved purifier, in eval mode, with the random transform that it was trained with.

    Args:
        purifier_path: a checkpoint whose header holds ``transform``, the fields of ``Transform``.
        classifier: any module, images in [0, 1] -> logits, on ``device``.

    Raises:
        FileNotFoundError, CheckpointError: as ``checkpoints.load``, or if the header names no transform.
    """
    purifier, header = checkpoints.load(purifier_path, kind="purifier", device=device)
    try:
        transform = Transform(**header["transform"])
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoints.CheckpointError(
            f"{purifier_path} does not say which random transform it belongs to ({error})"
        ) from error
    return AToPPipeline(transform, to_channels_last(purifier), classifier, seed=seed).eval()


def to_unit(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """From the purifier's [-1, 1] to the [0, 1] that classifiers take. Not clipped: a purifier without tanh
    may overshoot by a little, and a clip would zero gradients that an attack needs."""
    return (images + 1) / 2
