"""Curves: measures against the inverse temperature, and norms against training steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sat_lens.errors import ArgumentError
from sat_lens.figures import marks
from sat_lens.figures.layout import measure_groups, scale_places, scale_text, tick_scales
from sat_lens.figures.shown import ShownFigure, check_frame

INK, QUIET = "#222222", "#666666"
# What is drawn of a training run. S can be negative, and its control belongs beside it.
PANELS = {
    "norms": ("norm", "norm_grown", "qk_product", "ov_product"),
    "saturation": ("cos_saturated", "cos_random", "S", "lean"),
    "loss (nats per token)": ("loss", "loss_saturated"),
}
CONTROLS = ("cos_random",)


def scaling_curve_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw every measure against the inverse temperature, one panel a measure.

    The axis is logarithmic; 0 and infinity stand at its ends, apart from the rest.

    Args:
        frame: A row a scale (the index), a column a measure, as ``ScalingCurve.frame()`` gives it.
        title: What was measured on what.

    Raises:
        ArgumentError: The table is empty.

    Example:
        >>> import math
        >>> import pandas as pd
        >>> from sat_lens.figures import scaling_curve_figure
        >>> frame = pd.DataFrame({"loss": [8.0, 2.0, 3.0]}, index=[0.0, 1.0, math.inf])
        >>> [text.get_text() for text in scaling_curve_figure(frame, "t").axes[0].get_xticklabels()]
        ['0', '1', '∞']
    """
    check_frame(frame)
    if frame.empty or not len(frame.columns):
        raise ArgumentError(
            "Needed a table with a row a scale and a column a measure; it is empty."
        )
    ordered = frame.sort_index()
    groups = measure_groups([str(name) for name in frame.columns])
    scales = [float(c) for c in ordered.index]
    places = scale_places(scales)
    inside = [i for i, c in enumerate(scales) if 0 < c < math.inf]
    figure, panels = _panels(len(groups), title)
    for index, (axes, (words, names)) in enumerate(zip(panels, groups.items(), strict=True)):
        for name, color in zip(names, _line_colors(index, len(names)), strict=True):
            values = ordered[name].to_numpy(dtype=float)
            axes.plot([places[i] for i in inside], values[inside], color=color, lw=1.6)
            axes.plot(places, values, "o", color=color, ms=3.5, label=name.rpartition("_")[2])
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=6.5, ncols=math.ceil(len(names) / 6))
        if 1.0 in scales:
            axes.axvline(0.0, color="#CCCCCC", lw=0.8, zorder=0)
        chosen = tick_scales(scales, most=7)
        ticks = [places[scales.index(c)] for c in chosen]
        axes.set_xticks(ticks, [scale_text(c) for c in chosen])
        axes.set_xlabel("inverse temperature c", size=8, color=QUIET)
        axes.set_title(words, size=8.5, color=INK, loc="left").set_parse_math(False)
    return figure


def growth_figure(
    frame: pd.DataFrame,
    title: str,
    *,
    x: str = "step",
    columns: Sequence[str] | None = None,
    log_x: bool = True,
    log_y: bool = True,
) -> Figure:
    """Draw measures against training steps, one line a column.

    Args:
        frame: A row a step.
        title: What was measured on what.
        x: The column of the horizontal axis; the index is taken where there is no such column.
        columns: Which columns to draw; None is every column of numbers.
        log_x: Whether the steps are on a logarithmic axis; a step of 0 then stands at its left end.
        log_y: Whether the values are; values of 0 or less are then left out.

    Raises:
        ArgumentError: The table is empty, or a column is missing.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import growth_figure
        >>> frame = pd.DataFrame({"step": [1, 10, 100], "norm": [1.0, 2.0, 4.0]})
        >>> growth_figure(frame, "t").axes[0].get_xscale()
        'log'
    """
    check_frame(frame)
    steps = frame[x] if x in frame.columns else frame.index.to_series()
    numeric = [str(c) for c in frame.select_dtypes("number").columns if c != x]
    names = list(numeric if columns is None else columns)
    missing = [name for name in names if name not in frame.columns]
    if frame.empty or missing or not names:
        raise ArgumentError(
            f"Needed a table with rows and the columns {', '.join(names) or 'of some number'}; "
            f"found {len(frame)} rows and {', '.join(map(str, frame.columns)) or 'no columns'}."
        )
    figure, (axes,) = _panels(1, title)
    _draw(axes, steps, frame[names], log_x, log_y)
    axes.set_xlabel(x, size=8, color=QUIET)
    if len(names) > 1:
        axes.legend(
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), borderpad=0
        )
    else:
        axes.set_ylabel(names[0].replace("_", " "), size=8, color=QUIET)
    return figure


