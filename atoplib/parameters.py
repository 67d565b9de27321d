"""The parameters of a notebook: stated once, in its parameters cell, and checked by the cell after it.

The first cell, tagged ``parameters``, holds annotated defaults; the second checks whatever stands there by
then::

    eps: float = 8 / 255  # radius of the attack, images in [0, 1]
    epochs: int = 6

    from atoplib.parameters import at_least, between, check
    p = check(globals(), eps=between(0, 1), epochs=at_least(1), smoke=dict(epochs=1))

The type comes from the annotation, the rule from the keyword. A batch runs the same two cells by ``read``. No
torch here."""

import ast
import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fractions import Fraction
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

WEIGHTS = (".safetensors", ".pth", ".pt")  # how files of weights end
Rule = Callable[[Any], Any]


class ParameterError(ValueError):
    """A parameter that cannot be; the message names it and says what is allowed."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class MissingFileError(FileNotFoundError):
    """A file or run that is not there; the message says what to do, and IPython shows it alone."""

    _render_traceback_ = ParameterError._render_traceback_


class Parameters:
    """The checked parameters of a notebook, as attributes; they do not change.

    Attributes:
        run_fields: which of them name runs of which notebook, by ``run_of``.
    """

    def __init__(self, values: Mapping[str, Any], run_fields: Mapping[str, "RunOf"] | None = None) -> None:
        self.__dict__.update(values, run_fields=dict(run_fields or {}))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"parameters do not change: set {name} in the parameters cell, or use p.replace({name}=...)"
        )

    def __repr__(self) -> str:
        return f"Parameters({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, Any]:
        """All of them by name, as JSON values."""
        return {name: value for name, value in self.__dict__.items() if name != "run_fields"}

    def replace(self, **changes: Any) -> "Parameters":
        """The same with some values changed.

        Raises:
            ParameterError: for a name that is no parameter.
        """
        check_known(changes, self.as_dict())
        return Parameters(self.as_dict() | changes, self.run_fields)


class RunOf(NamedTuple):
    """The rule of a parameter that names a run of another notebook: ``latest``, a run's name, a path, a file
    of weights, ``pretrained``, or "" for none.

    Attributes:
        stage: that notebook's name.
        wanted: parameters of the run that ``latest`` means, beside the data set and its image size.
        several: the parameter is a dict of such names.
    """

    stage: str = ""
    wanted: Mapping[str, Any] = {}
    several: bool = False


def run_of(stage: str, **wanted: Any) -> RunOf:
    """The rule of a parameter that names one run of the notebook ``stage``, whose parameters are as
    ``wanted``.
    """
    return RunOf(stage, wanted)


# The rule of a parameter that names runs by names of one's own: {NAME: RUN} or {NAME: {KEY: RUN}}.
runs_of = partial(RunOf, several=True)


def between(low: float, high: float) -> Rule:
    """low <= value <= high."""
    return _rule(lambda value: low <= value <= high, f"must lie in {low:g}..{high:g}")


def at_least(low: float) -> Rule:
    """value >= low."""
    return _rule(lambda value: value >= low, f"must be at least {low:g}")


def above(low: float, most: float = float("inf")) -> Rule:
    """low < value <= most."""
    return _rule(
        lambda value: low < value <= most,
        f"must be above {low:g}" + ("" if most == float("inf") else f", at most {most:g}"),
    )


def one_of(*allowed: Any) -> Rule:
    """value is one of these."""
    return _rule(lambda value: value in allowed, f"must be one of {', '.join(map(str, allowed))}")


def each(rule: Rule) -> Rule:
    """The rule for every element of a list, which is not empty."""

    def of_list(values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("must not be empty")
        return [rule(value) for value in values]

    return of_list


def check_settings(**settings: tuple[Any, Rule]) -> None:
    """Raise ParameterError, with the name, unless each (value, rule) fits."""
    for name, (value, rule) in settings.items():
        try:
            rule(value)
        except ValueError as error:
            raise ParameterError(f"{name} {error}") from error


def check_counts(**counts: int) -> None:
    """Raise ValueError unless every number is whole and at least 1."""
    for rule in (at_least(1), _rule(lambda value: isinstance(value, Integral), "must be a whole number")):
        check_settings(**{name: (count, rule) for name, count in counts.items()})


def _rule(holds: Callable[[Any], bool], says: str) -> Rule:
    def rule(value: Any) -> Any:
        with suppress(TypeError):  # a text where a number belongs
            if holds(value):  # NaN never does
                return value
        raise ValueError(f"{says}, got {value!r}")

    return rule


# Rules of what nearly every notebook takes.
COMMON: dict[str, Rule] = {
    "experiment": _rule(
        lambda value: Path(value).name == value and value[:1] not in ("", "."), "must be a plain folder name"
    ),
    "seed": between(0, 2**31 - 1),
    "image_size": at_least(1),
    "max_train": at_least(1),
    "max_test": at_least(1),
    "max_batch": at_least(1),
}


def check(
    namespace: Mapping[str, Any], *, smoke: Mapping[str, Any] | None = None, **rules: Rule
) -> Parameters:
    """The annotated parameters in a notebook's namespace, of the right types and as their rules want them.

    Args:
        namespace: the notebook's ``globals()``.
        smoke: values that replace others when the parameter ``smoke`` is True: a few images and steps.
        rules: by parameter; each takes a value, and raises ValueError unless it fits. None passes where the
            type allows it.

    Raises:
        ParameterError: for a parameter that papermill injected and this notebook does not have, a rule
            without a parameter, a wrong type, or a value that is not allowed.
    """
    kinds = namespace.get("__annotations__", {})
    if not kinds:
        raise ParameterError("the parameters cell was not run: run it first, then this one")
    # what papermill's cell assigned, as the kernel's history of inputs tells
    cells = [source for source in namespace.get("In", []) if source.lstrip().startswith("# Parameters")]
    nodes = [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    injected = [node.id for node in nodes if isinstance(node.ctx, ast.Store)]
    check_known((*injected, *rules, *(smoke or {})), kinds)
    values = {name: convert(name, namespace[name], kind) for name, kind in kinds.items()}
    check_settings(
        **{
            name: (values[name], rule)
            for name, rule in (COMMON | rules).items()
            if callable(rule) and values.get(name) is not None
        }
    )
    _check_weights(values)
    if smoke and values.get("smoke"):
        values |= smoke
    return Parameters(values, {name: rule for name, rule in rules.items() if isinstance(rule, RunOf)})


def read(notebook: Path, overrides: Mapping[str, Any] | None = None) -> Parameters:
    """The parameters that a notebook would have with some of them overridden: its two cells are run here,
    without a kernel.

    Raises:
        ParameterError: as ``check``; the message names the notebook.
    """
    every = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in every if cell["cell_type"] == "code"]
    tagged = [i for i, cell in enumerate(cells[:-1]) if "parameters" in cell["metadata"].get("tags", [])]
    if not tagged:
        raise ParameterError(
            f"{notebook.name} has no cell tagged 'parameters' with a cell after it that checks them"
        )
    namespace: dict[str, Any] = {"__name__": "parameters", "__annotations__": {}}
    # the kit's own cells, or the user's: what a kernel would run
    exec("".join(cells[tagged[0]]["source"]), namespace)
    check_known(overrides or {}, namespace["__annotations__"], f"{notebook.stem} has no parameter")
    namespace |= overrides or {}
    try:
        exec("".join(cells[tagged[0] + 1]["source"]), namespace)
        return namespace["p"]
    except ParameterError as error:
        raise ParameterError(f"{notebook.stem}: {error}") from error


def convert(name: str, value: Any, kind: Any) -> Any:
    """A value as the type that a parameter has; text such as ``8/255`` or ``1e-3``, as a shell or YAML hands
    it on, becomes a number where a float is wanted.

    Raises:
        ParameterError: if the type does not fit.
    """
    allowed = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    if type(None) in allowed and (
        value is None or value == "None"
    ):  # YAML writes null, but the cells write None
        return None
    for each_kind in allowed:
        base, inner = get_origin(each_kind) or each_kind, get_args(each_kind)
        if base is float and isinstance(value, str):
            try:
                return float(Fraction(value.replace(" ", "")))
            except (ValueError, ArithmeticError):  # 1e999, 1/0
                continue
        if base is float and type(value) in (int, float):
            return float(value)
        if base is list and isinstance(value, list | tuple):
            return [
                convert(f"{name}[{i}]", item, inner[0]) if inner else item for i, item in enumerate(value)
            ]
        if isinstance(value, base) and (base is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join(
        "None" if item is type(None) else getattr(item, "__name__", str(item)) for item in allowed
    )
    raise ParameterError(
        f"parameter {name!r} must be of type {wanted}, got {value!r} ({type(value).__name__})"
    )


def _check_weights(values: Mapping[str, Any]) -> None:
    """Raise ParameterError unless the parameters of somebody's own weights, where a notebook has them, fit
    together.
    """
    if not {"classifier_run", "classifier", "mean", "std"} <= values.keys():
        return
    run, maker, mean, std = (values[name] for name in ("classifier_run", "classifier", "mean", "std"))
    has_more = values.get("classifier_options") or mean is not None or std is not None
    faults = (
        (
            not maker and has_more,
            "classifier_options, mean and std belong to somebody's network: name it by classifier = "
            "'package.module:function', or leave them out",
        ),
        (
            maker and not re.fullmatch(r"\w+(\.\w+)*:\w+", maker),
            f"classifier must be 'package.module:function', which builds the network, got {maker!r}",
        ),
        (
            maker and not any(f'{ending}"' in json.dumps(values) for ending in WEIGHTS),
            f"classifier = {maker!r} builds the network of a file of weights, but classifier_run is {run!r} "
            f"and no other parameter names one: give the path of a .pth, .pt or .safetensors file",
        ),
        (
            maker and ({len(mean or ()), len(std or ())} not in ({0}, {3}) or min(std or [1]) <= 0),
            f"mean and std belong together, three numbers each, those of std positive, got mean = {mean} and "
            f"std = {std}",
        ),
    )
    for wrong, message in faults:
        if wrong:
            raise ParameterError(message)


def check_known(names: Iterable[str], known: Iterable[str], none: str = "there is no parameter") -> None:
    """Raise ParameterError for a name that is not known, and suggest one: that begins it, or that it begins,
    before others that are spelled alike.

    Args:
        none: what the message begins with.
    """
    known = sorted(known)
    for name in (str(name) for name in names if name not in known):
        starts = [other for other in known if len(other) > 2 and name.lower().startswith(other)]
        starts += [other for other in known if len(name) > 2 and other.startswith(name.lower())]
        near = [
            f" (did you mean {other!r}?)" for other in starts + difflib.get_close_matches(name, known, n=1)
        ]
        raise ParameterError(f"{none} {name!r}{''.join(near[:1])}; allowed: {', '.join(known)}")
