"""Values from outside: what a shell, YAML or papermill hands on, as the types that parameters have."""

import types
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
    if value is None and type(None) in allowed:
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
