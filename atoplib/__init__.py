"""AToP: adversarial training on purification (Lin et al., ICLR 2024): transforms, purifiers, losses, evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoplib.pretrained import load_pretrained

__all__ = ["__version__", "load_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load_pretrained`` from here, which imports torch only when it is asked for."""
    if name == "load_pretrained":
        from atoplib.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
