"""The drawings behind :mod:`sat_lens.figures`, laid out by matplotlib's constrained layout.

The strength of a colour is its opacity, so that a picture can stand on a light and a dark page.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from sat_lens.errors import ArgumentError
from sat_lens.figures.style import (
    headline,
    label,
    lines,
    new_figure,
    panels,
    plain_words,
)
from sat_lens.vocabulary import (
    CAUTION,
    DESCRIPTIONS,
    HATCHED,
    INK,
    LINES,
    NEGATIVE,
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


# Curves: against the inverse temperature, against training steps, and ranges of c.


@plain_words
def scaling_curve_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw every measure against the inverse temperature, one panel a measure.

    The axis is logarithmic; 0 and infinity stand apart at its ends.

    Args:
        frame: A row a scale (the index), a column a measure, as ``ScalingCurve.frame()`` returns.
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
    figure, drawn = _grid_of_panels(len(groups), title)
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
        chosen = tick_scales(scales, most=7)
        ticks = [places[scales.index(c)] for c in chosen]
        axes.set_xticks(ticks, [scale_text(c) for c in chosen])
        label(axes, x="inverse temperature c")
        headline(axes, words)
    return figure


@plain_words
def growth_figure(
    frame: pd.DataFrame,
    title: str | None,
    *,
    x: str = "step",
    columns: Sequence[str] | None = None,
    log_x: bool = True,
    log_y: bool = True,
) -> Figure:
    """Draw measures against training steps, one line a column.

    Args:
        frame: A row a step.
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
    figure, (axes,) = _grid_of_panels(1, title)
    several = len(names) > 1
    words = {name: name.replace("_", " ") for name in names}
    y = "" if several else words[names[0]]
    table = frame.set_index(steps)
    lines(axes, table, words, x=x, y=y, log_x=log_x, log_y=log_y, dashed=CONTROLS, legend=False)
    if several:
        axes.legend(
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), borderpad=0,
            labelcolor=INK,
        )  # fmt: skip
    return figure


@plain_words
def training_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw a training run: norms, saturation with its control, and losses, a panel each.

    Norms are on a logarithmic axis, the rest is not. What was not measured is left out.

    Args:
        frame: A row a step (the index), as ``NormGrowth.frame()``, ``SaturationTracker.frame()``
            and ``read_training_log()`` return.
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
    figure, drawn = _grid_of_panels(len(groups), title)
    for axes, (words, names) in zip(drawn, groups.items(), strict=True):
        named = {name: name.replace("_", " ") for name in names}
        log_y = words == "norms"
        lines(axes, frame, named, x="step", log_y=log_y, dashed=CONTROLS, legend=False)
        headline(axes, words)
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none", labelcolor=INK, facecolor=PAPER)
    return figure


