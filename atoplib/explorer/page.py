"""What is on screen as HTML: pure functions from a ``View`` to text.

Colours of text and lines are those of JupyterLab's theme, light or dark. Right and wrong differ by a mark as well as by a
colour (blue and vermilion of Okabe and Ito's palette, which colour-blind eyes tell apart).
"""

from collections.abc import Sequence
from html import escape

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from atoplib.drawing import MINUS, RIGHT, RIGHT_COLOUR, WRONG, WRONG_COLOUR
from atoplib.explorer import draw
from atoplib.explorer.compute import RobustCurve, View
from atoplib.explorer.knobs import NO_ATTACK
from atoplib.explorer.suite import is_foreign, title
from atoplib.heatmaps import TRANSFORM_NAMES
from atoplib.verdicts import wilson_interval

MOST_CLASSES = 10  # bars under a picture; of more classes, the likeliest and the true one
CRISP_BELOW = 128  # pixels: a larger image is shrunk on screen, and looks better smoothed
NORM_NAMES = {"linf": "l\N{INFINITY}", "l2": "l2", "flow": "flow"}
SEES_NAMES = {
    "pipeline": "the whole pipeline",
    "bpda": "the pipeline by BPDA",
    "classifier": "the classifier alone",
}
GAP = "\N{NO-BREAK SPACE}"
SIGMA, ARROW, BETWEEN = "\N{GREEK SMALL LETTER SIGMA}", "\N{RIGHTWARDS ARROW}", " \N{MIDDLE DOT} "

COLOURS = f".atop, .atop-surface {{ --right: {RIGHT_COLOUR}; --wrong: {WRONG_COLOUR}; }}"
STYLE = (
    f"<style>\n{COLOURS}"
    + """
.atop { --ink: var(--jp-ui-font-color1, #222); --faint: var(--jp-ui-font-color2, #666);
  --line: var(--jp-border-color1, #bbb); --track: var(--jp-layout-color2, #eee);
  --other: var(--jp-ui-font-color3, #999);
  color: var(--ink); font: 12px/1.35 var(--jp-ui-font-family, system-ui, sans-serif); }
.atop p { margin: 0; }
.atop-summary { font-size: 14px; padding: 6px 0 8px; }
.atop b, .atop-strong { font-weight: 600; }
.atop-right { color: var(--right); font-weight: 600; }
.atop-wrong { color: var(--wrong); font-weight: 600; }
.atop-faint { color: var(--faint); }
.atop-row { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 4px 12px; max-width: 1380px; }
.atop figure { margin: 0; min-width: 0; }
.atop figcaption { font-weight: 600; font-size: 13px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.atop img { display: block; width: 100%; border: 1px solid var(--line); box-sizing: border-box; margin: 3px 0 4px; }
.atop img.atop-crisp { image-rendering: pixelated; }
.atop-void { aspect-ratio: 1; border: 1px dashed var(--line); box-sizing: border-box; display: grid; place-items: center;
  text-align: center; color: var(--faint); margin: 3px 0 4px; padding: 8px; }
.atop-bars { display: grid; grid-template-columns: fit-content(46%) minmax(0, 1fr) auto; gap: 2px 6px; align-items: center;
  font-size: 11px; line-height: 13px; margin-top: 4px; font-variant-numeric: tabular-nums; }
.atop-bars > .atop-name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: right; }
.atop-bars > .atop-value { text-align: right; white-space: nowrap; }
.atop-track { background: var(--track); height: 9px; }
.atop-track > div { height: 9px; background: var(--other); }
.atop-track > .atop-of-right { background: var(--right); }
.atop-track > .atop-of-wrong { background: var(--wrong); }
.atop-true { font-weight: 700; }
.atop-scale { height: 9px; border: 1px solid var(--line); box-sizing: border-box; }
.atop-ends { display: flex; justify-content: space-between; font-size: 11px; font-variant-numeric: tabular-nums; }
.atop-strip { display: flex; flex-wrap: wrap; gap: 6px 10px; margin-top: 10px; }
.atop-strip figure { width: 92px; }
.atop-strip figcaption { font-weight: 400; font-size: 11px; }
.atop-panel-title { font-weight: 600; font-size: 13px; margin: 0 0 2px; }
.atop svg { display: block; width: 100%; max-width: 340px; height: auto; overflow: visible; }
.atop svg text { fill: var(--ink); font-size: 11px; font-family: var(--jp-ui-font-family, system-ui, sans-serif); }
.atop svg .atop-axis { stroke: var(--line); stroke-width: 1; fill: none; }
.atop svg .atop-curve { stroke: var(--faint); stroke-width: 1.5; fill: none; }
.atop svg .atop-dot { fill: var(--right); }
.atop svg .atop-cross { stroke: var(--wrong); stroke-width: 1.8; fill: none; }
.atop svg .atop-here { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
.atop-problem { border-left: 4px solid var(--wrong); padding: 8px 12px; font-size: 14px; background: var(--track);
  overflow-wrap: anywhere; }
.atop-controls .widget-readout { min-width: 44px; max-width: 44px; margin-left: 6px; }
.atop-controls .slider-container { margin: 0 4px; }
.atop-pictures { transition: opacity 0.1s linear 0.25s; }
.atop-stale { opacity: 0.35; }
</style>"""
)


