"""Where the cells and lines of a page's drawings go; templates turn them into SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sat_lens.figures import marks
from sat_lens.figures.layout import (
    head_stacks,
    measure_groups,
    records_of,
    scale_places,
    scale_text,
    tick_scales,
)
from sat_lens.vocabulary import DESCRIPTIONS

CELL = 34
LEVELS = 5
_GROWTH = ("norm", "norm_grown", "qk_product", "ov_product", "loss", "loss_saturated", "S", "lean")
_ZERO_APART = 0.1  # of the axis lie between step 0 and the first step
_FARTHEST = 8  # octaves of c on either side of 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One head on a map: its place in the grid, its classes, its mark, and its alt text."""

    index: int
    row: int
    column: int
    classes: str
    mark: str
    text: str


@dataclasses.dataclass(frozen=True)
class HeadMap:
    """The map of one stack; ``index`` counts heads over all stacks, in the order of the table."""

    stack: str
    layers: list[int]
    heads: int
    cells: list[Cell]

    @property
    def step(self) -> int:
        """Every how many rows and columns a number is written."""
        return 1 if self.heads <= 20 else 2


def role_maps(frame: pd.DataFrame) -> list[HeadMap]:
    """Lay out the head-role map, a panel a stack."""

    def cell(record: Mapping[str, Any]) -> tuple[str, str, str]:
        role, target = str(record["role"]), str(record["target"] or "")
        level = max(1, math.ceil(marks.clarity(record) * LEVELS))
        text = f"{record['label']}: {role_text(role, target)}"
        return f"{role_class(role)} l{level}", marks.target_mark(target), text

    return _maps(frame, cell)


def effect_maps(frame: pd.DataFrame, column: str) -> list[HeadMap]:
    """Lay out signed effects of heads, a panel a stack; a head without one stays empty."""
    limit = float(frame[column].abs().max()) or 1.0

    def cell(record: Mapping[str, Any]) -> tuple[str, str, str]:
        value = float(record[column])
        if not math.isfinite(value):
            return "none", "", f"{record['label']}: not measured"
        level = math.ceil(abs(value) / limit * LEVELS)
        return f"{'pos' if value >= 0 else 'neg'} l{level}", "", f"{record['label']}: {value:.3g}"

    return _maps(frame, cell)


def role_class(role: str) -> str:
    """Name the style of a role; that of heads without one is grey and hatched."""
    return f"r-{role or 'none'}"


def role_text(role: str, target: str) -> str:
    """Say in words what a head does.

    Example:
        >>> role_text("argmax", "previous")
        'argmax, attends to one key at a time; looks at the token before'
    """
    if not role:
        return DESCRIPTIONS[role]
    looks = marks.TARGET_WORDS.get(target) or (target.removeprefix("offset ") and f"{target}")
    words = f"{role}, {DESCRIPTIONS.get(role, '')}"
    return f"{words}; looks at {looks}" if looks else words


def scale_axis(scales: Sequence[float], most: int = 7) -> dict[str, Any]:
    """Place scales on [0, 1] and choose their ticks; 0 and infinity stand apart at the ends."""
    places = scale_places(scales)
    low, span = min(places), (max(places) - min(places)) or 1.0
    at = {c: (place - low) / span for c, place in zip(scales, places, strict=True)}
    return {
        "places": at,
        "ticks": [{"at": at[c], "text": scale_text(c)} for c in tick_scales(scales, most)],
        "joined": [0 < c < math.inf for c in scales],
    }


