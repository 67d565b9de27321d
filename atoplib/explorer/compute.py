"""From the values of the controls to everything that is on screen: every defence on the iterates of its
attack."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.decisions import full_float32, reseed, sample_logits
from atoplib.explorer.attack import EACH, Path, Report, Scene, Values, attack_path, device_of, max_batch
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSample, corrupt

PARTIAL_SECONDS = 0.4  # so long without a picture, and the rows that are done are shown


class Shown(NamedTuple):
    """One step of an attack as a defence sees it: images, logits (votes, classes), and the class without the
    purifier."""

    adversarial: Tensor
    transformed: Tensor | None
    purified: Tensor | None
    logits: Tensor
    unpurified: int | None


class Row(NamedTuple):
    """One defence and what it makes of its adversarial image; on the CPU, images in [0, 1].

    Attributes:
        attacked: whether the attack was made on this defence.
        logits: of every iterate of the path, or (not ``complete``) of the one that is shown alone, under the
            same samples.
        sample: of t that is pictured; ``purified`` is under it, as many images as iterates in ``logits``.
        unpurified: classes of these iterates by the classifier alone, None without a purifier.
        random: whether the defence is.
    """

    name: str
    attacked: bool
    path: Path
    logits: Float[Tensor, "_votes _shown _classes"]
    sample: TransformSample | None
    purified: Float[Tensor, "_shown _channels _height _width"] | None
    unpurified: Int[Tensor, " _shown"] | None
    random: bool

    @property
    def complete(self) -> bool:
        """Whether every iterate was classified."""
        return self.logits.shape[1] == len(self.path.steps)

    def at(self, values: Values) -> Shown:
        """The step that is shown."""
        place = shown_place(self.path, values)
        image, number = self.path.images[place], place if self.complete else 0
        if self.sample is None:
            return Shown(image, None, None, self.logits[:, number], None)
        transformed = (corrupt(image[None], self.sample)[:, :3] / 2 + 0.5).clamp(0, 1)
        return Shown(
            image, transformed, self.purified[number], self.logits[:, number], int(self.unpurified[number])
        )


class View(NamedTuple):
    """What is on screen. ``rows`` holds None for a defence that is not done yet; ``preview``: the attack is
    not the one that the values ask for, but an earlier or a shorter one."""

    values: Values
    label: int
    classes: tuple[str, ...]
    clean: Float[Tensor, "channels height width"]
    rows: tuple[Row | None, ...]
    preview: bool
    seconds: float

    @property
    def done(self) -> bool:
        """Whether every row is there, and its attack is the one that was asked for."""
        return not self.preview and None not in self.rows

    def of(self, rows: list[Row | None], started: float, *, preview: bool = False) -> "View":
        """The view with these rows, and the seconds since ``started``."""
        return self._replace(rows=tuple(rows), preview=preview, seconds=time.monotonic() - started)


class Classified(NamedTuple):
    """Some images under the same samples of t, and everything of the sample that is shown."""

    logits: Tensor
    purified: Tensor | None
    sample: TransformSample | None


@torch.no_grad()
def classify(defence: nn.Module, images: Tensor, values: Values, votes: int, report: Report) -> Classified:
    """Logits (votes, images, classes) of a defence, its samples those of ``sample_logits`` on the first image
    alone."""
    vote, shown = divmod(values["sample"], votes)
    seed, parts = values["seed"] + 1 + vote, torch.arange(votes).split(max_batch(images))
    if not isinstance(defence, AToPPipeline):
        if votes == 1:
            reseed(defence, seed)
            return Classified(sample_logits(defence, images, max_batch=max_batch(images)), None, None)
        logits = []
        for number, image in enumerate(images):
            report("decision", number, len(images))
            reseed(defence, seed)
            logits.append(sample_logits(defence, image[None], num_samples=votes, max_batch=max_batch(images)))
        return Classified(torch.cat(logits, dim=1), None, None)
    reseed(defence, seed)
    samples = [defence.sample(images[:1].expand(len(part), -1, -1, -1)) for part in parts]
    logits, purified = [], []
    for number, image in enumerate(images):
        report("decision", number, len(images))
        own = []
        for part, sample in zip(parts, samples, strict=True):
            copies = image.expand(len(part), -1, -1, -1)
            made = defence.purify(copies, sample)
            own.append(defence.classifier(made) if defence.average == "images" else defence(copies, sample))
            if shown in part:
                place = shown - int(part[0])
                purified.append(made[place : place + 1])
                pictured = sample.rows(slice(place, place + 1))
        logits.append(torch.cat(own).float())
    return Classified(torch.stack(logits, dim=1), torch.cat(purified), pictured)


@torch.no_grad()
def make_row(
    scene: Scene, values: Values, name: str, path: Path, attacked: bool, report: Report, *, complete: bool
) -> Row:
    """A defence on the iterates of an attack: on all of them, or on the one that is shown."""
    defence = scene.defence(name, values)
    images = path.images.to(device_of(defence))
    random = scene.is_random(name, defence, images[:1])
    looked_at = images if complete else images[[shown_place(path, values)]]
    with full_float32(images.device):
        seen = classify(defence, looked_at, values, values["votes"] if random else 1, report)
        unpurified = None if seen.sample is None else defence.classifier(looked_at).argmax(dim=1).cpu()
    sample, purified = seen.sample, seen.purified
    if sample is not None:
        sample = sample._replace(
            **{key: part.cpu() for key, part in sample._asdict().items() if isinstance(part, Tensor)}
        )
        purified = purified.float().cpu()
    path = Path(path.steps, path.images.cpu())
    return Row(name, attacked, path, seen.logits.cpu(), sample, purified, unpurified, random)


def shown_place(path: Path, values: Values) -> int:
    """Which iterate is shown: the last one up to ``shown_step``, the result where that is None."""
    end = path.steps[-1] if values["shown_step"] is None else values["shown_step"]
    return max(number for number, step in enumerate(path.steps) if step <= end)


def views(
    scene: Scene, values: Values, report: Report = lambda *_: None, *, preview: bool = False
) -> Iterator[View]:
    """What the values show: with ``preview`` first what can be had at once, if the attack is not there yet;
    then the rows, several times where they take long; last with the decision at every step.

    Raises:
        ValueError: for values that do not fit; and whatever a loader or an attack raises.
    """
    started, names = time.monotonic(), values["rows"]
    source = {name: name if values["attacked"] == EACH else values["attacked"] for name in names}
    view = View(
        values,
        int(scene.labels[values["image"]]),
        scene.classes,
        scene.images[values["image"]],
        (),
        False,
        started,
    )
    if preview:
        early = {
            name: attack_path(scene, values, name, report, preview=True)
            for name in dict.fromkeys(source.values())
        }
        if any(path is not None for path in early.values()):
            rows = []
            for name in names:
                path = early[source[name]] or attack_path(scene, values, source[name], report)
                rows.append(make_row(scene, values, name, path, source[name] == name, report, complete=False))
            yield view.of(rows, started, preview=True)
    rows, shown = [None] * len(names), time.monotonic()
    for place, name in enumerate(names):
        path = attack_path(scene, values, source[name], report)
        rows[place] = make_row(scene, values, name, path, source[name] == name, report, complete=False)
        if time.monotonic() - shown > PARTIAL_SECONDS and place + 1 < len(names):
            yield view.of(rows, started)
            shown = time.monotonic()
    yield view.of(rows, started)
    if any(not row.complete for row in rows):
        rows = [
            make_row(scene, values, row.name, row.path, row.attacked, report, complete=True) for row in rows
        ]
        yield view.of(rows, started)


@torch.no_grad()
def next_misclassified(
    scene: Scene, values: Values, numbers: list[int], report: Report = lambda *_: None
) -> int | None:
    """The first of some images that one of the defences shown misclassifies, clean and in a single sample."""
    modules = [scene.defence(name, values) for name in values["rows"]]
    for module in modules:
        reseed(module, values["seed"] + 1)
    size = min(64, max_batch(scene.images))
    for start in range(0, len(numbers), size):
        report("searching", start, len(numbers))
        part = torch.tensor(numbers[start : start + size])
        images, labels = scene.images[part], scene.labels[part]
        wrong = torch.zeros(len(part), dtype=torch.bool)
        for module in modules:
            logits = sample_logits(module, images.to(device_of(module)))[0]
            wrong |= logits.argmax(dim=1).cpu() != labels.cpu()
        if wrong.any():
            return int(part[wrong.nonzero()[0, 0]])
    return None
