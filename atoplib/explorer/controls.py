"""The controls: one table of what can be set, from which follow checks, the page's fields, and the way to
papermill parameters and back."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from atoplib import files, parameters
from atoplib.attacks import ATTACKS
from atoplib.explorer.attack import (
    EACH,
    EFFORT,
    NO_ATTACK,
    TRANSFORM,
    Scene,
    Values,
    attacked_defence,
    is_attacking,
)
from atoplib.pipeline import AToPPipeline

THREAT_MODELS = {
    "white-box": "the gradient goes through transform, purifier and classifier",
    "bpda": "white-box, the gradient of transform and purifier replaced by the identity",
    "transfer": "the attack sees the classifier alone: this flatters a purifier",
}
TRANSFORMS = {  # title, and the settings that apply
    "none": ("none", ()),
    "rt1": ("RT1: patches", ("missing_rate",)),
    "rt2": ("RT2: noise, patches", ("missing_rate", "noise_std")),
    "rt3": ("RT3: noise, masks", ("noise_std", "num_masks")),
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
KEEP_STEP = {"shown_step", "sample", "votes", "rows", *TRANSFORM}  # other changes show the attack's end
MARK = "# explorer: "  # the line of a YAML text that only the explorer reads; to papermill it is a comment


class Control(NamedTuple):
    """One row of the table.

    Attributes:
        kind: ``range``, ``number``, ``menu``, ``check``, or ``""`` for a value that has a place of its own on
            the page.
        place: the part of the page that it is in.
        high: of the slider at first; ``most`` is what is allowed.
        unit: what the slider shows is so many times the value.
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
    unit: int = 1
    parameter: str | None = None


# fmt: off
CONTROLS = {control.name: control for control in (
    Control("image", "image", "range", "image", "number of the image", 0),
    Control("rows", "defences", "", "", "defences that are shown, one below the other", [], parameter=""),
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
            "share of patches dropped", 0.25, 0, 0.95, 0.01, 0.99, unit=100),
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
    Control("sample", "", "", "", "which sample is pictured", 0, parameter=""),
    Control("shown_step", "step", "range", "player",
            "show the attack after so many steps", None, parameter=""),
)}
PRESETS = {
    "Clean": ("no attack", {"attack": NO_ATTACK}),
    "Transfer": ("PGD-20 on the classifier alone, as purification used to be measured",
                 {"attack": "pgd", "threat_model": "transfer", "steps": 20, "eot_samples": 1}),
    "White-box": ("PGD-10 through the whole pipeline",
                  {"attack": "pgd", "threat_model": "white-box", "steps": 10, "eot_samples": 1}),
    "Strict": ("PGD-200 with 20 samples a gradient through the whole pipeline: takes its time",
               {"attack": "pgd", "threat_model": "white-box", "steps": 200, "eot_samples": 20}),
}
# fmt: on
TYPES = {name: type(control.default) for name, control in CONTROLS.items()} | {"shown_step": int | None}


def menus(values: Values, scene: Scene) -> dict[str, list]:
    """The entries of every menu, in groups: [group, [[value, label, description], ...]]; of an attack also
    why it is disabled where a random model is attacked, or ""."""
    norms = ATTACKS[values["attack"]].norms if values["attack"] in ATTACKS else (values["norm"],)
    attacks: dict[str, list] = {"": [[NO_ATTACK, "none", "the clean image"]]}
    for name, attack in ATTACKS.items():
        family = "by gradients" if attack.gradient else "without gradients"
        attacks.setdefault("torchattacks" if ":" in name else family, []).append(
            [name, attack.title, attack.description, "" if attack.stochastic else "deterministic models only"]
        )
    return {
        "attack": list(map(list, attacks.items())),
        "threat_model": [["", [[name, name, text] for name, text in THREAT_MODELS.items()]]],
        "transform": [["", [[name, title, ""] for name, (title, _) in TRANSFORMS.items()]]],
        "attacked": [
            ["", [[EACH, "each defence", "the attack is made on each defence itself"]]],
            ["one image for all, made on", [[name, name, ""] for name in scene.defences]],
        ],
        "norm": [["", [[norm, UNITS[norm][0] if norm in UNITS else norm, ""] for norm in norms]]],
        "target": [
            ["", [[-1, "none", "any other class"]]],
            ["", [[number, name, ""] for number, name in enumerate(scene.classes)]],
        ],
    }


def check(values: Values, scene: Scene) -> dict[str, Any]:
    """The values, each of its type; ValueError, naming what is allowed, for one that the scene does not have
    or that is out of range."""
    rules = {
        c.name: parameters.between(c.low, c.most) for c in CONTROLS.values() if c.kind in ("range", "number")
    }
    for name, groups in menus(values, scene).items():
        rules[name] = parameters.one_of(*(value for _, entries in groups for value, *_ in entries))
    rules["rows"] = parameters.each(parameters.one_of(*scene.defences))
    rules["image"] = parameters.between(0, len(scene.labels) - 1)
    rules["eps"] = parameters.between(0, 1.0 if values["norm"] == "linf" else math.inf)
    return parameters.check({**values, "__annotations__": TYPES}, **rules).as_dict()


