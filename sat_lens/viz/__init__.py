"""Views of heads for notebooks, and pages; circuitsvis draws the attention.

A view displays itself in Jupyter, VS Code and Colab, and ``save_html`` writes it as a page that
opens without a network. What answers to the mouse is drawn here; static charts are those of
:mod:`sat_lens.figures`, in the page's light or dark colours.
"""

from sat_lens.viz.patterns import token_strings
from sat_lens.viz.report import write_report
from sat_lens.viz.views import (
    FigureView,
    View,
    attention,
    role_map,
    row_changes,
    tokens,
    top_tokens,
)

__all__ = [
    "FigureView",
    "View",
    "attention",
    "role_map",
    "row_changes",
    "token_strings",
    "tokens",
    "top_tokens",
    "write_report",
]
