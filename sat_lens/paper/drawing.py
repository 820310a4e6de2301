"""The pictures that only this room draws: grids of runs, and panels of lines with words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sat_lens import figures
from sat_lens.vocabulary import INK, LINES, NEGATIVE, POSITIVE, QUIET

if TYPE_CHECKING:
    from sat_lens.paper.grid import GrowthGrid

_COLOURS = LinearSegmentedColormap.from_list("growth", [NEGATIVE, "white", POSITIVE])
_LOST: dict[str, Any] = {"facecolor": "#E8E8E8", "edgecolor": "#9A9A9A", "hatch": "////"}
# Octaves: a cell that collapses must not take the colour from the rest.
_LEAST_RANGE, _MOST_RANGE = 0.1, 2.0
_COLLAPSED = 1e-6


def panels(count: int, title: str, *, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """Make a figure of some panels in a row, its title in words above them."""
    return figures.panels(count, title, across=count, size=(max(6.4 / count, 3.6), height))


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
    """Draw columns of a table against its index; ``columns`` gives each its words.

    What a logarithmic axis cannot show is left out. Dashed columns are controls.
    """
    places = table.index.to_numpy(dtype=float)
    for number, (name, words) in enumerate(columns.items()):
        values = table[name].to_numpy(dtype=float)
        keep = np.isfinite(values) & ((places > 0) | (not log_x)) & ((values > 0) | (not log_y))
        style = "--" if name in dashed else "-o"
        color = LINES[number % len(LINES)]
        axes.plot(places[keep], values[keep], style, color=color, lw=1.5, ms=3, label=words)
    if log_x:
        logarithmic(axes, "x", multiples=(1,))
    if log_y:
        logarithmic(axes, "y")
    axes.set_xlabel(x, size=8, color=QUIET)
    axes.set_ylabel(y, size=8, color=QUIET)
    if legend:
        axes.legend(frameon=False, fontsize=7)


def logarithmic(
    axes: Axes, which: Literal["x", "y"], multiples: Sequence[float] = (1, 2, 5)
) -> None:
    """Make an axis logarithmic, with plain numbers at these multiples of the powers of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def growth_maps(grids: Sequence[GrowthGrid], title: str) -> Figure:
    """Draw how norms changed, a panel a grid: blue shrank, vermillion grew, white stayed.

    The colour is the end norm over the start norm, on one logarithmic scale for all panels that
    ends at a factor of four.

    Args:
        grids: The grids, from left to right.
        title: What was measured on what.
    """
    tables = [grid.frame() for grid in grids]
    changes = pd.concat(tables).query("outcome != 'diverged'")["growth"]
    largest = float(_octaves(changes).abs().max()) if len(changes) else 0.0
    limit = min(max(largest, _LEAST_RANGE), _MOST_RANGE)
    figure, axes = panels(len(grids), title, height=3.6)
    for panel, grid, table in zip(axes, grids, tables, strict=True):
        drawn = _growth_map(panel, table, limit)
        named = "AdamW" if grid.optimiser == "adamw" else f"SGD, momentum {grid.momentum:g}"
        cut = "" if grid.complete else f" of {grid.planned}: interrupted"
        panel.set_title(f"{named}, {grid.steps} steps{cut}", size=8.5, color=INK, loc="left")
    bar = figure.colorbar(drawn, ax=axes, extend="both" if largest > limit else "neither")
    bar.set_label("end norm / start norm", size=8, color=QUIET)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:.3g}"))
    bar.ax.tick_params(labelsize=7.5, colors=QUIET)
    if any((table["outcome"] == "diverged").any() for table in tables):
        figure.legend(
            handles=[Patch(label="diverged", **_LOST)],
            loc="outside lower left", frameon=False, fontsize=7.5,
        )  # fmt: skip
    return figure


def _growth_map(axes: Axes, table: pd.DataFrame, limit: float) -> Any:
    kept = table.assign(change=_octaves(table["growth"].where(table["outcome"] != "diverged")))
    grid = kept.pivot(index="wd", columns="lr", values="change")
    drawn = axes.imshow(
        grid.to_numpy(), cmap=_COLOURS, norm=Normalize(-limit, limit), origin="lower", aspect="auto"
    )
    for row, column in zip(*np.nonzero(grid.isna().to_numpy()), strict=True):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, lw=0, **_LOST))
    _ticks(axes.xaxis, list(grid.columns), "learning rate")
    _ticks(axes.yaxis, list(grid.index), "weight decay")
    axes.tick_params(axis="x", labelrotation=45)
    axes.spines[:].set_visible(False)
    return drawn


def _octaves(growth: pd.Series) -> pd.Series:
    return np.log2(growth.clip(lower=_COLLAPSED))


def _ticks(axis: Any, values: list[float], name: str) -> None:
    step = math.ceil(len(values) / 10)
    axis.set_ticks(range(0, len(values), step), [f"{v:.2g}" for v in values[::step]])
    axis.set_label_text(name, size=8, color=QUIET)