def changed(values: Values, changes: Mapping[str, Any], scene: Scene, start: Values) -> dict[str, Any]:
    """The values after some changes, and what follows from them: another attack has other norms and options,
    another norm another radius; no image has its own class as target; whatever changes the attack shows its
    end.

    Raises:
        ValueError: as ``check``, or for a value of a wrong type.
    """
    new = {**values, **changes}
    attack = ATTACKS.get(new["attack"])
    if attack is not None and new["attack"] != values["attack"]:
        new["options"] = changes.get("options", {})
        new["target"] = new["target"] if attack.targeted else -1
        new["norm"] = new["norm"] if new["norm"] in attack.norms else attack.norms[0]
    if new["norm"] != values["norm"] and "eps" not in changes:
        new["eps"] = start["eps"] if new["norm"] == start["norm"] else scene.usual[new["norm"]]
    if not KEEP_STEP.issuperset(changes):
        new["shown_step"] = new["shown_step"] if "shown_step" in changes else None
    if {"image", "attack"}.intersection(changes):
        new["sample"] = changes.get("sample", 0)
    new = check(new, scene)
    return new | {"target": -1} if new["target"] == int(scene.labels[new["image"]]) else new


def converted(name: str, value: Any) -> Any:
    """A value as the control has it; numbers may be written as '8/255'. ValueError where it cannot be, and
    for another name."""
    return parameters.convert(name, value, TYPES[parameters.one_of(*CONTROLS)(name)])


def unused(values: Values, scene: Scene) -> dict[str, str]:
    """The controls that change nothing now, and why; what is not known before a defence is loaded counts as
    used."""
    modules = [scene.loaded.get(name) for name in values["rows"]]
    bare = [module is not None and not isinstance(module, AToPPipeline) for module in modules]
    purified = [isinstance(module, AToPPipeline) for module in modules]
    attack = ATTACKS.get(values["attack"])
    deterministic = not any(scene.is_random(name, values) for name in values["rows"])
    of_attacks = ("threat_model", "attacked", *EFFORT, "target", "grey", "norm", "shown_step")
    reasons = [  # the first that holds is said
        (not is_attacking(values), "no attack", of_attacks),
        (attack is None, "no attack", ("eps",)),
        (deterministic, "nothing random here", ("votes", "sample", "eot_samples")),
        (all(bare), "no purifier here", (*TRANSFORM, "threat_model")),
        (
            True,
            f"not in the transform {values['transform']}",
            set(TRANSFORM[1:]).difference(TRANSFORMS[values["transform"]][1]),
        ),
    ]
    if attack is not None:
        reasons += [
            (True, f"{attack.title} has none", set(EFFORT).difference(attack.options)),
            (len(attack.norms) == 1, f"{attack.title} has this norm alone", ("norm",)),
            (not attack.targeted, f"{attack.title} has no targets", ("target",)),
            (
                values["threat_model"] == "transfer" and all(purified),
                "the classifier alone is not random",
                ("eot_samples",),
            ),
        ]
    return {name: why for holds, why, names in reversed(reasons) if holds for name in names}


def described(values: Values, scene: Scene) -> dict[str, dict[str, Any]]:
    """What the page shows of each control: its row of the table, value, entries, and why it is disabled."""
    reasons, entries = unused(values, scene), menus(values, scene)
    shown = {
        name: control._asdict()
        | {"value": values[name], "why": reasons.get(name), "entries": entries.get(name)}
        for name, control in CONTROLS.items()
    }
    shown["attack"]["random"] = values["threat_model"] != "transfer" and any(
        scene.is_random(attacked_defence(values, name), values) for name in values["rows"]
    )
    unit, high, step = UNITS.get(values["norm"], (values["norm"], 1.0, 0.01))
    if values["norm"] == "linf" and scene.usual["linf"] < 0.1:  # whatever eps is now
        shown["eps"] |= {"unit": 255}
        high, step = 32 / 255, 0.5 / 255
    shown["eps"] |= {"high": high, "step": step, "label": f"{unit} {CONTROLS['eps'].label}"}
    shown["image"]["high"] = len(scene.labels) - 1
    shown["target"]["entries"][1][1][int(scene.labels[values["image"]])].append("the image's own class")
    options = ATTACKS[values["attack"]].options if values["attack"] in ATTACKS else {}
    shown["options"]["entries"] = [
        [name, values["options"].get(name, default)]
        for name, default in options.items()
        if name not in EFFORT and (default is None or isinstance(default, bool | int | float | str))
    ]
    return shown


def to_yaml(values: Values, notebook: Mapping[str, Any]) -> str:
    """Parameters for ``papermill -f`` that run ``04_attack`` on what is shown, after those of ``notebook``.

    All values, also those that notebook 4 has no parameter for, are in a comment, from which ``from_yaml``
    sets them again.
    """
    mapped = {c.parameter or name: values[name] for name, c in CONTROLS.items() if c.parameter != ""}
    line, lines = (
        [f"{k}: {json.dumps(v)}" for k, v in each.items()] for each in (values, {**notebook, **mapped})
    )
    return "\n".join(
        [
            "# papermill notebooks/04_attack.ipynb out.ipynb -k python3 -f THIS_FILE",
            f"{MARK}{{{', '.join(line)}}}",
            *lines,
            "",
        ]
    )


def from_yaml(text: str) -> dict[str, Any]:
    """The changes that a YAML text asks for: one that ``to_yaml`` wrote, or any mapping with names of
    controls. A value edited by hand wins over the explorer's line; names of other parameters are passed over.

    Raises:
        ValueError: for a text that is no YAML mapping with a name of a control, or a value of a wrong type.
    """
    marked = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    names = {c.parameter: name for name, c in CONTROLS.items() if c.parameter} | {n: n for n in CONTROLS}
    changes = {}
    for part in (*marked, text):
        content = files.read_yaml(part) or {}
        if not isinstance(content, dict):
            raise ValueError("the YAML must be a mapping such as 'eps: 0.3'")
        changes |= {names[key]: value for key, value in content.items() if key in names}
    if not changes:
        raise ValueError(f"no name of a control in this YAML; they are: {', '.join(CONTROLS)}")
    return {name: converted(name, value) for name, value in changes.items()}
