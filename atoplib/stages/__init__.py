"""What notebooks 1 to 3 train: built from their parameters, trained into the run's directory, measured and saved; by this
process, or by several that torchrun starts.
"""

from atoplib.stages.build import BUILDERS, Stage, classifier_stage, finetuning_stage, pretraining_stage
from atoplib.stages.launch import COMPLAINT, TrainingFailed, train
from atoplib.stages.run import Trained, train_here, warning_of

__all__ = [
    "BUILDERS",
    "COMPLAINT",
    "Stage",
    "Trained",
    "TrainingFailed",
    "classifier_stage",
    "finetuning_stage",
    "pretraining_stage",
    "train",
    "train_here",
    "warning_of",
]
