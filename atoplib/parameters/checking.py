"""Values from outside: what a shell, YAML or papermill hands on, as the types that parameters have."""

import difflib
import types
from collections.abc import Iterable
from typing import Any, get_args, get_origin


class ParameterError(ValueError):
    """A notebook was given a parameter that cannot be; the message names it and says what is allowed."""


def convert(name: str, value: Any, kind: Any) -> Any:
    """A value as the type that a parameter has; text such as ``8/255`` or ``1e-3``, as a shell or YAML hands it on, becomes
    a number where a number is wanted.

    Raises:
        ParameterError: if the type does not fit.
    """
    allowed = get_args(kind) if isinstance(kind, types.UnionType) else (get_origin(kind) or kind,)
    if type(None) in allowed and (value is None or value == "None"):  # YAML writes null, but the cells write None
        return None
    if float in allowed:
        if isinstance(value, str):
            try:
                numerator, slash, denominator = value.partition("/")
                return float(numerator) / (float(denominator) if slash else 1)
            except (ValueError, ZeroDivisionError):
                pass
        elif isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool)):
        return value
    wanted = " or ".join("None" if item is type(None) else item.__name__ for item in allowed)
    raise ParameterError(f"parameter {name!r} must be of type {wanted}, got {value!r} ({type(value).__name__})")


def check_foreign(run: str, classifier: str, options: dict, mean: list | None, std: list | None) -> None:
    """Raise ValueError unless parameters describe somebody's weights, or none: ``classifier_run`` a file of weights,
    ``classifier`` ``"package.module:function"`` that builds its network from ``classifier_options``, ``mean`` and ``std`` of
    the normalisation that it needs, per channel.
    """
    if not classifier:
        if options or mean is not None or std is not None:
            raise ValueError(
                "classifier_options, mean and std belong to somebody's network: name it by classifier = "
                "'package.module:function', or leave them out"
            )
        return
    module, colon, function = classifier.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"classifier must be 'package.module:function', which builds the network, got {classifier!r}")
    if not run.endswith((".pth", ".pt", ".safetensors")):
        raise ValueError(
            f"classifier = {classifier!r} builds the network of a file of weights, but classifier_run is {run!r}: give the "
            f"path of a .pth, .pt or .safetensors file"
        )
    if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
        raise ValueError(f"mean and std belong together, a number a channel, got mean = {mean} and std = {std}")
    for name, values in (("mean", mean), ("std", std)):
        for value in values or ():
            if isinstance(value, bool) or not isinstance(value, int | float) or (name == "std" and value <= 0):
                raise ValueError(f"{name} must be a list of {'positive ' if name == 'std' else ''}numbers, got {values}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'eps'?)`` for a name that is not known, "" where none is near: the one that begins it, or that it
    begins, before others that are spelled alike.
    """
    known = sorted(known)
    starts = [other for other in known if len(other) > 2 and name.lower().startswith(other)]
    starts += [other for other in known if len(name) > 2 and other.startswith(name.lower())]
    near = starts[:1] or difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
