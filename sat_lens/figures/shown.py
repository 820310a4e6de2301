"""A figure that a notebook shows, although nobody imported pyplot; and what it may be made of."""

from __future__ import annotations

import io

import pandas as pd
from matplotlib.figure import Figure

from sat_lens.errors import ArgumentError


class ShownFigure(Figure):
    """A matplotlib figure that displays itself in notebooks as the last value of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def check_frame(frame: object) -> None:
    """Raise an ArgumentError unless something is a pandas table."""
    if not isinstance(frame, pd.DataFrame):
        raise ArgumentError(
            f"Needed a pandas table, such as the frame() of a result; found {type(frame).__name__}."
        )
