"""Checks of arguments, and the wording that errors of several modules share: an error names the value that was wrong,
what is allowed and what to do next, on one line.
"""

import torch

ROOM = "free some space, or choose another data_dir"


def check_positive(argument: str, value: object) -> None:
    """Raise ValueError unless the value is a whole number of at least 1, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{argument} is {value!r}: give a whole number of at least 1, or None")


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device with its index. Raises ValueError for one that this machine lacks."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}): give device='cpu'") from error


def one_line(error: BaseException) -> str:
    """Return what an error says on one line, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
