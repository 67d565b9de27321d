"""The masking checklist: which checks a model gets, and in which order."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import SquareSettings, check_attack, check_budget, square
from atoplib.attacks.bpda import IdentityBackward
from atoplib.masking.bench import (
    Bench,
    MaskingSettings,
    measure_agreement,
    measure_draws,
    measure_eot,
    measure_gradients,
    measure_modes,
    measure_unbounded,
    noise_of_size,
    own_generators,
    smooth_margin,
    throw_anew,
    unbounded_sizes,
)
from atoplib.masking.verdicts import Check, check_challenger, check_effort
from atoplib.progress import Report
from atoplib.verdicts import is_random

FEWEST_IMAGES = 8  # eight images to none are the fewest on which a comparison can fail at the default significance
MOMENTUM = 0.75  # of the falling steps that the main attack's schedule is compared with
SHORT_SCHEDULE = 2000  # of Square's shares: large squares for the few queries that a check can afford

BlackBox = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> adversarial images within the eps and norm that are being checked."""


def masking_checklist(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    settings: MaskingSettings,
    *,
    classifier: nn.Module | None = None,
    black_box: BlackBox | None = None,
    seed: int = 0,
    max_batch: int = 512,
    progress: Report | None = None,
) -> tuple[Check, ...]:
    """Look for gradient masking in a model; 64 images are enough.

    The dice of a random model are fixed by its method ``reseed(seed)`` (or ``fixed_draws(seed)``) where it has one, else by
    the global generators of CPU and GPU, which are as before afterwards. The model's own dice stand elsewhere afterwards.

    Args:
        model: in eval mode, images in [0, 1] -> logits; may be random. One with ``purify`` and ``classifier``, as
            ``AToPPipeline``, is attacked with a straight-through gradient, too.
        images, labels: in [0, 1]; true classes; at least eight.
        classifier: what a transfer attack sees; None: the model's own ``classifier`` if it has one, else no such attack.
        black_box: an attack without gradients in place of a short Square.
        seed: of everything random.
        max_batch: copies of images that are in memory at once.
        progress: called with checks done and in all.

    Returns:
        the checks in a fixed order: those of gradients and dice first, then the attacks that must not win.

    Raises:
        ValueError: as ``attacks.pgd``: train mode, images outside [0, 1], labels without a logit; fewer than eight images.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5; Hill et al. 2021 (straight-through purifier).
    """
    classifier = getattr(model, "classifier", None) if classifier is None else classifier
    checks: list[Check] = []
    with own_generators(images.device):
        given = model
        model, images, labels = check_attack(model, images, labels)
        if classifier is not None:
            classifier, _, _ = check_attack(classifier, images, labels)
        if len(images) < FEWEST_IMAGES:
            raise ValueError(f"a comparison needs at least {FEWEST_IMAGES} images, got {len(images)}; 64 are usual")
        bench = Bench(model, images, labels, settings, is_random(model, images, max_batch=max_batch), seed, max_batch)
        search = None if black_box is None else partial(black_box, given)
        planned = _plan(bench, classifier, search)
        for position, check in enumerate(planned, start=1):
            checks.append(check())
            if progress is not None:
                progress(position, len(planned), "checks", {})
    return tuple(checks)


