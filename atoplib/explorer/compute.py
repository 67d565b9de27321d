"""From the values of the controls to everything that is on screen: every defence on the iterates of its
attack."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int

from atoplib import decisions
from atoplib.explorer import attack
from atoplib.explorer.attack import Report, Scene, Values, max_batch
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import corrupt

PARTIAL_SECONDS = 0.4  # so long without a picture, and the rows that are done are shown
PREVIEW_STEPS = 2  # of an attack while a slider is being dragged


class Row(NamedTuple):
    """One defence and what it makes of iterates of an attack; on the CPU, images in [0, 1].

    Attributes:
        last: the number of the attack's last step.
        steps: those that are there, all or the one that is shown; ``images`` after them.
        logits: each iterate under the same samples.
        transformed, purified, unpurified: under the sample that is pictured (of RT3 its first mask), and
            classes by the classifier alone; None without a purifier.
    """

    name: str
    last: int
    steps: list[int]
    images: Float[torch.Tensor, "_shown _channels _height _width"]
    logits: Float[torch.Tensor, "_votes _shown _classes"]
    transformed: Float[torch.Tensor, "_shown _channels _height _width"] | None = None
    purified: Float[torch.Tensor, "_shown _channels _height _width"] | None = None
    unpurified: Int[torch.Tensor, " _shown"] | None = None

    def place(self, values: Values) -> int:
        """Which of the iterates is shown."""
        return self.steps.index(shown_step(self.steps, values))


class View(NamedTuple):
    """What is on screen.

    Attributes:
        rows: None for a defence that is not done yet.
        preview: the attack is a shorter one than the values ask for.
        complete: every step of the attack can be shown without computing.
    """

    values: Values
    label: int
    classes: list[str]
    clean: Float[torch.Tensor, "channels height width"]
    rows: list[Row | None]
    preview: bool
    complete: bool
    seconds: float

    @property
    def done(self) -> bool:
        """Whether every row is there, and its attack is the one that was asked for."""
        return not self.preview and None not in self.rows


def shown_step(steps: Iterable[int], values: Values) -> int:
    """The step that is shown: the last one up to the value ``shown_step``, the result where that is None."""
    return max(step for step in steps if values["shown_step"] is None or step <= values["shown_step"])


def make_row(scene: Scene, values: Values, name: str, report: Report, *, complete: bool = False) -> Row:
    """A defence on the iterates of its attack: on all of them, or on the one that is shown.

    The logits are those of ``sample_logits`` on one image alone.
    """
    defence, path = scene.defence(name, values), attack.attack_path(scene, values, name, report)
    steps = list(path) if complete else [shown_step(path, values)]
    images = torch.cat([path[step] for step in steps]).to(attack.device_of(defence))
    votes = values["votes"] if scene.is_random(name, values, images[:1]) else 1
    turn, pictured = divmod(values["sample"], votes)
    seed, size, logits = values["seed"] + 1 + turn, max_batch(images), []
    for number, image in enumerate(images):
        report("Decision", number, len(images))
        with decisions.seeded(defence, seed, image.device):
            logits.append(decisions.sample_logits(defence, image[None], num_samples=votes, max_batch=size))
    row = Row(name, max(path), steps, images.cpu(), torch.cat(logits, dim=1).cpu())
    if not isinstance(defence, AToPPipeline):
        return row
    decisions.reseed(defence, seed)
    for first in range(0, pictured + 1, size):  # the batches of sample_logits, up to the one with the sample
        sample = defence.sample(images[:1].expand(min(size, votes - first), -1, -1, -1))
    sample = sample.rows(slice(pictured - first, pictured - first + 1))
    with torch.no_grad(), decisions.full_float32(images.device):
        return row._replace(
            transformed=torch.cat([corrupt(image[None], sample)[:1, :3] for image in images]).cpu() / 2 + 0.5,
            purified=torch.cat([defence.purify(image[None], sample) for image in images]).cpu(),
            unpurified=torch.cat([defence.classifier(image[None]).argmax(dim=1) for image in images]).cpu(),
        )


def views(
    scene: Scene, values: Values, report: Report = lambda *_: None, *, preview: bool = False
) -> Iterator[View]:
    """What the values show: the rows, several times where they take long; last with the decision at every
    step. With ``preview`` a short attack alone, where the attack itself takes longer.

    Raises:
        ValueError: for values that do not fit; and whatever a loader or an attack raises.
    """
    started, names, number = time.monotonic(), values["rows"], values["image"]

    def view(rows: list[Row | None], preview: bool = False, complete: bool = False) -> View:
        return View(
            values=values,
            label=int(scene.labels[number]),
            classes=scene.classes,
            clean=scene.images[number],
            rows=list(rows),
            preview=preview,
            complete=complete,
            seconds=time.monotonic() - started,
        )

    attacking, short = attack.is_attacking(values), {**values, "steps": PREVIEW_STEPS}
    missing = attacking and any(attack.attack_key(scene, values, name) not in scene.paths for name in names)
    if preview and missing and values["steps"] > PREVIEW_STEPS:
        yield view([make_row(scene, short, name, report) for name in names], preview=True)
        return
    rows, shown = [None] * len(names), time.monotonic()
    for place, name in enumerate(names):
        rows[place] = make_row(scene, values, name, report)
        if None in rows and time.monotonic() - shown > PARTIAL_SECONDS:
            yield view(rows)
            shown = time.monotonic()
    yield view(rows, complete=not attacking)
    if attacking:
        yield view([make_row(scene, values, name, report, complete=True) for name in names], complete=True)
