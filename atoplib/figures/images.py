"""What attack, transform and purifier do to images: the pictures themselves, side by side."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from atoplib.attacks import pgd
from atoplib.decisions import fixed_sample, sample_logits
from atoplib.figures.style import DIVERGING, MINUS, RIGHT, WIDEST, WRONG, new_figure, plain
from atoplib.transforms import corrupt

COLUMNS = {
    "clean": "clean",
    "adversarial": "adversarial",
    "perturbation": f"perturbation\n(adversarial {MINUS} clean)",
    "transformed": "transformed",
    "purified": "purified",
    "residual": f"residual\n(purified {MINUS} clean)",
}


def telling_images(
    defences: Mapping[str, nn.Module],
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    count: int = 1,
    *,
    eps: float | None = None,
    norm: str = "linf",
    seed: int = 0,
) -> list[int]:
    """Numbers of ``count`` images worth a picture, the best of each class first: all defences classify them
    correctly, and, where ``eps`` is given, ``AToP`` holds them and ``AP`` loses them under white-box PGD-10.
    """

    def share(model: nn.Module, shown: Tensor) -> Tensor:
        return (sample_logits(model, shown, num_samples=10).argmax(dim=2) == labels).float().mean(dim=0)

    worth = torch.stack([10 * share(model, images) for model in defences.values()]).amin(dim=0)
    for name, sign in {"AP": -1, "AToP": 1}.items() if eps else ():
        if name in defences:
            worth += sign * share(
                defences[name], pgd(defences[name], images, labels, eps=eps, norm=norm, steps=10, seed=seed)
            )
    order = worth.argsort(descending=True, stable=True)
    turns = (labels[order, None] == labels[order]).tril().sum(dim=1)  # the first, second, ... of its class
    return order[turns.argsort(stable=True)][:count].tolist()


@torch.no_grad()
def purification_stages(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    adversarial: Float[Tensor, "batch 3 height width"],
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What a defence makes of clean and adversarial images, all under the sample of its random transform that
    ``seed`` gives.

    Args:
        model: an ``AToPPipeline`` in eval mode, or any module that classifies images in [0, 1].

    Returns:
        ``clean`` and ``adversarial``; ``perturbation``, their signed difference, (batch, height, width) in
        1/255, the mean over the channels; of a pipeline ``transformed``, what its purifier is given of the
        adversarial images (of several copies the first; a missing pixel is grey), ``purified`` and
        ``residual`` (purified - clean); ``p(clean)`` and ``p(adversarial)``, the softmax of what the whole
        defence answers, of a pipeline also ``p(alone)``, of what its classifier says of the adversarial
        images.
    """
    stages = {"clean": images, "adversarial": adversarial, "perturbation": _change(adversarial, images)}
    with fixed_sample(model, seed):
        stages["p(clean)"] = model(images).softmax(dim=1)
        stages["p(adversarial)"] = model(adversarial).softmax(dim=1)
        if hasattr(model, "sample") and hasattr(model, "purify"):
            sample = model.sample(adversarial)
            copies = adversarial.repeat(sample.masks.shape[1] // len(images), 1, 1, 1)
            stages["transformed"] = (corrupt(copies, sample)[: len(images), :3] + 1) / 2
            stages["purified"] = model.purify(adversarial, sample).float().clamp(0, 1)
            stages["residual"] = _change(stages["purified"], images)
            stages["p(alone)"] = model.classifier(adversarial).softmax(dim=1)
    return stages


def purification_grid(
    defences: nn.Module | Mapping[str, nn.Module],
    images: Float[Tensor, "batch 3 height width"],
    adversarial: Float[Tensor, "batch 3 height width"] | Mapping[str, Tensor],
    labels: Int[Tensor, " batch"] | None = None,
    title: str = "",
    *,
    classes: Sequence[str] | None = None,
    eps: float | None = None,
    seed: int = 0,
) -> Figure:
    """One row an image and defence: clean, adversarial, perturbation, transformed, purified, residual.

    Perturbation (adversarial - clean) and residual (purified - clean) show, at each pixel, the signed mean
    over the channels: brighter is red, darker blue, white is 0, with one scale for all rows (opposite changes
    of channels cancel).
    Below clean and purified images is what the defence classifies them as, with its probability; below an
    adversarial image that is purified, what its classifier alone says.

    Args:
        defences: a pipeline, or several by name; one without a purifier gets the first three pictures only.
        images, adversarial: in [0, 1]; adversarial images by defence where an attack was made on each.
        labels: true classes: named at the left, and every answer gets a mark.
        classes: name of each class; its number if None.
        eps: of a linf attack: the scale of perturbation and residual. None: the largest value of each map.
        seed: of the sample that all pictures share.
    """
    defences = {"": defences} if isinstance(defences, nn.Module) else defences
    adversarial = adversarial if isinstance(adversarial, Mapping) else dict.fromkeys(defences, adversarial)
    truths = [None] * len(images) if labels is None else labels.tolist()
    stages = {
        defence: purification_stages(model, images, adversarial[defence], seed=seed)
        for defence, model in defences.items()
    }
    columns, notes, rows = {name: [] for name in COLUMNS}, {}, []
    for number, truth in enumerate(truths):
        for defence, parts in stages.items():
            for name, pictures in columns.items():
                pictures.append(parts[name][number] if name in parts else None)
            answers = ("adversarial", 4), ("alone", 1) if "purified" in parts else ("adversarial", 1)
            for name, column in (("clean", 0), *answers):
                answer = parts[f"p({name})"][number]
                notes[len(rows), column] = _answer(answer, truth, classes, alone=name == "alone")
            rows.append(f"{defence}\n{'' if truth is None else classes[truth] if classes else truth}".strip())
    shown = {COLUMNS[name]: each for name, each in columns.items() if any(p is not None for p in each)}
    return _draw(shown, title, rows, notes, scales={} if eps is None else dict.fromkeys((2, 5), 255 * eps))


def image_grid(
    columns: Mapping[str, Float[Tensor, "batch 3 height width"]],
    title: str = "",
    *,
    names: Sequence[str] | None = None,
) -> Figure:
    """Images side by side: one row an image, one column an entry (such as the input and what each transform
    leaves of it).

    Args:
        columns: by heading, in [0, 1]; all of one shape.
        names: at the left of the rows.
    """
    return _draw(columns, title, names or [""] * len(next(iter(columns.values()))))


def _draw(
    columns: Mapping[str, Sequence[Tensor | None]],
    title: str,
    names: Sequence[str],
    notes: Mapping[tuple[int, int], tuple[str, str]] = {},
    scales: Mapping[int, float] = {},
) -> Figure:
    """Images (3, H, W) in [0, 1] and signed maps (H, W) in 1/255 by heading; each column of maps has one
    scale, symmetric about 0, with a colour bar below it. ``notes`` are texts and their colours below pictures
    (row, column)."""
    edge = min(1.5, (WIDEST - 0.3) / len(columns))  # inches of a picture
    figure = new_figure(
        max(3.0, edge * len(columns) + 0.3), len(names) * (0.9 * edge + 0.25 * bool(notes)) + 0.9, title
    )
    grid = figure.subplots(len(names), len(columns), squeeze=False)
    for column, (heading, pictures) in enumerate(columns.items()):
        signed = [picture for picture in pictures if picture is not None and picture.ndim == 2]
        largest = _scale(torch.stack(signed)) if signed else 1.0
        scale = scales.get(column, largest)
        look = {"cmap": DIVERGING, "vmin": -scale, "vmax": scale, "interpolation": "nearest"}
        for row, (axes, picture) in enumerate(zip(grid[:, column], pictures, strict=True)):
            axes.set(xticks=[], yticks=[], box_aspect=1 if picture is None else None)
            axes.spines[:].set(color="#8c8c8c", linewidth=0.6, visible=picture is not None)
            if picture is not None:
                pixels = picture.detach().float().cpu()
                drawn = axes.imshow(pixels if signed else pixels.clamp(0, 1).permute(1, 2, 0), **look)
                text, colour = notes.get((row, column), ("", "black"))
                axes.set_xlabel(plain(text), color=colour, fontsize=9)
        grid[0, column].set_title(plain(heading), fontsize=9)
        if signed:
            bar = figure.colorbar(
                drawn,
                cax=grid[-1, column].inset_axes((0, -0.14, 1, 0.06)),
                orientation="horizontal",
                extend="both" if largest > 1.001 * scale else "neither",  # some pixels lie beyond the scale
            )
            number, unit = (scale / 255, "[0, 1]") if scale > 64 else (scale, "1/255")
            ticks = {-scale: f"{MINUS}{number:.3g}", 0: "0", scale: f"{number:.3g}"}
            bar.set_ticks(list(ticks), labels=ticks.values(), fontsize=8)
            bar.set_label(f"channel mean, {unit}", fontsize=8)
    for row, name in enumerate(names):
        grid[row, 0].set_ylabel(plain(name), fontsize=10)
    return figure


def _answer(
    probabilities: Tensor, truth: int | None, classes: Sequence[str] | None, *, alone: bool = False
) -> tuple[str, str]:
    """Predicted class and its probability (or whose answer it is), and a mark and colour that tell whether it
    is the true one."""
    predicted = int(probabilities.argmax())
    mark, colour = ("", "black") if truth is None else RIGHT if predicted == truth else WRONG
    text = f"{mark} {classes[predicted] if classes else predicted}".strip()
    return f"f alone: {text}" if alone else f"{text}, {100 * float(probabilities.max()):.0f} %", colour


def _change(images: Tensor, clean: Tensor) -> Float[Tensor, "batch height width"]:
    return 255 * (images.detach().float() - clean.detach().float()).mean(dim=1)


def _scale(maps: Tensor) -> float:
    """The largest magnitude in units of 1/255; 1 where nothing changed, as a map needs a range."""
    largest = float(maps.abs().max())
    return largest if largest > 1e-3 else 1.0
