"""Figures of several panels in one style, curves, maps of heads, and the files they become.

matplotlib's constrained layout places everything. The strength of a colour is its opacity, so that
a picture can stand on a light and a dark page.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from sat_lens.errors import ArgumentError
from sat_lens.vocabulary import (
    CAUTION,
    DESCRIPTIONS,
    HATCHED,
    INK,
    LINES,
    NEGATIVE,
    OFFSET_MARK,
    ON_BLUE,
    ON_COLOR,
    OTHER_COLOR,
    PAPER,
    POSITIVE,
    QUIET,
    ROLE_COLORS,
    ROLES,
    RULE,
    TARGET_MARKS,
    TARGET_WORDS,
    clarity,
    target_kinds,
    target_mark,
    visible,
)

# What is drawn of a training run. S can be negative, and its control belongs beside it.
PANELS = {
    "norms": ("norm", "norm_grown", "qk_product", "ov_product"),
    "saturation": ("cos_saturated", "cos_random", "S", "lean"),
    "loss (nats per token)": ("loss", "loss_saturated"),
}
CONTROLS = ("cos_random",)
WORDS = {
    "loss": "loss (nats per token)",
    "S": "similarity S, by layer",
    "cos_random": "cosine of random keys, S = 0",
    "kl": "KL from the soft model (nats)",
    "top1": "same most likely token (share)",
    "metric": "metric",
}
# A layer's column, its stack before it where there are several: S_L0, cos_random_encoder.L0.
_OF_A_LAYER = re.compile(r"(S|cos_random)_(?:[a-z_]+\.)?L\d+")
_LEAST_SHADE = 0.3
_FARTHEST = 8  # octaves of c on either side of 1
_TICKS = 7
FORMATS = ("png", "svg", "pdf")
_DATES: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
# Words are drawn as they are: a $ in a name begins no formula.
_plain_words = rc_context({"text.parse_math": False})


# The style: panels and lines, which draw figures of one's own too.


class ShownFigure(Figure):
    """A matplotlib figure that a notebook displays although nobody imported pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


@_plain_words
def _new_figure(title: str | None, width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, below its title."""
    lines = [] if title is None else textwrap.wrap(visible(title), int(width * 11)) or [""]
    size = (width, height + 0.2 * len(lines))
    figure = ShownFigure(figsize=size, facecolor=PAPER, layout="constrained")
    if lines:
        figure.suptitle("\n".join(lines), size=10, color=INK, weight="bold", x=0.02, ha="left")
    return figure


@_plain_words
def panels(
    count: int,
    title: str | None,
    *,
    across: int = 2,
    size: tuple[float, float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels in the style of the library, and its axes.

    Args:
        count: How many panels.
        title: What was measured on what; None draws no title.
        across: How many panels stand in a row, at most.
        size: Width and height of one panel, in inches; None makes a single one larger.

    Example:
        >>> from sat_lens.figures import panels
        >>> figure, axes = panels(3, "Three panels")
        >>> len(axes)
        3
    """
    width, height = size or ((6.4, 3.4) if count == 1 else (3.6, 2.5))
    across = min(count, across)
    down = math.ceil(count / across)
    figure = _new_figure(title, width * across, height * down)
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


@_plain_words
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
    """Draw columns of a table against its index; missing values leave no gap.

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

    None takes as many as the axis needs to be read: all where it spans less than one power of ten,
    and 1, 2 and 5 where it spans less than four.
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


def figure_format(path: Path) -> str:
    """Return the format that the ending of a path names."""
    ending = path.suffix[1:].lower()
    if ending not in FORMATS:
        raise ArgumentError(
            f"A figure is one of {', '.join(f'.{name}' for name in FORMATS)}; found {path.name!r}."
        )
    return ending


def figure_bytes(
    figure: Figure, file_format: str, *, salt: str = "sat_lens", for_page: bool = False
) -> bytes:
    """Return a figure as PNG, SVG or PDF; the same figure gives the same bytes.

    Args:
        figure: The figure.
        file_format: ``"png"``, ``"svg"`` or ``"pdf"``.
        salt: What makes the identifiers in an SVG differ from those of another one.
        for_page: Whether words stay words in an SVG, and the background transparent.

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


# Curves: against the inverse temperature, against training steps, and ranges of c.


@_plain_words
def scaling_curve_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw every measure against the inverse temperature, one panel per measure.

    The axis is logarithmic; 0 and infinity stand apart at its ends.

    Args:
        frame: One row per scale (the index) and one column per measure, as
            ``ScalingCurve.frame()`` returns.
        title: What was measured on what; None draws no title.

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
    _check_table(frame)
    ordered = frame.sort_index()
    groups = measure_groups(map(str, frame.columns))
    scales = [float(c) for c in ordered.index]
    places = scale_places(scales)
    inside = [i for i, c in enumerate(scales) if 0 < c < math.inf]
    figure, drawn = panels(len(groups), title)
    for index, (axes, (words, names)) in enumerate(zip(drawn, groups.items(), strict=True)):
        for name, color in zip(names, _line_colors(index, len(names)), strict=True):
            values = ordered[name].to_numpy(dtype=float)
            axes.plot([places[i] for i in inside], values[inside], color=color, lw=1.6)
            layer = visible(name.rpartition("_")[2])
            axes.plot(places, values, "o", color=color, ms=3.5, label=layer)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7, ncols=math.ceil(len(names) / 6), labelcolor=INK)
        if 1.0 in scales:
            axes.axvline(0.0, color=RULE, lw=0.8, zorder=0)
        ticks = _ticks(scales, places)
        axes.set_xticks(list(ticks), list(ticks.values()))
        label(axes, x="inverse temperature c")
        headline(axes, words)
    return figure


