"""Honest numbers: accuracy under attacks with its interval, for every way to judge a random defence, by named protocols."""

from atoplib.evaluation.ablation import Cell, Setting, ablate, mask_surface, noise_sweep
from atoplib.evaluation.costs import Cost, cost_table, measure_cost
from atoplib.evaluation.measure import CLEAN, WORST, Evaluation, evaluate, with_worst_unseen
from atoplib.evaluation.protocols import (
    KNOWN,
    PROTOCOLS,
    Budget,
    PlannedAttack,
    Protocol,
    adjusted,
    lee_kim_indices,
    with_seen,
)
from atoplib.evaluation.provenance import attacked_norms, differences, training_attack, training_costs
from atoplib.evaluation.quality import Quality, purification_quality
from atoplib.evaluation.scores import Outcomes, Score, judge_draws, score, voted, weakest, worst_case
from atoplib.evaluation.versus import (
    Comparison,
    Pairing,
    compare,
    comparison_table,
    masked_gradients,
    pair,
    pairing_table,
    pairings,
)

__all__ = [
    "CLEAN",
    "KNOWN",
    "PROTOCOLS",
    "WORST",
    "Budget",
    "Cell",
    "Comparison",
    "Cost",
    "Evaluation",
    "Outcomes",
    "Pairing",
    "PlannedAttack",
    "Protocol",
    "Quality",
    "Score",
    "Setting",
    "ablate",
    "adjusted",
    "attacked_norms",
    "compare",
    "comparison_table",
    "cost_table",
    "differences",
    "evaluate",
    "judge_draws",
    "lee_kim_indices",
    "mask_surface",
    "masked_gradients",
    "measure_cost",
    "noise_sweep",
    "pair",
    "pairing_table",
    "pairings",
    "purification_quality",
    "score",
    "training_attack",
    "training_costs",
    "voted",
    "weakest",
    "with_seen",
    "with_worst_unseen",
    "worst_case",
]