def problem(sentence: str) -> str:
    """What stands in the place of the pictures when they cannot be made."""
    return f'<div class="atop" role="alert"><div class="atop-problem">{escape(sentence)}</div></div>'


def sentence_of(error: BaseException) -> str:
    """An error in one line, without a traceback; its type is named where its text alone would not be understood."""
    text = " ".join(str(error).split())
    explains = isinstance(error, ValueError | FileNotFoundError) and text
    return text if explains else f"{type(error).__name__}: {text}".rstrip(": ")


def name_of(view: View, number: int) -> str:
    """The name of a class."""
    return view.classes[number] if number < len(view.classes) else str(number)


def read(view: View, stage: str) -> tuple[str, float, bool]:
    """Name, probability and correctness of what is read at a stage."""
    probabilities = view.probabilities[stage]
    best = int(probabilities.argmax())
    return name_of(view, best), float(probabilities[best]), best == view.label


def defence_text(view: View) -> str:
    """The defence and its transform in a few words."""
    if view.pictured is None:
        return view.knobs.defence
    return f"{view.knobs.defence} with {transform_text(view)}" if view.knobs.transform != "none" else view.knobs.defence


def transform_text(view: View) -> str:
    """The transform with those of its settings that apply."""
    parts = [TRANSFORM_NAMES[view.knobs.transform]]
    if "missing_rate" in view.used:
        parts.append(f"{100 * float(view.pictured.masks.mean()):.3g}{GAP}% missing")
    if "noise_std" in view.used:
        parts.append(f"{SIGMA}{GAP}{view.knobs.noise_std:.3g}")
    if "num_masks" in view.used:
        parts.append(f"{view.knobs.num_masks}{GAP}masks")
    return ", ".join(parts)


def attack_text(view: View) -> str:
    """The attack, its radius and what it sees."""
    knobs = view.knobs
    if not knobs.attacks:
        return "no attack" if knobs.attack == NO_ATTACK else "eps 0: no attack"
    name = title(knobs.attack) + (f"-{knobs.steps}" if "steps" in view.used else "")
    if "eot_samples" in view.used and knobs.eot_samples > 1:
        name += f" + EOT-{knobs.eot_samples}"
    if "queries" in view.used:
        name += f", {knobs.queries} queries"
    sees = SEES_NAMES[knobs.attack_sees] if view.pictured is not None else "the model"
    return f"{name}, {radius_text(knobs.norm, knobs.eps)}, on {sees}"


def radius_text(norm: str, eps: float) -> str:
    """eps with its norm and unit."""
    return f"{NORM_NAMES[norm]} {255 * eps:.3g}/255" if norm == "linf" else f"{NORM_NAMES[norm]} {eps:.3g}"