def measure_groups(columns: Iterable[str]) -> dict[str, list[str]]:
    """Group the columns of a curve into panels: one per measure, with all its layers."""
    groups: dict[str, list[str]] = {words: [] for words in WORDS.values()}
    for name in columns:
        match = _OF_A_LAYER.fullmatch(name)
        words = WORDS.get(match[1] if match else name, name.replace("_", " "))
        groups.setdefault(words, []).append(name)
    return {words: names for words, names in groups.items() if names}


def scale_places(scales: Sequence[float]) -> list[float]:
    """Place scales on an axis: log2 inside, 0 and infinity one and a half units beyond the ends."""
    inside = [math.log2(c) for c in scales if 0 < c < math.inf] or [0.0]
    ends = {0.0: min(inside) - 1.5, math.inf: max(inside) + 1.5}
    return [ends[c] if c in ends else math.log2(c) for c in scales]


def _ticks(scales: Sequence[float], places: Sequence[float]) -> dict[float, str]:
    """Label the ends, 1, and other scales as far as they keep apart, by their places."""
    space = 0.8 * (max(places) - min(places) or 1.0) / _TICKS
    # The ends first, then powers of two, then the rest.
    rank = {0.0: 0, math.inf: 1, 1.0: 2}
    order = sorted(
        zip(scales, places, strict=True),
        key=lambda pair: rank.get(pair[0], 3 if pair[1].is_integer() else 4),
    )
    chosen: dict[float, str] = {}
    for c, place in order:
        if all(abs(place - other) >= space for other in chosen):
            chosen[place] = "∞" if math.isinf(c) else f"{c:g}"
    return dict(sorted(chosen.items()))


def _line_colors(panel: int, count: int) -> list[Any]:
    """One colour for a single line; for the layers of a model a ramp, seen on white and black."""
    if count == 1:
        return [LINES[panel % len(LINES)]]
    return [colormaps["viridis"](0.85 - 0.55 * i / (count - 1)) for i in range(count)]


