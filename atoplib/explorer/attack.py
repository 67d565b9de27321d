"""What can be looked at, and the attacks on it: each run once and remembered, iterate by iterate. No widgets
here.

Random numbers are those of ``evaluate``: a defence is reseeded with ``seed`` for the attack and with ``seed +
1`` for the decision, so that a library call on the same image gives the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib import decisions
from atoplib.attacks import ATTACKS, bpda, usual_radii
from atoplib.contract import adapt, check_eval_mode, device_of
from atoplib.evaluation.results import percents
from atoplib.pipeline import AToPPipeline

# Called as ``report(what, done, total, ...)`` between pieces of work; it may raise to stop the work.
# ``total`` is 0 where nobody knows it.
Report = Callable[..., None]
# The values of the controls by name, see ``controls.CONTROLS``.
Values = Mapping[str, Any]

NO_ATTACK, EACH = "none", "each"
EFFORT = ("steps", "queries", "eot_samples")  # options of attacks that have a control of their own
DECIDES_ATTACK = (*EFFORT, "image", "attack", "norm", "eps", "seed", "grey", "target", "options")
TRANSFORM = ("transform", "missing_rate", "noise_std", "num_masks")
MAX_PATH = 64  # steps of an attack that are kept; of a longer one every second, third, ... is
KEPT_PATHS = 64  # attacks that need not run again
PIXELS_A_BATCH = 2**18  # 256 copies at 32 px, 4 at 256 px: little memory, and work can be stopped in between
CURVE_FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # of eps, on the curve of robust accuracy
WHOLE_SIZES = {"occlusion": range(3), "corruption": range(6)}  # on it where eps is a number of something
CURVE_IMAGES = 32


@dataclass
class Scene:
    """What can be looked at, and what need not be computed again.

    Attributes:
        defences: modules in eval mode, images in [0, 1] -> logits, or functions that load one when it is
            first wanted.
        images, labels: in [0, 1]; images of one's own are appended.
        paths: attacks that were run, see ``attack_path``.
        num_initial: how many of the images were there from the start.
        usual: the usual eps of each norm for images such as these.
    """

    defences: dict[str, nn.Module | Callable[[], nn.Module]]
    images: Float[Tensor, "count channels height width"]
    labels: Int[Tensor, " count"]
    classes: list[str]
    loaded: dict[str, nn.Module] = field(default_factory=dict)
    random: dict[tuple, bool] = field(default_factory=dict)
    paths: dict[tuple, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_initial, self.usual = len(self.images), usual_radii(self.images)

    def defence(self, name: str, values: Values | None = None) -> nn.Module:
        """The module of a defence, with the transform of the values where it is a pipeline; the original
        stays as it is.

        Raises:
            ValueError: for something that is no model, or one in train mode; and whatever its loader raises.
        """
        if name not in self.loaded:
            source = self.defences[name]
            module = source if isinstance(source, nn.Module) else source()
            check_eval_mode(adapt(module))
            self.loaded[name] = (
                module.freeze_for_attack() if isinstance(module, AToPPipeline) else adapt(module)
            )
        module = self.loaded[name]
        if values is None or not isinstance(module, AToPPipeline):
            return module
        return module.with_transform(name=values["transform"], **{key: values[key] for key in TRANSFORM[1:]})

    def is_random(self, name: str, values: Values, image: Tensor | None = None) -> bool:
        """Whether two passes of a defence differ, tried once for each of its transforms; without an image
        nothing is loaded or computed, and what is not known counts as random."""
        if image is None and name not in self.loaded:
            return True
        defence = self.defence(name, values)
        key = name, getattr(defence, "transform", None)
        if image is not None and key not in self.random:
            self.random[key] = decisions.is_random(defence, image, max_batch=max_batch(image))
        return self.random.get(key, True)


def max_batch(images: Tensor) -> int:
    """Copies of images, of their size, that are in memory at once."""
    return max(1, PIXELS_A_BATCH // (images.shape[-1] * images.shape[-2]))


class Grey(nn.Sequential):
    """A model of RGB images as one of grey images: one channel, given to it three times."""

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        return super().forward(images.expand(-1, 3, -1, -1))


def is_attacking(values: Values) -> bool:
    """Whether there is anything to attack with."""
    return values["attack"] != NO_ATTACK and values["eps"] > 0


def attacked_defence(values: Values, name: str) -> str:
    """The defence that the adversarial image of a row is made on: its own, or one for all rows."""
    return name if values["attacked"] == EACH else values["attacked"]


def run_attack(
    scene: Scene, values: Values, name: str, images: Tensor, labels: Tensor, watch: Callable
) -> Tensor:
    """Adversarial images of one defence for the values, with the seeds of ``evaluate``; ``images`` at eps 0.

    Args:
        watch: (step, steps, adversarial) after every step, steps 0 where they are not known; it may raise to
            stop.
    """
    if not is_attacking(values):
        return images
    attack, model = ATTACKS[values["attack"]], scene.defence(name, values)
    random = scene.is_random(name, values, images[:1])
    if isinstance(model, AToPPipeline) and values["threat_model"] != "white-box":
        random = random and values["threat_model"] != "transfer"
        model = model.classifier if values["threat_model"] == "transfer" else bpda(model)
    options = values["options"] | {key: values[key] for key in EFFORT if key in attack.options}
    if not random:
        options |= {"eot_samples": 1} if "eot_samples" in attack.options else {}  # others are the same
    if attack.targeted and values["target"] >= 0:
        options["targets"] = torch.full_like(labels, values["target"])
    grey = values["grey"] and images.shape[1] == 3 and torch.equal(images[:, :1].expand_as(images), images)
    with decisions.seeded(model, values["seed"], images.device), decisions.full_float32(images.device):
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
        )
    return result.detach().expand_as(images).contiguous()


def attack_key(scene: Scene, values: Values, name: str) -> tuple:
    """Everything that decides the adversarial image of a row."""
    names, name = DECIDES_ATTACK, attacked_defence(values, name)
    if isinstance(scene.defence(name), AToPPipeline):
        names += ("threat_model", *(TRANSFORM if values["threat_model"] != "transfer" else ()))
    return name, int(scene.labels[values["image"]]), *(str(values[key]) for key in names)


def attack_path(scene: Scene, values: Values, name: str, report: Report) -> dict[int, Tensor]:
    """The attack of a row on the image, run or remembered: its iterates (1, channels, height, width) by the
    number of the step, the clean image first, the result last, and at most ``MAX_PATH`` in between."""
    number, source = values["image"], attacked_defence(values, name)
    device, key = device_of(scene.defence(source)), attack_key(scene, values, name)
    image, label = (part[number : number + 1].to(device) for part in (scene.images, scene.labels))
    if not is_attacking(values):
        return {0: image}
    if key not in scene.paths:
        kept, last = {0: image}, 1

        def watch(step: int, steps: int, adversarial: Tensor) -> None:
            nonlocal last
            report(f"Attack on {source}", step, steps)
            if steps:
                last = max(1, step)
                if step % ceil(steps / MAX_PATH) == 0:
                    kept[step] = adversarial.detach().clone()

        report(f"Attack on {source}", 0, 0)
        result = run_attack(scene, values, source, image, label, watch)  # it may not be the last iterate
        scene.paths[key] = {step: kept[step] for step in kept if step < last} | {last: result}
    scene.paths[key] = scene.paths.pop(key)  # the last one used is the last one forgotten
    if len(scene.paths) > KEPT_PATHS:
        del scene.paths[next(iter(scene.paths))]
    return scene.paths[key]


def robust_curve(scene: Scene, values: Values, name: str, report: Report) -> list[tuple[float, ...]]:
    """Robust accuracy of a defence over eps, attacked as the values say, on the images from the one shown on:
    (eps, correct in a single sample, ends of the 95 % interval), in percent.
    """
    defence, source, points = scene.defence(name, values), attacked_defence(values, name), []
    order = (torch.arange(scene.num_initial) + values["image"]) % scene.num_initial
    order = order[scene.labels[order] != values["target"]][:CURVE_IMAGES]  # none has its own class as target
    count, top = len(order), {"linf": 1.0, "rotation": 180.0}.get(values["norm"], inf)
    sizes = WHOLE_SIZES.get(values["norm"]) or [min(factor * values["eps"], top) for factor in CURVE_FACTORS]
    images, labels = (part[order].to(device_of(defence)) for part in (scene.images, scene.labels))
    for eps in dict.fromkeys(sizes):
        adversarial = run_attack(
            scene, {**values, "eps": eps}, source, images, labels,
            partial(report, f"Accuracy of {name} at {eps:.3g}"),
        )  # fmt: skip
        with decisions.seeded(defence, values["seed"] + 1, images.device):
            logits = decisions.sample_logits(defence, adversarial, max_batch=max_batch(images))[0]
        points.append((eps, *percents(int((logits.argmax(dim=1) == labels).sum()), count)))
    return points
