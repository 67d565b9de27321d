"""Attacks of other libraries, kept to our rules: those of torchattacks by name, with EOT and a ball that is
checked; and minimum-norm attacks of foolbox on deterministic models: the nearest misclassified point, and by
its distance (``norms.norm_of``) the accuracy at every radius.

Kim 2020, "Torchattacks: A PyTorch Repository for Adversarial Attacks" (arXiv 2010.01950); Rauber et al. 2020,
"Foolbox Native". Both are slow to import, and are imported by the first attack only.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from threading import Lock
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks.eot import EOTWrapper, StepCallback, make_generator
from atoplib.attacks.losses import cross_entropy
from atoplib.attacks.norms import Ball, norm_of
from atoplib.attacks.pgd import step_sizes
from atoplib.attacks.queries import prepare_attack
from atoplib.decisions import Model, forked_rng, is_random
from atoplib.parameters import above, check_counts, check_settings, one_of

FMN = {"linf": "LInfFMNAttack", "l2": "L2FMNAttack", "l1": "L1FMNAttack"}
BEYOND = 1 + 1e-3  # of a radius that ends on the boundary, where a point is still classified correctly
LINF, L2, BOTH = ("linf",), ("l2",), ("linf", "l2")
FOUR_CLASSES = ("APGDT", "AutoAttack")  # their targeted loss needs so many
ONE_AT_A_TIME = Lock()  # the random numbers of torchattacks are those of the whole process


class ThirdParty(NamedTuple):
    """What is known of an attack before its library is imported: the norms that it is made for, its own name
    for the number of steps or queries ("": it has none), and whether it takes a step size beside its
    steps."""

    norms: tuple[str, ...]
    steps: str = ""
    queries: str = ""
    alpha: bool = False


ASCENT = ThirdParty(LINF, "steps", alpha=True)
# The attacks of torchattacks 3.5.1 that ask for nothing but a model.
THIRD_PARTY: dict[str, ThirdParty] = {
    # one step
    "GN": ThirdParty(BOTH),
    "FGSM": ThirdParty(LINF),
    "FFGSM": ThirdParty(LINF),
    # gradient ascent in a ball
    "RFGSM": ASCENT,
    "BIM": ASCENT,
    "PGD": ASCENT,
    "EOTPGD": ASCENT,
    "PGDRS": ASCENT,
    "TPGD": ASCENT,
    "UPGD": ASCENT,
    "Jitter": ASCENT,
    "APGD": ThirdParty(BOTH, "steps"),
    "APGDT": ThirdParty(BOTH, "steps"),
    "PGDL2": ASCENT._replace(norms=L2),
    "PGDRSL2": ASCENT._replace(norms=L2),
    # made to transfer
    "MIFGSM": ASCENT,
    "NIFGSM": ASCENT,
    "SINIFGSM": ASCENT,
    "VMIFGSM": ASCENT,
    "VNIFGSM": ASCENT,
    "DIFGSM": ASCENT,
    "TIFGSM": ASCENT,
    "PIFGSM": ThirdParty(LINF, "num_iter_set"),
    "PIFGSMPP": ThirdParty(LINF, "num_iter_set"),
    # smallest perturbation
    "CW": ThirdParty(L2, "steps"),
    "DeepFool": ThirdParty(L2, "steps"),
    "FAB": ThirdParty(BOTH, "steps"),
    # black box, ensembles
    "SPSA": ThirdParty(LINF, "nb_iter"),
    "Square": ThirdParty(BOTH, queries="n_queries"),
    "AutoAttack": ThirdParty(BOTH),
}


def third_party(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    name: str,
    eps: float,
    norm: str | None = None,
    steps: int | None = None,
    queries: int | None = None,
    eot_samples: int = 1,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
    **options: Any,
) -> Float[Tensor, "batch channels height width"]:
    """Adversarial images by an attack of torchattacks, projected into our ball and checked.

    Args:
        model, images, labels, eps, seed, max_batch, callback: as ``pgd``; so many images are attacked at a
            time that images x samples fit max_batch (one at the least), and the callback reports after every
            such part.
        name: a key of ``THIRD_PARTY``.
        norm: one that the attack is made for; None: its first. An attack without a radius (CW, DeepFool)
            finds what it finds; the result is then projected into the ball.
        steps, queries: under the name that the attack has for them; its steps are as large as those of our
            ``pgd``.
        eot_samples: samples whose logits are averaged in each of the attack's forward passes.
        options: what else the attack itself takes, such as ``decay=0.5``; its own defaults elsewhere, which
            are made for eps = 8/255.

    Raises:
        ValueError: as ``pgd``; for an unknown attack, a norm or an option that it does not take.
    """
    check_settings(name=(name, one_of(*THIRD_PARTY)))
    known = THIRD_PARTY[name]
    counts = {
        option: value for option, value in {"steps": steps, "queries": queries}.items() if value is not None
    }
    check_counts(**counts)
    if unknown := [option for option in counts if not getattr(known, option)]:
        raise ValueError(f"{name} of torchattacks has no {unknown[0]}: leave them out")
    norm = norm or known.norms[0]
    check_settings(**{f"norm of {name}": (norm, one_of(*known.norms))})
    model, images, labels, _ = prepare_attack(model, images, labels)
    ball, wrapped, device = Ball(images, eps, norm), EOTWrapper(model, eot_samples), images.device
    alpha = step_sizes(eps, steps or 10)[0] if known.alpha else None
    wanted = {known.steps: steps, known.queries: queries, "alpha": alpha}
    options = {option: value for option, value in wanted.items() if option and value is not None} | options
    adversarial, losses = images.detach().clone(), torch.zeros(len(images), device=device)
    with without_a_trace(model, seed, device) as number:
        attack = _build(name, wrapped, ball, number, options)
        for rows in torch.arange(len(images), device=device).split(max(1, max_batch // eot_samples)):
            # contiguous, as some sample in the order of the memory
            perturbed = attack(images[rows].contiguous(), labels[rows])
            adversarial[rows] = ball.rows(rows).project(perturbed.detach())
            if callback is not None:
                with torch.no_grad():
                    losses[rows] = cross_entropy(wrapped(adversarial[rows]), labels[rows])
                callback(int(rows[-1]) + 1, len(images), adversarial.clone(), losses.clone())
    return ball.check(adversarial)


def _build(name: str, model: nn.Module, ball: Ball, seed: int, options: dict[str, Any]) -> Any:
    """The attack with our radius, norm, number of classes and seed under the names that it has for them."""
    import torchattacks

    make = getattr(torchattacks, name)
    allowed = set(inspect.signature(make).parameters) - {"model"}
    check_settings(**{f"option of {name}": (option, one_of(*sorted(allowed))) for option in options})
    with torch.no_grad():
        classes = model(ball.images[:1]).shape[1]
    if name in FOUR_CLASSES and classes < 4 and options.get("version") != "rand":
        raise ValueError(
            f"{name} of torchattacks needs at least 4 classes, but the model has {classes}; use APGD"
        )
    ours = {
        "eps": ball.eps, "max_epsilon": ball.eps, "norm": ball.norm.capitalize(), "n_classes": classes,
        "seed": seed,  # AutoAttack's own default is the time of day
    }  # fmt: skip
    attack = make(model, **{name: value for name, value in ours.items() if name in allowed} | options)
    attack.set_device(ball.images.device)
    return attack


@contextmanager
def without_a_trace(
    model: nn.Module, seed: int | torch.Generator | None, device: torch.device
) -> Iterator[int]:
    """Within the block gradients are computed, torch's global generators start from the number that it gives
    (drawn from ``seed``), and no weight asks for a gradient (some attacks call ``backward`` and would leave
    theirs behind); outside nothing changed."""
    number = int(torch.randint(2**31, (), generator=make_generator(seed, device), device=device))
    weights = nn.ParameterList(weight for weight in model.parameters() if weight.requires_grad)
    with ONE_AT_A_TIME, forked_rng(device), torch.enable_grad():
        torch.manual_seed(number)
        try:
            weights.requires_grad_(False)
            yield number
        finally:
            weights.requires_grad_(True)


def ddn(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = inf,
    norm: str = "l2",
    steps: int = 100,
    gamma: float = 0.05,
    first_norm: float = 1.0,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The nearest misclassified points in l2, by decoupled direction and norm: a step along the gradient,
    then the norm of the perturbation shrinks where the point is misclassified and grows elsewhere.

    Args:
        model: deterministic, in eval mode, images in [0, 1] -> logits.
        images: in [0, 1].
        labels: true classes.
        eps: a point farther away is pulled back to this distance (and then mostly classified correctly); inf:
            never.
        norm: ``l2``.
        steps: at least 1.
        gamma: share by which the norm shrinks or grows.
        first_norm: of the perturbation, in units of the image.
        targets: class that each image is driven to; None: any other.
        seed: of the direction where the gradient is zero; None: torch's global generator.
        max_batch: images that are attacked at a time.
        callback: (images done, images, best points, their distances) after every ``max_batch`` images.

    Returns:
        images in [0, 1]; where no misclassified point was found, the image itself.

    Raises:
        ValueError: as ``contract.prepare``; for another norm, or a random model.
        ImportError: without foolbox.

    Source: Rony et al. 2019, algorithm 1.
    """
    check_settings(norm=(norm, one_of("l2")), first_norm=(first_norm, above(0)))
    return _nearest(
        "DDNAttack", model, images, labels, eps=eps, norm=norm, targets=targets, seed=seed,
        max_batch=max_batch, callback=callback, steps=steps, gamma=gamma, init_epsilon=first_norm,
    )  # fmt: skip


