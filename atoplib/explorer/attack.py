"""What can be looked at, and the attacks on it: each run once and remembered, iterate by iterate. No widgets
here.

Random numbers are those of ``evaluate``: a defence is reseeded with ``seed`` for the attack and with ``seed +
1`` for the decision, so that a library call on the same image gives the same numbers.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import ceil, inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import ATTACKS, Attack, bpda
from atoplib.contract import adapt, check_eval_mode
from atoplib.decisions import full_float32, is_random, reseed, sample_logits
from atoplib.pipeline import AToPPipeline

Report = Callable[[str, int, int], None]
"""Called as ``report(what, done, total)`` between pieces of work; it may raise to stop the work. ``total`` is
0 where nobody knows it."""
Values = Mapping[str, Any]
"""The values of the controls by name, see ``controls.CONTROLS``."""

NO_ATTACK, EACH = "none", "each"
OWN = ("steps", "queries", "eot_samples")  # options of attacks that have a control of their own
TRANSFORM = ("transform", "missing_rate", "noise_std", "num_masks")
LAST = -1  # where the number of the last step is noted
MAX_PATH = 64  # steps of an attack that are kept; of a longer one every second, third, ... is
KEPT_PATHS = 64  # attacks that need not run again
PIXELS_A_BATCH = (
    2**18
)  # 256 copies at 32 px, 4 at 256 px: memory stays small, and work can be stopped in between
PREVIEW_STEPS = 2  # of an attack while a slider is being dragged
CURVE_FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # of eps, on the curve of robust accuracy
CURVE_IMAGES = 32


class Path(NamedTuple):
    """The iterates of an attack on one image, the clean image first, the result last; ``steps`` are their
    numbers."""

    steps: tuple[int, ...]
    images: Float[Tensor, "_iterates _channels _height _width"]


@dataclass
class Scene:
    """What can be looked at, and what need not be computed again.

    Attributes:
        defences: modules in eval mode, images in [0, 1] -> logits, or functions that load one when it is
            first wanted.
        images, labels: in [0, 1]; images of one's own are appended.
        dataset: whose usual radii fit, as ``attacks.default_eps`` names it.
        given: how many of the images were there from the start.
    """

    defences: dict[str, nn.Module | Callable[[], nn.Module]]
    images: Float[Tensor, "count channels height width"]
    labels: Int[Tensor, " count"]
    classes: tuple[str, ...]
    dataset: str = "cifar10"
    attacks: Mapping[str, Attack] = field(default_factory=lambda: ATTACKS)
    given: int = 0
    loaded: dict[str, nn.Module] = field(default_factory=dict)
    random: dict[tuple, bool] = field(default_factory=dict)
    paths: OrderedDict[tuple, Path] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.given = len(self.labels)

    def defence(self, name: str, values: Values | None = None) -> nn.Module:
        """The module of a defence, with the transform of the values where it is a pipeline; the original
        stays as it is.

        Raises:
            ValueError: for something that is no module, or one in train mode; and whatever its loader raises.
        """
        if name not in self.loaded:
            source = self.defences[name]
            module = source if isinstance(source, nn.Module) else source()
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"the defence {name!r} must be a torch.nn.Module, got {type(module).__name__}"
                )
            check_eval_mode(module)
            self.loaded[name] = (
                module.freeze_for_attack() if isinstance(module, AToPPipeline) else adapt(module)
            )
        module = self.loaded[name]
        if values is None or not isinstance(module, AToPPipeline):
            return module
        return module.with_transform(name=values["transform"], **{key: values[key] for key in TRANSFORM[1:]})

    def image(self, values: Values, name: str) -> tuple[Tensor, Tensor]:
        """The image and its label, a batch of one each, where the defence computes."""
        device = device_of(self.defence(name))
        number = values["image"]
        return self.images[number : number + 1].to(device), self.labels[number : number + 1].to(device)

    def is_random(self, name: str, defence: nn.Module, image: Tensor) -> bool:
        """Whether two passes of a defence differ; tried once for each of its transforms."""
        key = name, getattr(defence, "transform", None)
        if key not in self.random:
            self.random[key] = is_random(defence, image, max_batch=max_batch(image))
        return self.random[key]

    def may_be_random(self, name: str, values: Values) -> bool:
        """Whether a defence is random, or not known not to be: nothing is loaded or computed."""
        if name not in self.loaded:
            return True
        return self.random.get((name, getattr(self.defence(name, values), "transform", None)), True)

    def add(self, image: Float[Tensor, "channels height width"], label: int) -> int:
        """Append an image of one's own; returns its number."""
        self.images = torch.cat([self.images, image[None].to(self.images)])
        self.labels = torch.cat([self.labels, torch.tensor([label]).to(self.labels)])
        return len(self.labels) - 1


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its parameters or buffers, the CPU if it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def max_batch(images: Tensor) -> int:
    """Copies of images, of their size, that are in memory at once."""
    return max(1, PIXELS_A_BATCH // (images.shape[-1] * images.shape[-2]))


class Grey(nn.Module):
    """A model of RGB images as one of grey images: one channel, given to it three times."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        return self.model(images.expand(-1, 3, -1, -1))


def is_attacking(values: Values) -> bool:
    """Whether there is anything to attack with."""
    return values["attack"] != NO_ATTACK and values["eps"] > 0


def seen_model(defence: nn.Module, values: Values) -> nn.Module:
    """What the attack sees of a defence, by the threat model; a module that is no pipeline is always seen
    whole."""
    if not isinstance(defence, AToPPipeline) or values["threat_model"] == "white-box":
        return defence
    return defence.classifier if values["threat_model"] == "transfer" else bpda(defence)


def run_attack(
    scene: Scene, values: Values, name: str, images: Tensor, labels: Tensor, watch: Callable, **changes: Any
) -> Tensor:
    """Adversarial images of one defence for the values, with the seeds of ``evaluate``; ``images`` at eps 0.

    Args:
        watch: (step, steps, adversarial) after every step, steps 0 where they are not known; it may raise to
            stop.
        changes: options of the attack in place of those of the values.
    """
    if not is_attacking(values):
        return images
    attack, defence = scene.attacks[values["attack"]], scene.defence(name, values)
    model = seen_model(defence, values)
    own = {key: values[key] for key in OWN if key in attack.options}
    transfer = isinstance(defence, AToPPipeline) and values["threat_model"] == "transfer"
    if transfer or not scene.is_random(name, defence, images[:1]):
        own.pop("eot_samples", None)  # more samples of a deterministic model are the same ones
    options = {**attack.options, **{k: v for k, v in values["options"].items() if k in attack.options}, **own}
    options |= {key: value for key, value in changes.items() if key in attack.options}
    grey = values["grey"] and images.shape[1] == 3 and torch.equal(images[:, :1].expand_as(images), images)
    targets = torch.full_like(labels, values["target"]) if attack.targeted and values["target"] >= 0 else None
    reseed(model, values["seed"])
    with full_float32(images.device):
        result = attack.function(
            Grey(model).eval() if grey else model,
            images[:, :1] if grey else images,
            labels,
            eps=values["eps"],
            norm=values["norm"],
            seed=values["seed"],
            max_batch=max_batch(images),
            callback=lambda step, steps, adversarial, *_: watch(step, steps, adversarial.expand_as(images)),
            **options,
            **({} if targets is None else {"targets": targets}),
        )
    return result.detach().expand_as(images).contiguous()


def attack_key(scene: Scene, values: Values, name: str) -> tuple[tuple, tuple]:
    """Everything that decides an attack on one image: without the transform, and the transform where it is
    seen."""
    attack = scene.attacks[values["attack"]]
    names = ("image", "attack", "norm", "eps", "seed", "grey", *(key for key in OWN if key in attack.options))
    pipeline = isinstance(scene.defence(name), AToPPipeline)
    key = [
        name,
        int(scene.labels[values["image"]]),
        *(values[key] for key in names),
        repr(sorted(values["options"].items())),
    ]
    key += [values["target"] if attack.targeted else -1, values["threat_model"] if pipeline else ""]
    seen = pipeline and values["threat_model"] != "transfer"
    return tuple(key), tuple(values[key] for key in TRANSFORM) if seen else ()


def attack_path(
    scene: Scene, values: Values, name: str, report: Report, *, preview: bool = False
) -> Path | None:
    """The attack on the image, run or remembered: at most ``MAX_PATH`` iterates between the first and the
    last.

    A preview is an attack that differs by the transform alone, or one of ``PREVIEW_STEPS``; None where the
    attack itself is there, or has no steps to leave out.
    """
    image, label = scene.image(values, name)
    if not is_attacking(values):
        return None if preview else Path((0,), image)
    key = attack_key(scene, values, name)
    if key in scene.paths:
        scene.paths.move_to_end(key)
        return None if preview else scene.paths[key]
    options = {}
    if preview:
        earlier = next((scene.paths[other] for other in reversed(scene.paths) if other[0] == key[0]), None)
        if (
            earlier is not None
            or values.get("steps", 0) <= PREVIEW_STEPS
            or "steps" not in scene.attacks[values["attack"]].options
        ):
            return earlier
        options = {"steps": PREVIEW_STEPS}
    kept = {0: image}
    report(f"attack on {name}", 0, 0)
    result = run_attack(
        scene, values, name, image, label, partial(_keep, kept, report, f"attack on {name}"), **options
    )
    last = kept.pop(LAST, (1, None))[0]  # the result may not be the last iterate
    path = Path(
        (*(step for step in kept if step < last), last),
        torch.cat([*(kept[s] for s in kept if s < last), result]),
    )
    if not preview:
        scene.paths[key] = path
        while len(scene.paths) > KEPT_PATHS:
            scene.paths.popitem(last=False)
    return path


def _keep(kept: dict, report: Report, what: str, step: int, steps: int, adversarial: Tensor) -> None:
    """Note an iterate of an attack; every second, third, ... one of a long attack."""
    report(what, step, steps)
    if steps:
        kept[LAST] = max(1, step), None
        if step % ceil(steps / MAX_PATH) == 0:
            kept[step] = adversarial.detach().clone()


class Curve(NamedTuple):
    """Robust accuracy of a defence: of ``images`` images ``correct[i]`` are correct, in a single sample, at
    ``eps[i]``."""

    name: str
    eps: tuple[float, ...]
    correct: tuple[int, ...]
    images: int


def _count(
    report: Report, what: str, number: int, count: int, step: int, steps: int, _adversarial: Tensor
) -> None:
    report(what, number * steps + step, count * steps)


def robust_curve(scene: Scene, values: Values, name: str, report: Report = lambda *_: None) -> Curve:
    """Robust accuracy of a defence over eps, attacked as the values say, on the images from the one shown on.

    Raises:
        ValueError: without an attack.
    """
    if not is_attacking(values):
        raise ValueError("accuracy over eps needs an attack with an eps above 0: choose one")
    source = name if values["attacked"] == EACH else values["attacked"]
    order = (torch.arange(min(CURVE_IMAGES, scene.given)) + values["image"]) % scene.given
    images, labels = (part[order].to(device_of(scene.defence(name))) for part in (scene.images, scene.labels))
    top = 1.0 if values["norm"] == "linf" else inf
    radii, correct = tuple(dict.fromkeys(min(factor * values["eps"], top) for factor in CURVE_FACTORS)), []
    what = f"accuracy of {name}"
    for number, eps in enumerate(radii):
        report(what, number, len(radii))
        watch = partial(_count, report, what, number, len(radii))
        adversarial = run_attack(scene, {**values, "eps": eps}, source, images, labels, watch)
        defence = scene.defence(name, values)
        reseed(defence, values["seed"] + 1)
        logits = sample_logits(defence, adversarial, max_batch=max_batch(images))[0]
        correct.append(int((logits.argmax(dim=1) == labels).sum()))
    return Curve(name, radii, tuple(correct), len(labels))
