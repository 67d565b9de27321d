"""Honest numbers: accuracy under attacks with its interval, for every way to judge a random defence, by named protocols."""

from atoplib.evaluation.ablation import Cell, Setting, ablate, mask_surface, noise_sweep
from atoplib.evaluation.measure import CLEAN, WORST, Evaluation, evaluate
from atoplib.evaluation.protocols import PROTOCOLS, Budget, PlannedAttack, Protocol, adjusted, lee_kim_indices
from atoplib.evaluation.quality import Quality, purification_quality
from atoplib.evaluation.scores import Outcomes, Score, judge_draws, score, worst_case
from atoplib.evaluation.versus import Comparison, compare, comparison_table

__all__ = [
    "CLEAN",
    "PROTOCOLS",
    "WORST",
    "Budget",
    "Cell",
    "Comparison",
    "Evaluation",
    "Outcomes",
    "PlannedAttack",
    "Protocol",
    "Quality",
    "Score",
    "Setting",
    "ablate",
    "adjusted",
    "compare",
    "comparison_table",
    "evaluate",
    "judge_draws",
    "lee_kim_indices",
    "mask_surface",
    "noise_sweep",
    "purification_quality",
    "score",
    "worst_case",
]
