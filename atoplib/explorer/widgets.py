"""The explorer in a notebook: controls, pictures, and the thread between them.

The knobs (``self.knobs``) are the truth; controls mirror them. A control's change makes new knobs and a request to the
worker, which computes and shows; what belongs to other knobs than the present ones is dimmed until then.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from torch import nn

from atoplib.attacks import NORMS
from atoplib.checkpoints import write_atomically
from atoplib.data import Dataset
from atoplib.drawing import save_figure
from atoplib.explorer import compute, page
from atoplib.explorer.knobs import (
    L2_OF_LINF,
    MAX_DRAWS,
    MAX_EOT,
    MAX_MASKS,
    MAX_QUERIES,
    MAX_STEPS,
    NO_ATTACK,
    USUAL_FLOW,
    Knobs,
    from_yaml,
    presets,
    to_yaml,
)
from atoplib.explorer.still import figure_bundle, still
from atoplib.explorer.suite import ATTACKS, AttackEntry, title
from atoplib.explorer.worker import Ticket, Worker
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings

PROGRESS_SECONDS = 0.1  # between two movements of the progress bar
ALL = -1  # the class filter that lets every class pass
NO_CURVE = '<div class="atop"><p class="atop-panel-title">Robust accuracy over eps</p><p class="atop-faint">{}</p></div>'
ON_DEMAND = f"Computed on demand: this attack, on {compute.CURVE_IMAGES} images from this one on."
LABEL = {"description_width": "104px"}
WIDE = {"width": "auto", "min_width": "0"}
COPY = """<button class="jupyter-button lm-Widget" style="width:100%%" title="the YAML below" data-yaml="%s"
onclick="const y=this.dataset.yaml, b=this, done=()=>{b.textContent='Copied';
setTimeout(()=>b.textContent='Copy as papermill parameters',1500)};
if(navigator.clipboard){navigator.clipboard.writeText(y).then(done)}else{const t=document.createElement('textarea');
t.value=y;document.body.append(t);t.select();document.execCommand('copy');t.remove();done()}"
>Copy as papermill parameters</button>"""


class Explorer:
    """Controls and pictures of one explorer, as a widget in ``panel``. Made and shown by ``explore``.

    Attributes:
        knobs: what the controls say.
        view: what is on screen; None before the first picture and after a problem. It is current where
            ``view.knobs == knobs`` and ``view.adapted``.
        worker: computes, in a thread of its own; ``worker.wait()`` waits for it.
        name: of this explorer, unique on the page.
    """

    def __init__(self, scene: compute.Scene, knobs: Knobs, *, notebook: Mapping[str, Any], folder: Path) -> None:
        self.scene = scene
        self.knobs = self.start = knobs
        self.view: compute.View | None = None
        self.memory = compute.Memory()
        self.notebook = dict(notebook)
        self.folder = folder
        self.name = uuid.uuid4().hex[:8]
        self.worker = Worker(self._show_problem, self._show_idle)
        self.saver = Worker(lambda error: self._say(page.sentence_of(error)), lambda: None)
        self._mirroring: int | None = None  # the thread that sets the controls: what they then report is no wish
        self._class = ALL
        self._last_progress = 0.0
        self._make_controls()
        self._make_outputs()
        self.panel = self._lay_out()
        self._mirror()

    def request(self, **changes: Any) -> None:
        """Change some knobs and compute; a sentence is shown for a value that is not allowed."""
        with self.worker.lock:
            try:
                self.knobs = replace(self.knobs, **changes)
            except ValueError as error:
                self._mirror()
                self._say(str(error))
                return
            self.refresh()

    def refresh(self, *, curve: bool = False, search: bool = False) -> None:
        """Ask the worker for what the knobs show, in place of everything asked for before.

        Args:
            curve: robust accuracy over eps, too.
            search: first go to the next image that the defence misreads.
        """
        with self.worker.lock:
            self._mirror()
            self._set_stale(True)
            self.curve.value = NO_CURVE.format(ON_DEMAND)
            self.cancel_button.disabled, self.compute_button.disabled = False, True
            self.worker.submit(lambda ticket: self._work(ticket, curve=curve, search=search))

    def cancel(self) -> None:
        """Stop what is being computed."""
        with self.worker.lock:
            if self.worker.cancel():
                current = self.view is not None and self.view.knobs == self.knobs and self.view.adapted
                self._set_stale(not current)
                self._say("Cancelled." if current else "Cancelled: the dimmed pictures are those of earlier knobs.")
                self.cancel_button.disabled, self.compute_button.disabled = True, False
                self.progress.layout.visibility = "hidden"

    def load(self, text: str) -> None:
        """Set the knobs from a YAML text; a sentence is shown if it cannot be."""
        try:
            knobs = from_yaml(text, self.knobs)
            self.scene.check(knobs)
        except ValueError as error:
            self._say(str(error))
            return
        with self.worker.lock:
            self.knobs, self._class = knobs, ALL
            self.refresh()

    def save(self) -> None:
        """Write what is on screen as PNG, PDF and YAML, in the background; the status says where."""
        view = self.view
        if view is None or not view.adapted:
            self._say("There is no picture to save yet.")
            return
        self._say("Saving ...")

        def write(ticket: Ticket) -> None:
            saved = save_view(view, self.notebook, self.folder)
            ticket.publish(lambda: self._say(f"Saved {saved}"))

        self.saver.submit(write)

    # the worker's thread

    def _work(self, ticket: Ticket, *, curve: bool, search: bool) -> None:
        def report(what: str, done: int, total: int) -> None:
            ticket.check()
            if time.monotonic() - self._last_progress > PROGRESS_SECONDS:
                self._last_progress = time.monotonic()
                ticket.publish(lambda: self._show_progress(what, done, total))

        self._last_progress = time.monotonic()
        missed = ""
        if search:
            indices = self._indices()
            place = indices.index(self.knobs.image) if self.knobs.image in indices else -1
            others = torch.tensor(indices[place + 1 :] + indices[: max(0, place)], dtype=torch.int64)
            found = compute.next_misclassified(self.knobs, self.scene, self.memory, others, report)
            if found is None:
                missed = " No other image is misread in a single draw."
            else:
                ticket.publish(lambda: self._go_to(found))
        for view in compute.views(self.knobs, self.scene, self.memory, report):
            ticket.publish(lambda view=view: self._show(view, missed))
        if curve:
            self._last_progress = time.monotonic()
            result = compute.robust_curve(self.knobs, self.scene, self.memory, report)
            ticket.publish(lambda: self._show_curve(result))

    def _go_to(self, image: int) -> None:
        self.knobs = replace(self.knobs, image=image, shown_step=None)
        self._mirror()

    def _show_progress(self, what: str, done: int, total: int) -> None:
        self.progress.max, self.progress.value = max(1, total), done if total else 1
        self.progress.layout.visibility = "visible"
        self._say(f"{what.capitalize()}: {f'{done} of {total}' if total else f'{done} forward passes'} ...")

    def _show(self, view: compute.View, remark: str = "") -> None:
        self.view = view
        self.pictures.value, self.votes.value, self.path.value = page.pictures(view), page.votes(view), page.path(view)
        self._mirror(view)
        self._set_stale(False)
        if view.adapted:
            text = to_yaml(view.knobs, self.notebook, max_batch=view.max_batch)
            self.yaml.value, self.copy.value = text, COPY % escape(text)
            self._say(f"{self._summary(view)}{remark}")
        else:
            self._say("A preview: the attack is being made anew for this transform ...")

    def _show_curve(self, result: compute.RobustCurve) -> None:
        self.curve.value = page.curve(result)
        self._say(self._summary(self.view))

    @staticmethod
    def _summary(view: compute.View) -> str:
        return f"{page.defence_text(view)}; {page.attack_text(view)}; {view.seconds:.2f} s."

    def _show_problem(self, error: Exception) -> None:
        self.view = None
        self.pictures.value, self.votes.value, self.path.value = page.problem(page.sentence_of(error)), "", ""
        self.copy.value = ""
        self._set_stale(False)
        self._say("This cannot be shown; see below.")

    def _show_idle(self) -> None:
        self.progress.layout.visibility = "hidden"
        self.cancel_button.disabled = True
        self.compute_button.disabled = False

    def _set_stale(self, stale: bool) -> None:
        if stale:
            self.shown.add_class("atop-stale")
        else:
            self.shown.remove_class("atop-stale")

    def _say(self, text: str) -> None:
        self.status.value = f'<div class="atop" role="status" aria-live="polite">{escape(text)}</div>'

    # controls

    def _make_controls(self) -> None:
        knobs, scene = self.knobs, self.scene
        sees = [(name, value) for value, name in page.SEES_NAMES.items()]
        transforms = [
            ("none", "none"),
            ("RT1: patches", "rt1"),
            ("RT2: noise, patches", "rt2"),
            ("RT3: noise, masks", "rt3"),
        ]
        self.controls: dict[str, widgets.ValueWidget] = {
            "dataset": self._dropdown("data set", list(scene.datasets), knobs.dataset, "whose test images are shown"),
            "defence": self._dropdown("defence", list(scene.defences), knobs.defence, "what is attacked"),
            "attack": self._dropdown(
                "attack",
                [("none", NO_ATTACK), *((title(name), name) for name in scene.attacks)],
                knobs.attack,
                "how the adversarial image is made",
            ),
            "attack_sees": self._dropdown(
                "attack sees",
                sees,
                knobs.attack_sees,
                "BPDA: the identity as the purifier's gradient. The classifier alone: a transfer attack, which flatters",
            ),
            "norm": self._dropdown("norm", self._norms(knobs), knobs.norm, "what eps is a radius of"),
            "eps": self._float("eps", 0, 1, 0.01, 0, "radius of the ball"),
            "steps": self._int("steps", 1, max(100, knobs.steps), knobs.steps, "iterations, of the default step size"),
            "eot_samples": self._int("EOT draws", 1, 50, knobs.eot_samples, "draws that each gradient is averaged over"),
            "queries": self._int("queries", 1, 2000, knobs.queries, "forward passes of a black-box attack"),
            "transform": self._dropdown("transform", transforms, knobs.transform, "what destroys the perturbation"),
            "missing_rate": self._int("missing (%)", 0, 95, 0, "share of the patches that are dropped"),
            "noise_std": self._float("noise std (of 1)", 0, 1, 0.01, knobs.noise_std, "of images in [0, 1]"),
            "num_masks": self._int("masks", 2, 16, knobs.num_masks, "RT3: each misses one patch in so many"),
            "num_draws": self._int("votes (draws)", 1, 50, knobs.num_draws, "forward passes of the vote"),
            "seed": widgets.BoundedIntText(
                value=knobs.seed,
                min=0,
                max=2**31 - 1,
                description="seed",
                tooltip="of attack and dice",
                style=LABEL,
                layout=WIDE,
            ),
            "shown_step": self._int("shown step", 0, 1, 1, "the pictures show the attack after so many steps"),
        }
        self.class_filter = self._dropdown("class", [("all", ALL)], ALL, "show only images of one class")
        self.image = self._int("image", 0, 1, 0, "place among the images of the class")
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._turned(name, change["new"]), "value")
        self.class_filter.observe(lambda change: self._filtered(change["new"]), "value")
        self.image.observe(lambda change: self._moved(change["new"]), "value")

        def button(text: str, tooltip: str, press: Callable[[], None]) -> widgets.Button:
            made = widgets.Button(description=text, tooltip=tooltip, layout=widgets.Layout(width="auto", flex="1 1 auto"))
            made.on_click(lambda _: press())
            return made

        self.previous_button = button("Previous", "the image before", lambda: self._step_image(-1))
        self.next_button = button("Next", "the next image", lambda: self._step_image(1))
        self.search_button = button(
            "Next misread", "the next image that the defence misreads without an attack", lambda: self.refresh(search=True)
        )
        self.again_button = button(
            "Draw again", "other dice, the same attack", lambda: self.request(draw=self.knobs.draw + 1)
        )
        self.preset_buttons = [
            button(title, tooltip, lambda name=name: self._preset(name))
            for name, title, tooltip in (
                ("clean", "Clean", "no attack"),
                ("paper", "Paper", "PGD-20 on the classifier alone: what the published code logs"),
                ("strict", "Strict", "PGD-200 with 20 draws a gradient, through the whole pipeline: takes its time"),
                ("reset", "Reset", "all knobs as they were at the start"),
            )
        ]
        self.compute_button = button("Compute", "once more, as after a cancellation", self.refresh)
        self.cancel_button = button("Cancel", "stop what is being computed", self.cancel)
        self.curve_button = button("Robust accuracy over eps", ON_DEMAND, lambda: self.refresh(curve=True))
        self.save_button = button("Save figure", f"PNG, PDF and YAML, to {self.folder}", self.save)
        self.load_button = button(
            "Set knobs from YAML", "from the text below, edited or pasted", lambda: self.load(self.yaml.value)
        )
        self.upload = widgets.FileUpload(
            accept=".yaml,.yml",
            description="Load a YAML file",
            tooltip="sets the knobs",
            layout=widgets.Layout(width="auto"),
        )
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")

    @staticmethod
    def _dropdown(text: str, options: list, value: Any, tooltip: str) -> widgets.Dropdown:
        return widgets.Dropdown(
            options=options,
            value=value,
            description=text,
            tooltip=tooltip,
            style=LABEL,
            layout=WIDE,
        )

    @staticmethod
    def _int(text: str, low: int, high: int, value: int, tooltip: str) -> widgets.IntSlider:
        return widgets.IntSlider(
            value=value,
            min=low,
            max=max(high, value),
            description=text,
            tooltip=tooltip,
            continuous_update=False,
            style=LABEL,
            layout=WIDE,
        )

    @staticmethod
    def _float(text: str, low: float, high: float, step: float, value: float, tooltip: str) -> widgets.FloatSlider:
        return widgets.FloatSlider(
            value=value,
            min=low,
            max=max(high, value),
            step=step,
            description=text,
            tooltip=tooltip,
            continuous_update=False,
            readout_format=".2f",
            style=LABEL,
            layout=WIDE,
        )

    def _turned(self, name: str, value: Any) -> None:
        """A person has turned a control."""
        if self._mirroring == threading.get_ident():
            return
        changes = {name: value}
        if name == "eps":
            changes = {"eps": value / 255 if self.knobs.norm == "linf" else value}
        elif name == "missing_rate":
            changes = {"missing_rate": value / 100}
        elif name == "norm":
            eps = self.knobs.eps * L2_OF_LINF if value == "l2" else min(1.0, self.knobs.eps / L2_OF_LINF)
            changes = {"norm": value, "eps": eps}
        elif name == "attack" and self.knobs.norm not in self._norms_of(value):
            changes |= self._usual_radius(self._norms_of(value)[0])
        elif name == "dataset":
            self._class, changes = ALL, {"dataset": value, "image": 0}
        elif name == "shown_step" and value == self.controls[name].max:
            changes = {"shown_step": None}
        if name not in ("shown_step", "transform", "missing_rate", "noise_std", "num_masks", "num_draws"):
            changes["shown_step"] = None
        self.request(**changes)

    def _norms_of(self, attack: str) -> tuple[str, ...]:
        return NORMS if attack == NO_ATTACK else self.scene.attacks[attack].norms

    def _norms(self, knobs: Knobs) -> list[tuple[str, str]]:
        """The options of the norm, by what the attack knows."""
        names = self._norms_of(knobs.attack)
        return [(page.NORM_NAMES[name], name) for name in (names if knobs.norm in names else (*names, knobs.norm))]

    def _usual_radius(self, norm: str) -> dict[str, Any]:
        """The norm and the radius to begin with there: that of the start, or what is usual."""
        if self.start.norm == norm:
            return {"norm": norm, "eps": self.start.eps}
        return {"norm": norm, "eps": {"linf": 8 / 255, "l2": 0.5, "flow": USUAL_FLOW}[norm]}

    def _filtered(self, label: int) -> None:
        if self._mirroring != threading.get_ident():
            self._class = label
            indices = self._indices()
            image = self.knobs.image if self.knobs.image in indices else (indices or [self.knobs.image])[0]
            self.request(image=image, shown_step=None)

    def _moved(self, place: int) -> None:
        if self._mirroring != threading.get_ident():
            self.request(image=self._indices()[place], shown_step=None)

    def _step_image(self, step: int) -> None:
        self.image.value = (self.image.value + step) % (self.image.max + 1)

    def _preset(self, name: str) -> None:
        with self.worker.lock:
            start = replace(self.start, dataset=self.knobs.dataset, image=self.knobs.image, defence=self.knobs.defence)
            self.knobs = self.start if name == "reset" else presets(start)[name]
            self._class = ALL if name == "reset" else self._class
            self.refresh()

    def _uploaded(self, files: tuple) -> None:
        if not files:
            return
        try:
            text = bytes(files[0]["content"]).decode()
        except UnicodeDecodeError:
            self._say(f"{files[0]['name']} is no text file: give a YAML file.")
            return
        self.upload.value = ()
        self.load(text)

    def _indices(self) -> list[int]:
        """The test images that pass the class filter."""
        labels = self.scene.datasets[self.knobs.dataset].test.labels
        if self._class == ALL:
            return list(range(len(labels)))
        return (labels == self._class).nonzero()[:, 0].tolist()

    @contextmanager
    def _as_mirror(self):
        before, self._mirroring = self._mirroring, threading.get_ident()
        try:
            yield
        finally:
            self._mirroring = before

    def _mirror(self, view: compute.View | None = None) -> None:
        """Set the controls to what the knobs say, and disable those that do not apply.

        With a ``view``, which comes from the worker's thread, values stay as they are: somebody may be moving a slider whose newer
        value still waits for the lock, and to set the older one would undo a key press.
        """
        knobs = self.knobs
        with self.worker.lock, self._as_mirror():
            radius = 255 * knobs.eps if knobs.norm == "linf" else knobs.eps
            usual = self.start.eps / L2_OF_LINF if self.start.norm == "l2" else self.start.eps
            usual = max(usual, 1 / 255)
            unit, step, shown, highest = {
                "linf": ("1/255", 0.5, ".1f", min(255.0, max(32.0, 4 * 255 * usual))),
                "l2": ("l2", 0.01, ".2f", max(2.0, 4 * usual * L2_OF_LINF)),
                "flow": ("flow", 0.005, ".3f", 4 * USUAL_FLOW),
            }[knobs.norm]
            eps = self.controls["eps"]
            eps.description, eps.step, eps.readout_format = f"eps ({unit})", step, shown
            eps.max = max(highest, radius)
            if view is None:
                eps.value = radius
            if self.controls["norm"].options != tuple(self._norms(knobs)):
                self.controls["norm"].options = self._norms(knobs)
            ceilings = {
                "steps": MAX_STEPS,
                "eot_samples": MAX_EOT,
                "queries": MAX_QUERIES,
                "num_draws": MAX_DRAWS,
                "num_masks": MAX_MASKS,
            }
            for name, highest in ceilings.items():
                self.controls[name].max = min(highest, max(self.controls[name].max, getattr(knobs, name)))
            values = {
                name: getattr(knobs, name) for name in self.controls if name not in ("eps", "missing_rate", "shown_step")
            }
            values["missing_rate"] = round(100 * knobs.missing_rate)
            if view is None:
                for name, value in values.items():
                    self.controls[name].value = value
            dataset = self.scene.datasets[knobs.dataset]
            options = [("all", ALL), *((name, number) for number, name in enumerate(dataset.classes))]
            if self.class_filter.options != tuple(options):
                self.class_filter.options = options
            self.class_filter.value = self._class
            indices = self._indices()
            self.image.max = max(0, len(indices) - 1)
            self.image.disabled = len(indices) < 2
            self.image.value = indices.index(knobs.image) if knobs.image in indices else 0
            step = self.controls["shown_step"]
            if view is not None:
                step.max = max(1, view.path_steps[-1])
                if knobs.shown_step is None:
                    step.value = step.max
            used = view.used if view is not None else compute.used_knobs(knobs, self.scene, self.memory)
            if used is not None:
                for name, control in self.controls.items():
                    control.disabled = name not in used
                self.again_button.disabled = "draw" not in used
                self.curve_button.disabled = not knobs.attacks

    # layout

    def _make_outputs(self) -> None:
        self.pictures, self.votes, self.path = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.curve = widgets.HTML(NO_CURVE.format(ON_DEMAND))
        self.status = widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0"))
        self.progress = widgets.IntProgress(0, 0, 1, layout=widgets.Layout(width="160px", visibility="hidden"))
        self.copy = widgets.HTML(layout=widgets.Layout(flex="1 1 auto"))
        self.yaml = widgets.Textarea(
            rows=8, layout=widgets.Layout(width="auto"), tooltip="parameters of 04_attack that reproduce what is on screen"
        )
        self.yaml.add_class("atop-yaml")

    def _lay_out(self) -> widgets.VBox:
        c = self.controls
        row = widgets.Layout(flex_flow="row wrap", align_items="center")

        def column(title: str, *children: widgets.Widget) -> widgets.VBox:
            heading = widgets.HTML(f'<div class="atop"><p class="atop-panel-title">{title}</p></div>')
            return widgets.VBox([heading, *children], layout=widgets.Layout(min_width="0"))

        steering = widgets.HBox([self.previous_button, self.next_button, self.search_button])
        attack = [c[name] for name in ("attack", "attack_sees", "norm", "eps", "steps", "eot_samples", "queries")]
        transform = (c["transform"], c["missing_rate"], c["noise_std"], c["num_masks"], c["num_draws"])
        controls = widgets.GridBox(
            [
                column("Image and defence", c["dataset"], c["defence"], self.class_filter, self.image, steering),
                column("Attack", *attack),
                column("Random transform and vote", *transform, c["seed"]),
            ],
            layout=widgets.Layout(grid_template_columns="repeat(auto-fit, minmax(260px, 1fr))", grid_gap="0 16px"),
        )
        controls.add_class("atop-controls")
        bar = widgets.HBox([*self.preset_buttons, self.compute_button, self.cancel_button], layout=row)
        state = widgets.HBox([self.status, self.progress], layout=widgets.Layout(align_items="center"))
        charts = widgets.GridBox(
            [
                widgets.VBox([self.votes, widgets.HBox([self.again_button])]),
                widgets.VBox([self.path, c["shown_step"]]),
                widgets.VBox([self.curve, widgets.HBox([self.curve_button])]),
            ],
            layout=widgets.Layout(
                grid_template_columns="2fr 3fr 3fr", grid_gap="0 20px", margin="12px 0 0", align_items="flex-start"
            ),
        )
        self.shown = widgets.VBox([self.pictures, charts])
        self.shown.add_class("atop-pictures")
        keep = widgets.HBox([self.copy, self.save_button, self.load_button, self.upload], layout=row)
        style = widgets.HTML(page.STYLE + f"<style>.atop-still-{self.name} {{ display: none }}</style>")
        parts = [style, controls, bar, state, self.shown, keep, self.yaml]
        return widgets.VBox(parts, layout=widgets.Layout(overflow="hidden"))


def save_view(view: compute.View, notebook: Mapping[str, Any], folder: Path) -> str:
    """Write a view as PNG, PDF and YAML, named by what it shows; returns the path of the files without their endings."""
    text = to_yaml(view.knobs, notebook, max_batch=view.max_batch)
    knobs = view.knobs
    words = (knobs.dataset, str(knobs.image), knobs.defence, knobs.attack, sha256(text.encode()).hexdigest()[:8])
    name = "-".join("".join(letter if letter.isalnum() else "_" for letter in word) for word in words)
    figure = still(view)
    for ending in ("png", "pdf"):
        save_figure(figure, folder / f"{name}.{ending}")
    write_atomically(folder / f"{name}.yaml", lambda part: part.write_text(text))
    return f"{folder / name}.png, .pdf and .yaml"


def explore(
    defences: nn.Module | Mapping[str, compute.Defence],
    datasets: Dataset | Mapping[str, Dataset],
    *,
    attacks: Mapping[str, AttackEntry] = ATTACKS,
    notebook: Mapping[str, Any] | None = None,
    folder: Path | str = "explored",
    **start: Any,
) -> None:
    """Show the explorer in a notebook: pick an image, an attack and a transform, and see what happens to the decision.

    The first picture is computed before the call returns, and stays in the saved notebook as a still.

    Args:
        defences: modules in eval mode, images in [0, 1] -> logits, by name (or a single one), on any device. One that is an
            ``AToPPipeline`` gets the transform's knobs; it is not changed itself. A function without arguments is called
            when its defence is first picked, and must return the module.
        datasets: whose test images are shown.
        attacks: by name; see ``suite.ATTACKS``.
        notebook: parameters of the notebook that explores, handed on to ``04_attack`` in the YAML.
        folder: where "Save figure" writes.
        **start: knobs at the start, fields of ``Knobs``; the others as trained, or at their defaults.

    Raises:
        ValueError: without a defence, a data set or a test image, for names and values of ``start`` that are not allowed.
    """
    explorer = make_explorer(defences, datasets, attacks=attacks, notebook=notebook, folder=folder, **start)
    explorer.refresh()
    try:
        explorer.worker.wait()
    except KeyboardInterrupt:
        explorer.cancel()
    if explorer.view is not None:
        bundle = still_bundle(explorer.view, explorer.name)
    else:
        bundle = {"text/html": f'<div class="atop-still-{explorer.name}">{explorer.pictures.value}</div>'}
    display(explorer.panel)  # last of all: as long as the cell runs, no control would be heard
    display(bundle, raw=True)


def make_explorer(
    defences: nn.Module | Mapping[str, compute.Defence],
    datasets: Dataset | Mapping[str, Dataset],
    *,
    attacks: Mapping[str, AttackEntry] = ATTACKS,
    notebook: Mapping[str, Any] | None = None,
    folder: Path | str = "explored",
    **start: Any,
) -> Explorer:
    """The explorer, not shown and nothing computed yet. Arguments and errors as ``explore``."""
    if isinstance(defences, nn.Module):
        defences = {"defence": defences}
    if isinstance(datasets, Dataset):
        datasets = {datasets.name: datasets}
    if not defences or not datasets:
        raise ValueError("there is nothing to explore: give at least one defence and one data set")
    for name, dataset in datasets.items():
        if not len(dataset.test.labels):
            raise ValueError(f"the data set {name!r} has no test images: leave it out, or raise max_test")
    scene = compute.Scene(dict(datasets), dict(defences), dict(attacks))
    pipelines = (module for module in defences.values() if isinstance(module, AToPPipeline))
    trained = next(pipelines, None)
    transform = TransformSettings() if trained is None else trained.transform
    values = {
        "dataset": next(iter(datasets)),
        "defence": next(iter(defences)),
        "transform": transform.name,
        "missing_rate": transform.missing_rate,
        "noise_std": transform.noise_std,
        "num_masks": transform.num_masks,
    }
    try:
        knobs = Knobs(**{**values, **start})
    except TypeError as error:
        raise ValueError(f"explore has no such knob: {error}") from error
    scene.check(knobs)
    return Explorer(scene, knobs, notebook=notebook or {}, folder=Path(folder))


def still_bundle(view: compute.View, name: str) -> dict[str, str]:
    """The still as ``figure_bundle`` has it."""
    return figure_bundle(still(view), name, f"{page.defence_text(view)}; {page.attack_text(view)}")
