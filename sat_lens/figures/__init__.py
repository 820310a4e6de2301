"""Static figures (matplotlib) from tables, tensors and labels.

A function takes plain tables and tensors and returns a ``matplotlib`` figure; nothing here knows
a model or a result. Save a figure with ``figure.savefig("roles.pdf")``: PNG, SVG and PDF work
without a display. Importing it neither imports matplotlib nor changes its global state.

``panels``, ``lines``, ``headline`` and ``label`` draw a figure of your own in the same style. For
an interactive view of heads see :mod:`sat_lens.viz`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_lens.figures.drawing import (
        column_figure,
        figure_bytes,
        growth_figure,
        headline,
        label,
        lines,
        panels,
        role_figure,
        scale_range_figure,
        scaling_curve_figure,
        sweep_figure,
        training_figure,
    )

__all__ = [
    "column_figure",
    "figure_bytes",
    "growth_figure",
    "headline",
    "label",
    "lines",
    "panels",
    "role_figure",
    "scale_range_figure",
    "scaling_curve_figure",
    "sweep_figure",
    "training_figure",
]


def __getattr__(name: str) -> Any:
    # Results import this room for their plots; matplotlib costs half a second, once one is drawn.
    if name in __all__:
        return getattr(importlib.import_module("sat_lens.figures.drawing"), name)
    raise AttributeError(f"module 'sat_lens.figures' has no attribute {name!r}")
