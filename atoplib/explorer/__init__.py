"""The explorer: turn a knob, see the perturbation die. ``explore`` shows it in a notebook.

``controls`` says what can be set, ``attack`` and ``compute`` what it shows, ``page`` how that looks;
``widget`` and ``explorer.js`` are the two ends of the wire, ``worker`` the thread.
"""

import base64
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from IPython.display import display
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import default_eps
from atoplib.data import load_images
from atoplib.decisions import sample_logits
from atoplib.explorer import page
from atoplib.explorer.attack import Scene, device_of
from atoplib.explorer.controls import CONTROLS, check, converted
from atoplib.explorer.widget import FOLDER, Explorer
from atoplib.pipeline import AToPPipeline
from atoplib.pretrained import load_pretrained
from atoplib.transforms import Transform

__all__ = ["Explorer", "explore"]

KIT = {"undefended": "undefended", "AT": "at", "AP": "ap", "AToP": "atop"}
FIRST = 0  # of the kit's test digits: one that AToP holds and AP loses


def explore(
    model_or_defences: nn.Module | Mapping[str, nn.Module | Callable[[], nn.Module]] | None = None,
    images: Float[Tensor, "count channels height width"] | None = None,
    labels: Int[Tensor, " count"] | None = None,
    *,
    classes: tuple[str, ...] | list[str] | None = None,
    eps: float | None = None,
    norm: str = "linf",
    notebook: Mapping[str, Any] | None = None,
    folder: Path | str = "explored",
    **start: Any,
) -> None:
    """Show the explorer in a notebook: pick an image, an attack and a transform, and see what becomes of the
    decision.

    The first picture is computed before the call returns, and stays in the saved notebook as a still.

    Args:
        model_or_defences: modules in eval mode, images in [0, 1] -> logits, by name (or a single one), or
            functions that load one when it is first shown. An ``AToPPipeline`` gets the transform's controls;
            it is not changed itself. None: the kit's defences for MNIST, on its test digits.
        images, labels: in [0, 1], and their classes; labels None: what the first defence says.
        classes: their names; None: numbers.
        eps: radius at the start; None: the usual one of the norm for grey digits or for colour images.
        notebook: parameters of the notebook that explores, handed on to ``04_attack`` in the YAML.
        folder: where pictures are saved.
        **start: further values of controls at the start: image, rows, attack, threat_model, steps, transform,
            ...

    Raises:
        ValueError: without a defence or an image, for names and values of ``start`` that are not allowed.
    """
    explorer = make_explorer(
        model_or_defences,
        images,
        labels,
        classes=classes,
        eps=eps,
        norm=norm,
        notebook=notebook,
        folder=folder,
        **start,
    )
    explorer.refresh()
    try:
        explorer.worker.wait()
    except KeyboardInterrupt:
        explorer.cancel()
    display(explorer)  # last of all: as long as the cell runs, no control would be heard
    display(still(explorer), raw=True)


def make_explorer(
    model_or_defences: Any = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    classes: tuple[str, ...] | list[str] | None = None,
    eps: float | None = None,
    norm: str = "linf",
    notebook: Mapping[str, Any] | None = None,
    folder: Path | str = "explored",
    **start: Any,
) -> Explorer:
    """The explorer, not shown and nothing computed yet. Arguments and errors as ``explore``."""
    defences = model_or_defences
    if defences is None:
        defences = {name: load_pretrained("mnist", own) for name, own in KIT.items()}
        notebook = {"dataset": "mnist5k", **(notebook or {})}
        if images is None:
            images, labels = load_images("mnist5k", 200)
            start = {"image": FIRST, **start}
    if not isinstance(defences, Mapping):
        defences = {"model": defences}
    if not defences or images is None or not len(images):
        raise ValueError(
            "there is nothing to explore: give at least one defence, and images (count, channels, height, "
            "width)"
        )
    images = images.detach().float().cpu()
    scene = Scene(dict(defences), images, torch.zeros(len(images), dtype=torch.int64), tuple(classes or ()))
    first = scene.defence(next(iter(defences)))
    logits = sample_logits(first, (images if labels is None else images[:1]).to(device_of(first)))[0].cpu()
    scene.labels = (logits.argmax(dim=1) if labels is None else labels).long().cpu().clone()
    scene.classes = scene.classes or tuple(str(number) for number in range(logits.shape[1]))
    scene.dataset = "mnist" if (images == images[:, :1]).all() else "cifar10"
    pipelines = [module for module in (first, *defences.values()) if isinstance(module, AToPPipeline)]
    transform = pipelines[0].transform if pipelines else Transform()
    values = {name: control.default for name, control in CONTROLS.items()}
    values |= {
        "rows": tuple(defences),
        "norm": norm,
        "eps": default_eps(norm, scene.dataset) if eps is None else float(eps),
        "transform": transform.name,
        "missing_rate": transform.missing_rate,
        "noise_std": transform.noise_std,
        "num_masks": transform.num_masks,
    }
    if unknown := set(start) - set(values):
        raise ValueError(
            f"explore has no such value: {', '.join(sorted(unknown))}; there are {', '.join(values)}"
        )
    values |= {name: converted(name, value, values[name]) for name, value in start.items()}
    check(values, scene)
    return Explorer(scene, values, notebook=notebook or {}, folder=Path(folder))


def still(explorer: Explorer) -> dict[str, str]:
    """What is on screen as HTML, hidden by the explorer where that is alive, and as PNG for readers without
    HTML."""
    view, shown = explorer.view, explorer.shown
    style = f"<style>{(FOLDER / 'explorer.css').read_text()}</style>"
    clean = f'<div class="atop-original">{shown.get("clean", "")}</div>'
    parts = f"{clean}<div>{shown.get('grid', '')}{shown.get('path', '')}</div>"
    content = shown.get("problem") or f'<div class="atop-main">{parts}</div>'
    inner = f'{style}<div class="atop">{content}<p>{escape(explorer.status["text"])}</p></div>'
    html = f'<div class="atop-still atop-still-{explorer.name}">{inner}</div>'
    bundle = {"text/html": html}
    if view is not None:
        png = page.encoded([page.sheet(view, explorer._title(view))], "png")
        bundle["image/png"] = base64.b64encode(png).decode()
    return bundle