def summary(view: View) -> str:
    """The decisions in one sentence."""
    true = name_of(view, view.label)
    parts = [f"true class <b>{escape(true)}</b>"]
    titles = {"clean": "clean", "adversarial": "attacked", "purified": "attacked and purified"}
    for stage in view.probabilities:
        name, probability, right = read(view, stage)
        parts.append(f"{titles[stage]}: reads {_marked(name, right)} ({100 * probability:.1f} %)")
    if len(view.votes) > 1:
        parts.append(f"vote: {_marked(name_of(view, view.majority), view.majority == view.label)} ({votes_text(view)})")
    if not view.adapted:
        parts.append('<span class="atop-wrong">preview: the attack does not know the new transform yet</span>')
    return f'<p class="atop-summary">{BETWEEN.join(parts)}</p>'


def votes_text(view: View) -> str:
    """How many draws are right."""
    return f"{view.right_draws} of {len(view.votes)} draws right"


def pictures(view: View) -> str:
    """Summary, the six pictures with what belongs to each, and the copies of RT3."""
    after, knobs = view.adversarial, view.knobs
    perturbation = draw.signed_change(after, view.clean)
    scale = 255 * knobs.eps if knobs.norm == "linf" and knobs.attacks else draw.map_scale(perturbation)
    change = after - view.clean
    steps = f", step {view.step} of {view.path_steps[-1]}" if view.step != view.path_steps[-1] else ""
    sizes = (f"largest {255 * float(change.abs().max()):.3g}/255", f"l2 norm {float(change.norm()):.3g}")
    columns = [
        _column("clean", _img(view, draw.picture(view.clean), "the clean image"), _bars(view, "clean")),
        _column(
            f"adversarial{steps}",
            _img(view, draw.picture(after), f"the adversarial image{steps}"),
            _bars(view, "adversarial"),
        ),
        _column(
            "perturbation",
            _img(view, draw.change_map(perturbation, scale), f"the perturbation: {sizes[0]}, {sizes[1]}"),
            _scale(scale, f"adversarial {MINUS} clean", *sizes),
        ),
    ]
    if view.pictured is None:
        nothing = '<div class="atop-void">{}</div>'
        columns += [
            _column("transformed", nothing.format("no transform: this defence is a bare classifier"), ""),
            _column("purified", nothing.format("no purifier"), ""),
            _column("purifier's change", nothing.format("no purifier"), ""),
        ]
        return _page(summary(view) + f'<div class="atop-row">{"".join(columns)}</div>')
    shown = view.pictured
    copies = len(shown.transformed)
    changed = draw.signed_change(shown.purified, after)
    most = draw.map_scale(changed)
    distances = [255 * float((image - view.clean).abs().mean()) for image in (after, shown.purified)]
    left = f"mean distance to clean: {distances[0]:.3g} {ARROW} {distances[1]:.3g}/255"
    which = f", copy 1 of {copies}" if copies > 1 else ""
    columns += [
        _column(
            "transformed",
            _img(view, draw.picture(shown.transformed[0]), f"what the purifier reads{which}"),
            f'<p>{escape(transform_text(view) + which)}</p><p class="atop-faint">{escape(_draw_text(view))}</p>',
        ),
        _column("purified", _img(view, draw.picture(shown.purified), "the purified image"), _bars(view, "purified")),
        _column(
            "purifier's change",
            _img(view, draw.change_map(changed, most), f"what the purifier changed, at most {most:.3g}/255"),
            _scale(most, f"purified {MINUS} adversarial", left),
        ),
    ]
    strip = _strip(view) if copies > 1 else ""
    return _page(summary(view) + f'<div class="atop-row">{"".join(columns)}</div>{strip}')


def votes(view: View) -> str:
    """The vote over draws as a histogram."""
    if len(view.votes) == 1:
        name, _, right = read(view, list(view.probabilities)[-1])
        text = f"<p>No dice are thrown: every draw reads {_marked(name, right)}.</p>"
        return _page(f'<p class="atop-panel-title">Vote</p>{text}')
    counts = view.votes.bincount(minlength=len(view.classes))
    order = sorted(range(len(counts)), key=lambda number: (-int(counts[number]), number))
    kept = [number for number in order if counts[number] or number == view.label][:MOST_CLASSES]
    if view.label not in kept:
        kept[-1] = view.label
    rows = [(number, float(counts[number]) / len(view.votes), str(int(counts[number]))) for number in kept]
    title = f"Vote of {len(view.votes)} draws: {view.right_draws} right"
    worst = "every draw is right" if view.right_draws == len(view.votes) else "an attacker who may try again wins"
    return _page(
        f'<p class="atop-panel-title">{title}</p>{_bar_rows(view, rows)}<p class="atop-faint">majority: '
        f"{_marked(name_of(view, view.majority), view.majority == view.label)}; worst of {len(view.votes)}: {worst}</p>"
    )


