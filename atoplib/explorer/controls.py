"""The controls: one table of what can be set, which of it applies, and its way to papermill parameters and
back."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from atoplib.attacks import default_eps
from atoplib.explorer.attack import EACH, NO_ATTACK, OWN, Scene, Values, is_attacking
from atoplib.pipeline import AToPPipeline
from atoplib.plain_yaml import NotPlainYAML, load_yaml
from atoplib.transforms import TRANSFORMS, Transform

THREAT_MODELS = {
    "white-box": "the gradient goes through transform, purifier and classifier",
    "bpda": "white-box, the gradient of transform and purifier replaced by the identity",
    "transfer": "the attack sees the classifier alone: this flatters a purifier",
}
TRANSFORM_NAMES = {
    "none": "none",
    "rt1": "RT1: patches",
    "rt2": "RT2: noise, patches",
    "rt3": "RT3: noise, masks",
}
SETTINGS_OF = {
    "none": (),
    "rt1": ("missing_rate",),
    "rt2": ("missing_rate", "noise_std"),
    "rt3": ("noise_std", "num_masks"),
}
UNITS = {  # of a radius: name, highest and step of the slider
    "linf": ("\N{SCRIPT SMALL L}\N{INFINITY}", 1.0, 0.01),
    "l2": ("\N{SCRIPT SMALL L}2", 8.0, 0.05),
    "l1": ("\N{SCRIPT SMALL L}1", 40.0, 0.5),
    "flow": ("flow", 0.2, 0.005),
    "occlusion": ("patches", 2, 1),
    "rotation": ("degrees", 90, 1),
    "corruption": ("severity", 5, 1),
}
SMALL = 0.1  # an linf radius below is shown in 1/255
FREE = (
    "shown_step",
    "sample",
    "votes",
    "transform",
    "missing_rate",
    "noise_std",
    "num_masks",
    "rows",
)  # keep the step shown
MARK = "# explorer: "  # the line of a YAML text that only the explorer reads; to papermill it is a comment


class Control(NamedTuple):
    """One row of the table.

    Attributes:
        kind: ``range``, ``number``, ``menu``, ``check``, or ``""`` for a value that has a place of its own on
            the page.
        place: the part of the page that it is in.
        high: of the slider at first; ``most`` is what is allowed.
        parameter: its name in notebook 4, "" where that has none; None: the same.
    """

    name: str
    label: str
    kind: str
    place: str
    help: str
    default: Any
    low: float = 0
    high: float = 1
    step: float = 1
    most: float = 2**31 - 1
    parameter: str | None = None


# fmt: off
CONTROLS = {control.name: control for control in (
    Control("image", "image", "range", "image", "number of the image", 0),
    Control("rows", "defences", "", "", "defences that are shown, one below the other", (), parameter=""),
    Control("attack", "attack", "menu", "main", "how the adversarial image is made", "pgd"),
    Control("threat_model", "threat model", "menu", "main",
            "what the attack knows of a pipeline", "white-box"),
    Control("attacked", "attack on", "menu", "main",
            "each defence itself, or one image for all", EACH, parameter=""),
    Control("eps", "\N{GREEK SMALL LETTER EPSILON}", "range", "main",
            "radius of the ball around the image", 8 / 255),
    Control("steps", "steps", "range", "main", "iterations of the attack", 10, 1, 100, 1, 1000),
    Control("queries", "queries", "range", "main",
            "passes of an attack without gradients", 500, 10, 2000, 10, 10_000),
    Control("transform", "transform", "menu", "main", "what destroys the perturbation", "rt2"),
    Control("missing_rate", "missing", "range", "main",
            "share of patches dropped", 0.25, 0, 0.95, 0.01, 0.99),
    Control("noise_std", "noise", "range", "main",
            "standard deviation, images in [0, 1]", 0.25, 0, 1, 0.05, 10),
    Control("num_masks", "masks", "range", "more", "RT3: each misses one patch in so many", 4, 2, 16, 1, 64),
    Control("votes", "votes", "range", "more",
            "samples that decide", 10, 1, 50, 1, 200, parameter="num_samples"),
    Control("norm", "norm", "menu", "more", "what \N{GREEK SMALL LETTER EPSILON} is a radius of", "linf"),
    Control("eot_samples", "EOT samples", "range", "more",
            "samples averaged in each gradient", 1, 1, 50, 1, 100),
    Control("target", "target", "menu", "more", "class that the attack aims at", -1, parameter=""),
    Control("grey", "grey attack", "check", "more",
            "of grey images: all channels change alike; else each may change "
            "by itself, as in the notebooks", False, parameter=""),
    Control("seed", "seed", "number", "more", "of the attack's start and of the samples", 0),
    Control("options", "", "", "", "further options of the attack", {}, parameter=""),
    Control("sample", "", "", "", "which sample is pictured", 0, most=2**20, parameter=""),
    Control("shown_step", "step", "range", "player",
            "show the attack after so many steps", None, parameter=""),
)}
PRESETS = {
    "clean": ("Clean", "no attack", {"attack": NO_ATTACK}),
    "transfer": ("Transfer", "PGD-20 on the classifier alone, as purification used to be measured",
                 {"attack": "pgd", "threat_model": "transfer", "steps": 20, "eot_samples": 1}),
    "white-box": ("White-box", "PGD-10 through the whole pipeline",
                  {"attack": "pgd", "threat_model": "white-box", "steps": 10, "eot_samples": 1}),
    "strict": ("Strict", "PGD-200 with 20 samples a gradient through the whole pipeline: takes its time",
               {"attack": "pgd", "threat_model": "white-box", "steps": 200, "eot_samples": 20}),
}
# fmt: on


def check(values: Values, scene: Scene) -> None:
    """Raise ValueError, naming what is allowed, for a value that the scene does not have or that is out of
    range."""
    attacks = (NO_ATTACK, *scene.attacks)
    allowed = {"attack": attacks, "threat_model": tuple(THREAT_MODELS), "transform": TRANSFORMS}
    allowed["attacked"] = (EACH, *scene.defences)
    for name, wanted in [*((name, (values[name],)) for name in allowed), ("rows", values["rows"])]:
        for value in wanted:
            known = allowed.get(name, tuple(scene.defences))
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"there is no {name} {value!r} here{hint}; allowed: {', '.join(known)}")
    for control in CONTROLS.values():
        value = values[control.name]
        if isinstance(value, int | float) and control.name not in ("eps", "target"):
            if not control.low <= value <= control.most:
                raise ValueError(f"{control.name} must lie in {control.low}..{control.most}, got {value}")
    if not values["rows"]:
        raise ValueError("show at least one defence")
    if values["image"] >= len(scene.labels):
        raise ValueError(
            f"there is no image {values['image']}: there are {len(scene.labels)}, counted from 0"
        )
    if not 0 <= values["eps"] < math.inf or values["norm"] == "linf" and values["eps"] > 1:
        raise ValueError(
            f"eps must be 0 or above, in linf at most 1 (images lie in [0, 1]), got {values['eps']}"
        )
    if not -1 <= values["target"] < len(scene.classes):
        raise ValueError(
            f"target must be a class in 0..{len(scene.classes) - 1}, or -1 for none, got {values['target']}"
        )
    if values["attack"] != NO_ATTACK:
        attack = scene.attacks[values["attack"]]
        if values["norm"] not in attack.norms:
            raise ValueError(
                f"{attack.name} has no norm {values['norm']!r}; allowed: {', '.join(attack.norms)}"
            )
        for name in values["options"]:
            if name not in attack.options:
                raise ValueError(
                    f"{attack.name} has no option {name!r}; allowed: {', '.join(attack.options)}"
                )
    Transform(values["transform"], values["missing_rate"], values["noise_std"], values["num_masks"])


def usual_eps(scene: Scene, norm: str, start: Values) -> float:
    """The radius to begin with in a norm: that of the start, or the usual one of such images."""
    return start["eps"] if norm == start["norm"] else default_eps(norm, scene.dataset)


def changed(values: Values, changes: Mapping[str, Any], scene: Scene, start: Values) -> dict[str, Any]:
    """The values after some changes, and what follows from them: another attack has other norms and options,
    another norm another radius; whatever changes the attack shows its end.

    Raises:
        ValueError: as ``check``.
    """
    new = {**values, **changes}
    if "attack" in changes and new["attack"] in scene.attacks and changes["attack"] != values["attack"]:
        attack = scene.attacks[new["attack"]]
        new["options"] = changes.get("options", {})
        new["target"] = new["target"] if attack.targeted else -1
        if new["norm"] not in attack.norms:
            new["norm"] = attack.norms[0]
    if new["norm"] != values["norm"] and "eps" not in changes:
        new["eps"] = usual_eps(scene, new["norm"], start)
    if any(name not in FREE for name in changes) and "shown_step" not in changes:
        new["shown_step"] = None
    if "image" in changes or "attack" in changes:
        new["sample"] = changes.get("sample", 0)
    check(new, scene)
    return new


def unused(values: Values, scene: Scene) -> dict[str, str]:
    """The controls that change nothing now, and why; what is not known before a defence is loaded counts as
    used."""
    modules = [scene.loaded.get(name) for name in values["rows"]]
    pipelines = any(module is None or isinstance(module, AToPPipeline) for module in modules)
    random = any(scene.may_be_random(name, values) for name in values["rows"])
    reasons = {}
    if not pipelines:
        reasons |= dict.fromkeys(
            ("transform", "missing_rate", "noise_std", "num_masks", "threat_model"), "no purifier here"
        )
    for name in ("missing_rate", "noise_std", "num_masks"):
        if name not in SETTINGS_OF[values["transform"]]:
            reasons.setdefault(name, f"not in the transform {values['transform']}")
    if not random:
        reasons |= dict.fromkeys(("votes", "sample", "eot_samples"), "nothing random here")
    if not is_attacking(values):
        reasons |= dict.fromkeys(
            ("threat_model", "attacked", "steps", "queries", "eot_samples", "target", "grey", "norm"),
            "no attack",
        )
        reasons |= {"shown_step": "no attack"} | (
            {"eps": "no attack"} if values["attack"] == NO_ATTACK else {}
        )
        return reasons
    attack = scene.attacks[values["attack"]]
    for name in ("steps", "queries", "eot_samples"):
        if name not in attack.options:
            reasons[name] = f"{attack.title} has none"
    if len(attack.norms) == 1:
        reasons["norm"] = f"{attack.title} has this norm alone"
    if not attack.targeted:
        reasons["target"] = f"{attack.title} has no targets"
    if (
        values["threat_model"] == "transfer"
        and pipelines
        and all(isinstance(module, AToPPipeline) for module in modules)
    ):
        reasons["eot_samples"] = "the classifier alone is not random"
    return reasons


def attack_menu(scene: Scene) -> list[list]:
    """The attacks in groups, as [group, [[value, label, description], ...]]."""
    groups: dict[str, list] = {"": [[NO_ATTACK, "none", "the clean image"]]}
    for name, attack in scene.attacks.items():
        third_party = ":" in name
        group = "torchattacks" if third_party else "by gradients" if attack.gradient else "without gradients"
        groups.setdefault(group, []).append([name, attack.title, attack.description])
    return [[group, entries] for group, entries in groups.items()]


def described(values: Values, scene: Scene, last_step: int) -> dict[str, dict[str, Any]]:
    """What the page shows of each control: its value, limits, entries, and why it is disabled."""
    reasons = unused(values, scene)
    entries = {
        "attack": attack_menu(scene),
        "threat_model": [["", [[name, name, text] for name, text in THREAT_MODELS.items()]]],
        "transform": [["", [[name, text, ""] for name, text in TRANSFORM_NAMES.items()]]],
        "attacked": [
            ["", [[EACH, "each defence", "the attack is made on each defence itself"]]],
            ["one image for all, made on", [[name, name, ""] for name in scene.defences]],
        ],
        "target": [
            [
                "",
                [[-1, "none: any other class", ""], *([n, name, ""] for n, name in enumerate(scene.classes))],
            ]
        ],
    }
    norms = scene.attacks[values["attack"]].norms if values["attack"] in scene.attacks else (values["norm"],)
    entries["norm"] = [["", [[norm, UNITS.get(norm, (norm,))[0], ""] for norm in norms]]]
    shown = {}
    for name, control in CONTROLS.items():
        if not control.kind:
            continue
        value = values[name]
        high = (
            control.high
            if isinstance(value, bool) or not isinstance(value, int | float)
            else max(control.high, value)
        )
        entry = {"value": value, "high": high, "step": control.step, "why": reasons.get(name, ""), "unit": 1}
        shown[name] = entry | ({"entries": entries[name]} if name in entries else {})
    unit, high, step = UNITS.get(values["norm"], (values["norm"], 1.0, 0.01))
    small = values["norm"] == "linf" and values["eps"] < SMALL
    eps = (
        {"high": 32 / 255, "step": 0.5 / 255, "unit": 255}
        if small
        else {"high": max(high, values["eps"]), "step": step}
    )
    shown["eps"] |= eps | {"label": f"{unit} {CONTROLS['eps'].label}"}
    options = scene.attacks[values["attack"]].options if values["attack"] in scene.attacks else {}
    shown["queries"]["hidden"] = "queries" not in options
    shown["steps"]["hidden"] = "queries" in options and "steps" not in options
    shown["missing_rate"]["unit"] = 100
    shown["image"]["high"] = len(scene.labels) - 1
    shown["shown_step"] |= {"high": max(1, last_step)}
    if values["shown_step"] is None:
        shown["shown_step"]["value"] = max(1, last_step)
    return shown


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def more_options(values: Values, scene: Scene) -> list[dict[str, Any]]:
    """The further options of the attack, from its row of the registry, with their values."""
    attack = scene.attacks.get(values["attack"])
    known = (
        {} if attack is None else {k: v for k, v in attack.options.items() if k not in OWN and _is_plain(v)}
    )
    return [{"name": name, "value": values["options"].get(name, default)} for name, default in known.items()]


def to_yaml(values: Values, notebook: Mapping[str, Any]) -> str:
    """Parameters for ``papermill -f`` that run ``04_attack`` on what is shown, after those of ``notebook``.

    All values, also those that notebook 4 has no parameter for, are in a comment, from which ``from_yaml``
    sets them again.
    """
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    line = yaml.safe_dump(own, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    names = {
        name: name if control.parameter is None else control.parameter for name, control in CONTROLS.items()
    }
    parameters = {**notebook, **{parameter: own[name] for name, parameter in names.items() if parameter}}
    head = "# papermill notebooks/04_attack.ipynb out.ipynb -k python3 -f THIS_FILE\n"
    return head + f"{MARK}{line}\n" + yaml.safe_dump(parameters, sort_keys=False)


def from_yaml(text: str, values: Values) -> dict[str, Any]:
    """The changes that a YAML text asks for: one that ``to_yaml`` wrote, or any mapping with names of
    controls. A value edited by hand wins over the explorer's line; names of other parameters are passed over.

    Raises:
        ValueError: for a text that is no YAML mapping with a name of a control, or a value of a wrong type.
    """
    marked = "".join(line[len(MARK) :] for line in text.splitlines() if line.startswith(MARK))
    try:
        parts = [load_yaml(part) for part in (marked or "{}", text)]
    except NotPlainYAML as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not all(isinstance(part or {}, dict) for part in parts):
        raise ValueError("the YAML must be a mapping such as 'eps: 0.3'")
    names = {control.parameter or name: name for name, control in CONTROLS.items()} | {
        name: name for name in CONTROLS
    }
    found = {names[name]: value for part in parts for name, value in (part or {}).items() if name in names}
    if not found:
        raise ValueError(f"no name of a control in this YAML; they are: {', '.join(CONTROLS)}")
    return {name: converted(name, value, values[name]) for name, value in found.items()}


def converted(name: str, value: Any, like: Any) -> Any:
    """A value as the control has it: of the type of ``like``; numbers may be written as '8/255'.

    Raises:
        ValueError: where it cannot be.
    """
    try:
        if name == "shown_step" or like is None:
            return value if value is None or name != "shown_step" else int(value)
        if isinstance(like, bool):
            if not isinstance(value, bool):
                raise TypeError
            return value
        if isinstance(like, float):
            over, _, under = str(value).partition("/")
            return float(over) / float(under or 1)
        if isinstance(like, int) and float(value) != int(float(value)):
            raise TypeError
        return type(like)(value)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{name} must be of type {type(like).__name__}, got {value!r}") from error
