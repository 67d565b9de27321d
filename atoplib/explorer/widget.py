"""The explorer in a notebook: one widget, whose page (``explorer.js``) sends wishes and shows what comes
back.

The values (``Explorer.values``) are the truth. The page numbers its wishes; with every answer it gets the
number of the
last one that was heard, and takes over values only if it has not asked for others since: a finished picture
never moves a slider back that somebody is moving.
"""

import base64
import io
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import anywidget
import traitlets
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from atoplib.decisions import sample_logits
from atoplib.explorer import page
from atoplib.explorer.attack import Curve, Scene, robust_curve
from atoplib.explorer.compute import View, next_misclassified, views
from atoplib.explorer.controls import (
    CONTROLS,
    PRESETS,
    changed,
    converted,
    described,
    from_yaml,
    more_options,
    to_yaml,
)
from atoplib.explorer.worker import Ticket, Worker
from atoplib.files import write_atomically

PROGRESS_SECONDS = 0.1  # between two movements of the progress bar
REST_SECONDS = 0.15  # a slider that is held still so long while dragged gets the whole attack
FOLDER = Path(__file__).parent


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
    layout_ = traitlets.Dict().tag(sync=True)  # what does not change: controls, presets, names
    state = traitlets.Dict().tag(
        sync=True
    )  # the controls now, and the number of the last wish that was heard
    shown = traitlets.Dict().tag(sync=True)  # HTML of the pictures and charts
    status = traitlets.Dict().tag(sync=True)  # a sentence, progress, busy or not

    def __init__(
        self, scene: Scene, values: dict[str, Any], *, notebook: Mapping[str, Any], folder: Path
    ) -> None:
        self.scene, self.values, self.start = scene, values, values
        self.notebook, self.folder, self.name = dict(notebook), folder, uuid.uuid4().hex[:8]
        self.view: View | None = None
        self.curves: list[Curve] = []
        self.worker = Worker(self._show_problem, lambda: self._say(busy=False))
        self._heard, self._reported = 0, 0.0
        self._titles = {name: attack.title for name, attack in scene.attacks.items()}
        super().__init__()
        controls = [control._asdict() | {"default": None} for control in CONTROLS.values() if control.kind]
        presets = [[name, title, text] for name, (title, text, _) in PRESETS.items()]
        self.layout_ = {
            "name": self.name,
            "controls": controls,
            "presets": presets,
            "defences": list(scene.defences),
        }
        self.status = {"text": "", "busy": False, "done": 0, "total": 0}
        self._mirror()
        self.on_msg(lambda _widget, content, buffers: self.handle(content, buffers))

    # wishes

    def handle(self, wish: Mapping[str, Any], buffers: list | None = None) -> None:
        """Do what the page asks for: ``{"do": NAME, "number": N, ...}``; a sentence is shown for what cannot
        be done."""
        actions: dict[str, Callable[..., None]] = {
            "set": lambda: self.set(wish["values"], preview=wish.get("dragging", False)),
            "preset": lambda: self.preset(wish["name"]),
            "option": lambda: self.set({"options": self._with_option(wish["name"], wish["value"])}),
            "move": lambda: self.move(wish["by"], wish["class"]),
            "search": lambda: self.refresh(search=wish["class"]),
            "resample": lambda: self.set({"sample": self.values["sample"] + 1}),
            "compute": self.refresh,
            "cancel": self.cancel,
            "curve": lambda: self.refresh(curve=True),
            "draw": lambda: self.draw(base64.b64decode(wish["png"].split(",")[-1])),
            "label": lambda: self.relabel(wish["label"]),
            "yaml": lambda: self.load(wish["text"]),
            "save": self.save,
            "gif": self.animate,
        }
        with self.worker.lock:
            self._heard = max(self._heard, wish.get("number", 0))
            try:
                actions[wish["do"]]()
            except (ValueError, OSError) as error:
                self._say(page.sentence_of(error))
            self._mirror()

    def set(self, changes: Mapping[str, Any], *, preview: bool = False) -> None:
        """Change some values and compute; with ``preview`` (a slider is being dragged) first what can be had
        at once.

        Raises:
            ValueError: for a value that is not allowed; nothing is changed then.
        """
        with self.worker.lock:
            types = {name: self.values[name] for name in changes}
            made = {name: converted(name, value, types[name]) for name, value in changes.items()}
            self.values = changed(self.values, made, self.scene, self.start)
            at_hand = self.view is not None and self.view.done and all(row.complete for row in self.view.rows)
            if at_hand and self.view.values == {**self.values, "shown_step": self.view.values["shown_step"]}:
                self.worker.cancel()
                self._show(self.view._replace(values=self.values))
            else:
                self.refresh(preview=preview)

    def refresh(self, *, preview: bool = False, curve: bool = False, search: int | None = None) -> None:
        """Ask the worker for what the values show, in place of everything asked for before.

        Args:
            curve: accuracy over eps, too.
            search: first go to the next image of this class (-1: of any) that a defence misclassifies.
        """
        with self.worker.lock:
            if not curve:
                self.curves = []
            self._mirror()
            self._say(self.status["text"], busy=True)
            self.worker.submit(lambda ticket: self._work(ticket, preview, curve, search))

    def cancel(self) -> None:
        """Stop what is being computed."""
        with self.worker.lock:
            if self.worker.cancel():
                current = self.view is not None and self.view.done and self.view.values == self.values
                self._say(
                    "Cancelled." if current else "Cancelled: the pictures are those of earlier values.",
                    busy=False,
                )

    def preset(self, name: str) -> None:
        """The values of a preset, or of the start (``reset``); image and defences stay."""
        keep = {key: self.values[key] for key in ("image", "rows")}
        changes = {**self.start, **keep} if name == "reset" else {**self.start, **keep, **PRESETS[name][2]}
        self.set({**changes, "shown_step": None})

    def move(self, by: int, label: int) -> None:
        """Go to the image before or after, among those of one class (-1: of any)."""
        numbers = self._numbers(label)
        now = self.values["image"]
        after = [n for n in numbers if n > now] if by > 0 else [n for n in reversed(numbers) if n < now]
        self.set({"image": (after or numbers[:: 1 if by > 0 else -1])[0]})

    def draw(self, content: bytes) -> None:
        """Take a picture file of one's own (or the drawing pad's), fitted to the size of the images; its
        class is what the first defence says until another is chosen.

        Raises:
            ValueError: where it is no picture.
        """
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
        except OSError as error:
            raise ValueError("this file is no picture that can be read: give a PNG or JPEG") from error
        channels, height, width = self.scene.images.shape[1:]
        image = pil_to_tensor(ImageOps.fit(picture, (width, height))).float() / 255
        image = image.mean(dim=0, keepdim=True).expand(channels, -1, -1) if self._grey else image[:channels]
        defence = self.scene.defence(self.values["rows"][0], self.values)
        label = int(sample_logits(defence, image[None])[0].argmax())
        self.set({"image": self.scene.add(image, label)})

    def relabel(self, label: int) -> None:
        """Say which class one's own image is of.

        Raises:
            ValueError: for an image that was given with its label.
        """
        if self.values["image"] < self.scene.given:
            raise ValueError("the class of this image is known; that of an image of your own can be chosen")
        self.scene.labels[self.values["image"]] = label
        self.refresh()

    def load(self, text: str) -> None:
        """Set the values from a YAML text.

        Raises:
            ValueError: if it cannot be.
        """
        self.set({"shown_step": None, **from_yaml(text, self.values)})

    def save(self) -> None:
        """Write what is on screen as PNG, PDF and YAML; the status has links to them.

        Raises:
            ValueError: before the first picture.
            OSError: if they cannot be written.
        """
        view = self._current()
        text, bitmap = to_yaml(view.values, self.notebook), page.sheet(view, self._title(view))
        stem = f"{self._stem(view)}-{sha256(text.encode()).hexdigest()[:8]}"
        files = {f"{stem}.{kind}": page.encoded([bitmap], kind) for kind in ("png", "pdf")}
        self._write({**files, f"{stem}.yaml": text.encode()})

    def animate(self) -> None:
        """Write the attack step by step as an animated GIF; the status has a link to it. Errors as
        ``save``."""
        view = self._current()
        steps = sorted({step for row in view.rows for step in row.path.steps})
        frames = [view._replace(values={**view.values, "shown_step": step}) for step in steps]
        content = page.encoded([page.sheet(frame, self._title(view)) for frame in frames], "gif")
        self._write({f"{self._stem(view)}.gif": content})

    def _stem(self, view: View) -> str:
        return f"image{view.values['image']}-{view.values['attack'].replace(':', '-')}"

    def _write(self, files: Mapping[str, bytes]) -> None:
        links = []
        for name, content in files.items():
            write_atomically(self.folder / name, lambda part, content=content: part.write_bytes(content))
            links.append({"name": name, "href": f"data:;base64,{base64.b64encode(content).decode()}"})
        self._say(f"Saved in {self.folder}:", links=links)

    # the worker's thread

    def _work(self, ticket: Ticket, preview: bool, curve: bool, search: int | None) -> None:
        report = partial(self._report, ticket)
        self._reported = monotonic()
        if search is not None:
            numbers, now = self._numbers(search), self.values["image"]
            found = next_misclassified(
                self.scene,
                self.values,
                [n for n in numbers if n > now] + [n for n in numbers if n < now],
                report,
            )
            if found is None:
                ticket.publish(lambda: self._say("No other image is misclassified without an attack."))
                return
            ticket.publish(lambda: self._go_to(found))
        for view in views(self.scene, self.values, report, preview=preview):
            ticket.publish(lambda view=view: self._show(view))
            if view.preview:
                ticket.pause(REST_SECONDS)
        for name in self.values["rows"] if curve else ():
            made = robust_curve(self.scene, self.values, name, report)
            ticket.publish(lambda made=made: self._show_curve(made))

    def _report(self, ticket: Ticket, what: str, done: int, total: int) -> None:
        ticket.check()
        if monotonic() - self._reported > PROGRESS_SECONDS:
            self._reported = monotonic()
            amount = f"{done} of {total}" if total else "running"
            line = f"{what[:1].upper()}{what[1:]}: {amount} \N{HORIZONTAL ELLIPSIS}"
            ticket.publish(lambda: self._say(line, busy=True, done=done, total=total))

    def _go_to(self, image: int) -> None:
        self.values = changed(self.values, {"image": image}, self.scene, self.start)
        self._mirror()

    # the page

    def _show(self, view: View) -> None:
        self.view = view
        shown = {
            "clean": page.clean(view),
            "grid": page.grid(view),
            "path": page.path_chart(view),
            "problem": "",
            "preview": not view.done,
        }
        if view.done:
            shown["yaml"] = to_yaml(view.values, self.notebook)
        self.shown = {**self.shown, **shown, "curve": "" if not self.curves else self.shown["curve"]}
        self._mirror()
        text = f"{page.attack_text(view, self._titles)}; {page.transform_text(view)}; {view.seconds:.2f} s"
        self._say(f"Preview: {text}" if view.preview else text)

    def _show_curve(self, curve: Curve) -> None:
        self.curves = [*(known for known in self.curves if known.name != curve.name), curve]
        made = page.curve_chart(self.curves, self.values["norm"], self.values["eps"])
        self.shown = {**self.shown, "curve": made}

    def _show_problem(self, error: Exception) -> None:
        self.view = None
        self.shown = {**self.shown, "problem": page.problem(page.sentence_of(error))}
        self._say("This cannot be shown.", busy=False)

    def _say(self, text: str | None = None, *, busy: bool | None = None, **more: Any) -> None:
        text = self.status["text"] if text is None else text
        self.status = {
            "text": text,
            "busy": self.status["busy"] if busy is None else busy,
            "done": 0,
            "total": 0,
            **more,
        }

    def _mirror(self) -> None:
        """Tell the page what the controls are."""
        rows = [row for row in (self.view.rows if self.view is not None else ()) if row is not None]
        last = max((row.path.steps[-1] for row in rows), default=1)
        self.state = {
            "heard": self._heard,
            "stale": self.view is not None and self.view.values != self.values,
            "controls": described(self.values, self.scene, last),
            "options": more_options(self.values, self.scene),
            "rows": list(self.values["rows"]),
            "own": self.values["image"] >= self.scene.given,
            "label": int(self.scene.labels[self.values["image"]]),
            "classes": list(self.scene.classes),
            "steps": sorted({step for row in rows for step in row.path.steps}),
        }

    @property
    def _grey(self) -> bool:
        images = self.scene.images[: self.scene.given]
        return bool((images == images[:, :1]).all())

    def _with_option(self, name: str, value: Any) -> dict[str, Any]:
        default = self.scene.attacks[self.values["attack"]].options[name]
        return {**self.values["options"], name: value if default is None else converted(name, value, default)}

    def _numbers(self, label: int) -> list[int]:
        if label < 0:
            return list(range(len(self.scene.labels)))
        return (self.scene.labels == label).nonzero()[:, 0].tolist() or [self.values["image"]]

    def _current(self) -> View:
        if self.view is None or not self.view.done:
            raise ValueError("there is no finished picture yet")
        return self.view

    def _title(self, view: View) -> str:
        return f"{page.attack_text(view, self._titles)}; {page.transform_text(view)}"