def path(view: View) -> str:
    """Loss and decision at each step of the attack."""
    panel_title = '<p class="atop-panel-title">Path of the attack: loss (nats)</p>'
    if len(view.path_steps) == 1:
        return _page(panel_title + f"<p>{escape(attack_text(view)).capitalize()}.</p>")
    if not view.adapted:
        return _page(panel_title + '<p class="atop-faint">A preview: the path is that of the attack to come.</p>')
    right = (view.path_classes == view.label).tolist()
    chart = line_chart(
        [float(step) for step in view.path_steps],
        view.path_losses.tolist(),
        right,
        here=float(view.step),
        x_label="step of the attack",
        label=f"cross-entropy from {float(view.path_losses[0]):.3g} to {float(view.path_losses[-1]):.3g}",
    )
    place = view.path_steps.index(view.step)
    decision = _marked(name_of(view, int(view.path_classes[place])), right[place])
    here = f"<p>step {view.step}: loss {float(view.path_losses[place]):.3g}, reads {decision}</p>"
    if is_foreign(view.knobs.attack):
        here += '<p class="atop-faint">torchattacks shows the result alone, and no step on the way.</p>'
    return _page(panel_title + chart + here)


def curve(result: RobustCurve) -> str:
    """Robust accuracy over eps, with 95 % intervals."""
    factor, unit = (255, "1/255") if result.knobs.norm == "linf" else (1, result.knobs.norm)
    shares = [100 * right / result.images for right in result.right]
    bands = [tuple(100 * end for end in wilson_interval(right, result.images)) for right in result.right]
    chart = line_chart(
        [factor * eps for eps in result.eps],
        shares,
        [True] * len(shares),
        here=factor * result.knobs.eps,
        x_label=f"eps ({unit})",
        label="robust accuracy: " + ", ".join(f"{share:.0f} %" for share in shares),
        limits=(0.0, 100.0),
        bands=bands,
    )
    title = '<p class="atop-panel-title">Robust accuracy (%) over eps</p>'
    return _page(f'{title}{chart}<p class="atop-faint">{result.images} images, one draw each, 95 % intervals</p>')


