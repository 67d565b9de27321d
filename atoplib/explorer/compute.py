"""From the knobs to everything that is on screen: pictures, probabilities, votes, the path of the attack. No widgets here.

The random numbers are those of ``evaluation.evaluate``: the defence is reseeded with ``seed`` for the attack and with
``seed + 1`` for the verdict, so that a library call or ``04_attack`` on the same image gives the same numbers.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil, inf
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from atoplib.attacks import BPDA, require_eval_mode
from atoplib.data import Dataset, to_float
from atoplib.explorer.knobs import NO_ATTACK, Knobs, applicable, check_names
from atoplib.explorer.suite import AttackEntry
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Draw, corrupt
from atoplib.verdicts import draw_logits, full_float32, is_random, reseed

Report = Callable[[str, int, int], None]
"""Called as ``report(what, done, total)`` between pieces of work; it may raise to stop the work. Where nobody
knows the total it is 0, and ``done`` are forward passes."""

Defence = nn.Module | Callable[[], nn.Module]
"""A module in eval mode, images in [0, 1] -> logits, or a function that loads one when it is first picked."""

MAX_PATH = 64  # steps of an attack that are kept; of a longer one every second, third, ... is
KEPT_PATHS = 32  # attacks that need not run again
PIXELS_A_BATCH = 2**18  # 256 copies at 32 px, 4 at 256 px: memory stays small, and work can be stopped between two batches
CURVE_FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # of eps, on the curve of robust accuracy
CURVE_IMAGES = 32


@dataclass(frozen=True)
class Scene:
    """What can be picked: data sets, defences and attacks by name."""

    datasets: Mapping[str, Dataset]
    defences: Mapping[str, Defence]
    attacks: Mapping[str, AttackEntry]

    def check(self, knobs: Knobs) -> None:
        """Raise ValueError unless the names in the knobs, and the image, are there."""
        attacks = (NO_ATTACK, *self.attacks)
        check_names(knobs, dataset=tuple(self.datasets), defence=tuple(self.defences), attack=attacks)
        count = len(self.datasets[knobs.dataset].test.labels)
        if knobs.image >= count:
            raise ValueError(f"there is no image {knobs.image}: {knobs.dataset} has {count} test images, counted from 0")
        if knobs.attacks and knobs.norm not in self.attacks[knobs.attack].norms:
            norms = ", ".join(self.attacks[knobs.attack].norms)
            raise ValueError(f"{knobs.attack} knows no norm {knobs.norm!r}; allowed: {norms}")

    def uses(self, knobs: Knobs, random: bool) -> tuple[str, ...]:
        """The knobs that the attack reads, where what it sees throws dice or not."""
        return () if knobs.attack == NO_ATTACK else self.attacks[knobs.attack].used(random)


@dataclass(frozen=True)
class AttackPath:
    """The iterates of an attack on one image, the clean image first, the result last; ``steps`` are their numbers.

    ``logits`` are those of the classifier in a pipeline, where the attack sees it alone: no transform changes them.
    """

    steps: tuple[int, ...]
    images: Float[Tensor, "iterates 3 height width"]
    logits: Float[Tensor, "iterates classes"] | None = None


@dataclass
class Memory:
    """What need not be computed or loaded again: defences, and the latest attacks by everything that decides them."""

    defences: dict[str, nn.Module] = field(default_factory=dict)
    paths: OrderedDict[tuple, AttackPath] = field(default_factory=OrderedDict)

    def keep(self, key: tuple, path: AttackPath) -> None:
        """Keep an attack; the oldest is dropped when there are many."""
        self.paths[key] = path
        self.paths.move_to_end(key)
        while len(self.paths) > KEPT_PATHS:
            self.paths.popitem(last=False)

    def latest(self, without_transform: tuple) -> AttackPath | None:
        """The latest attack that differs by the transform alone."""
        return next((self.paths[key] for key in reversed(self.paths) if key[0] == without_transform), None)


@dataclass(frozen=True)
class Pictured:
    """One draw of the pipeline on the adversarial image.

    Attributes:
        transformed: what the purifier reads, RGB in [0, 1], one copy a mask.
        masks: 1 where a copy has a pixel missing.
        purified: what the classifier reads, in [0, 1] as far as the purifier keeps its range.
    """

    transformed: Float[Tensor, "masks 3 height width"]
    masks: Float[Tensor, "masks 1 height width"]
    purified: Float[Tensor, "3 height width"]


@dataclass(frozen=True)
class View:
    """What is on screen, on the CPU; images in [0, 1].

    Attributes:
        knobs: what it was computed from.
        adapted: False for a preview, whose attack was made before the transform was changed.
        label: true class.
        clean, adversarial: the image before and after the attack, up to the step that is shown.
        pictured: one draw of the pipeline; None for a bare classifier.
        probabilities: softmax of ``clean`` and ``adversarial`` read by the classifier alone, and of ``purified``.
        votes: the class of each draw.
        path_steps, path_losses, path_classes: cross-entropy (nats) and decision of the attacked model at the steps of the
            attack that were kept, of a pipeline all under the draw that is pictured; of a preview the steps alone.
        step: the step of the attack that is shown.
        max_batch: copies of images that were in memory at once.
        used: the knobs that apply.
        seconds: what it took.
    """

    knobs: Knobs
    adapted: bool
    label: int
    classes: tuple[str, ...]
    clean: Float[Tensor, "3 height width"]
    adversarial: Float[Tensor, "3 height width"]
    pictured: Pictured | None
    probabilities: dict[str, Tensor]
    votes: Int[Tensor, " draws"]
    path_steps: tuple[int, ...]
    path_losses: Float[Tensor, " iterates"]
    path_classes: Int[Tensor, " iterates"]
    step: int
    max_batch: int
    used: frozenset[str]
    seconds: float

    @property
    def right_draws(self) -> int:
        """How many draws of the vote are right."""
        return int((self.votes == self.label).sum())

    @property
    def majority(self) -> int:
        """The class of the vote; ties go to the lower class, as in ``verdicts.winners``."""
        return int(self.votes.bincount(minlength=len(self.classes)).argmax())


def silent(what: str, done: int, total: int) -> None:
    """A report to nobody."""


def load_defence(scene: Scene, memory: Memory, name: str) -> nn.Module:
    """The module of a defence, loaded if it was not yet.

    Raises:
        ValueError: for a module in train mode, or none at all; and whatever its loader raises.
    """
    if name not in memory.defences:
        given = scene.defences[name]
        module = given if isinstance(given, nn.Module) else given()
        if not isinstance(module, nn.Module):
            raise ValueError(f"the defence {name!r} must be a torch.nn.Module, got {type(module).__name__}")
        memory.defences[name] = module
    require_eval_mode(memory.defences[name])
    return memory.defences[name]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its parameters or buffers, the CPU if it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None) if isinstance(module, nn.Module) else None
    return torch.device("cpu") if tensor is None else tensor.device


def pick(
    dataset: Dataset, indices: Tensor, device: torch.device
) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
    """Some test images in [0, 1] and their labels, on a device; their memory in the order that notebook 4 has it in."""
    indices = indices.to(dataset.test.images.device)
    images = to_float(dataset.test.images[indices].to(device)).contiguous(memory_format=torch.channels_last)
    return images, dataset.test.labels[indices].to(device)


def adapt(defence: nn.Module, knobs: Knobs) -> nn.Module:
    """The defence with the transform of the knobs. It shares the weights; the pipeline that was given stays as it is."""
    if not isinstance(defence, AToPPipeline):
        return defence
    transform = knobs.transform_settings(defence.transform.grid_size)
    return AToPPipeline(transform, defence.purifier, defence.classifier, seed=knobs.seed).eval()


def attacked(defence: nn.Module, knobs: Knobs) -> nn.Module:
    """What the attack sees: the defence, the same with the identity as the backward pass, or the classifier in it."""
    if is_blind(defence, knobs):
        return defence.classifier
    return BPDA(defence) if isinstance(defence, AToPPipeline) and knobs.attack_sees == "bpda" else defence


def is_blind(defence: nn.Module, knobs: Knobs) -> bool:
    """Whether the attack sees the classifier in a pipeline alone."""
    return isinstance(defence, AToPPipeline) and knobs.attack_sees == "classifier"


def attack_key(knobs: Knobs, entry: AttackEntry, defence: nn.Module) -> tuple[tuple, tuple]:
    """Everything that decides an attack: without the transform, and the transform if the attack sees it."""
    names = ("dataset", "defence", "image", "attack", "attack_sees", "seed", *entry.uses)
    sees_transform = isinstance(defence, AToPPipeline) and not is_blind(defence, knobs)
    transform = (knobs.transform, knobs.missing_rate, knobs.noise_std, knobs.num_masks) if sees_transform else ()
    return tuple(getattr(knobs, name) for name in names), transform


def throws_dice(defence: nn.Module, knobs: Knobs, image: Float[Tensor, "1 3 height width"]) -> bool:
    """Whether two forward passes differ; a pipeline tells by its parts, another module by two forward passes."""
    return rolls(defence, knobs) if isinstance(defence, AToPPipeline) else is_random(defence, image)


def rolls(defence: AToPPipeline, knobs: Knobs) -> bool:
    """Whether a pipeline throws dice: its transform, or its purifier."""
    return defence.purifier_noise > 0 or knobs.is_random(defence.transform.grid_size)


def used_knobs(knobs: Knobs, scene: Scene, memory: Memory) -> frozenset[str] | None:
    """The knobs that apply, where that is known without computing: None for a defence that is not a loaded pipeline."""
    defence = memory.defences.get(knobs.defence)
    if not isinstance(defence, AToPPipeline):
        return None
    random = rolls(defence, knobs)
    sees_dice = random and not is_blind(defence, knobs)
    return applicable(knobs, scene.uses(knobs, sees_dice), purifies=True, random=random)


def run_attack(
    knobs: Knobs,
    entry: AttackEntry,
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    *,
    callback: Callable[[int, int, Tensor], None],
) -> Float[Tensor, "batch 3 height width"]:
    """Adversarial images for the knobs, with the seeds of ``evaluation.evaluate``; ``images`` at eps 0.

    Args:
        callback: (step, steps, adversarial) after every step, steps 0 where they are not known; it may raise to stop.
    """
    if not knobs.attacks:
        return images
    settings = entry.settings(knobs, throws_dice(model, knobs, images[:1]))
    reseed(model, knobs.seed)
    with full_float32(images.device):  # as notebook 4 measures it with the parameters that are copied from here
        return entry.run(
            model,
            images,
            labels,
            settings,
            generator=torch.Generator(images.device).manual_seed(knobs.seed),
            max_batch=max_batch(images),
            callback=lambda step, steps, adversarial, _losses: callback(step, steps, adversarial),
        )


def attack_path(
    knobs: Knobs,
    entry: AttackEntry,
    model: nn.Module,
    image: Float[Tensor, "1 3 height width"],
    label: Int[Tensor, " 1"],
    report: Report = silent,
) -> AttackPath:
    """Run the attack on one image and keep its iterates: at most ``MAX_PATH`` of them between the first and the last."""
    kept = {0: image}
    latest = 0

    def watch(step: int, steps: int, adversarial: Tensor) -> None:
        nonlocal latest
        report("attack", step, steps)
        if not steps:
            return
        latest = step
        if step % ceil(steps / MAX_PATH) == 0:
            kept[step] = adversarial

    report("attack", 0, knobs.steps)
    result = run_attack(knobs, entry, model, image, label, callback=watch)
    kept[max(1, latest)] = result
    return AttackPath(tuple(kept), torch.cat(list(kept.values())))


def views(knobs: Knobs, scene: Scene, memory: Memory, report: Report = silent) -> Iterator[View]:
    """What the knobs show. Where the attack must run again because the transform was changed, a preview comes first: the
    attack as it was, through the new transform, marked as not adapted.

    Raises:
        ValueError: for names, images or settings that do not fit; and whatever a loader or an attack raises.
    """
    started = time.monotonic()
    scene.check(knobs)
    report("loading", 0, 1)
    defence = adapt(load_defence(scene, memory, knobs.defence), knobs)
    entry = scene.attacks.get(knobs.attack)
    dataset = scene.datasets[knobs.dataset]
    image, label = pick(dataset, torch.tensor([knobs.image]), device_of(defence))

    def show(path: AttackPath, adapted: bool) -> View:
        with full_float32(image.device):
            return _show(knobs, scene, dataset, defence, path, label, adapted, started, report)

    if entry is None or not knobs.attacks:
        yield show(AttackPath((0,), image), True)
        return
    key = attack_key(knobs, entry, defence)
    if key not in memory.paths:
        earlier = memory.latest(key[0])
        if earlier is not None:
            yield show(earlier, False)
        path = attack_path(knobs, entry, attacked(defence, knobs), image, label, report)
        if is_blind(defence, knobs):
            with full_float32(image.device):
                path = replace(path, logits=_path_logits(defence.classifier, path.images, None, report))
        memory.keep(key, path)
    memory.paths.move_to_end(key)
    yield show(memory.paths[key], True)


@torch.no_grad()
def _show(
    knobs: Knobs,
    scene: Scene,
    dataset: Dataset,
    defence: nn.Module,
    path: AttackPath,
    label: Int[Tensor, " 1"],
    adapted: bool,
    started: float,
    report: Report,
) -> View:
    end = path.steps[-1] if knobs.shown_step is None else knobs.shown_step
    place = max(number for number, step in enumerate(path.steps) if step <= end)
    clean, adversarial = path.images[:1], path.images[place : place + 1]
    random = throws_dice(defence, knobs, clean)
    sees_dice = random and not is_blind(defence, knobs)
    vote, number = divmod(knobs.draw, knobs.num_draws) if random else (0, 0)
    reseed(defence, knobs.seed + 1 + vote)
    draws = knobs.num_draws if random else 1
    if isinstance(defence, AToPPipeline):
        pictured, logits = _purified_draws(defence, adversarial, draws, number, report)
        known = path.logits
        read = defence.classifier(torch.cat([clean, adversarial])).float() if known is None else known[[0, place]]
        clean_read, adversarial_read = read.softmax(dim=1)
        probabilities = {"clean": clean_read, "adversarial": adversarial_read, "purified": logits[number].softmax(dim=0)}
    else:
        pictured = None
        logits = draw_logits(defence, adversarial, num_draws=draws, max_batch=max_batch(clean))[:, 0]
        read = defence(clean)[0].float().softmax(dim=0)
        probabilities = {"clean": read, "adversarial": logits[number].softmax(dim=0)}
    path_logits = path.logits
    if path_logits is None:
        path_logits = _path_logits(defence, path.images, pictured, report) if adapted else logits[:0]
    losses = functional.cross_entropy(path_logits, label.expand(len(path_logits)), reduction="none")
    return View(
        knobs=knobs,
        adapted=adapted,
        label=int(label),
        classes=tuple(dataset.classes),
        clean=clean[0].cpu(),
        adversarial=adversarial[0].cpu(),
        pictured=None if pictured is None else Pictured(*(part.float().cpu() for part in pictured.images)),
        probabilities={name: value.cpu() for name, value in probabilities.items()},
        votes=logits.argmax(dim=1).cpu(),
        path_steps=path.steps,
        path_losses=losses.cpu(),
        path_classes=path_logits.argmax(dim=1).cpu(),
        step=path.steps[place],
        max_batch=max_batch(clean),
        used=applicable(knobs, scene.uses(knobs, sees_dice), purifies=pictured is not None, random=random),
        seconds=time.monotonic() - started,
    )


class _Draw(NamedTuple):
    """The draw that is pictured, and its images."""

    draw: Draw
    images: tuple[Tensor, Tensor, Tensor]


def _purified_draws(
    pipeline: AToPPipeline, image: Tensor, draws: int, number: int, report: Report
) -> tuple[_Draw, Float[Tensor, "draws classes"]]:
    """Several draws of one image, the dice thrown as ``verdicts.draw_logits`` does, and everything of draw ``number``."""
    logits, pictured = [], None
    for part in torch.arange(draws).split(max_batch(image)):
        report("votes", int(part[0]), draws)
        copies = image.expand(len(part), -1, -1, -1)
        draw = pipeline.draw(copies)
        purified = pipeline.purify(copies, draw)
        logits.append(pipeline.classifier(purified).float())
        if number in part:
            row = slice(number - int(part[0]), number - int(part[0]) + 1)
            own = draw.of(row)
            transformed = (corrupt(image, own)[:, :3] / 2 + 0.5).clamp(0, 1)
            pictured = _Draw(own, (transformed, own.masks[:, 0], purified[row][0]))
    return pictured, torch.cat(logits)


@torch.no_grad()
def _path_logits(model: nn.Module, images: Tensor, pictured: _Draw | None, report: Report) -> Float[Tensor, "steps classes"]:
    """Logits of every iterate, in float32; of a pipeline all under the draw that is pictured."""
    logits = []
    for part in images.split(max_batch(images)):
        report("path", sum(map(len, logits)), len(images))
        if isinstance(model, AToPPipeline):
            logits.append(model(part, pictured.draw.repeated(len(part))).float())
        else:
            logits.append(model(part).float())
    return torch.cat(logits)


def max_batch(images: Tensor) -> int:
    """Copies of images, of their size, that are in memory at once."""
    return max(1, PIXELS_A_BATCH // (images.shape[-1] * images.shape[-2]))


@torch.no_grad()
def next_misclassified(
    knobs: Knobs, scene: Scene, memory: Memory, candidates: Int[Tensor, " n"], report: Report = silent
) -> int | None:
    """The first of the candidates (indices of test images) whose clean image the defence misreads in a single draw."""
    defence = adapt(load_defence(scene, memory, knobs.defence), knobs)
    dataset, device = scene.datasets[knobs.dataset], device_of(defence)
    size = min(64, max_batch(dataset.test.images))
    reseed(defence, knobs.seed + 1)
    for number, part in enumerate(candidates.split(size)):
        report("searching", number * size, len(candidates))
        images, labels = pick(dataset, part, device)
        with full_float32(device):
            wrong = (defence(images).argmax(dim=1) != labels).nonzero()
        if len(wrong):
            return int(part[int(wrong[0])])
    return None


@dataclass(frozen=True)
class RobustCurve:
    """Robust accuracy over eps: of ``images`` images ``right[i]`` are read correctly, in a single draw, at ``eps[i]``."""

    knobs: Knobs
    eps: tuple[float, ...]
    right: tuple[int, ...]
    images: int


def robust_curve(knobs: Knobs, scene: Scene, memory: Memory, report: Report = silent) -> RobustCurve:
    """Robust accuracy of the defence under the knobs' attack, on the test images from the one shown on, at several eps.

    Raises:
        ValueError: without an attack; else as ``views``.
    """
    scene.check(knobs)
    if not knobs.attacks:
        raise ValueError("robust accuracy over eps needs an attack with an eps above 0: choose one")
    defence = adapt(load_defence(scene, memory, knobs.defence), knobs)
    dataset = scene.datasets[knobs.dataset]
    count = len(dataset.test.labels)
    order = (torch.arange(min(CURVE_IMAGES, count)) + knobs.image) % count
    images, labels = pick(dataset, order, device_of(defence))
    top = {"linf": 1.0, "l2": inf, "flow": 2.0}[knobs.norm]
    radii = tuple(dict.fromkeys(min(factor * knobs.eps, top) for factor in CURVE_FACTORS))
    right = []
    for number, eps in enumerate(radii):

        def watch(step: int, steps: int, _adversarial: Tensor, number: int = number) -> None:
            report("robust accuracy", number * steps + step, len(radii) * steps)  # of 0 steps all is 0: not known

        report("robust accuracy", number, len(radii))
        entry = scene.attacks[knobs.attack]
        adversarial = run_attack(replace(knobs, eps=eps), entry, attacked(defence, knobs), images, labels, callback=watch)
        reseed(defence, knobs.seed + 1)
        logits = draw_logits(defence, adversarial, max_batch=max_batch(images))[0]
        right.append(int((logits.argmax(dim=1) == labels).sum()))
    return RobustCurve(knobs, radii, tuple(right), len(labels))
