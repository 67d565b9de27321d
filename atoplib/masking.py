"""Signs of gradient masking, looked for before a robust accuracy is believed (Athalye et al. 2018, Carlini et al. 2019).

Each check compares attacks on the same images, or the gradient with the loss that it should predict, and ends as
``passed``, ``suspicious`` or ``failed`` with a sentence of evidence. Comparisons are paired and exact: ``suspicious`` is
a p-value below ``significance``, ``failed`` one below a tenth of it, because a checklist makes about ten comparisons.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import atanh, inf, isfinite, pi, sqrt, tanh

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import bdtrc, chdtrc
from torch import Tensor, nn

from atoplib.attacks import (
    PGDSettings,
    SquareSettings,
    ascend,
    check_attack,
    check_budget,
    input_gradient,
    project,
    square,
)
from atoplib.attacks.bpda import IdentityBackward
from atoplib.attacks.eot import Loss, cross_entropy
from atoplib.progress import Report
from atoplib.verdicts import Model, draw_logits, is_random, reseed, wilson_interval

OUTCOMES = ("passed", "suspicious", "failed")
FEWEST_IMAGES = 8  # eight images to none are the fewest on which a comparison can fail at the default significance
AGREEMENT = {"failed": 0.5, "suspicious": 0.9}  # of gradient and loss: correlations that are too small
VANISHED = {"failed": 0.1, "suspicious": 0.0}  # shares of images without a usable gradient that are too large
SHORT_SCHEDULE = 2000  # of Square's shares: large squares for the few queries that a check can afford

BlackBox = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> adversarial images within the eps and norm that are being checked."""


