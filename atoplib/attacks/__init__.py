"""Attacks on any model (B, C, H, W) in [0, 1] -> logits, random or not: one function each, all with one
signature, and the table of them by name, which protocols, explorer and notebooks read.

``attack(model, images, labels, *, eps, norm="linf", ..., targets=None, seed=0, max_batch=256,
callback=None)`` returns adversarial images in [0, 1].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any

from torch import Tensor

from atoplib.attacks.apgd import apgd, autoattack
from atoplib.attacks.black_box import square
from atoplib.attacks.eot import (
    EOTGradient,
    EOTWrapper,
    IdentityBackward,
    PassCounter,
    StepCallback,
    bpda,
    eot_gradient,
)
from atoplib.attacks.flow import flow
from atoplib.attacks.norms import NORMS, Ball
from atoplib.attacks.pgd import fgsm, n_fgsm, pgd, pgd_ensemble
from atoplib.attacks.third_party import THIRD_PARTY, ddn, fmn, third_party
from atoplib.attacks.unseen import CORRUPTIONS, corrupt, corruption, occlusion, rotation_translation

__all__ = [
    "ATTACKS",
    "CORRUPTIONS",
    "NORMS",
    "RADII",
    "Attack",
    "Ball",
    "EOTGradient",
    "EOTWrapper",
    "IdentityBackward",
    "PassCounter",
    "StepCallback",
    "apgd",
    "autoattack",
    "bpda",
    "corrupt",
    "corruption",
    "ddn",
    "eot_gradient",
    "fgsm",
    "flow",
    "fmn",
    "n_fgsm",
    "occlusion",
    "pgd",
    "pgd_ensemble",
    "rotation_translation",
    "square",
    "third_party",
    "usual_radii",
]

# The usual eps by norm, of grey images (MNIST) and of coloured ones (CIFAR-10): in units of the image
# ([0, 1]); flow: of half the image's side; patches; degrees; severity.
RADII: dict[str, tuple[float, float]] = {
    "linf": (0.3, 8 / 255),
    "l2": (2.0, 0.5),
    "l1": (12.0, 12.0),
    "flow": (0.05, 0.05),
    "occlusion": (1, 1),
    "rotation": (30, 30),
    "corruption": (3, 3),
}

SHARED = {
    "model",
    "images",
    "labels",
    "eps",
    "norm",
    "name",
    "targets",
    "seed",
    "max_batch",
    "callback",
    "ball",
}


@dataclass(frozen=True)
class Attack:
    """A row of the registry.

    Attributes:
        name, title: in code; for people.
        function: attack(model, images, labels, *, eps, norm, ...) -> adversarial images.
        norms: those that its eps can be of, the usual one first.
        description: one line.
        gradient: whether it differentiates the model.
        stochastic: whether it can attack random models.
        tries: about so many points of each image are looked at beside steps, by default.
        takes: names of its own options; None: those of the function's signature.
    """

    name: str
    title: str
    function: Callable[..., Tensor]
    norms: tuple[str, ...]
    description: str
    gradient: bool = True
    stochastic: bool = True
    tries: int = 1
    takes: tuple[str, ...] | None = None

    @cached_property
    def options(self) -> dict[str, Any]:
        """The attack's own keyword arguments and their defaults."""
        parameters = signature(self.function).parameters.items()
        known = {name: each.default for name, each in parameters if name not in SHARED}
        return known if self.takes is None else {name: known[name] for name in self.takes}

    @cached_property
    def targeted(self) -> bool:
        """Whether it can drive each image to a class: ``targets``."""
        return "targets" in signature(self.function).parameters


def usual_radii(images: Tensor) -> dict[str, float]:
    """The usual eps of each norm (``RADII``): those of digits where all images are grey, else of CIFAR-10."""
    grey = bool((images[:, :1] == images).all())
    return {norm: of_grey if grey else of_colour for norm, (of_grey, of_colour) in RADII.items()}


def _torchattacks(name: str) -> Attack:
    known = THIRD_PARTY[name]
    takes = [option for option, has in {"steps": known.steps, "queries": known.queries}.items() if has]
    return Attack(
        f"torchattacks:{name}", f"{name} (torchattacks)", partial(third_party, name=name), known.norms,
        f"{name} as torchattacks has it, projected into our ball", takes=(*takes, "eot_samples"),
        gradient=name not in ("Square", "SPSA"), stochastic=name != "FAB",  # it finds nothing there
    )  # fmt: skip


_ROWS = (
    Attack(
        "fgsm", "FGSM", fgsm, NORMS,
        "one step of size eps along the gradient (Goodfellow et al. 2015)",
    ),
    Attack(
        "pgd", "PGD", pgd, NORMS,
        "projected gradient ascent over samples (Madry et al. 2018; EOT)",
    ),
    Attack(
        "pgd_ensemble", "PGD ensemble", pgd_ensemble, NORMS,
        "PGD with falling steps, momentum, restarts of other losses: the strongest here",
    ),
    Attack(
        "apgd", "APGD", apgd, NORMS,
        "PGD that halves its own step where the loss stalls (Croce & Hein 2020)",
    ),
    Attack(
        "autoattack", "AutoAttack", autoattack, NORMS,
        "a fixed ensemble; rand for random models (Croce & Hein 2020)",
    ),
    Attack(
        "flow", "Flow (StAdv)", flow, ("flow",),
        "pixels move instead of changing their values (Xiao et al. 2018)",
    ),
    Attack(
        "square", "Square", square, ("linf", "l2"),
        "random search with squares, logits alone (Andriushchenko et al. 2020)", gradient=False,
    ),
    Attack(
        "occlusion", "Occlusion", occlusion, ("occlusion",),
        "patches covered at the worst place", gradient=False, tries=65,
    ),
    Attack(
        "rotation_translation", "Rotation, translation", rotation_translation, ("rotation",),
        "the worst rotation and shift of a grid (Engstrom et al. 2019)", gradient=False, tries=775,
    ),
    Attack(
        "corruption", "Corruption", corruption, ("corruption",),
        "noise, blur, contrast and others (Hendrycks & Dietterich 2019)", gradient=False,
        tries=len(CORRUPTIONS),
    ),
    Attack(
        "ddn", "DDN", ddn, ("l2",),
        "the smallest l2 perturbation (Rony et al. 2019)", stochastic=False,
    ),
    Attack(
        "fmn", "FMN", fmn, NORMS,
        "the smallest perturbation of a norm (Pintor et al. 2021)", stochastic=False,
    ),
    *(_torchattacks(name) for name in THIRD_PARTY),
)  # fmt: skip
ATTACKS: Mapping[str, Attack] = {row.name: row for row in _ROWS}
