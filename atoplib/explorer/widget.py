"""The explorer in a notebook: one widget, whose page (``explorer.js``) sends wishes and shows what comes
back.

The values (``Explorer.values``) are the truth. The page numbers its wishes; with every answer it gets the
number of the last one that was heard, and takes over values only if it has not asked for others since: a
finished picture never moves a slider back that somebody is moving.
"""

import base64
import io
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import anywidget
import torch
import traitlets
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from atoplib import decisions, files, hashing
from atoplib.explorer import attack, compute, controls, page

PROGRESS_SECONDS = 0.1  # between two movements of the progress bar
FOLDER = Path(__file__).parent


class Superseded(Exception):
    """Raised inside a job that is no longer wanted."""


class Worker:
    """Runs jobs one at a time, each in a thread that ends with it; a new one takes the place of all that were
    asked for before. A job is called with its number, by which it asks whether it is still wanted.

    Args:
        on_error: called with whatever a job raised, unless the job had been superseded.
        on_idle: called when the last job has ended, however it ended.
    """

    def __init__(self, on_error: Callable[[Exception], None], on_idle: Callable[[], None]) -> None:
        self.lock = threading.Condition()  # of an RLock; notified when a job has ended
        self.latest = self.unfinished = 0
        self._turn = threading.Lock()
        self._on_error, self._on_idle = on_error, on_idle

    def submit(self, job: Callable[[int], None]) -> None:
        """Run ``job(number)`` next; the job that runs now is told to stop, those that wait never start."""
        with self.lock:
            self.cancel()
            self.unfinished += 1
            threading.Thread(target=self._work, args=(self.latest, job), daemon=True).start()

    def check(self, number: int) -> None:
        """Raise Superseded if a later request than this job, or a cancellation, has come."""
        if number != self.latest:
            raise Superseded

    def publish(self, number: int, show: Callable[[], None]) -> None:
        """Call ``show`` for a job that is still wanted, else raise Superseded; no request can come in
        between."""
        with self.lock:
            self.check(number)
            show()

    def cancel(self) -> bool:
        """Stop what runs and forget what waits; whether there was anything."""
        with self.lock:
            self.latest += 1
            return self.unfinished > 0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs and nothing waits; False if that took longer than ``timeout`` seconds."""
        with self.lock:
            return self.lock.wait_for(lambda: not self.unfinished, timeout)

    def _work(self, number: int, job: Callable[[int], None]) -> None:
        try:
            with suppress(Superseded), self._turn:
                self.check(number)
                job(number)
        except Exception as error:  # whatever a model or an attack raises: a person reads it as a sentence
            with suppress(Superseded):
                self.publish(number, partial(self._on_error, error))
        finally:
            with self.lock:
                self.unfinished -= 1
                if not self.unfinished:
                    self._on_idle()
                self.lock.notify_all()


class Explorer(anywidget.AnyWidget):
    """The explorer of some defences on some images. Made and shown by ``explore``.

    Attributes:
        values: what the controls say, by name (``controls.CONTROLS``).
        view: what is on screen; None before the first picture and after a problem. It is current where
            ``view.values == values`` and ``view.done``.
        worker: computes, in a thread of its own; ``worker.wait()`` waits for it.
    """

    _esm = FOLDER / "explorer.js"
    _css = FOLDER / "explorer.css"
    state = traitlets.Dict().tag(sync=True)  # the controls now, and the last wish that was heard
    shown = traitlets.Dict().tag(sync=True)  # pictures and charts, or a problem
    status = traitlets.Dict({"text": "", "busy": False}).tag(sync=True)  # a sentence, progress, busy or not

    def __init__(
        self, scene: attack.Scene, values: dict[str, Any], *, notebook: Mapping[str, Any], folder: Path
    ) -> None:
        self.scene, self.values, self.start = scene, values, values
        self.notebook, self.folder = dict(notebook), folder
        self.view: compute.View | None = None
        self.curves: list[list] = []
        self.worker = Worker(self._show_problem, lambda: self._say(busy=False))
        self._heard, self._reported = 0, 0.0
        super().__init__()
        self._mirror()
        self.on_msg(lambda _widget, wish, _buffers: self.handle(wish))

    # wishes

    def __repr__(self) -> str:
        """What a page without a kernel shows in its place."""
        return "The interactive explorer: it opens in JupyterLab (make lab)"

    def handle(self, wish: Mapping[str, Any]) -> None:
        """Do what the page asks for: ``{"do": NAME, "number": N, ...arguments}``; a sentence is shown for
        what cannot be done."""
        actions = {
            "set": self.set,
            "move": lambda by, label: self.set({"image": self._others(label)[0 if by > 0 else -1]}),
            "compute": self.refresh,
            "cancel": self.cancel,
            "curve": lambda: self._start(self._compute_curves),
            "draw": self.draw,
            "label": self.relabel,
            "yaml": lambda text: self.set({"shown_step": None, **controls.from_yaml(text)}),
            "save": self.save,
        }
        arguments = {name: value for name, value in wish.items() if name not in ("do", "number")}
        with self.worker.lock:
            self._heard = max(self._heard, wish.get("number", 0))
            try:
                actions[wish["do"]](**arguments)
            except (ValueError, OSError) as error:
                self._say(text=page.sentence_of(error))
            self._mirror()

    def set(self, values: Mapping[str, Any], dragging: bool = False) -> None:
        """Change some values and compute; while a slider is dragged first what can be had at once.

        Raises:
            ValueError: for a value that is not allowed; nothing is changed then.
        """
        self.values = controls.changed(self.values, values, self.scene, self.start)
        if not {"eps", "shown_step", "sample"}.issuperset(values):  # on these no curve over eps depends
            self.curves = []
        view, step = self.view, {"shown_step": self.values["shown_step"]}
        if view is not None and view.complete and view.values | step == self.values:
            self.worker.cancel()
            self._show(view._replace(values=self.values))
        else:
            self.refresh(preview=dragging)

    def refresh(self, *, preview: bool = False) -> None:
        """Ask the worker for what the values show, in place of everything asked for before."""
        self._start(lambda number: self._compute(number, preview))

    def cancel(self) -> None:
        """Stop what is being computed."""
        if self.worker.cancel():
            self._say(
                text="Cancelled: what is dimmed is of earlier values, what is missing was not computed.",
                busy=False,
            )

    def draw(self, png: str) -> None:
        """Take a picture of one's own (a data URL), fitted to the size of the images; its class is what the
        first defence says until another is chosen.

        Raises:
            ValueError: where it is no picture.
        """
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(png.split(",")[-1]))).convert("RGB")
        except OSError as error:
            raise ValueError("this file is no picture that can be read: give a PNG or JPEG") from error
        channels, height, width = self.scene.images.shape[1:]
        image = pil_to_tensor(ImageOps.fit(picture, (width, height))).float() / 255
        if (self.scene.images == self.scene.images[:, :1]).all():  # as grey as the others
            image = image.mean(dim=0, keepdim=True).expand(channels, -1, -1)
        defence = self.scene.defence(self.values["rows"][0], self.values)
        logits = decisions.sample_logits(defence, image[None].to(attack.device_of(defence)))[0].cpu()
        self.scene.images = torch.cat([self.scene.images, image[None]])
        self.scene.labels = torch.cat([self.scene.labels, logits.argmax(dim=1)])
        self.set({"image": len(self.scene.labels) - 1})

    def relabel(self, label: int) -> None:
        """Say which class one's own image is of."""
        self.scene.labels[self.values["image"]], self.curves = label, []
        self.values = controls.changed(self.values, {}, self.scene, self.start)
        self.refresh()

    def save(self, kinds: Iterable[str] = ("png", "pdf", "yaml")) -> None:
        """Write what is on screen, or the attack step by step as an animation (``gif``); the status has links
        to the files.

        Raises:
            ValueError: before the picture is finished.
            OSError: if they cannot be written.
        """
        view, links = self.view, []
        if view is None or not view.complete:
            raise ValueError("there is no finished picture yet")
        text = controls.to_yaml(view.values, self.notebook)
        name = view.values["attack"].replace(":", "-")
        self._say(text=f"Writing into {self.folder} \N{HORIZONTAL ELLIPSIS}")
        for kind in kinds:
            steps = self.shown["steps"] if kind == "gif" else [view.values["shown_step"]]
            frames = [page.sheet(view._replace(values=view.values | {"shown_step": step})) for step in steps]
            content = text.encode() if kind == "yaml" else page.encoded(frames, kind)
            path = self.folder / f"image{view.values['image']}-{name}-{hashing.json_hash(text)[:8]}.{kind}"
            files.write_atomically(path, lambda part, content=content: part.write_bytes(content))
            links.append({"name": path.name, "href": f"data:;base64,{base64.b64encode(content).decode()}"})
        self._say(text=f"Saved in {self.folder}:", links=links)

    def _others(self, label: int) -> list[int]:
        """The other images of a class (-1: of any), from the one after this on and round to the one before;
        this one where there is no other."""
        now, count = self.values["image"], len(self.scene.labels)
        order = ((now + by) % count for by in range(1, count))
        return [number for number in order if label in (-1, self.scene.labels[number])] or [now]

    # the worker's thread

    def _start(self, job: Callable[[int], None]) -> None:
        self._mirror()
        self._say(busy=True)
        self.worker.submit(job)

    def _compute(self, number: int, preview: bool) -> None:
        for view in compute.views(self.scene, self.values, partial(self._report, number), preview=preview):
            self.worker.publish(number, partial(self._show, view))

    def _compute_curves(self, number: int) -> None:
        points = [
            [name, *point]
            for name in self.values["rows"]
            for point in attack.robust_curve(self.scene, self.values, name, partial(self._report, number))
        ]
        self.worker.publish(number, partial(self._show_curves, points))

    def _report(self, number: int, what: str, done: int, total: int, *_: Any) -> None:
        self.worker.check(number)
        if monotonic() - self._reported > PROGRESS_SECONDS:
            self._reported = monotonic()
            line = f"{what}: {done} of {total} \N{HORIZONTAL ELLIPSIS}" if total else what
            self.worker.publish(number, lambda: self._say(text=line, done=done, total=total))

    # the page

    def _show(self, view: compute.View) -> None:
        self.view = view
        self.shown = {
            **page.content(view, self.curves),
            "yaml": controls.to_yaml(view.values, self.notebook) if view.done else "",
        }
        self._mirror()
        self._say(text=f"{'Preview: ' if view.preview else ''}{page.caption(view)}; {view.seconds:.2f} s")

    def _show_curves(self, points: list[list]) -> None:
        self.curves = points
        self.shown = self.shown | {"curve": page.curve_chart(self.curves, self.values)}
        self._say(text="Accuracy over \N{GREEK SMALL LETTER EPSILON}: choose a point to see it.")

    def _show_problem(self, error: Exception) -> None:
        self.view = None
        self.shown = {"problem": page.sentence_of(error)}
        self._say(text="This cannot be shown.")

    def _say(self, **facts: Any) -> None:
        """Show a text, progress, links, or whether it is busy; a text stays until there is another."""
        self.status = {**self.status, "done": 0, "total": 0, "links": [], **facts}

    def _mirror(self) -> None:
        """Tell the page what the controls are."""
        self.state = {
            "heard": self._heard,
            "stale": self.view is not None and self.view.values != self.values,
            "controls": controls.described(self.values, self.scene),
            "own": self.values["image"] >= self.scene.num_initial,
            "label": int(self.scene.labels[self.values["image"]]),
            "classes": self.scene.classes,
            "name": self.model_id,
            "defences": list(self.scene.defences),
            "start": self.start,
            "presets": controls.PRESETS,
        }
