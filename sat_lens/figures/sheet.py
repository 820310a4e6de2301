"""A sheet of panels laid out in inches, so that nothing overlaps at any number of heads."""

from __future__ import annotations

import math
import textwrap

import pandas as pd
from matplotlib.axes import Axes

from sat_lens.figures import marks
from sat_lens.figures.shown import ShownFigure

INK, QUIET = "#222222", "#666666"
MARGIN, LEFT, LINE = 0.25, 0.55, 0.21
_GAP = 0.55


class Sheet:
    """A figure laid out in inches: title, panels side by side, room for a legend below."""

    def __init__(self, sizes: list[tuple[int, int]], title: str, legend_lines: float) -> None:
        most_heads = sum(heads for _, heads in sizes)
        self.cell = min(max(7.2 / most_heads, 0.2), 0.42)
        self.sizes = sizes
        panels = sum(heads * self.cell for _, heads in sizes) + (len(sizes) - 1) * _GAP
        self.width = max(LEFT + panels + MARGIN, 6.2)
        lines = textwrap.wrap(marks.visible(title), int(self.width * 11)) or [""]
        self.top = MARGIN + 0.2 * len(lines) + (0.5 if len(sizes) > 1 else 0.35)
        self.map_height = max(layers for layers, _ in sizes) * self.cell
        self.legend_height = legend_lines * LINE + MARGIN
        self.height = self.top + self.map_height + 0.3 + self.legend_height
        self.figure = ShownFigure(figsize=(self.width, self.height), facecolor="white")
        y = 1 - MARGIN / self.height
        self.figure.text(
            MARGIN / self.width, y, "\n".join(lines), size=10, color=INK, va="top", weight="bold"
        ).set_parse_math(False)

    def panel(self, index: int, part: pd.DataFrame, stack: str) -> Axes:
        """Add the axes of one stack, one unit a cell, heads along the top."""
        layers, heads = self.sizes[index]
        before = sum(h * self.cell for _, h in self.sizes[:index]) + index * _GAP
        width, height = heads * self.cell, layers * self.cell
        axes = self.axes(LEFT + before, self.height - self.top - height, width, height)
        axes.set(xlim=(-0.5, heads - 0.5), ylim=(layers - 0.5, -0.5))
        names = sorted(part["layer"].unique())
        every = math.ceil(0.2 / self.cell) if self.cell < 0.3 else 1
        axes.set_xticks(range(0, heads, every))
        axes.set_yticks(range(0, layers, every), [str(name) for name in names[::every]])
        axes.tick_params(length=0, labelsize=7.5, colors=QUIET, top=True, labeltop=True)
        axes.tick_params(axis="x", bottom=False, labelbottom=False, pad=1)
        axes.set_ylabel("layer" if index == 0 else "", size=8, color=QUIET)
        axes.set_xlabel("head", size=8, color=QUIET)
        axes.xaxis.set_label_position("top")
        if stack:
            axes.set_title(stack, size=9, color=INK, pad=4).set_parse_math(False)
        axes.spines[:].set_visible(False)
        return axes

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Add axes at a place given in inches from the lower left corner."""
        w, h = self.width, self.height
        return self.figure.add_axes((left / w, bottom / h, width / w, height / h))

    def write(self, x: float, line: float, text: str, color: str = INK) -> None:
        """Write a line of the legend."""
        y = (self.legend_height - (line + 0.5) * LINE) / self.height
        self.figure.text(x / self.width, y, text, size=8, color=color, va="center").set_parse_math(
            False
        )