def training_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw a training run: norms, saturation with its control, and losses, a panel each.

    Norms are on a logarithmic axis, the rest is not. What was not measured is left out.

    Args:
        frame: A row a step (the index), as ``NormGrowth.frame()``, ``SaturationTracker.frame()``
            and ``read_training_log()`` give it.
        title: What was measured on what.

    Raises:
        ArgumentError: The table has none of the columns that are drawn.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import training_figure
        >>> frame = pd.DataFrame({"norm": [1.0, 2.0], "S": [-0.1, 0.5], "cos_random": [0.9, 0.6]})
        >>> [axes.get_title(loc="left") for axes in training_figure(frame, "t").axes]
        ['norms', 'saturation']
    """
    check_frame(frame)
    measured = set(frame.columns[frame.notna().any()])
    found = {words: [name for name in names if name in measured] for words, names in PANELS.items()}
    groups = {words: names for words, names in found.items() if names}
    if not groups:
        known = ", ".join(name for names in PANELS.values() for name in names)
        raise ArgumentError(
            f"Needed a table with some of the columns {known}; found "
            f"{', '.join(map(str, frame.columns)) or 'none'}."
        )
    figure, panels = _panels(len(groups), title)
    for axes, (words, names) in zip(panels, groups.items(), strict=True):
        _draw(axes, frame.index.to_series(), frame[names], True, words == "norms")
        axes.set_title(words, size=8.5, color=INK, loc="left")
        axes.set_xlabel("step", size=8, color=QUIET)
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    return figure


def _draw(
    axes: Axes, steps: pd.Series[Any], columns: pd.DataFrame, log_x: bool, log_y: bool
) -> None:
    """Draw a line a column, dashed where it is a control; what has no value leaves no gap."""
    for name, color in zip(columns, _cycle(len(columns.columns)), strict=True):
        values = columns[name]
        keep = values.notna() & ((steps >= 0) | (not log_x)) & ((values > 0) | (not log_y))
        drawn = (steps[keep].to_numpy(), values[keep].to_numpy())
        style = "--" if name in CONTROLS else "-o"
        axes.plot(*drawn, style, color=color, lw=1.6, ms=3, label=str(name).replace("_", " "))
    _scale_steps(axes, steps, log_x)
    axes.set_yscale("log" if log_y else "linear")
    low, high = axes.get_ylim()
    if log_y and high < 1e4 * low:
        multiples = range(1, 10) if high < 10 * low else (1, 2, 5)
        axes.yaxis.set_major_locator(LogLocator(subs=multiples))
    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if log:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _scale_steps(axes: Axes, steps: pd.Series[Any], log: bool) -> None:
    """Make the axis of steps logarithmic; with a step of 0, linear from there to the first one."""
    positive = steps[steps > 0]
    if not log or positive.empty:
        return
    if bool((steps > 0).all()):
        axes.set_xscale("log")
        return
    first = float(positive.min())
    axes.set_xscale("symlog", linthresh=first, linscale=0.4)
    axes.set_xlim(-0.15 * first, float(positive.max()) * 1.3)


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    across = min(count, 2)
    down = math.ceil(count / across)
    width, height = (6.4, 3.4) if count == 1 else (7.2, 2.5 * down)
    lines = textwrap.wrap(marks.visible(title), int(width * 11)) or [""]
    head = 0.25 + 0.2 * len(lines)
    figure = ShownFigure(figsize=(width, height + head), facecolor="white")
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, height / (height + head)))
    figure.set_layout_engine(engine)
    figure.text(
        0.02, 1 - 0.12 / (height + head), "\n".join(lines), size=10, color=INK, va="top",
        weight="bold",
    ).set_parse_math(False)  # fmt: skip
    panels = [figure.add_subplot(down, across, i + 1) for i in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#BBBBBB")
        axes.tick_params(labelsize=7.5, colors=QUIET, length=2)
    return figure, panels


def _line_colors(panel: int, count: int) -> list[Any]:
    """One colour for a single line; for the layers of a model a ramp from light to dark."""
    if count == 1:
        return [marks.LINES[panel % len(marks.LINES)]]
    return [colormaps["viridis_r"](0.15 + 0.85 * i / (count - 1)) for i in range(count)]


def _cycle(count: int) -> list[str]:
    return [marks.LINES[i % len(marks.LINES)] for i in range(count)]