@_plain_words
def growth_figure(
    frame: pd.DataFrame,
    title: str | None,
    *,
    x: str = "step",
    columns: Sequence[str] | None = None,
    log_x: bool = True,
    log_y: bool = True,
) -> Figure:
    """Draw measures against training steps, one line per column.

    Args:
        frame: One row per step.
        title: What was measured on what; None draws no title.
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
    _check_table(frame, columns or ())
    table = frame.set_index(frame[x]) if x in frame.columns else frame
    numeric = [str(c) for c in frame.select_dtypes("number").columns if c != x]
    words = {name: name.replace("_", " ") for name in columns or numeric}
    if not words:
        raise ArgumentError(f"Needed a table with a column of numbers beside {x!r}; found none.")
    figure, (axes,) = panels(1, title)
    y = "" if len(words) > 1 else next(iter(words.values()))
    lines(axes, table, words, x=x, y=y, log_x=log_x, log_y=log_y, dashed=CONTROLS, legend=False)
    if len(words) > 1:
        axes.legend(
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), borderpad=0,
            labelcolor=INK,
        )  # fmt: skip
    return figure


@_plain_words
def training_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw a training run: norms, saturation with its control, and losses, a panel each.

    Norms are on a logarithmic axis, the rest is not. What was not measured is left out.

    Args:
        frame: One row per step (the index), as ``NormGrowth.frame()``,
            ``SaturationTracker.frame()`` and ``read_training_log()`` return.
        title: What was measured on what; None draws no title.

    Raises:
        ArgumentError: The table has none of the columns that are drawn.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import training_figure
        >>> frame = pd.DataFrame({"norm": [1.0, 2.0], "S": [-0.1, 0.5], "cos_random": [0.9, 0.6]})
        >>> [axes.get_title(loc="left") for axes in training_figure(frame, "t").axes]
        ['norms', 'saturation']
    """
    _check_table(frame)
    groups = panels_of_a_run(frame)
    if not groups:
        raise ArgumentError(
            "Needed a table with some of the columns "
            f"{', '.join(name for names in PANELS.values() for name in names)}; found "
            f"{', '.join(map(str, frame.columns))}."
        )
    figure, drawn = panels(len(groups), title)
    for axes, (words, names) in zip(drawn, groups.items(), strict=True):
        named = {name: name.replace("_", " ") for name in names}
        log_y = words == "norms"
        lines(axes, frame, named, x="step", log_y=log_y, dashed=CONTROLS, legend=False)
        headline(axes, words)
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none", labelcolor=INK, facecolor=PAPER)
    return figure


def panels_of_a_run(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Return which columns of a training run were measured, by panel."""
    measured = set(frame.columns[frame.notna().any()])
    groups = {words: [n for n in names if n in measured] for words, names in PANELS.items()}
    return {words: names for words, names in groups.items() if names}


@_plain_words
def scale_range_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw each head's range of c between uniform and saturated attention as a bar.

    Left of its bar a head is close to uniform, right of it close to its limit; the line is c = 1.

    Args:
        frame: One row per head (the index: its label) with the columns ``role``, ``c_lo`` and
            ``c_hi``, as ``HeadRoles.frame()`` returns. Heads without both numbers are left out;
            bars end at c = 256 and 1/256.
        title: What was measured on what; None draws no title.

    Raises:
        ArgumentError: The table lacks a column, or no head has a finite range.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import scale_range_figure
        >>> frame = pd.DataFrame({"role": ["mean"], "c_lo": [0.5], "c_hi": [8.0]}, index=["L0H0"])
        >>> len(scale_range_figure(frame, "t").axes[0].patches)
        1
    """
    _check_table(frame, ("role", "c_lo", "c_hi"))
    ranged = frame.dropna(subset=["c_lo", "c_hi"])
    if not len(ranged):
        raise ArgumentError("Needed a head with a range of c, c_lo to c_hi; every head lacks one.")
    least, most = 2.0**-_FARTHEST, 2.0**_FARTHEST
    ends = np.log2(ranged[["c_lo", "c_hi"]].to_numpy(dtype=float).clip(least, most))
    figure, (axes,) = panels(1, title, size=(7.2, 0.9 + 0.15 * len(ranged)))
    for place, (role, (low, high)) in enumerate(zip(ranged["role"], ends, strict=True)):
        axes.barh(place, high - low, 0.7, left=low, color=ROLE_COLORS.get(role, OTHER_COLOR))
    axes.axvline(0.0, color=QUIET, lw=0.8, ls=":")
    low, high = math.floor(ends.min()), math.ceil(ends.max())
    exponents = range(low, high + 1, math.ceil((high - low or 1) / 8))
    axes.set_xticks(list(exponents), [f"{2.0**e:g}" for e in exponents])
    axes.tick_params(axis="x", labeltop=len(ranged) > 40)
    axes.set_yticks(range(len(ranged)), [visible(str(label)) for label in ranged.index], size=7)
    axes.set(xlim=(low - 0.1, high + 0.1), ylim=(len(ranged) - 0.4, -0.6))
    label(axes, x="inverse temperature c")
    handles = [Patch(color=c, label=role) for role, c in ROLE_COLORS.items()
               if (ranged["role"] == role).any()]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(ROLES), frameon=False, fontsize=7.5,
        labelcolor=INK, handlelength=1, handleheight=1, columnspacing=1.2,
    )  # fmt: skip
    return figure


