"""Static figures (matplotlib) from tables, tensors and labels.

Everything here takes plain tables and tensors and gives a ``matplotlib`` figure; nothing knows
TransformerLens, and importing it leaves matplotlib's global state alone. Save a figure with
``figure.savefig("roles.pdf")``: PNG, SVG and PDF work without a display.

When not to use it: to look around interactively; :mod:`sat_lens.viz` is for that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_lens.figures.curves import growth_figure, scaling_curve_figure, training_figure
    from sat_lens.figures.maps import grid_map, role_map, sweep_map

# Imported when first used: pages need the marks and the layout beside them, and no matplotlib.
_PLACES = {
    "grid_map": "maps",
    "growth_figure": "curves",
    "role_map": "maps",
    "scaling_curve_figure": "curves",
    "sweep_map": "maps",
    "training_figure": "curves",
}

__all__ = [
    "grid_map",
    "growth_figure",
    "role_map",
    "scaling_curve_figure",
    "sweep_map",
    "training_figure",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"sat_lens.figures.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'sat_lens.figures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
