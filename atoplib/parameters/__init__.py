"""Parameters of the notebooks: their names, types, defaults, and what ``smoke`` makes of them.

A notebook's first code cell holds the same defaults as literals, for papermill to override; its second cell calls ``check``,
which stops it within a second if a name, a type or a value is wrong. papermill itself only warns of an unknown name.
"""

from atoplib.parameters.attacking import Attacking
from atoplib.parameters.base import LATEST, Parameters
from atoplib.parameters.checking import ParameterError, convert
from atoplib.parameters.looking import Ablate, CrossCheck, Report, Visualize
from atoplib.parameters.measuring import SEES, Attack, Compare, Measuring
from atoplib.parameters.training import FinetuneAtop, PretrainPurifier, PurifierTraining, TrainClassifier, Training

NOTEBOOKS: dict[str, type[Parameters]] = {
    item.STAGE: item
    for item in (TrainClassifier, PretrainPurifier, FinetuneAtop, Attack, Visualize, Compare, Ablate, Report, CrossCheck)
}
REPORT = Report.STAGE  # of what others measured: no notebook of a recipe

__all__ = [
    "LATEST",
    "NOTEBOOKS",
    "REPORT",
    "SEES",
    "Ablate",
    "Attack",
    "Attacking",
    "Compare",
    "CrossCheck",
    "FinetuneAtop",
    "Measuring",
    "ParameterError",
    "Parameters",
    "PretrainPurifier",
    "PurifierTraining",
    "Report",
    "TrainClassifier",
    "Training",
    "Visualize",
    "convert",
]
