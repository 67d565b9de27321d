"""Attacks of torchattacks by name, kept to our rules: EOT, a budget that is checked, dice of their own.

Kim 2020, "Torchattacks: A PyTorch Repository for Adversarial Attacks" (arXiv 2010.01950).
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import TextIOBase
from threading import Lock, get_ident
from typing import Any, TextIO

import numpy as np
import torch
import torchattacks
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.checks import check_attack, check_budget
from atoplib.attacks.eot import cross_entropy
from atoplib.attacks.foreign_names import FOREIGN
from atoplib.attacks.norms import check_ball, project
from atoplib.attacks.pgd import StepCallback
from atoplib.verdicts import reseed

ONE_AT_A_TIME = Lock()  # the dice of torchattacks are those of the whole process


@dataclass(frozen=True)
class ForeignSettings:
    """An attack of torchattacks.

    Attributes:
        name: a key of ``FOREIGN``.
        eps: radius of the ball, in units of the image ([0, 1]). An attack without one (CW, DeepFool) finds what it finds;
            the result is then projected into the ball.
        norm: ``linf`` or ``l2``, one that the attack is made for.
        eot_samples: draws whose logits are averaged in each of the attack's forward passes, at least 1.
        options: what the attack itself takes, such as ``{"steps": 50, "alpha": 0.01}``; its own defaults elsewhere, which
            are made for eps = 8/255.
    """

    name: str
    eps: float
    norm: str = "linf"
    eot_samples: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in FOREIGN:
            raise ValueError(f"unknown attack {self.name!r} of torchattacks; allowed: {', '.join(FOREIGN)}")
        check_ball(self.eps, self.norm)
        norms = FOREIGN[self.name].norms
        if self.norm not in norms:
            raise ValueError(f"{self.name} is no attack for {self.norm}, but for {', '.join(norms)}")
        if self.eot_samples < 1:
            raise ValueError(f"eot_samples must be at least 1, got {self.eot_samples}")
        known = _parameters(self.name)
        unknown = [option for option in self.options if option not in known]
        if unknown:
            raise ValueError(f"{self.name} does not take {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")


class MeanLogits(nn.Module):
    """A random model as any attack can take it: (B, 3, H, W) -> logits averaged over ``draws`` draws, all in one batch.

    For attacks of other libraries, which know of no draws: what they differentiate is a function of the mean logits
    (Athalye et al. 2018, section 4.2; Hill et al. 2021 average logits too). The graph of all draws is in memory at once.
    ``on_pass`` is called with the number of each forward pass before it is made, and may raise.
    """

    def __init__(self, model: nn.Module, draws: int, on_pass: Callable[[int], None] | None = None) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.model, self.draws = model, draws
        self.training = model.training  # a wrapper has no mode of its own
        self.passes, self.on_pass = 0, on_pass

    def reseed(self, seed: int) -> None:
        """Start the model's dice anew, where it has any of its own."""
        reseed(self.model, seed)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        self.passes += 1
        if self.on_pass is not None:
            self.on_pass(self.passes)
        return self.model(images.repeat(self.draws, 1, 1, 1)).float().unflatten(0, (self.draws, len(images))).mean(dim=0)


class Silence(TextIOBase):
    """An output that swallows what this thread writes, and hands on what others do."""

    def __init__(self, others: TextIO) -> None:
        super().__init__()
        self.others, self.thread = others, get_ident()

    def write(self, text: str) -> int:
        return len(text) if get_ident() == self.thread else self.others.write(text)

    def flush(self) -> None:
        self.others.flush()


def torchattacks_attack(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: ForeignSettings,
    *,
    generator: torch.Generator | None = None,
    max_batch: int = 512,
    callback: StepCallback | None = None,
    on_pass: Callable[[int], None] | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images by an attack of torchattacks, projected into our ball and checked.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. Its mode is not touched.
        images: in [0, 1].
        labels: true classes.
        generator: seeds the global generators for the time of the attack, for torchattacks knows no others; afterwards
            they stand where they stood.
        max_batch: images x draws in one forward pass: so many images are attacked at a time (one at the least).
        callback: (images done, images, adversarial so far, cross-entropy of each image done) after every part.
        on_pass: called with the number of each forward pass before it is made; it may raise to stop the attack.

    Returns:
        adversarial images in [0, 1], within eps of ``images``.

    Raises:
        ValueError: as ``pgd``.
    """
    model, images, labels = check_attack(model, images, labels)
    seed = int(torch.randint(2**31, (), generator=generator, device=images.device))
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    mean = MeanLogits(model, settings.eot_samples, on_pass)
    adversarial = images.detach().clone()
    losses = torch.zeros(len(images), device=images.device)
    done = 0
    with ONE_AT_A_TIME, _global_dice(seed, images.device), _frozen(model):
        attack = _build(mean, settings, classes, seed, images.device)
        for part in torch.arange(len(images), device=images.device).split(max(1, max_batch // settings.eot_samples)):
            with torch.enable_grad(), redirect_stdout(Silence(sys.stdout)):  # some of them print
                found = attack(images[part].contiguous(), labels[part])  # some throw dice in the order of the memory
            adversarial[part] = project(found.detach(), images[part], settings.eps, settings.norm)
            done += len(part)
            if callback is not None:
                with torch.no_grad():
                    losses[part] = cross_entropy(mean(adversarial[part]), labels[part])
                callback(done, len(images), adversarial.clone(), losses.clone())
    check_budget(adversarial, images, settings.eps, settings.norm)
    return adversarial


def _parameters(name: str) -> set[str]:
    """What the attack's constructor takes beside the model."""
    return set(inspect.signature(getattr(torchattacks, name)).parameters) - {"model"}


def _build(
    model: nn.Module, settings: ForeignSettings, classes: int, seed: int, device: torch.device
) -> torchattacks.attack.Attack:
    """The attack with our radius, norm, number of classes and seed under the names that it has for them."""
    ours = {
        "eps": settings.eps,
        "max_epsilon": settings.eps,
        "norm": {"linf": "Linf", "l2": "L2"}[settings.norm],
        "n_classes": classes,
        "seed": seed,  # AutoAttack's own default is the time of day
    }
    known = _parameters(settings.name)
    given = {name: value for name, value in ours.items() if name in known}
    with redirect_stdout(Silence(sys.stdout)):  # a model without parameters makes it print
        attack = getattr(torchattacks, settings.name)(model, **(given | dict(settings.options)))
    attack.set_device(device)
    return attack


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no weight asks for a gradient: some attacks call ``backward`` and would leave theirs behind."""
    kept = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in kept:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in kept:
            weight.requires_grad_(True)


@contextmanager
def _global_dice(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block the global generators of torch, NumPy and Python start from ``seed``; outside nothing moved."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
