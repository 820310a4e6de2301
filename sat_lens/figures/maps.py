"""Maps of heads: rows are layers with 0 on top, columns are heads."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sat_lens.errors import ArgumentError
from sat_lens.figures import marks
from sat_lens.figures.layout import head_stacks, records_of
from sat_lens.figures.sheet import INK, LEFT, LINE, MARGIN, QUIET, Sheet
from sat_lens.figures.shown import check_frame
from sat_lens.vocabulary import CAUTION, DESCRIPTIONS, ROLES

_LEAST_SHADE = 0.3
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline", "weight": "bold"}


def role_map(frame: pd.DataFrame, title: str) -> Figure:
    """Draw the head-role map: one colour a role, stronger the clearer the role is.

    Args:
        frame: A row a head, as ``HeadRoles.frame()`` gives it; the columns ``layer``, ``head`` and
            ``role`` are needed, ``target``, ``agreement`` and ``stack`` are used where they are.
        title: What was measured on what.

    Raises:
        ArgumentError: The table is empty or lacks a column.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.figures import role_map
        >>> frame = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "role": ["argmax", "mean"]})
        >>> role_map(frame, "two heads").get_axes()[0].get_ylabel()
        'layer'
    """
    _check(frame, ("layer", "head", "role"))
    stacks = head_stacks(frame)
    known = _legend_roles(frame)
    sheet = Sheet([_size(part) for _, part in stacks], title, legend_lines=len(known) + 3.2)
    for index, (stack, part) in enumerate(stacks):
        axes = sheet.panel(index, part, stack)
        rows = {layer: row for row, layer in enumerate(sorted(part["layer"].unique()))}
        for record in records_of(part):
            color = _role_color(str(record["role"]), marks.clarity(record))
            hatch = None if record["role"] in marks.ROLE_COLORS else "////"
            _cell(axes, record["head"], rows[record["layer"]], color, hatch)
            mark = marks.target_mark(str(record.get("target", "") or ""))
            if mark:
                size = sheet.cell * 72 * (0.5 if len(mark) == 1 else 0.34)
                at = (record["head"], rows[record["layer"]])
                axes.text(*at, mark, size=size, color=_ink_on(color), **_CENTRED)
    _role_legend(sheet, known, set(frame["role"]), set(frame.get("target", ())))
    return sheet.figure


def sweep_map(
    values: Float[Tensor, "layer head"], title: str, label: str, *, reference: float | None = None
) -> Figure:
    """Draw signed effects of heads, in diverging colours centred on 0; NaN stays empty.

    Args:
        values: One effect a head; NaN where no such head was asked for.
        title: What was measured on what.
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
    n_layers, n_heads = table.shape
    limit = float(table[table.isfinite()].abs().max()) or 1.0
    sheet = Sheet([(n_layers, n_heads)], title, legend_lines=2.6)
    layers = pd.DataFrame({"layer": range(n_layers), "head": [n_heads - 1] * n_layers})
    axes = sheet.panel(0, layers, "")
    for layer in range(n_layers):
        for head in range(n_heads):
            value = float(table[layer, head])
            if math.isfinite(value):
                _cell(axes, head, layer, diverging_color(value / limit))
            else:
                _cell(axes, head, layer, "white", hatch="////")
    _color_bar(sheet, limit, label, reference)
    return sheet.figure


def grid_map(
    values: Float[Tensor, "row column"],
    title: str,
    label: str,
    *,
    rows: Sequence[Any],
    columns: Sequence[Any],
    row_name: str,
    column_name: str,
) -> Figure:
    """Draw a grid of runs (learning rate by weight decay, say): signed values centred on 0.

    Args:
        values: One value a run; NaN where a run failed or was not made.
        title: What was measured on what.
        label: What the colour means, with its unit.
        rows: What each row stands for, top first.
        columns: What each column stands for.
        row_name: The name of the vertical axis.
        column_name: The name of the horizontal axis.

    Raises:
        ArgumentError: The values are no matrix, none is finite, or the names do not fit its shape.

    Example:
        >>> import torch
        >>> from sat_lens.figures import grid_map
        >>> figure = grid_map(torch.zeros(1, 2), "t", "growth", rows=[0.1], columns=[1, 2],
        ...                   row_name="weight decay", column_name="learning rate")
        >>> figure.get_axes()[0].get_ylabel()
        'weight decay'
    """
    table = _matrix(values)
    if tuple(table.shape) != (len(rows), len(columns)):
        raise ArgumentError(
            f"Needed one name a row and a column of values {list(table.shape)}; found "
            f"{len(rows)} and {len(columns)}."
        )
    figure = sweep_map(values, title, label)
    axes = figure.get_axes()[0]
    for axis, names, name in ((axes.xaxis, columns, column_name), (axes.yaxis, rows, row_name)):
        step = math.ceil(len(names) / 12)
        axis.set_ticks(range(0, len(names), step), [_short(n) for n in names[::step]])
        axis.set_label_text(name)
    width = max(len(_short(name)) for name in rows)
    _widen_left(figure, 0.075 * width)
    axes.tick_params(axis="x", labelrotation=45 if len(columns) > 4 else 0)
    return figure


