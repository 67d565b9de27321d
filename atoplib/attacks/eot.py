"""Gradients through models that are random or not differentiable, and a count of passes.

EOT, expectation over transformation: means over samples of the model. BPDA: the defence as it is on the way
forward, the identity in its place on the way back (Athalye et al. 2018, 4.2 and 4.1). What ``bpda`` returns
is a model like any other, so that every attack runs on it: ``pgd(bpda(pipeline), images, labels, eps=8 / 255,
steps=50, alpha=2 / 255, eot_samples=15)`` is the attack of Hill, Mitchell & Zhu 2021, section 4 (they decide
by the mean of 150 samples). The decision is the defence's own.
"""

from collections.abc import Callable
from math import log
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.losses import LOSSES, MEAN_SOFTMAX, Loss
from atoplib.contract import Adapted, adapt
from atoplib.decisions import Model
from atoplib.parameters import check_counts, check_settings, one_of

# Values by which one field of noise moves from sample to sample: noise drawn for every copy would depend on
# how max_batch cuts them.
SHIFT = 97

# (step, steps, adversarial images, loss of each image), called after every step of an attack.
StepCallback = Callable[[int, int, Tensor, Tensor], None]


class EOTGradient(NamedTuple):
    """Of each image: gradient of the loss and the loss over all samples, and the logits of every sample."""

    gradient: Float[Tensor, "batch channels height width"]
    loss: Float[Tensor, " batch"]
    logits: Float[Tensor, "samples batch classes"]


def eot_gradient(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    loss: Loss | str = "ce",
    eot_samples: int = 1,
    targets: Int[Tensor, " batch"] | None = None,
    noise: Float[Tensor, "batch channels height width"] | None = None,
    max_batch: int = 256,
) -> EOTGradient:
    """Gradient of each image's loss over ``eot_samples`` samples of the model; samples and images share
    batches.

    Args:
        model: images in [0, 1] -> logits, random for each image of its batch by itself, or deterministic.
        loss: a name of ``LOSSES`` or a function (logits, labels) -> one value an image, averaged over the
            samples; or ``mean_softmax``: the cross-entropy of the mean probability over the samples, each
            sample's logits scaled as in ``scaled_cross_entropy``. A mean of cross-entropies pulls most where
            a sample is wrong already, this one where a sample is still correct.
        targets: third argument of a targeted loss.
        noise: added to the images where gradients are taken; from sample to sample it is shifted by
            ``SHIFT`` of an image's values, so that each sees another.
        max_batch: copies of images that are in memory at once.

    Raises:
        ValueError: for an unknown loss.

    Source: Athalye et al. 2018, section 4.2.
    """
    if isinstance(loss, str):
        check_settings(loss=(loss, one_of(*LOSSES)))
    value_of = LOSSES.get(loss, loss)
    classes = (labels,) if targets is None else (labels, targets)
    results = []
    for rows in torch.arange(len(images), device=images.device).split(max(1, max_batch // eot_samples)):
        passes, shown = [], images.detach()[rows].repeat(eot_samples, 1, 1, 1)
        if noise is not None:
            shown += torch.cat(
                [noise[rows].flatten(1).roll(SHIFT * k, dims=1) for k in range(eot_samples)]
            ).view_as(shown)
        for part, copy in zip(rows.repeat(eot_samples).split(max_batch), shown.split(max_batch), strict=True):
            copies = copy.detach().requires_grad_()
            with torch.enable_grad():
                logits = model(copies)
                values = value_of(logits, *(each[part] for each in classes))
                (gradient,) = torch.autograd.grad(values.sum(), copies)
            passes.append((gradient, values.detach().float(), logits.detach()))
        gradients, values, logits = (
            torch.cat(each).unflatten(0, (eot_samples, len(rows))) for each in zip(*passes, strict=True)
        )
        if loss == MEAN_SOFTMAX:  # the gradient of -log mean p is a mean of those of -log p, weighed by p
            weights, value = (-values).softmax(dim=0), log(eot_samples) - (-values).logsumexp(dim=0)
            gradient = (gradients * weights[..., None, None, None]).sum(dim=0)
        else:
            gradient, value = gradients.mean(dim=0), values.mean(dim=0)
        results.append((gradient, value, logits))
    gradients, values, logits = zip(*results, strict=True)
    return EOTGradient(torch.cat(gradients), torch.cat(values), torch.cat(logits, dim=1))


def make_generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """The generator of an attack's own random numbers: a new one for a number, a given one, or None (torch's
    global)."""
    return torch.Generator(device).manual_seed(int(seed)) if isinstance(seed, Integral) else seed


class PassCounter(Adapted):
    """A model that counts its passes, in images: ``gradient_passes`` (forward and backward) and
    ``forward_passes`` (forward alone). Everything else is the model's."""

    def __init__(self, model: Model) -> None:
        super().__init__(adapt(model))
        self.gradient_passes = self.forward_passes = 0

    def forward(self, images: Float[Tensor, "batch channels height width"], *others: Any) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            self.gradient_passes += len(images)
        else:
            self.forward_passes += len(images)
        return self.network(images, *others)


class EOTWrapper(nn.Module):
    """A random model as other libraries can attack it: logits averaged over ``eot_samples`` samples, all in
    one batch.

    What they differentiate is a function of the mean logits (Athalye et al. 2018, section 4.2; Hill et al.
    2021 average logits, too). The graph of all samples is in memory at once.
    """

    def __init__(self, model: Model, eot_samples: int) -> None:
        super().__init__()
        check_counts(eot_samples=eot_samples)
        self.model, self.eot_samples = adapt(model), eot_samples
        self.training = self.model.training

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        logits = self.model(images.repeat(self.eot_samples, 1, 1, 1)).float()
        return logits.unflatten(0, (self.eot_samples, len(images))).mean(dim=0)


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
        # the processed images bit by bit, for 0 is added; its gradient is that of the images
        return self.classifier(processed + (images - images.detach()))


def bpda(pipeline: nn.Module) -> IdentityBackward:
    """An ``AToPPipeline`` with the identity backward through transform and purifier; it is not copied.

    The logits are the pipeline's own, bit by bit, and so are the random numbers: both sample from the same
    sequence.

    Raises:
        ValueError: for what is no pipeline, or one that averages logits over several samples (their mean is
            that of no purified image).
    """
    if not hasattr(pipeline, "purify") or (pipeline.copies > 1 and pipeline.average == "logits"):
        raise ValueError(
            f"bpda needs an AToPPipeline with average='images', not a {type(pipeline).__name__}; of others "
            "attacks.IdentityBackward(preprocess, classifier)"
        )
    return IdentityBackward(pipeline.purify, pipeline.classifier)