@plain_words
def scale_range_figure(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw each head's range of c between uniform and saturated attention as a bar.

    Left of its bar a head is close to uniform, right of it close to its limit; the line is c = 1.

    Args:
        frame: A row a head (the index: its label) with the columns ``role``, ``c_lo`` and ``c_hi``,
            as ``HeadRoles.frame()`` returns. Heads without both numbers are left out; bars end at
            c = 256 and 1/256.
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
    _check_columns(frame, ("role", "c_lo", "c_hi"))
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


def measure_groups(columns: Sequence[str]) -> dict[str, list[str]]:
    """Group the measures of a curve into panels: one a measure, with all its layers.

    Example:
        >>> measure_groups(["kl", "S_L0", "S_L1"])["similarity S, by layer"]
        ['S_L0', 'S_L1']
    """
    groups: dict[str, list[str]] = {words: [] for words in WORDS.values()}
    for name in columns:
        match = _OF_A_LAYER.fullmatch(name)
        words = WORDS.get(match[1] if match else name, name.replace("_", " "))
        groups.setdefault(words, []).append(name)
    return {words: names for words, names in groups.items() if names}


def scale_places(scales: Sequence[float]) -> list[float]:
    """Place scales on an axis: log2 inside, 0 and infinity one and a half units beyond the ends.

    Example:
        >>> scale_places([0.0, 0.5, 1.0, 2.0, math.inf])
        [-2.5, -1.0, 0.0, 1.0, 2.5]
    """
    inside = [math.log2(c) for c in scales if 0 < c < math.inf] or [0.0]
    ends = {0.0: min(inside) - 1.5, math.inf: max(inside) + 1.5}
    return [ends[c] if c in ends else math.log2(c) for c in scales]


def tick_scales(scales: Sequence[float], most: int) -> list[float]:
    """Choose which scales get a tick: the ends, 1, and others as far as they keep apart.

    Example:
        >>> tick_scales([0.0, 1.0, 1.1, 4.0, math.inf], most=4)
        [0.0, 1.0, 4.0, inf]
    """
    places = dict(zip(scales, scale_places(scales), strict=True))
    span = max(places.values()) - min(places.values()) or 1.0
    whole = [c for c in scales if c < math.inf and c > 0 and float(math.log2(c)).is_integer()]
    first = [c for c in (0.0, math.inf, 1.0) if c in places]
    chosen: list[float] = []
    for c in [*first, *whole, *scales]:
        if all(abs(places[c] - places[other]) >= 0.8 * span / most for other in chosen):
            chosen.append(c)
    return sorted(chosen)


def scale_text(c: float) -> str:
    """Write a scale for an axis.

    Example:
        >>> scale_text(math.inf), scale_text(0.5), scale_text(32.0)
        ('∞', '0.5', '32')
    """
    return "∞" if math.isinf(c) else f"{c:g}"


def _grid_of_panels(count: int, title: str | None) -> tuple[Figure, list[Axes]]:
    return panels(count, title, size=(6.4, 3.4) if count == 1 else (3.6, 2.5))


def _line_colors(panel: int, count: int) -> list[Any]:
    """One colour for a single line; for the layers of a model a ramp, seen on white and black."""
    if count == 1:
        return [LINES[panel % len(LINES)]]
    return [colormaps["viridis"](0.85 - 0.55 * i / (count - 1)) for i in range(count)]


# Maps of heads: rows are layers with 0 on top, columns are heads.


@plain_words
def role_map(frame: pd.DataFrame, title: str | None) -> Figure:
    """Draw the head-role map: one colour a role, stronger the clearer the role is.

    Args:
        frame: A row a head, as ``HeadRoles.frame()`` returns; the columns ``layer``, ``head`` and
            ``role`` are needed, ``target``, ``agreement`` and ``stack`` are used where they are.
        title: What was measured on what; None draws no title.

    Raises:
        ArgumentError: The table is empty or lacks a column.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import role_map
        >>> frame = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "role": ["argmax", "mean"]})
        >>> role_map(frame, "two heads").get_axes()[0].get_ylabel()
        'layer'
    """
    _check_columns(frame, ("layer", "head", "role"))
    stacks = head_stacks(frame)
    known = [role for role in DESCRIPTIONS if role or (frame["role"] == "").any()]
    figure, grids = _head_grids(stacks, title, below=0.2 * len(known) + 0.9)
    for axes, (_, part) in zip(grids, stacks, strict=True):
        rows = {layer: row for row, layer in enumerate(sorted(part["layer"].unique()))}
        for record in records_of(part):
            role, at = str(record["role"]), (record["head"], rows[record["layer"]])
            shade = _LEAST_SHADE + (1 - _LEAST_SHADE) * clarity(record)
            if role in ROLE_COLORS:
                _cell(axes, *at, (*to_rgb(ROLE_COLORS[role]), shade))
            else:
                _cell(axes, *at, OTHER_COLOR, hatch="////")
            mark = target_mark(str(record.get("target", "") or ""))
            if mark:
                size = _cell_inches(stacks) * 72 * (0.5 if len(mark) == 1 else 0.34)
                axes.text(
                    *at, mark, size=size, color=_ink_on(role, shade), weight="bold",
                    ha="center", va="center_baseline",
                )  # fmt: skip
    _role_legend(figure, known, set(frame["role"]), set(frame.get("target", ())))
    return figure


@plain_words
def sweep_map(
    values: Float[Tensor, "layer head"],
    title: str | None,
    label: str,
    *,
    reference: float | None = None,
) -> Figure:
    """Draw signed effects of heads, in diverging colours centred on 0; NaN stays empty.

    Args:
        values: One effect a head; NaN where no such head was asked for.
        title: What was measured on what; None draws no title.
        label: What the colour means, with its unit.
        reference: An effect to mark on the colour bar, of a random control for example.

    Raises:
        ArgumentError: The values are no matrix, or none of them is finite.

    Example:
        >>> import torch
        >>> from sat_lens.figures import sweep_map
        >>> figure = sweep_map(torch.tensor([[0.1, -0.2], [float("nan"), 0.0]]), "t", "effect")
        >>> len(figure.get_axes())
        2
    """
    table = _matrix(values)
    limit = float(table[table.isfinite()].abs().max()) or 1.0
    rows = [{"layer": row, "head": table.shape[1] - 1} for row in range(table.shape[0])]
    figure, (axes,) = _head_grids([("", pd.DataFrame(rows))], title, below=0.6)
    for row, line in enumerate(table.tolist()):
        for column, value in enumerate(line):
            if math.isfinite(value):
                _cell(axes, column, row, diverging_color(value / limit))
            else:
                _cell(axes, column, row, PAPER, hatch="////")
    scale = ScalarMappable(Normalize(-limit, limit), ListedColormap(
        [diverging_color(step / 16) for step in range(-16, 17)]))  # fmt: skip
    bar = figure.colorbar(
        scale, ax=axes, location="bottom", shrink=0.55, aspect=28, anchor=(0.0, 1.0), panchor=False
    )
    bar.set_ticks([-limit, 0, limit], labels=[f"{-limit:.2g}", "0", f"{limit:.2g}"])
    if reference is not None and math.isfinite(reference):
        bar.ax.axvline(min(max(reference, -limit), limit), color=INK, lw=1.2)
    bar.ax.tick_params(length=2, labelsize=7.5, colors=QUIET)
    bar.outline.set_visible(False)
    note = "" if reference is None else "; the line is the random control"
    bar.set_label(visible(f"{label}{note}"), size=8, color=INK)
    return figure


def diverging_color(share: float) -> tuple[float, float, float, float]:
    """Return the colour of a value in [-1, 1]: blue below 0, clear at 0, vermillion above.

    Example:
        >>> diverging_color(0.0)
        (1.0, 1.0, 1.0, 0.0)
    """
    if share == 0:
        return (1.0, 1.0, 1.0, 0.0)
    return (*to_rgb(POSITIVE if share > 0 else NEGATIVE), min(abs(share), 1.0))


def head_stacks(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split a table of heads by stack, in the model's order; without that column it stays whole."""
    if "stack" not in frame.columns:
        return [("", frame)]
    return [(str(name), part) for name, part in frame.groupby("stack", sort=False)]


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return each row of a table as a dict by column name.

    Example:
        >>> records_of(pd.DataFrame({"head": [3]}))
        [{'head': 3}]
    """
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _cell_inches(stacks: list[tuple[str, pd.DataFrame]]) -> float:
    across = sum(int(part["head"].max()) + 1 for _, part in stacks)
    return min(max(7.2 / across, 0.2), 0.42)


def _head_grids(
    stacks: list[tuple[str, pd.DataFrame]], title: str | None, below: float
) -> tuple[Figure, list[Axes]]:
    """Make a figure with a grid a stack, one unit a cell, and ``below`` inches for the legend."""
    heads = [int(part["head"].max()) + 1 for _, part in stacks]
    layers = [sorted(part["layer"].unique()) for _, part in stacks]
    cell = _cell_inches(stacks)
    width = max(cell * sum(heads) + 0.5 * len(stacks) + 0.4, 6.2)
    height = cell * max(map(len, layers)) + (0.7 if len(stacks) > 1 else 0.5) + below
    figure = new_figure(title, width, height)
    grids = figure.subplots(1, len(stacks), squeeze=False, width_ratios=heads)[0]
    every = math.ceil(0.2 / cell) if cell < 0.3 else 1
    for index, (axes, (stack, _)) in enumerate(zip(grids, stacks, strict=True)):
        axes.set(xlim=(-0.5, heads[index] - 0.5), ylim=(len(layers[index]) - 0.5, -0.5))
        axes.set(aspect="equal", anchor="NW")
        axes.set_xticks(range(0, heads[index], every))
        numbers = [str(layer) for layer in layers[index]]
        axes.set_yticks(range(0, len(numbers), every), numbers[::every])
        axes.tick_params(length=0, labelsize=7.5, colors=QUIET, top=True, labeltop=True)
        axes.tick_params(axis="x", bottom=False, labelbottom=False, pad=1)
        axes.set_ylabel("layer" if index == 0 else "", size=8, color=QUIET)
        axes.set_xlabel("head", size=8, color=QUIET)
        axes.xaxis.set_label_position("top")
        if stack:
            axes.set_title(visible(stack), size=9, color=INK, pad=4)
        axes.spines[:].set_visible(False)
    return figure, list(grids)


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
    kinds = {"offset" if t.startswith("offset ") else t for t in targets if t}
    shown = [name for name in TARGET_WORDS if name in kinds][: len(known)]
    for name in shown:
        words = f"{TARGET_MARKS.get(name, '±k')}  {name}: {TARGET_WORDS[name]}"
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
    clear = color == PAPER or color == diverging_color(0.0)
    edge = HATCHED if hatch else RULE if clear else PAPER
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=edge, lw=1.0, hatch=hatch)
    )


def _ink_on(role: str, shade: float) -> str:
    """On strong colours letters keep their own colour, on pale ones they have the page's."""
    if shade < 0.5 or role not in ROLE_COLORS:
        return INK
    return ON_BLUE if role == "mean" else ON_COLOR


# What may be drawn.


def check_frame(frame: object) -> None:
    """Raise an ArgumentError unless something is a pandas table."""
    if not isinstance(frame, pd.DataFrame):
        raise ArgumentError(
            f"Needed a pandas table, such as the frame() of a result; found {type(frame).__name__}."
        )


def _check_columns(frame: pd.DataFrame, needed: tuple[str, ...]) -> None:
    check_frame(frame)
    missing = [name for name in needed if name not in frame.columns]
    if missing or frame.empty:
        raise ArgumentError(
            f"Needed a table with a row a head and the columns {', '.join(needed)}; found "
            f"{len(frame)} rows and no column {', '.join(missing) or '(none missing)'}."
        )


def _matrix(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise ArgumentError(f"Needed a tensor [layer, head]; found {type(values).__name__}.")
    if values.dim() != 2 or not bool(values.isfinite().any()):
        raise ArgumentError(
            f"Needed a matrix of values with a finite one among them; found shape "
            f"{list(values.shape)}."
        )
    return values.detach().double().cpu()