def diverging_color(share: float) -> tuple[float, float, float]:
    """Give the colour of a value in [-1, 1]: blue below 0, white at 0, vermillion above.

    Example:
        >>> diverging_color(0.0)
        (1.0, 1.0, 1.0)
    """
    color = marks.POSITIVE if share >= 0 else marks.NEGATIVE
    return _mixed(color, min(abs(share), 1.0))


def _legend_roles(frame: pd.DataFrame) -> list[str]:
    """All roles; and, where there is such a head, the empty one of heads without a counted row."""
    return [*ROLES, *([""] if (frame["role"] == "").any() else [])]


def _role_legend(sheet: Sheet, known: list[str], roles: set[str], targets: set[str]) -> None:
    swatch = 0.15
    for line, role in enumerate(known):
        bottom = sheet.legend_height - (line + 0.5) * LINE - swatch / 2
        axes = sheet.axes(MARGIN, bottom, swatch, swatch)
        axes.set_axis_off()
        color, hatch = _role_color(role, 1.0), "" if role else "//////"
        axes.add_patch(Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="white", hatch=hatch))
        ink = INK if role in roles else QUIET
        words = f"{role}: {DESCRIPTIONS[role]}" if role else DESCRIPTIONS[role]
        sheet.write(MARGIN + 0.24, line, words, ink)
    kinds = {"offset" if t.startswith("offset ") else t for t in targets if t}
    shown = [name for name in marks.TARGET_WORDS if name in kinds]
    for line, name in enumerate(shown[: len(ROLES)]):
        mark = marks.TARGET_MARKS.get(name, "±k")
        sheet.write(3.45, line, f"{mark}  {name}: {marks.TARGET_WORDS[name]}")
    sheet.write(
        MARGIN, len(known) + 0.4, "The stronger the colour, the more rows have the role.", QUIET
    )
    for line, text in enumerate(textwrap.wrap(CAUTION, int(sheet.width * 15))):
        sheet.write(MARGIN, len(known) + 1.3 + 0.9 * line, text, QUIET)


def _color_bar(sheet: Sheet, limit: float, label: str, reference: float | None) -> None:
    width = min(sheet.width - LEFT - MARGIN, 3.2)
    bar = sheet.axes(LEFT, sheet.legend_height - 1.1 * LINE, width, 0.11)
    steps = 64
    for step in range(steps):
        x = -1 + 2 * step / steps
        color = diverging_color(x + 1 / steps)
        bar.add_patch(Rectangle((x, 0), 2 / steps, 1, facecolor=color, edgecolor=color, lw=0.3))
    ticks = [-1, 0, 1]
    names = [f"{-limit:.2g}", "0", f"{limit:.2g}"]
    bar.set(xlim=(-1, 1), ylim=(0, 1), yticks=[])
    bar.set_xticks(ticks, names)
    if reference is not None and math.isfinite(reference):
        bar.axvline(min(max(reference / limit, -1.0), 1.0), color=INK, lw=1.2)
    bar.tick_params(length=2, labelsize=7.5, colors=QUIET)
    bar.spines[:].set_visible(False)
    note = "" if reference is None else "; the line is the random control"
    bar.set_xlabel(f"{label}{note}", size=8, color=INK).set_parse_math(False)


def _cell(axes: Axes, x: int, y: int, color: Any, hatch: str | None = None) -> None:
    edge = "#DDDDDD" if color == "white" else "white"
    corner = (x - 0.5, y - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor=edge, lw=1.0, hatch=hatch))


def _role_color(role: str, clear: float) -> tuple[float, float, float]:
    if role not in marks.ROLE_COLORS:
        return _mixed(marks.OTHER_COLOR, 1.0)
    shade = _LEAST_SHADE + (1 - _LEAST_SHADE) * clear
    return _mixed(marks.ROLE_COLORS[role], shade)


def _mixed(color: str, share: float) -> tuple[float, float, float]:
    red, green, blue = (1 - share + share * part for part in to_rgb(color))
    return red, green, blue


def _ink_on(color: tuple[float, float, float]) -> str:
    red, green, blue = color
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def _widen_left(figure: Figure, inches: float) -> None:
    width, height = figure.get_size_inches()
    for part in figure.get_axes():
        box = part.get_position()
        left, span = box.x0 * width + inches, box.width * width
        part.set_position((left / (width + inches), box.y0, span / (width + inches), box.height))
    figure.set_size_inches(width + inches, height)


def _short(name: Any) -> str:
    return f"{name:.3g}" if isinstance(name, float) else marks.visible(str(name))


def _matrix(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise ArgumentError(f"Needed a tensor [row, column]; found {type(values).__name__}.")
    if values.dim() != 2 or not bool(values.isfinite().any()):
        raise ArgumentError(
            f"Needed a matrix of values with a finite one among them; found shape "
            f"{list(values.shape)}."
        )
    return values.detach().double().cpu()


def _check(frame: pd.DataFrame, needed: tuple[str, ...]) -> None:
    check_frame(frame)
    missing = [name for name in needed if name not in frame.columns]
    if missing or frame.empty:
        raise ArgumentError(
            f"Needed a table with a row a head and the columns {', '.join(needed)}; found "
            f"{len(frame)} rows and no column {', '.join(missing) or '(none missing)'}."
        )


def _size(part: pd.DataFrame) -> tuple[int, int]:
    return part["layer"].nunique(), int(part["head"].max()) + 1
