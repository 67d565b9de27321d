"""The explorer: turn a knob, see the perturbation die. ``explore`` shows it in a notebook; the rooms behind it know no
widgets, except ``widgets``: ``knobs`` (what can be set), ``suite`` (attacks), ``compute``, ``draw``, ``page`` and ``still``
(pictures), ``worker`` (the thread).
"""

from atoplib.explorer.knobs import Knobs
from atoplib.explorer.widgets import Explorer, explore

__all__ = ["Explorer", "Knobs", "explore"]