# Maps of heads: rows are layers with 0 on top, columns are heads.


@_plain_words
def role_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw the head-role map: one colour per role, stronger the clearer the role is.

    Args:
        frame: One row per head, as ``HeadRoles.frame()`` returns; the columns ``layer``, ``head``
            and ``role`` are needed, ``target``, ``agreement`` and ``stack`` are optional.
        title: What was measured on what; None draws no title.

    Raises:
        ArgumentError: The table is empty or lacks a column.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import role_figure
        >>> frame = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "role": ["argmax", "mean"]})
        >>> role_figure(frame, "two heads").get_axes()[0].get_ylabel()
        'layer'
    """
    _check_table(frame, ("layer", "head", "role"))
    known = [role for role in DESCRIPTIONS if role or (frame["role"] == "").any()]
    figure, cells, inches = _head_cells(frame, title, below=0.2 * len(known) + 0.9)
    for axes, at, record in cells:
        role = str(record["role"])
        shade = _LEAST_SHADE + (1 - _LEAST_SHADE) * clarity(record)
        if role in ROLE_COLORS:
            _cell(axes, *at, (*to_rgb(ROLE_COLORS[role]), shade))
        else:
            _cell(axes, *at, OTHER_COLOR, hatch="////")
        mark = target_mark(str(record.get("target", "") or ""))
        if mark:
            size = inches * 72 * (0.5 if len(mark) == 1 else 0.34)
            axes.text(
                *at, mark, size=size, color=_ink_on(role, shade), weight="bold",
                ha="center", va="center_baseline",
            )  # fmt: skip
    _role_legend(figure, known, set(frame["role"]), set(frame.get("target", ())))
    return figure


@_plain_words
def sweep_figure(
    values: Float[Tensor, "layer head"],
    title: str | None,
    label: str,
    *,
    reference: float | None = None,
) -> Figure:
    """Draw signed effects of heads, in diverging colours centred on 0; NaN is hatched.

    Args:
        values: One effect per head; NaN where no such head was asked for.
        title: What was measured on what; None draws no title.
        label: What the colour means, with its unit.
        reference: An effect to mark on the colour bar, of a random control for example.

    Raises:
        ArgumentError: The values are no matrix, or none of them is finite.

    Example:
        >>> import torch
        >>> from sat_lens.figures import sweep_figure
        >>> figure = sweep_figure(torch.tensor([[0.1, -0.2], [float("nan"), 0.0]]), "t", "effect")
        >>> len(figure.get_axes())
        2
    """
    if not isinstance(values, Tensor):
        raise ArgumentError(f"Needed a tensor [layer, head]; found {type(values).__name__}.")
    if values.dim() != 2 or not bool(values.isfinite().any()):
        raise ArgumentError(
            f"Needed a matrix of values with a finite one among them; found shape "
            f"{list(values.shape)}."
        )
    table = pd.DataFrame(values.detach().double().cpu().numpy())
    frame = table.rename_axis("layer").reset_index().melt("layer", var_name="head")
    limit = float(values[values.isfinite()].abs().max()) or 1.0
    figure, bar = _number_map(frame.sort_values(["layer", "head"]), "value", title, -limit, limit)
    if reference is not None and math.isfinite(reference):
        bar.ax.axvline(min(max(reference, -limit), limit), color=INK, lw=1.2)
    note = "" if reference is None else "; the line is the random control"
    bar.set_label(visible(f"{label}{note}"), size=8, color=INK)
    return figure


@_plain_words
def column_figure(frame: pd.DataFrame, column: str, title: str | None) -> Figure:
    """Draw one number of every head: from 0 to 1 where it is a share, else up to the largest.

    Args:
        frame: One row per head, with the columns ``layer`` and ``head``, ``stack`` where there are
            several, and ``column``.
        column: What is drawn. Negative numbers are blue; what is not finite is hatched.
        title: What was measured on what; None draws no title.

    Raises:
        ArgumentError: The table is empty or lacks a column, or the column holds no finite number.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import column_figure
        >>> frame = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "lean": [0.2, 0.9]})
        >>> column_figure(frame, "lean", "two heads").get_axes()[0].get_ylabel()
        'layer'
    """
    _check_table(frame, ("layer", "head", column))
    numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
    numbers = numbers[np.isfinite(numbers)]
    if numbers.empty:
        raise ArgumentError(f"Needed a column of numbers; {column!r} holds no finite one.")
    low, high = min(float(numbers.min()), 0.0), float(numbers.max())
    limit = 1.0 if low == 0 and high <= 1 else max(high, -low)
    figure, bar = _number_map(frame, column, title, -limit if low < 0 else 0.0, limit)
    bar.set_label(visible(column), size=8, color=INK)
    return figure


def _number_map(
    frame: pd.DataFrame, column: str, title: str | None, low: float, high: float
) -> tuple[Figure, Colorbar]:
    """Draw a number of every head in diverging colours, above a bar; gaps are hatched."""
    figure, cells, _ = _head_cells(frame, title, below=0.6)
    for axes, at, record in cells:
        value = float(record[column])
        finite = math.isfinite(value)
        color = _diverging(value / high) if finite else PAPER
        _cell(axes, *at, color, hatch=None if finite else "////")
    colors = [_diverging(step / 16) for step in range(-16 if low < 0 else 0, 17)]
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), ListedColormap(colors)), ax=list(figure.axes),
        location="bottom", shrink=0.55, aspect=28, anchor=(0.0, 1.0), panchor=False,
    )  # fmt: skip
    ticks = sorted({low, 0.0, high})
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.ax.tick_params(length=2, labelsize=7.5, colors=QUIET)
    bar.outline.set_visible(False)
    return figure, bar


def _diverging(share: float) -> tuple[float, float, float, float]:
    """Return the colour of a value in [-1, 1]: blue below 0, clear at 0, vermillion above."""
    if share == 0:
        return (1.0, 1.0, 1.0, 0.0)
    return (*to_rgb(POSITIVE if share > 0 else NEGATIVE), min(abs(share), 1.0))


def head_stacks(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split a table of heads by stack, in the model's order; without that column it stays whole."""
    if "stack" not in frame.columns:
        return [("", frame)]
    return [(str(name), part) for name, part in frame.groupby("stack", sort=False)]


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return each row of a table as a dict by column name."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _head_cells(
    frame: pd.DataFrame, title: str | None, below: float
) -> tuple[Figure, list[tuple[Axes, tuple[int, int], dict[str, Any]]], float]:
    """Make a figure with one grid per stack, and ``below`` inches for the legend.

    Returns:
        The figure; for each head its grid, its column and row there, and its row of the table; and
        the width of a cell, one unit of a grid, in inches.
    """
    stacks = head_stacks(frame)
    heads = [int(part["head"].max()) + 1 for _, part in stacks]
    layers = [sorted(map(int, part["layer"].unique())) for _, part in stacks]
    cell = min(max(7.2 / sum(heads), 0.2), 0.42)
    width = max(cell * sum(heads) + 0.5 * len(stacks) + 0.4, 6.2)
    height = cell * max(map(len, layers)) + (0.7 if len(stacks) > 1 else 0.5) + below
    figure = _new_figure(title, width, height)
    grids = figure.subplots(1, len(stacks), squeeze=False, width_ratios=heads)[0]
    every = math.ceil(0.2 / cell) if cell < 0.3 else 1
    cells = []
    for axes, (stack, part), count, rows in zip(grids, stacks, heads, layers, strict=True):
        axes.set(xlim=(-0.5, count - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set(aspect="equal", anchor="NW")
        axes.set_xticks(range(0, count, every))
        axes.set_yticks(range(0, len(rows), every), [str(layer) for layer in rows[::every]])
        axes.tick_params(length=0, labelsize=7.5, colors=QUIET, top=True, labeltop=True)
        axes.tick_params(axis="x", bottom=False, labelbottom=False, pad=1)
        label(axes, x="head", y="layer" if axes is grids[0] else "")
        axes.xaxis.set_label_position("top")
        if stack:
            axes.set_title(visible(stack), size=9, color=INK, pad=4)
        axes.spines[:].set_visible(False)
        cells += [
            (axes, (int(record["head"]), rows.index(record["layer"])), record)
            for record in records_of(part)
        ]
    return figure, cells, cell


def _role_legend(figure: Figure, known: list[str], roles: set[str], targets: set[str]) -> None:
    """Write below a map what its colours and marks mean; roles that do not occur are pale."""
    handles: list[Any] = [
        Patch(
            facecolor=ROLE_COLORS.get(role, OTHER_COLOR), edgecolor=PAPER, lw=0,
            hatch="" if role else "//////",
            label=f"{role}: {DESCRIPTIONS[role]}" if role else DESCRIPTIONS[role],
        )
        for role in known
    ]  # fmt: skip
    shown = target_kinds(targets)[: len(known)]
    for name in shown:
        words = f"{TARGET_MARKS.get(name, OFFSET_MARK)}  {name}: {TARGET_WORDS[name]}"
        handles.append(Line2D([], [], ls="none", label=words))
    if shown:  # an even number in each of the two columns
        handles += [Line2D([], [], ls="none", label=" ")] * (len(known) - len(shown))
    width = int(figure.get_figwidth() * 15)
    caution = f"The stronger the colour, the more rows have the role. {CAUTION}"
    legend = figure.legend(
        handles=handles, loc="outside lower left", ncols=2 if shown else 1, frameon=False,
        fontsize=8, title="\n".join(textwrap.wrap(caution, width)), title_fontsize=8,
        alignment="left", handlelength=1.0, handleheight=1.0, columnspacing=2.0,
    )  # fmt: skip
    legend.get_title().set_color(QUIET)
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        role = handle.get_label().partition(":")[0]
        text.set_color(QUIET if role in ROLES and role not in roles else INK)


def _cell(axes: Axes, x: int, y: int, color: Any, hatch: str | None = None) -> None:
    edge = HATCHED if hatch else RULE if color == _diverging(0.0) else PAPER
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=edge, lw=1.0, hatch=hatch)
    )


def _ink_on(role: str, shade: float) -> str:
    """On strong colours letters have a colour of their own, on pale ones that of the page."""
    if shade < 0.5 or role not in ROLE_COLORS:
        return INK
    return ON_BLUE if role == "mean" else ON_COLOR


def _check_table(frame: object, columns: Sequence[str] = ()) -> None:
    """Raise an ArgumentError unless it is a table with rows and these columns."""
    if not isinstance(frame, pd.DataFrame):
        raise ArgumentError(
            f"Needed a pandas table, such as the frame() of a result; found {type(frame).__name__}."
        )
    if frame.empty or not set(columns) <= set(frame.columns):
        needed = f" and the columns {', '.join(columns)}" if columns else ""
        found = "an empty one" if frame.empty else ", ".join(map(str, frame.columns))
        raise ArgumentError(f"Needed a table with rows{needed}; found {found}.")
