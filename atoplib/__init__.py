"""Adversarial training on purification (AToP, ICLR 2024, arXiv 2401.16352): transforms, purifiers, losses,
attacks, evaluation.

The first four names are a whole first hour; the modules below are what the notebooks use. ``import atoplib``
loads none of them but ``hashing`` before it is asked for."""

import importlib
from typing import Any

__version__ = "0.2.0"

_FUNCTIONS = {
    "load_pretrained": "pretrained",
    "load_images": "data",
    "evaluate": "evaluation",
    "explore": "explorer",
}
_MODULES = (
    "attacks", "certification", "checkpoints", "classifiers", "contract", "data", "decisions", "defences",
    "evaluation", "explorer", "figures", "freezing", "hashing", "losses", "masking", "parameters", "pipeline",
    "pretrained", "progress", "purifiers", "runs", "training", "transforms",
)  # fmt: skip

__all__ = [*_FUNCTIONS, *_MODULES]

importlib.import_module("atoplib.hashing")  # first: it notes the source of every other as it is imported


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"atoplib.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"atoplib.{name}")
    raise AttributeError(f"module 'atoplib' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
