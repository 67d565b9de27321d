"""Pictures of what attack and purifier do to images, accuracies, training curves, and certificates beside
attacks.

Every function returns a ``matplotlib.figure.Figure`` of its own, which pyplot does not know. A notebook shows
it once ``%matplotlib inline`` was run; ``save_figure`` writes it.
"""

from atoplib.figures.charts import (
    accuracy_bars,
    accuracy_over_eps,
    attack_heatmap,
    parameter_lines,
    training_curves,
)
from atoplib.figures.images import image_grid, purification_grid, purification_stages, telling_images
from atoplib.figures.style import eps_text, save_figure

__all__ = [
    "accuracy_bars",
    "accuracy_over_eps",
    "attack_heatmap",
    "eps_text",
    "image_grid",
    "parameter_lines",
    "purification_grid",
    "purification_stages",
    "save_figure",
    "telling_images",
    "training_curves",
]
