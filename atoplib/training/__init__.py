"""The three stages of AToP: train a classifier, pre-train a purifier, fine-tune the purifier adversarially."""

from atoplib.training.classifier import accuracy, classifier_step
from atoplib.training.cost import training_flops
from atoplib.training.loop import (
    DTYPES,
    Batch,
    TrainingDiverged,
    TrainingSettings,
    Updater,
    compute_dtype,
    fit,
    learning_rate_at,
)
from atoplib.training.purifier import FineTuningAttack, purifier_step

__all__ = [
    "DTYPES",
    "Batch",
    "FineTuningAttack",
    "TrainingDiverged",
    "TrainingSettings",
    "Updater",
    "accuracy",
    "classifier_step",
    "compute_dtype",
    "fit",
    "learning_rate_at",
    "purifier_step",
    "training_flops",
]
