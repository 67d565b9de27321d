"""Training: one resumable loop over a step that stands in a notebook; accuracy and cost of what it makes."""

from atoplib.training.loop import TrainingDiverged, fit
from atoplib.training.measures import accuracy, flops
from atoplib.training.optimizers import DTYPES, compute_dtype

__all__ = ["DTYPES", "TrainingDiverged", "accuracy", "compute_dtype", "fit", "flops"]