def line_chart(
    across: Sequence[float],
    up: Sequence[float],
    right: Sequence[bool],
    *,
    here: float,
    x_label: str,
    label: str,
    limits: tuple[float, float] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    width: int = 300,
    height: int = 160,
) -> str:
    """A curve as SVG: a disc where ``right``, a cross where not, a dashed line at ``here``, bars for ``bands``."""
    left, top, bottom = 38, 8, 34
    low, high = limits or (min(0.0, *up), 1.08 * max(*up, 1e-3))
    ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low - 1e-9 <= tick <= high * 1.001]
    first, last = min(across), max(max(across), min(across) + 1e-9)

    def x(value: float) -> float:
        return left + 8 + (value - first) / (last - first) * (width - left - 20)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    base = height - bottom
    parts = [f'<path class="atop-axis" d="M{left} {top}V{base}H{width}"/>']
    for tick in ticks:
        parts.append(f'<path class="atop-axis" d="M{left - 4} {y(tick):.1f}h4"/>')
        parts.append(f'<text x="{left - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    whole = all(float(value).is_integer() for value in across)
    for tick in MaxNLocator(6, integer=whole).tick_values(first, last):
        if first - 1e-9 <= tick <= last + 1e-9:
            parts.append(f'<path class="atop-axis" d="M{x(tick):.1f} {base}v4"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{base + 15}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<path class="atop-here" d="M{x(here):.1f} {top}V{base}"/>')
    points = [(x(a), y(b)) for a, b in zip(across, up, strict=True)]
    parts.append(f'<path class="atop-curve" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in points)}"/>')
    for (a, _), (worst, best) in zip(points, bands, strict=False):
        parts.append(f'<path class="atop-curve" d="M{a:.1f} {y(worst):.1f}V{y(best):.1f}"/>')
    for (a, b), good in zip(points, right, strict=True):
        parts.append(
            f'<circle class="atop-dot" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>'
            if good
            else f'<path class="atop-cross" d="M{a - 3:.1f} {b - 3:.1f}l6 6m0 -6l-6 6"/>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _page(content: str) -> str:
    return f'<div class="atop">{content}</div>'


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-9 else value:.3g}".replace("-", MINUS)


def _marked(name: str, right: bool) -> str:
    kind, mark = ("right", RIGHT) if right else ("wrong", WRONG)
    return f'<span class="atop-{kind}">{escape(name)} {mark}</span>'


def _column(title: str, image: str, below: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}{below}</figure>"


def _img(view: View, png: bytes, alt: str) -> str:
    crisp = ' class="atop-crisp"' if view.clean.shape[-1] < CRISP_BELOW else ""
    return f'<img{crisp} src="{draw.data_uri(png)}" alt="{escape(alt)}">'


def _scale(scale: float, *lines: str) -> str:
    end = f"{scale:.3g}"
    texts = "".join(f'<p class="atop-faint">{escape(line)}</p>' for line in lines)
    return (
        f'<div class="atop-scale" style="background:{draw.map_gradient()}"></div>'
        f'<div class="atop-ends"><span>{MINUS}{end}</span><span>0</span><span>+{end} /255</span></div>{texts}'
    )


def shown_classes(view: View) -> list[int]:
    """The classes that get a bar under every picture: all, or the likeliest of any stage and the true one."""
    if len(view.classes) <= MOST_CLASSES:
        return list(range(len(view.classes)))
    likely: Tensor = sum(view.probabilities.values())
    best = likely.topk(MOST_CLASSES - 1).indices.tolist()
    return sorted({*best, view.label})


def _bars(view: View, stage: str) -> str:
    name, probability, right = read(view, stage)
    values = view.probabilities[stage]
    rows = [(number, float(values[number]), f"{100 * float(values[number]):.1f}") for number in shown_classes(view)]
    return f"<p>reads {_marked(name, right)} {100 * probability:.1f} %</p>{_bar_rows(view, rows)}"


def _bar_rows(view: View, rows: Sequence[tuple[int, float, str]]) -> str:
    top = max(rows, key=lambda row: row[1])[0]
    cells = []
    for number, share, text in rows:
        true = number == view.label
        kind = "right" if true else "wrong" if number == top else "other"
        mark, strong = (" \N{BLACK LEFT-POINTING SMALL TRIANGLE}", " atop-true") if true else ("", "")
        name = escape(name_of(view, number))
        cells.append(
            f'<span class="atop-name{strong}" title="{name}">{name}</span>'
            f'<div class="atop-track"><div class="atop-of-{kind}" style="width:{100 * share:.1f}%"></div></div>'
            f'<span class="atop-value{strong}">{text}{mark}</span>'
        )
    return f'<div class="atop-bars">{"".join(cells)}</div>'


def _draw_text(view: View) -> str:
    vote, number = divmod(view.knobs.draw, view.knobs.num_draws)
    if "draw" not in view.used:
        return "every draw is the same"
    return f"draw {number + 1} of {len(view.votes)}" + (f" of vote {vote + 1}" if vote else " of the vote")


def _strip(view: View) -> str:
    """RT3: each masked copy, and what the purifier filled in there."""
    shown = view.pictured
    kept = []
    for number, (copy, mask) in enumerate(zip(shown.transformed, shown.masks, strict=True), start=1):
        filled = shown.purified * mask + 0.5 * (1 - mask)
        kept.append(
            f"<figure><figcaption>mask {number}</figcaption>"
            + _img(view, draw.picture(copy), f"what the purifier reads under mask {number}")
            + _img(view, draw.picture(filled), f"what the purifier fills in under mask {number}")
            + "</figure>"
        )
    text = '<p class="atop-faint">Each masked copy, and below it what the purifier fills in; only that is kept.</p>'
    return f'<div class="atop-strip">{"".join(kept)}</div>{text}'
