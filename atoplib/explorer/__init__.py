"""The explorer: turn a knob, see the perturbation die. ``explore`` shows it in a notebook.

``controls`` says what can be set, ``attack`` and ``compute`` what it shows, ``page`` what is drawn of that;
``widget`` (with the thread that computes) and ``explorer.js`` are the two ends of the wire.
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

from atoplib import data, decisions, parameters, pretrained
from atoplib.contract import device_of, prepare
from atoplib.explorer import controls, page
from atoplib.explorer.attack import Scene
from atoplib.explorer.widget import Explorer
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform


def explore(
    model_or_defences: nn.Module | Mapping[str, nn.Module | Callable[[], nn.Module]] | None = None,
    images: Float[Tensor, "count channels height width"] | str | None = None,
    labels: Int[Tensor, " count"] | None = None,
    **options: Any,
) -> None:
    """Show the explorer in a notebook: pick an image, an attack and a transform, and see what becomes of the
    decision.

    The first picture is computed before the call returns, and stays in the saved notebook as a still.

    Args:
        model_or_defences: modules in eval mode, images in [0, 1] -> logits, by name (or a single one), or
            functions that load one when it is first shown. An ``AToPPipeline`` gets the transform's controls;
            it is not changed itself. None: the kit's defences for MNIST, on its test digits.
        images, labels: in [0, 1], and their classes; labels None: what the first defence says. Or the name
            of a data set, of whose test images 200 are shown.
        **options: classes: their names; numbers for those that have none.
            eps, norm: radius at the start; None: the usual one for grey digits or for colour images.
            notebook: parameters of the notebook that explores, handed on to ``04_attack`` in the YAML.
            folder: where pictures are saved.
            image, rows, attack, threat_model, steps, transform, ...: further controls at the start.

    Raises:
        ValueError: without a defence or an image, for images or labels as ``contract.prepare``, for names
            and values of controls that are not allowed.
    """
    explorer = make_explorer(model_or_defences, images, labels, **options)
    explorer.refresh()
    try:
        explorer.worker.wait()
    except KeyboardInterrupt:
        explorer.handle({"do": "cancel"})
    display(explorer)  # last of all: as long as the cell runs, no control would be heard
    display(still(explorer), raw=True)


def make_explorer(
    model_or_defences: nn.Module | Mapping[str, nn.Module | Callable[[], nn.Module]] | None = None,
    images: Float[Tensor, "count channels height width"] | str | None = None,
    labels: Int[Tensor, " count"] | None = None,
    *,
    classes: tuple[str, ...] | list[str] = (),
    eps: float | None = None,
    norm: str = "linf",
    notebook: Mapping[str, Any] | None = None,
    folder: Path | str = "explored",
    **start: Any,
) -> Explorer:
    """The explorer, not shown and nothing computed yet. Arguments and errors as ``explore``."""
    defences = model_or_defences
    if defences is None:
        defences = {
            name: pretrained.load_pretrained("mnist", name) for name in ("undefended", "AT", "AP", "AToP")
        }
        images = "mnist5k" if images is None else images
    if isinstance(images, str):
        notebook = {"dataset": images, **(notebook or {})}
        images, labels = data.load_images(images, 200)
    if not isinstance(defences, Mapping):
        defences = {"model": defences}
    if not defences or images is None or not len(images):
        raise ValueError(
            "there is nothing to explore: give a defence, and images (count, channels, height, width)"
        )
    images = torch.as_tensor(images)
    scene = Scene(
        {str(name): module for name, module in defences.items()},
        images.detach().float().cpu(),
        torch.zeros(len(images), dtype=torch.int64),
        list(classes),
    )
    first = scene.defence(next(iter(scene.defences)))
    known, device = scene.images[:1] if labels is not None else scene.images, device_of(first)
    logits = decisions.sample_logits(first, known.to(device))[0].cpu()
    labels = logits.argmax(dim=1) if labels is None else torch.as_tensor(labels)
    prepare(first, scene.images.to(device), labels.to(device))
    scene.labels = labels.cpu().clone()
    scene.classes += map(str, range(len(classes), logits.shape[1]))
    transform = next(
        (each.transform for each in (first, *defences.values()) if isinstance(each, AToPPipeline)),
        Transform(),
    )
    values = {name: control.default for name, control in controls.CONTROLS.items()} | {
        "rows": list(scene.defences),
        "norm": norm,
        "eps": scene.usual[parameters.one_of(*controls.UNITS)(norm)] if eps is None else eps,
        "transform": transform.name,
        **{name: getattr(transform, name) for name in ("missing_rate", "noise_std", "num_masks")},
        **{name: controls.converted(name, value) for name, value in start.items()},
    }
    return Explorer(scene, controls.check(values, scene), notebook=notebook or {}, folder=Path(folder))


def still(explorer: Explorer) -> dict[str, str]:
    """What is on screen as a picture, hidden by the explorer where that is alive."""
    text, bundle = escape(explorer.shown.get("problem") or explorer.status["text"]), {}
    if explorer.view is not None:
        bundle["image/png"] = base64.b64encode(page.encoded([page.sheet(explorer.view)], "png")).decode()
        text = f'<img alt="{text}" src="data:image/png;base64,{bundle["image/png"]}">'
    return {"text/html": f'<div class="atop-still atop-still-{explorer.model_id}">{text}</div>', **bundle}