def scale_charts(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Lay out one small chart a measure against the inverse temperature."""
    ordered = frame.sort_index()
    scales = [float(c) for c in ordered.index]
    axis = scale_axis(scales)
    xs = [axis["places"][c] for c in scales]
    return [
        _chart(
            words,
            "inverse temperature c",
            xs,
            {name.rpartition("_")[2]: list(ordered[name]) for name in names},
            axis["ticks"],
            axis["joined"],
        )
        for words, names in measure_groups([str(name) for name in ordered.columns]).items()
    ]


def step_charts(frame: pd.DataFrame, x: str = "step") -> list[dict[str, Any]]:
    """Lay out one small chart a column against training steps, on logarithmic steps; 0 is apart.

    Of a table with the columns of norm growth the telling ones are drawn, of another one all.
    """
    steps = [float(s) for s in (frame[x] if x in frame.columns else frame.index)]
    positive = [math.log10(s) for s in steps if s > 0] or [0.0]
    low, span = min(positive), (max(positive) - min(positive)) or 1.0
    start = 0.0 if len(positive) == len(steps) else _ZERO_APART

    def at(exponent: float) -> float:
        return start + (1 - start) * (exponent - low) / span

    places = [at(math.log10(s)) if s > 0 else 0.0 for s in steps]
    exponents = range(math.ceil(low), math.floor(low + span) + 1)
    ticks = [{"at": at(e), "text": f"{10**e:,}" if e >= 0 else f"1e{e}"} for e in exponents]
    if start:
        ticks.insert(0, {"at": 0.0, "text": "0"})
    numeric = [str(c) for c in frame.select_dtypes("number").columns if c != x]
    known = [name for name in numeric if frame[name].notna().any()]
    names = [name for name in _GROWTH if name in known] or known
    return [
        _chart(
            name.replace("_", " "),
            x,
            places,
            {name: list(frame[name])},
            ticks,
            [True] * len(steps),
        )
        for name in names
    ]


def scale_bars(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Lay out each head's range c_lo to c_hi as a bar; None where the table has no such columns."""
    if not {"c_lo", "c_hi"} <= set(frame.columns):
        return None
    known = [float(c) for c in (*frame["c_lo"], *frame["c_hi"]) if 0 < c < math.inf]
    if not known:
        return None
    # A flat head may need a c of a million; its bar runs to the edge, and its text has the number.
    low = max(math.floor(math.log2(min(known))), -_FARTHEST)
    high = min(math.ceil(math.log2(max(known))), _FARTHEST)
    span = (high - low) or 1
    step = math.ceil(span / 8)

    def at(c: float, end: float) -> float:
        return min(max((math.log2(c) - low) / span, 0.0), 1.0) if 0 < c < math.inf else end

    bars = [
        {
            "label": str(label),
            "style": role_class(str(role)),
            "from": at(c_lo, 0.0),
            "to": at(c_hi, 1.0),
            "text": f"{label}: {c_lo:.3g} to {c_hi:.3g}",
        }
        for label, role, c_lo, c_hi in zip(
            frame.index, frame["role"], frame["c_lo"], frame["c_hi"], strict=True
        )
        if not (math.isnan(c_lo) or math.isnan(c_hi))
    ]
    exponents = range(low, high + 1, step)
    ticks = [{"at": (e - low) / span, "text": f"{2.0**e:g}"} for e in exponents]
    return {"bars": bars, "ticks": ticks, "one": -low / span if low <= 0 <= high else None}


def _maps(frame: pd.DataFrame, cell: Any) -> list[HeadMap]:
    # Stacks may alternate in the table; a cell counts by its place there.
    index = {label: place for place, label in enumerate(frame.index)}
    maps = []
    for stack, part in head_stacks(frame):
        layers = sorted(int(layer) for layer in part["layer"].unique())
        cells = []
        for label, record in zip(part.index, records_of(part), strict=True):
            classes, mark, text = cell({**record, "label": label})
            row, column = layers.index(int(record["layer"])), int(record["head"])
            cells.append(Cell(index[label], row, column, classes, mark, text))
        maps.append(HeadMap(stack, layers, int(part["head"].max()) + 1, cells))
    return maps


def _chart(
    name: str,
    x_name: str,
    xs: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    ticks: list[dict[str, Any]],
    joined: Sequence[bool],
) -> dict[str, Any]:
    finite = [float(v) for line in lines.values() for v in line if math.isfinite(v)] or [0.0]
    marks_y = _round_ticks(min(finite), max(finite))
    low, span = marks_y[0], (marks_y[-1] - marks_y[0]) or 1.0
    drawn = [
        {
            "name": line,
            "shade": round((LEVELS - 1) * index / max(len(lines) - 1, 1)),
            "dots": [
                {"x": x, "y": (float(v) - low) / span, "joined": j, "text": f"{v:.4g}"}
                for x, v, j in zip(xs, values, joined, strict=True)
                if math.isfinite(v)
            ],
        }
        for index, (line, values) in enumerate(lines.items())
    ]
    return {
        "name": name,
        "x_name": x_name,
        "lines": drawn,
        "x_ticks": ticks,
        "y_ticks": [{"at": (v - low) / span, "text": f"{v:g}"} for v in marks_y],
        "text": f"{name}: from {min(finite):.3g} to {max(finite):.3g}",
    }


def _round_ticks(low: float, high: float) -> list[float]:
    """Choose three to six round numbers around a range."""
    raw = (high - low) / 4 or abs(high) / 4 or 0.25
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]
