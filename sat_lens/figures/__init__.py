"""Static figures (matplotlib) from tables, tensors and labels.

Everything here takes plain tables and tensors and gives a ``matplotlib`` figure; nothing knows
TransformerLens, and importing it leaves matplotlib's global state alone. Save a figure with
``figure.savefig("roles.pdf")``: PNG, SVG and PDF work without a display.

When not to use it: to look around interactively; :mod:`sat_lens.viz` is for that.
"""

from sat_lens.figures.curves import growth_figure, scaling_curve_figure
from sat_lens.figures.maps import grid_map, role_map, sweep_map

__all__ = ["grid_map", "growth_figure", "role_map", "scaling_curve_figure", "sweep_map"]
