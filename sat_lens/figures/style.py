"""Figures of several panels in one style, the lines in them, and the files that they become."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sat_lens.vocabulary import INK, LINES, PAPER, QUIET, RULE, visible

# Words are drawn as they are: a $ in a name begins no formula.
plain_words = rc_context({"text.parse_math": False})
_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


class ShownFigure(Figure):
    """A matplotlib figure that a notebook displays although nobody imported pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


@plain_words
def new_figure(title: str | None, width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, below its title; None draws no title."""
    lines = [] if title is None else textwrap.wrap(visible(title), int(width * 11)) or [""]
    size = (width, height + 0.2 * len(lines))
    figure = ShownFigure(figsize=size, facecolor=PAPER, layout="constrained")
    if lines:
        figure.suptitle("\n".join(lines), size=10, color=INK, weight="bold", x=0.02, ha="left")
    return figure


@plain_words
def panels(
    count: int, title: str | None, *, across: int = 2, size: tuple[float, float] = (3.6, 2.5)
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels in the style of the library, and its axes.

    Args:
        count: How many panels.
        title: What was measured on what; None draws no title.
        across: How many panels stand in a row, at most.
        size: Width and height of one panel, in inches.

    Example:
        >>> from sat_lens.figures import panels
        >>> figure, axes = panels(3, "Three panels")
        >>> len(axes)
        3
    """
    across = min(count, across)
    down = math.ceil(count / across)
    figure = new_figure(title, size[0] * across, size[1] * down)
    drawn = [figure.add_subplot(down, across, i + 1) for i in range(count)]
    for axes in drawn:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(labelsize=7.5, colors=QUIET, length=2)
    return figure, drawn


def headline(panel: Axes, words: str) -> None:
    """Write the title of one panel.

    Example:
        >>> from sat_lens.figures import headline, panels
        >>> figure, (axes,) = panels(1, None)
        >>> headline(axes, "$5 a head")
        >>> axes.get_title(loc="left")
        '$5 a head'
    """
    panel.set_title(visible(words), size=8.5, color=INK, loc="left").set_parse_math(False)


def label(panel: Axes, *, x: str = "", y: str = "") -> None:
    """Label the axes of one panel.

    Example:
        >>> from sat_lens.figures import label, panels
        >>> figure, (axes,) = panels(1, None)
        >>> label(axes, x="step", y="norm")
        >>> axes.get_xlabel()
        'step'
    """
    panel.set_xlabel(visible(x) if x else "", size=8, color=QUIET)
    panel.set_ylabel(visible(y) if y else "", size=8, color=QUIET)


@plain_words
def lines(
    axes: Axes,
    table: pd.DataFrame,
    columns: dict[str, str],
    *,
    x: str,
    y: str = "",
    log_x: bool = True,
    log_y: bool = False,
    dashed: Sequence[str] = (),
    legend: bool = True,
) -> None:
    """Draw columns of a table against its index; what has no value leaves no gap.

    Args:
        axes: The panel.
        table: The index is the horizontal axis. Values that a logarithmic axis cannot show are
            left out; a 0 of the index stands at its left end.
        columns: Columns to draw, and what the legend calls them.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is.
        dashed: Columns drawn dashed and without marks: controls.
        legend: Whether the panel gets a legend.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import lines, panels
        >>> figure, (axes,) = panels(1, None)
        >>> table = pd.DataFrame({"norm": [1.0, 2.0]}, index=[1, 10])
        >>> lines(axes, table, {"norm": "norm of all parameters"}, x="step")
        >>> axes.get_xscale()
        'log'
    """
    places = table.index.to_numpy(dtype=float)
    for number, (name, words) in enumerate(columns.items()):
        values = table[name].to_numpy(dtype=float)
        keep = np.isfinite(values) & ((places >= 0) | (not log_x)) & ((values > 0) | (not log_y))
        style, color = "--" if name in dashed else "-o", LINES[number % len(LINES)]
        axes.plot(places[keep], values[keep], style, color=color, lw=1.6, ms=3,
                  label=visible(words))  # fmt: skip
    if log_x:
        logarithmic(axes, "x", multiples=(1,))
        if (places == 0).any() and (places > 0).any():
            # Linear from 0 to the first step, logarithmic from there.
            first = float(places[places > 0].min())
            axes.set_xscale("symlog", linthresh=first, linscale=0.4)
            axes.set_xlim(-0.15 * first, float(places.max()) * 1.3)
            _plain_numbers(axes.xaxis)
    if log_y:
        logarithmic(axes, "y")
    label(axes, x=x, y=y)
    if legend:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)


def logarithmic(
    axes: Axes, which: Literal["x", "y"], multiples: Sequence[float] | None = None
) -> None:
    """Make an axis logarithmic, with plain numbers at these multiples of the powers of ten.

    None takes as many as it needs to be read: all where it spans less than one power of ten, and
    1, 2 and 5 where it spans less than four.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    if multiples is None:
        multiples = range(1, 10) if high < 10 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    axis.set_major_locator(LogLocator(subs=multiples))
    _plain_numbers(axis)


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def figure_bytes(
    figure: Figure, file_format: str, *, salt: str = "sat_lens", for_page: bool = False
) -> bytes:
    """Return a figure as PNG, SVG or PDF; the same figure gives the same bytes.

    Args:
        figure: The figure.
        file_format: ``"png"``, ``"svg"`` or ``"pdf"``.
        salt: What makes the identifiers in an SVG differ from those of another one.
        for_page: Whether words stay words in an SVG, and the ground is left clear.

    Example:
        >>> from sat_lens.figures import figure_bytes, panels
        >>> figure_bytes(panels(1, None)[0], "pdf")[:4]
        b'%PDF'
    """
    buffer = io.BytesIO()
    letters = "none" if for_page else "path"
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": salt, "svg.fonttype": letters}):
        figure.savefig(
            buffer, format=file_format, dpi=200, metadata=_DATES.get(file_format, {}),
            transparent=for_page,
        )  # fmt: skip
    return buffer.getvalue()
