"""Honest numbers: accuracy under attacks with its interval, by every decision rule of a random defence, by
named protocols."""

from atoplib.evaluation.measure import evaluate
from atoplib.evaluation.protocols import PROTOCOLS, Protocol, Row, images_of, radii, single
from atoplib.evaluation.results import (
    CLEAN,
    PUBLISHED,
    WORST,
    Evaluation,
    compare_attacks,
    compare_defences,
    eps_text,
    leaders,
    markdown_table,
    masked_gradients,
    mcnemar,
)

__all__ = [
    "CLEAN",
    "PROTOCOLS",
    "PUBLISHED",
    "WORST",
    "Evaluation",
    "Protocol",
    "Row",
    "compare_attacks",
    "compare_defences",
    "eps_text",
    "evaluate",
    "images_of",
    "leaders",
    "markdown_table",
    "masked_gradients",
    "mcnemar",
    "radii",
    "single",
]