def fmn(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    eps: float = inf,
    norm: str = "linf",
    steps: int = 100,
    alpha: float | None = None,
    gamma: float = 0.05,
    targets: Int[Tensor, " batch"] | None = None,
    seed: int | torch.Generator | None = 0,
    max_batch: int = 256,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """The nearest misclassified points in linf, l2 or l1, by fast minimum norm: steps along the gradient of
    the margin, projected onto a ball that shrinks where the point is misclassified and grows elsewhere.

    Args:
        alpha: first step size, the l2 norm of a step; it falls to a hundredth along half a cosine. None: 10
            for linf, else 1.
        gamma: share by which the radius shrinks or grows, at first; it falls to 0.001.
        seed: not used, there is no random number.
        other arguments, result and errors: as ``ddn``.

    Source: Pintor et al. 2021, algorithm 1.
    """
    alpha = (10.0 if norm == "linf" else 1.0) if alpha is None else alpha
    check_settings(norm=(norm, one_of(*FMN)), alpha=(alpha, above(0)))
    return _nearest(
        FMN[norm], model, images, labels, eps=eps, norm=norm, targets=targets, seed=seed,
        max_batch=max_batch, callback=callback, steps=steps, gamma=gamma, max_stepsize=alpha,
    )  # fmt: skip


def _nearest(
    name: str,
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str,
    steps: int,
    targets: Tensor | None,
    seed: int | torch.Generator | None,
    max_batch: int,
    callback: StepCallback | None,
    **options: Any,
) -> Tensor:
    """What foolbox's attack ``name`` finds, pulled back to ``eps``."""
    check_counts(steps=steps, max_batch=max_batch)
    check_settings(eps=(eps, above(0)), gamma=(options["gamma"], above(0, 1)))
    model, images, labels, targets = prepare_attack(model, images, labels, targets)
    if is_random(model, images, max_batch=max_batch):
        raise ValueError(
            "minimum-norm attacks follow one boundary, but the model is random; use pgd at several eps"
        )
    import foolbox  # an optional extra: pip install foolbox

    attack = getattr(foolbox.attacks, name)(steps=steps, **options)
    attack.project = partial(_project, norm)
    wrapped, best = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device), images.clone()
    for rows in torch.arange(len(images), device=images.device).split(max_batch):
        criterion = (
            foolbox.Misclassification(labels[rows]) if targets is None
            else foolbox.TargetedMisclassification(targets[rows])
        )  # fmt: skip
        with without_a_trace(model, seed, images.device):
            best[rows] = attack.run(wrapped, images[rows], criterion).clamp(0, 1)
        if callback is not None:
            callback(int(rows[-1]) + 1, len(images), best.clone(), norm_of(best - images, norm))
    return best if eps == inf else Ball(images, eps, norm).project(best)


def _project(norm: str, x: Any, x0: Any, epsilon: Any) -> Any:
    """Points of foolbox's own tensors into balls around x0. In l2 onto the sphere, from inside, too: nearer
    points are found so (foolbox 3.3.4 divides each norm by itself there, and moves no point)."""
    points, images, radius = x.raw, x0.raw, epsilon.raw * BEYOND
    if norm == "l2":
        factor = radius / norm_of(points - images, norm).clamp_min(1e-12)
        return type(x)(images + (points - images) * factor.view(-1, 1, 1, 1))
    return type(x)(Ball(images, radius, norm).project(points))