def _plan(
    bench: Bench, classifier: nn.Module | None, black_box: Callable[[Tensor, Tensor], Tensor] | None
) -> list[Callable[[], Check]]:
    """The checks that can be made of this model, each still to be run; they share the main attack."""
    settings, attack = bench.settings, bench.attack
    common = {"num_draws": bench.num_draws, "significance": settings.significance}
    found: dict[str, Tensor] = {}

    def main() -> Tensor:
        if "main" not in found:
            found["main"] = bench.run(attack)
            found["restart"] = bench.run(attack, seed=bench.seed + 1000)
            found["wrong"], found["wrong again"] = bench.wrong(found["main"]), bench.wrong(found["restart"])
        return found["wrong"]

    def counted(name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in found:
            found[name] = bench.wrong(make())
        return found[name]

    def challenge(name: str, make: Callable[[], Tensor]) -> Callable[[], Check]:
        def check() -> Check:
            wrong = main()
            return check_challenger(name, counted(name, make), wrong, found["wrong again"], **common)

        return check

    def larger_steps() -> Tensor:
        return bench.run(replace(attack, alpha=settings.eps, decay=False, momentum=0.0))

    def margin_loss() -> Tensor:
        return bench.run(attack, loss=smooth_margin)

    def falling_steps() -> Tensor:
        schedule = replace(attack, steps=2 * settings.steps, alpha=settings.eps, decay=True, momentum=MOMENTUM)
        return bench.run(schedule, loss=smooth_margin, seed=bench.seed + 2000)

    def steps() -> Check:
        efforts = {max(1, settings.steps // 2): None, settings.steps: main(), 2 * settings.steps: None}
        for effort in efforts:
            if efforts[effort] is None:
                efforts[effort] = bench.wrong(bench.run(replace(attack, steps=effort)))
        others = {
            "another start": found["wrong again"],
            "equal steps": counted("larger steps", larger_steps),
            "margin": counted("margin loss", margin_loss),
            "falling steps with momentum": counted("falling steps", falling_steps),
        }
        return check_effort("steps", "steps", efforts, **common, others=others)

    def draws() -> Check:
        return measure_eot(bench, main())

    def starts() -> Check:
        wrong = main()
        both = bench.wrong(bench.hardest((found["main"], found["restart"])))
        return check_effort("restarts", "starts", {1: wrong, 2: both}, **common)

    def noise() -> Iterator[Tensor]:
        generator = torch.Generator(bench.images.device).manual_seed(bench.seed)
        for _ in range(settings.noise_samples):
            yield noise_of_size(bench.images, settings.eps, settings.norm, generator)

    def search() -> Tensor:
        throw_anew(bench.model, bench.seed)
        if black_box is not None:
            result = black_box(bench.images, bench.labels)
            check_budget(result, bench.images, settings.eps, settings.norm)
            return result
        return square(
            bench.model,
            bench.images,
            bench.labels,
            SquareSettings(settings.eps, settings.norm, settings.queries, 0.3, bench.draws, schedule=SHORT_SCHEDULE),
            generator=torch.Generator(bench.images.device).manual_seed(bench.seed),
            max_batch=bench.max_batch,
        )

    def attacked() -> Tensor:
        main()
        return found["main"]

    one_step = replace(attack, steps=1, alpha=None, decay=False, momentum=0.0, start="clean")
    plan = [
        lambda: measure_gradients(bench),
        lambda: measure_modes(bench, attacked()),
        lambda: measure_agreement(bench, bench.images),
        lambda: measure_agreement(bench, attacked(), "finite differences, attacked"),
    ]
    if bench.random:
        plan.append(lambda: measure_draws(bench))
    plan += [lambda eps=eps: measure_unbounded(bench, eps) for eps in unbounded_sizes(bench)]
    plan += [steps, draws, starts] if bench.random else [steps, starts]
    plan.append(challenge("one step", lambda: bench.run(one_step)))
    plan.append(challenge("larger steps", larger_steps))
    plan.append(challenge("margin loss", margin_loss))
    plan.append(challenge("noise", lambda: bench.hardest(noise())))
    if black_box is not None or settings.queries:
        plan.append(challenge("black box", search))
    if classifier is not None:
        plan.append(challenge("transfer", lambda: bench.run(replace(attack, eot_samples=1), target=classifier)))
    if hasattr(bench.model, "purify") and hasattr(bench.model, "classifier"):
        target = IdentityBackward(bench.model.purify, bench.model.classifier)
        plan.append(challenge("straight-through", lambda: bench.run(attack, target=target)))
    return plan