@dataclass(frozen=True)
class MaskingSettings:
    """What is checked, and at which cost: about 10 * steps * eot_samples gradients an image, and as many forward passes.

    Attributes:
        eps, norm: the budget of the robust accuracy that is to be believed, as in ``PGDSettings``.
        steps: iterations of the attack, at least 2; half and twice as many are tried as well.
        alpha: its step size, as in ``PGDSettings``; one of eps is tried as well.
        eot_samples: draws a gradient where the model is random; one and twice as many are tried as well.
        num_draws: forward passes an image to judge a random model.
        unbounded_eps: changes of every value at which an attack should break everything; in the l2 norm, their norm is
            used. Those below 2 * eps are left out, but for the largest.
        queries: of the Square attack that is tried where no ``black_box`` is given; 0: none.
        noise_samples: random perturbations an image of the same norm.
        directions: random directions an image in which gradient and loss are compared.
        significance: p-value below which a comparison is suspicious; a tenth of it fails.
    """

    eps: float
    norm: str = "linf"
    steps: int = 10
    alpha: float | None = None
    eot_samples: int = 4
    num_draws: int = 8
    unbounded_eps: tuple[float, ...] = (64 / 255, 0.95)
    queries: int = 100
    noise_samples: int = 10
    directions: int = 8
    significance: float = 0.05

    def __post_init__(self) -> None:
        PGDSettings(eps=self.eps, norm=self.norm, alpha=self.alpha)  # says what is wrong with them
        for name, least in (("steps", 2), ("eot_samples", 1), ("num_draws", 1), ("noise_samples", 1), ("directions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.queries < 0:
            raise ValueError(f"queries must be 0 (no black-box attack) or more, got {self.queries}")
        if not self.unbounded_eps or not all(0 < eps <= 1 for eps in self.unbounded_eps):
            raise ValueError(f"unbounded_eps must hold values in (0, 1], at least one, got {self.unbounded_eps}; 0.95?")
        if not 0 < self.significance < 1:
            raise ValueError(f"significance must lie in (0, 1), got {self.significance}; 0.05?")


@dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: what was looked at.
        verdict: ``passed``, ``suspicious`` or ``failed``.
        evidence: one sentence with the numbers.
    """

    name: str
    verdict: str
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in OUTCOMES:
            raise ValueError(f"unknown verdict {self.verdict!r}; allowed: {', '.join(OUTCOMES)}")


def trustworthy(checks: Sequence[Check]) -> bool:
    """Whether no check failed; one that is suspicious asks for a look, and for a stronger attack."""
    return all(check.verdict != "failed" for check in checks)


def stamp(checks: Mapping[str, Sequence[Check]]) -> str:
    """What is written over a table whose numbers must not be believed; empty if no check of any defence failed."""
    masked = [name for name, found in checks.items() if not trustworthy(found)]
    return f"NOT TRUSTWORTHY, gradients may be masked in: {', '.join(masked)}." if masked else ""


def format_checks(checks: Sequence[Check]) -> str:
    """The checklist as Markdown, readable as plain text, with what it means for the number below it.

    Raises:
        ValueError: without a check.
    """
    if not checks:
        raise ValueError("there are no checks to show: run masking_checklist first")
    rows = [("check", "verdict", "evidence"), *((check.name, check.verdict, check.evidence) for check in checks)]
    rows = [tuple(text.replace("|", "\\|") for text in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"| {name.ljust(widths[0])} | {verdict.ljust(widths[1])} | {evidence} |" for name, verdict, evidence in rows]
    lines.insert(1, f"| {'-' * widths[0]} | {'-' * widths[1]} | -------- |")
    failed = [check.name for check in checks if check.verdict == "failed"]
    unsure = [check.name for check in checks if check.verdict == "suspicious"]
    if failed:
        stamp = f"**Not trustworthy**: failed {', '.join(failed)}. A robust accuracy means nothing until this is explained."
    elif unsure:
        stamp = f"Trustworthy with a question: look into {', '.join(unsure)}."
    else:
        stamp = "Trustworthy as far as these checks see."
    return "\n".join([*lines, "", stamp])


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
    with _own_generators(images.device):
        check_attack(model, images, labels)
        if classifier is not None:
            check_attack(classifier, images, labels)
        if len(images) < FEWEST_IMAGES:
            raise ValueError(f"a comparison needs at least {FEWEST_IMAGES} images, got {len(images)}; 64 are usual")
        bench = _Bench(model, images, labels, settings, is_random(model, images, max_batch=max_batch), seed, max_batch)
        planned = _plan(bench, classifier, black_box)
        for position, check in enumerate(planned, start=1):
            checks.append(check())
            if progress is not None:
                progress(position, len(planned), "checks", {})
    return tuple(checks)


# Verdicts: numbers in, a line of the checklist out.


def paired_p_value(challenger: Int[Tensor, " batch"], incumbent: Int[Tensor, " batch"]) -> float:
    """Probability of so large a sum of (challenger - incumbent), were each image's two counts exchangeable; one-sided.

    The exact paired permutation test (Fisher 1935; Pitman 1937): each difference keeps its size and throws a coin for its
    sign. With counts of 0 and 1 it is McNemar's exact test. Many differences cost no more than few: the distribution of
    their sum comes from its characteristic function.

    Args:
        challenger, incumbent: whole numbers an image, such as wrong draws under two attacks.
    """
    differences = (challenger - incumbent).double().cpu()
    total = int(differences.abs().sum())
    size = 2 * total + 1  # sums from -total to total
    waves = 2 * pi * torch.arange(size, dtype=torch.float64) / size
    spectrum = torch.cos(waves.unsqueeze(1) * differences).prod(dim=1)
    probabilities = torch.fft.ifft(spectrum.to(torch.complex128)).real  # of the sums 0, 1, ..., total, -total, ..., -1
    sums = torch.arange(size)
    sums = torch.where(sums > total, sums - size, sums)
    return float(probabilities[sums >= int(differences.sum())].sum().clamp(0, 1))


def outcome_of(p_value: float, significance: float) -> str:
    """``suspicious`` below ``significance``, ``failed`` below a tenth of it, else ``passed``."""
    return "failed" if p_value < significance / 10 else "suspicious" if p_value < significance else "passed"


def check_gradients(gradients: Float[Tensor, "batch 3 height width"]) -> Check:
    """Input gradients must be finite and not zero: of hardly any image (at most a tenth; any at all is suspicious)."""
    flat = gradients.flatten(1)
    broken = ~torch.isfinite(flat).all(dim=1)
    zero = (flat == 0).all(dim=1)
    count, images = int((broken | zero).sum()), len(gradients)
    low, _ = wilson_interval(count, images)
    verdict = next((name for name in ("failed", "suspicious") if low > VANISHED[name]), "passed")
    text = f"the input gradient is zero for {int(zero.sum())} and not finite for {int(broken.sum())} of {images} images"
    return Check("gradients", verdict, text)


def check_agreement(predicted: Float[Tensor, "directions batch"], measured: Float[Tensor, "directions batch"]) -> Check:
    """What the gradient predicts for small steps must be what the loss does: correlation over images and directions.

    The 95 % bound counts images only, since the directions of one image share its gradient. Failed where the correlation
    is surely below 0.5, suspicious where it is surely below 0.9.
    """
    x, y = predicted.flatten().double(), measured.flatten().double()
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    correlation = float(x @ y) / size if size > 0 and isfinite(size) else 0.0
    within = max(-1 + 1e-12, min(1 - 1e-12, correlation))
    high = tanh(atanh(within) + 1.645 / sqrt(max(1, predicted.shape[1] - 3)))
    verdict = next((name for name in ("failed", "suspicious") if high < AGREEMENT[name]), "passed")
    text = f"small steps change the margin as the gradient says with a correlation of {correlation:.2f} (at most {high:.2f})"
    return Check("finite differences", verdict, text)


def check_draws(values: Float[Tensor, "calls copies batch"], significance: float) -> Check:
    """Copies of an image in one batch must get draws of their own, or EOT averages one draw with itself.

    ``values`` of an image in one call must not be more alike than those of different calls (Kruskal & Wallis 1952, summed
    over the images).
    """
    calls, copies, images = values.shape
    number = calls * copies
    ranks = values.flatten(0, 1).argsort(dim=0).argsort(dim=0).double().unflatten(0, (calls, copies)) + 1
    distance = (ranks.mean(dim=1) - (number + 1) / 2).square().sum(dim=0)
    p_value = float(chdtrc(images * (calls - 1), float(12 * copies * distance.sum() / (number * (number + 1)))))
    verdict = outcome_of(p_value, significance)
    relation = "independent" if verdict == "passed" else "alike, so EOT averages fewer draws than it says"
    return Check("draws", verdict, f"copies of an image in one batch get draws that are {relation} ({_p(p_value)})")


def check_unbounded(right: Bool[Tensor, " batch"], classes: int, eps: float, significance: float) -> Check:
    """Under an attack without a real bound, accuracy must fall to chance, 1 / classes (exact binomial test)."""
    count, images = int(right.sum()), len(right)
    p_value = float(bdtrc(count - 1, images, 1 / classes)) if count else 1.0
    text = f"{count} of {images} images are still read correctly; chance is {images / classes:.1f} ({_p(p_value)})"
    return Check(f"unbounded, eps {eps:.2f}", outcome_of(p_value, significance), text)


def check_challenger(
    name: str,
    challenger: Int[Tensor, " batch"],
    attack: Int[Tensor, " batch"],
    restart: Int[Tensor, " batch"],
    num_draws: int,
    significance: float,
) -> Check:
    """An attack that should be weaker must neither win nor break images that a restart of the main attack does not.

    Args:
        challenger, attack, restart: wrong draws an image, of ``num_draws``, under each attack.
    """
    missed_by_attack = 2 * attack <= num_draws
    found, again = ((missed_by_attack & (2 * other > num_draws)).long() for other in (challenger, restart))
    p_value = min(1.0, 2 * min(paired_p_value(challenger, attack), paired_p_value(found, again)))  # two comparisons
    text = (
        f"it finds {_errors(challenger, num_draws)} errors, the white-box attack {_errors(attack, num_draws)}; "
        f"of the {int(missed_by_attack.sum())} images which that misses it breaks {int(found.sum())}, "
        f"a restart {int(again.sum())} ({_p(p_value)})"
    )
    return Check(name, outcome_of(p_value, significance), text)


def check_effort(
    name: str, unit: str, wrong: dict[int, Int[Tensor, " batch"]], num_draws: int, significance: float
) -> Check:
    """More of ``unit`` (steps, draws, starts) must not make the attack weaker; that it still helps is said.

    Args:
        wrong: wrong draws an image, of ``num_draws``, by the effort, in ascending order.
    """
    efforts = list(wrong)
    pairs = list(zip(efforts, efforts[1:], strict=False))
    weaker = min(1.0, len(pairs) * min(paired_p_value(wrong[less], wrong[more]) for less, more in pairs))
    stronger = paired_p_value(wrong[efforts[-1]], wrong[efforts[-2]])
    found = ", ".join(f"{effort}: {_errors(wrong[effort], num_draws)}" for effort in efforts)
    state = "more still help, so a robust accuracy at this budget is too high" if stronger < significance else "converged"
    verdict = outcome_of(weaker, significance)
    text = f"errors by {unit}: {found}; " + (state if verdict == "passed" else f"more make the attack weaker ({_p(weaker)})")
    return Check(name, verdict, text)


def _p(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"


def _errors(wrong: Tensor, num_draws: int) -> str:
    return f"{float(wrong.sum()) / num_draws:.1f}".removesuffix(".0")


# Measurements: what the verdicts are about.


def smooth_margin(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """log-sum-exp of the other logits minus the label's: as smooth as cross-entropy, but it never saturates."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    logits = logits.float()
    return logits.masked_fill(own, -inf).logsumexp(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def attackable(model: Model) -> Model:
    """The model as an attack needs it, however it hides: logits that depend on the images, a gradient without NaN.

    Where the model gives no gradient it is zero, and where it is not finite, too: an attack then stands still.
    """

    def forward(images: Tensor) -> Tensor:
        passed = images.view_as(images)
        if passed.requires_grad:
            passed.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        return connected(model)(passed)

    return forward


def connected(model: Model) -> Model:
    """The same logits, with a gradient of zero where the model gives none (a detached input)."""

    def forward(images: Tensor) -> Tensor:
        return model(images) + 0 * images.flatten(1).sum(dim=1, keepdim=True)

    return forward


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """The global generators, of CPU and ``device``, as they were before the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _throw_anew(model: Model, seed: int) -> None:
    """Every dice a model may use, from ``seed``."""
    torch.manual_seed(seed)
    reseed(model, seed)


@contextmanager
def _fixed(model: nn.Module, seed: int) -> Iterator[None]:
    """The same dice in each such block."""
    _throw_anew(model, seed)
    if hasattr(model, "fixed_draws"):
        with model.fixed_draws(seed):
            yield
    else:
        yield


@dataclass(frozen=True)
class _Bench:
    """One model and its images on the bench, with what every attack on them shares."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    settings: MaskingSettings
    random: bool
    seed: int
    max_batch: int

    @property
    def draws(self) -> int:
        """Of a gradient."""
        return self.settings.eot_samples if self.random else 1

    @property
    def num_draws(self) -> int:
        """Of a verdict."""
        return self.settings.num_draws if self.random else 1

    @property
    def widest(self) -> float:
        """The norm of a change of every value by 1."""
        return 1.0 if self.settings.norm == "linf" else sqrt(self.images[0].numel())

    @property
    def attack(self) -> PGDSettings:
        settings = self.settings
        return PGDSettings(settings.eps, settings.norm, settings.steps, settings.alpha, eot_samples=self.draws)

    def run(
        self, attack: PGDSettings, *, target: Model | None = None, loss: Loss = cross_entropy, seed: int | None = None
    ) -> Tensor:
        """Adversarial images by PGD on ``target`` (the model itself if None)."""
        seed = self.seed if seed is None else seed
        _throw_anew(self.model, seed)
        found = ascend(
            attackable(self.model if target is None else target),
            self.images,
            self.labels,
            attack,
            generator=torch.Generator(self.images.device).manual_seed(seed),
            loss=loss,
            max_batch=self.max_batch,
        )
        check_budget(found, self.images, attack.eps, attack.norm)
        return found

    def logits(self, images: Tensor, *, seed: int) -> Tensor:
        _throw_anew(self.model, seed)
        return draw_logits(self.model, images, num_draws=self.num_draws, max_batch=self.max_batch)

    def wrong(self, images: Tensor) -> Tensor:
        """Wrong draws an image; the same dice for every attack."""
        return (self.logits(images, seed=self.seed + 1).argmax(dim=2) != self.labels).sum(dim=0)

    def hardest(self, candidates: Iterable[Tensor]) -> Tensor:
        """Of several perturbations, the one that each image reads worst, by dice that no verdict uses."""
        best, reached = self.images, None
        for images in candidates:
            logits = self.logits(images, seed=self.seed + 2)
            labels = self.labels.repeat(len(logits))
            gained = smooth_margin(logits.flatten(0, 1), labels).unflatten(0, logits.shape[:2]).mean(dim=0)
            if reached is None:
                best, reached = images, gained
                continue
            better = gained > reached
            best, reached = torch.where(better.view(-1, 1, 1, 1), images, best), torch.where(better, gained, reached)
        return best


def _plan(bench: _Bench, classifier: nn.Module | None, black_box: BlackBox | None) -> list[Callable[[], Check]]:
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

    def challenge(name: str, make: Callable[[], Tensor]) -> Callable[[], Check]:
        def check() -> Check:
            wrong = main()
            return check_challenger(name, bench.wrong(make()), wrong, found["wrong again"], **common)

        return check

    def steps() -> Check:
        efforts = {max(1, settings.steps // 2): None, settings.steps: main(), 2 * settings.steps: None}
        for effort in efforts:
            if efforts[effort] is None:
                efforts[effort] = bench.wrong(bench.run(replace(attack, steps=effort)))
        return check_effort("steps", "steps", efforts, **common)

    def draws() -> Check:
        return _check_eot(bench, main())

    def starts() -> Check:
        wrong = main()
        both = bench.wrong(bench.hardest((found["main"], found["restart"])))
        return check_effort("restarts", "starts", {1: wrong, 2: both}, **common)

    def noise() -> Iterator[Tensor]:
        generator = torch.Generator(bench.images.device).manual_seed(bench.seed)
        for _ in range(settings.noise_samples):
            yield _noise_of_size(bench.images, settings.eps, settings.norm, generator)

    def search() -> Tensor:
        _throw_anew(bench.model, bench.seed)
        if black_box is not None:
            result = black_box(bench.model, bench.images, bench.labels)
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

    one_step = replace(attack, steps=1, alpha=None, start="clean")
    plan = [lambda: _measure_gradients(bench), lambda: _measure_agreement(bench)]
    if bench.random:
        plan.append(lambda: _measure_draws(bench))
    plan += [lambda eps=eps: _measure_unbounded(bench, eps) for eps in _unbounded(bench)]
    plan += [steps, draws, starts] if bench.random else [steps, starts]
    plan.append(challenge("one step", lambda: bench.run(one_step)))
    plan.append(challenge("larger steps", lambda: bench.run(replace(attack, alpha=settings.eps))))
    plan.append(challenge("margin loss", lambda: bench.run(attack, loss=smooth_margin)))
    plan.append(challenge("noise", lambda: bench.hardest(noise())))
    if black_box is not None or settings.queries:
        plan.append(challenge("black box", search))
    if classifier is not None:
        plan.append(challenge("transfer", lambda: bench.run(replace(attack, eot_samples=1), target=classifier)))
    if hasattr(bench.model, "purify") and hasattr(bench.model, "classifier"):
        target = IdentityBackward(bench.model.purify, bench.model.classifier)
        plan.append(challenge("straight-through", lambda: bench.run(attack, target=target)))
    return plan


def _unbounded(bench: _Bench) -> list[float]:
    """The sizes that are well above eps; the largest in any case."""
    sizes = bench.settings.unbounded_eps
    return [eps for eps in sizes if eps * bench.widest >= 2 * bench.settings.eps or eps == max(sizes)]


def _noise_of_size(images: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """Random perturbations at the edge of the ball: signs (linf), a direction (l2); clipped to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    if norm == "linf":
        return project(images + eps * noise.sign(), images, eps, norm)
    length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return project(images + eps * noise / length, images, eps, norm)


def _measure_gradients(bench: _Bench) -> Check:
    _throw_anew(bench.model, bench.seed)
    found = input_gradient(
        connected(bench.model), bench.images, bench.labels, eot_samples=bench.draws, max_batch=bench.max_batch
    )
    return check_gradients(found.gradient)


def _measure_agreement(bench: _Bench) -> Check:
    """Central differences of the margin, under one draw that all evaluations share, against the gradient's prediction."""
    settings, dimensions = bench.settings, bench.images[0].numel()
    step = settings.eps / 16 if settings.norm == "linf" else settings.eps / 4 / sqrt(dimensions)
    origin = bench.images.clamp(step, 1 - step)  # both sides of it are images
    model = attackable(bench.model)

    @torch.no_grad()
    def value(images: Tensor) -> Tensor:
        with _fixed(bench.model, bench.seed):
            parts = zip(images.split(bench.max_batch), bench.labels.split(bench.max_batch), strict=True)
            return torch.cat([smooth_margin(bench.model(part), labels) for part, labels in parts])

    if not torch.equal(value(origin), value(origin)):
        text = "the model's dice cannot be fixed, so gradient and loss were not compared: give it a method reseed(seed)"
        return Check("finite differences", "suspicious", text)
    with _fixed(bench.model, bench.seed):
        gradient = input_gradient(model, origin, bench.labels, loss=smooth_margin, max_batch=bench.max_batch).gradient
    generator = torch.Generator(origin.device).manual_seed(bench.seed)
    predicted, measured = [], []
    for _ in range(settings.directions):
        direction = (torch.rand(origin.shape, generator=generator, device=origin.device) < 0.5).float() * 2 - 1
        predicted.append((gradient * direction).flatten(1).sum(dim=1))
        measured.append((value(origin + step * direction) - value(origin - step * direction)) / (2 * step))
    return check_agreement(torch.stack(predicted), torch.stack(measured))


def _measure_draws(bench: _Bench, calls: int = 12, copies: int = 12, images: int = 4) -> Check:
    _throw_anew(bench.model, bench.seed)
    shown, labels = bench.images[:images].repeat(copies, 1, 1, 1), bench.labels[:images].repeat(copies)
    with torch.no_grad():
        values = torch.stack([smooth_margin(bench.model(shown), labels) for _ in range(calls)])
    return check_draws(values.unflatten(1, (copies, images)), bench.settings.significance)


def _measure_unbounded(bench: _Bench, eps: float) -> Check:
    """From the image itself: a random start in so large a ball would destroy the image without any gradient."""
    adversarial = bench.run(replace(bench.attack, eps=eps * bench.widest, alpha=None, start="clean"))
    logits = bench.logits(adversarial, seed=bench.seed + 1)[0]
    right = logits.argmax(dim=1) == bench.labels
    return check_unbounded(right, logits.shape[1], eps, bench.settings.significance)


def _check_eot(bench: _Bench, wrong: Tensor) -> Check:
    """More draws a gradient must not weaken the attack; an attack with a single draw must not gain by more."""
    settings = bench.settings
    efforts = {1: None, bench.draws: wrong, 2 * bench.draws: None} if bench.draws > 1 else {1: wrong, 8: None}
    for effort in efforts:
        if efforts[effort] is None:
            efforts[effort] = bench.wrong(bench.run(replace(bench.attack, eot_samples=effort)))
    check = check_effort("EOT", "draws a gradient", efforts, bench.num_draws, settings.significance)
    p_value = paired_p_value(list(efforts.values())[-1], efforts[1])
    if bench.draws > 1 or check.verdict != "passed":
        return replace(check, evidence=f"{check.evidence}; more than one draw matters: {_p(p_value)}")
    text = f"{check.evidence}; an attack that averages nothing is no measure of a random model ({_p(p_value)})"
    return Check("EOT", outcome_of(p_value, settings.significance), text)
