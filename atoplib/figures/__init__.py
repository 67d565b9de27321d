"""Pictures of what attack and purifier do to images, training curves, accuracies, and certificates beside attacks.

Every function returns a ``matplotlib.figure.Figure`` of its own, see ``drawing``. A notebook shows it once ``%matplotlib
inline`` was run; ``save_figure`` writes it.
"""

from atoplib.drawing import save_figure
from atoplib.figures.accuracies import accuracy_against, accuracy_bars
from atoplib.figures.certificate import certified_and_attacked
from atoplib.figures.curves import training_curves
from atoplib.figures.images import PurificationStages, masks_and_inputs, purification_rows
from atoplib.figures.tables import format_table

__all__ = [
    "PurificationStages",
    "accuracy_against",
    "accuracy_bars",
    "certified_and_attacked",
    "format_table",
    "masks_and_inputs",
    "purification_rows",
    "save_figure",
    "training_curves",
]
