"""The explorer: turn a knob, see the perturbation die. ``explore`` shows it in a notebook; the rooms behind it know no
widgets, except ``widgets``: ``knobs`` (what can be set), ``suite`` (attacks), ``compute``, ``draw``, ``page`` and ``still``
(pictures), ``worker`` (the thread). ``surface`` is another, smaller one: over the cells of an ablation.
"""

from atoplib.explorer.knobs import Knobs
from atoplib.explorer.surface import SurfaceExplorer, explore_surface
from atoplib.explorer.widgets import Explorer, explore

__all__ = ["Explorer", "Knobs", "SurfaceExplorer", "explore", "explore_surface"]
