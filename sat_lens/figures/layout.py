"""How tables are laid out in figures and pages: stacks, panels, places and ticks of scales."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

# A layer's column, its stack before it where there are several: S_L0, cos_random_encoder.L0.
_OF_A_LAYER = re.compile(r"(S|cos_random)_(?:[a-z_]+\.)?L\d+")
WORDS = {
    "loss": "loss (nats per token)",
    "S": "similarity S, by layer",
    "cos_random": "cosine of random keys, S = 0",
    "kl": "KL from the soft model (nats)",
    "top1": "same most likely token (share)",
    "metric": "metric",
}


def head_stacks(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Part a table of heads by stack, in the model's order; without the column it is one part."""
    if "stack" not in frame.columns:
        return [("", frame)]
    return [(str(name), part) for name, part in frame.groupby("stack", sort=False)]


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Give each row of a table as a dict by column name.

    Example:
        >>> records_of(pd.DataFrame({"head": [3]}))
        [{'head': 3}]
    """
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


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
