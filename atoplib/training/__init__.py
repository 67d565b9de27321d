"""Training: one resumable loop over a step that stands in a notebook; accuracy and cost of what it makes."""

from atoplib.training.loop import TrainingDiverged, fit
from atoplib.training.parts import DTYPES, accuracy, compute_dtype, flops

__all__ = ["DTYPES", "TrainingDiverged", "accuracy", "compute_dtype", "fit", "flops"]
