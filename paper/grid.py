"""Figure ``grid``: where norms grow, by learning rate and weight decay, under AdamW and SGD.

A small language model is trained at every learning rate and weight decay of a grid. All cells start
from the same parameters and see the same batches; they train together (:mod:`paper.cells`). The
text is the source of Python's standard library, by character.

When not to use it: to choose settings for a large model. Where growth turns into shrinking depends
on the initial norm, on the number of steps and on the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from paper.cells import SGD, AdamW, CellsRun, Stack, cell, stacked, train_cells
from paper.claims import Claim, Reproduction, verdict
from paper.network import (
    Shape,
    SmallTransformer,
    characters,
    new_network,
    next_token_cross_entropy,
    saturation,
    windows,
)
from sat_lens._checks import check_choice, check_count
from sat_lens.demo.corpus import corpus_name, held_out_texts, training_texts
from sat_lens.errors import ArgumentError
from sat_lens.figures import headline, label, panels
from sat_lens.results import Provenance, Result
from sat_lens.vocabulary import NEGATIVE, POSITIVE

Rule = Literal["adamw", "sgd"]
NAMES = {"adamw": "AdamW", "sgd": "SGD"}
BATCH = 8
HELD_OUT = 16
# A norm within this share of its start has neither grown nor shrunk.
STAYED = 0.01
# A cell whose held-out loss ends this much above its start, in nats, has diverged.
WORSE = 1.0
MEASURED = ("start_norm", "end_norm", "growth", "start_loss", "loss", "S", "lean")

# The figure's own grids.
RATES: dict[Rule, tuple[float, float]] = {"adamw": (1e-4, 1e-1), "sgd": (1e-3, 1.0)}
DECAYS = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 0.6, 1.0)
QUICK_DECAYS = (0.0, 1e-2, 1.0)
QUICK_SHAPE = Shape(width=16, heads=2)
STEPS, QUICK_STEPS = 500, 40
# The rules of the verdicts: what is usual weight decay, what are most cells and half of them.
USUAL_DECAY = 0.01
MOST, HALF = 0.8, 0.5

_COLOURS = LinearSegmentedColormap.from_list("growth", [NEGATIVE, "white", POSITIVE])
_LOST: dict[str, Any] = {"facecolor": "#E8E8E8", "edgecolor": "#9A9A9A", "hatch": "////"}
# The range of the colour scale, in doublings: one cell that collapses must not flatten the rest.
_LEAST_RANGE, _MOST_RANGE = 0.1, 2.0
_COLLAPSED = 1e-6


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Train the grids of both optimisers, and judge where norms grow."""
    count = 4 if quick else 10
    grids: list[GrowthGrid] = []
    for optimiser, (first, last) in RATES.items():
        grids.append(
            growth_grid(
                [first * (last / first) ** (i / (count - 1)) for i in range(count)],
                QUICK_DECAYS if quick else DECAYS,
                optimiser=optimiser,
                steps=QUICK_STEPS if quick else STEPS,
                shape=QUICK_SHAPE if quick else None,
                seed=seed,
                progress=progress,
            )
        )
        if not grids[-1].complete:
            break
    return reproduction(grids)


def reproduction(grids: Sequence[GrowthGrid]) -> Reproduction:
    """Judge grids, and draw them side by side."""
    title = "Where norms grow, by learning rate and weight decay"
    first = grids[0]
    return Reproduction(
        name="grid",
        title=title,
        claims=tuple(claim for grid in grids for claim in judged(grid.optimiser, grid.frame())),
        frame=pd.concat([grid.frame() for grid in grids], ignore_index=True),
        figure=growth_maps(grids, title),
        note=f"Each cell is a {first.provenance}, trained for {first.steps} steps from one "
        f"initialisation on the same batches of characters: {', '.join(map(_named, grids))}. Grows "
        f"and shrinks mean by more than {STAYED:.0%}. Where growth ends depends on the initial "
        "norm and on the number of steps: with few steps a small learning rate moves nothing. One "
        "seed.",
        complete=all(grid.complete for grid in grids),
    )


def judged(optimiser: str, table: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge where norms grow at usual weight decay, and whether more of it ends growth."""
    trained = table[table["outcome"] != "diverged"]
    usual = trained[trained["wd"] <= USUAL_DECAY]
    counts = usual["outcome"].value_counts()
    grew = float(counts.get("grows", 0) / max(len(usual), 1))
    lost = len(table) - len(trained)
    growth = trained.pivot(index="lr", columns="wd", values="growth")
    steps = growth.diff(axis=1).stack()
    turned = float((growth.min(axis=1) < 1 - STAYED).mean())
    share = float((steps.dropna() <= STAYED).mean())
    name = NAMES[optimiser]
    claims = (
        Claim(
            f"Under {name} norms grow at most learning rates, up to a weight decay of "
            f"{USUAL_DECAY:g}.",
            verdict(grew >= MOST, grew >= HALF),
            f"{counts.get('grows', 0)} of {len(usual)} such cells grow, {counts.get('stays', 0)} "
            f"stay and {counts.get('shrinks', 0)} shrink; {lost} cells of all {len(table)} "
            f"diverged and are left out. Rule: {MOST:.0%} of them; from {HALF:.0%} on, the "
            "correction is that it takes the larger learning rates or the smaller decays (see the "
            "map).",
        ),
        Claim(
            f"Under {name} enough weight decay ends growth.",
            verdict(turned >= MOST and share >= MOST, turned >= HALF),
            f"At {turned:.0%} of the learning rates the norm shrinks at some decay up to "
            f"{table['wd'].max():g}; from one decay to the next above it the end norm falls or "
            f"stays in {share:.0%} of the pairs. Rule: {MOST:.0%} for both; {HALF:.0%} of the "
            "learning rates is the correction.",
        ),
    )
    # One decay says nothing about more of it.
    return claims if table["wd"].nunique() > 1 else claims[:1]


def _named(grid: GrowthGrid) -> str:
    if grid.optimiser == "adamw":
        return "AdamW"
    return f"SGD with momentum {grid.momentum:g}" if grid.momentum else "SGD without momentum"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GrowthGrid(Result, kind="growth grid"):
    """Norms before and after training, one cell per setting; made by :func:`growth_grid`.

    Attributes:
        provenance: The text and the versions.
        optimiser: ``"adamw"`` or ``"sgd"``.
        momentum: Of SGD.
        seed: Of the initial parameters and the batches.
        steps: How many steps were taken.
        planned: How many were asked for.
        columns: One value per cell; see :meth:`frame`.
    """

    optimiser: str
    momentum: float
    seed: int
    steps: int
    planned: int
    columns: dict[str, Tensor]

    @property
    def complete(self) -> bool:
        """False if the run was interrupted: the numbers are those of the steps taken until then."""
        return self.steps == self.planned

    def frame(self) -> pd.DataFrame:
        """Return one row per cell.

        Columns: ``lr``, ``wd``, ``optimiser``, ``steps``; ``start_norm`` and ``end_norm`` of all
        parameters and their ratio ``growth``; held-out ``start_loss`` and ``loss`` (nats per
        character); ``S`` and ``lean`` at the end, as elsewhere in the library; ``outcome``:
        ``"grows"``, ``"stays"`` (within 1%), ``"shrinks"`` or ``"diverged"``; and ``broke_at``,
        the first step whose loss was not finite, 0 where all were. A diverged cell's loss ended
        more than 1 nat above its start, or was not finite; then its numbers are NaN.
        """
        table = pd.DataFrame({name: values.tolist() for name, values in self.columns.items()})
        table.insert(2, "optimiser", self.optimiser)
        table.insert(3, "steps", self.steps)
        table["outcome"] = [_outcome(row) for row in table.to_dict("records")]
        return table

    def plot(self, title: str | None = None) -> Figure:
        """Draw the growth of every cell (:func:`growth_maps`)."""
        return growth_maps([self], title or f"Norm growth: {self.provenance}")


def growth_grid(
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    *,
    optimiser: Rule = "adamw",
    momentum: float = 0.0,
    steps: int = 500,
    shape: Shape | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GrowthGrid:
    """Train a small language model at every learning rate and weight decay, all together.

    The figures on AdamW and SGD in Merrill et al. 2021, arXiv 2010.09697. Learning rates are
    constant. AdamW's weight decay is decoupled, SGD's is added to the gradient. After an interrupt
    the result holds the steps taken until then.

    Args:
        learning_rates: Each above 0.
        weight_decays: Each 0 or above.
        optimiser: ``"adamw"`` or ``"sgd"``.
        momentum: Of SGD, in [0, 1); AdamW has none.
        steps: Steps of 8 windows of text each.
        shape: The model; None is 2 layers of 4 heads, width 32, context 32.
        seed: Seed of the initial parameters and the batches.
        progress: Whether to show a progress bar.

    Raises:
        ArgumentError: An empty axis, a value that is out of range or given twice, an unknown
            optimiser, AdamW with momentum, fewer than one step, or a shape that is not a ``Shape``.

    Example:
        >>> grid = growth_grid([1e-3, 1e-2], [0.0], steps=2, progress=False)
        >>> grid.frame()[["lr", "wd", "outcome"]].shape
        (2, 3)
    """
    _check(optimiser, momentum, steps, seed)
    size = shape or Shape()
    if not isinstance(size, Shape):
        raise ArgumentError(f"shape is a paper.network.Shape; found {shape!r}.")
    axes = _axis("learning rate", learning_rates), _axis("weight decay", weight_decays, least=0.0)
    model = new_network(size, seed=seed)
    rates, decays = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    single = rates.float(), decays.float()
    rule = AdamW(*single) if optimiser == "adamw" else SGD(*single, momentum)
    text = characters(held_out_texts())
    held_out = windows(text, size.context, HELD_OUT, seed)
    start = stacked(model, len(rates))
    before = {"start_norm": _norms(start), "start_loss": _loss(model, held_out).expand(len(rates))}
    run = train_cells(
        model, start, rule, _batches(size, steps, seed), next_token_cross_entropy,
        total=steps, progress=progress, name=optimiser,
    )  # fmt: skip
    columns = {"lr": rates, "wd": decays} | before | _after(model, run, held_out)
    columns["growth"] = columns["end_norm"] / columns["start_norm"]
    ordered = {name: columns[name] for name in ("lr", "wd", *MEASURED, "broke_at")}
    made_of = f"{size.layers} layers of {size.heads} heads, width {size.width}"
    where = Provenance(f"small transformer ({made_of})", corpus_name())
    return GrowthGrid(where, optimiser, momentum, seed, run.steps, steps, ordered)


def _batches(shape: Shape, steps: int, seed: int) -> Iterator[Int[Tensor, "batch context"]]:
    text = characters(training_texts())
    for step in range(steps):
        yield windows(text, shape.context, BATCH, seed * 1_000_003 + step)


def _norms(parameters: Stack) -> Float[Tensor, " cell"]:
    squares = [stack.double().flatten(1).square().sum(1) for stack in parameters.values()]
    return torch.stack(squares).sum(0).sqrt()


def _after(model: SmallTransformer, run: CellsRun, held_out: Tensor) -> dict[str, Tensor]:
    """Measure every cell; a cell with any value that is not finite is NaN in all of them."""
    norms = _norms(run.parameters)
    rows = [
        _measured(model, cell(run.parameters, index), held_out)
        if run.broke_at[index] == 0 and norms[index].isfinite()
        else dict.fromkeys(("loss", "S", "lean"), math.nan)
        for index in range(len(norms))
    ]
    found = {
        name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]
    }
    found["end_norm"] = norms.where(found["loss"].isfinite(), math.nan)
    return found | {"broke_at": run.broke_at}


def _measured(model: SmallTransformer, own: Stack, held_out: Tensor) -> dict[str, float]:
    trained = new_network(model.shape)
    trained.load_state_dict(own)
    found = saturation(trained, held_out)
    return {"loss": float(_loss(trained, held_out)), "S": found["S"], "lean": found["lean"]}


@torch.no_grad()
def _loss(model: SmallTransformer, held_out: Tensor) -> Float[Tensor, ""]:
    return next_token_cross_entropy(model(held_out), held_out).double()


def _outcome(row: dict[str, Any]) -> str:
    lost = not math.isfinite(row["loss"]) or row["loss"] > row["start_loss"] + WORSE
    if lost or row["broke_at"]:
        return "diverged"
    if abs(row["growth"] - 1) <= STAYED:
        return "stays"
    return "grows" if row["growth"] > 1 else "shrinks"


def _axis(name: str, values: Any, least: float | None = None) -> Float[Tensor, " value"]:
    """Return an axis as a tensor: numbers above 0, or at least ``least``."""
    try:
        axis = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        axis = torch.zeros(())
    in_range = axis > 0 if least is None else axis >= least
    fine = axis.dim() == 1 and len(axis) and bool((in_range & axis.isfinite()).all())
    if not fine or len(axis.unique()) < len(axis):
        raise ArgumentError(
            f"Each {name} is a number {'above 0' if least is None else f'from {least:g} on'}, "
            f"given once, in a list of at least one; found {values!r}."
        )
    return axis


def _check(optimiser: str, momentum: float, steps: int, seed: int) -> None:
    check_count("steps", steps)
    check_count("seed", seed, at_least=0)
    check_choice("optimiser", optimiser, get_args(Rule))
    if not 0 <= momentum < 1 or (momentum and optimiser == "adamw"):
        raise ArgumentError(
            f"Momentum is in [0, 1) and SGD's alone; found {momentum} with {optimiser}."
        )


def growth_maps(grids: Sequence[GrowthGrid], title: str) -> Figure:
    """Draw how norms changed, one panel per grid: blue shrank, vermilion grew, white stayed.

    The colour is the end norm over the start norm, on one logarithmic scale for all panels that
    ends at a factor of four. Cells that diverged are grey and hatched.

    Args:
        grids: The grids, from left to right.
        title: What was measured on what.
    """
    tables = [grid.frame() for grid in grids]
    changes = pd.concat(tables).query("outcome != 'diverged'")["growth"]
    largest = float(_octaves(changes).abs().max()) if len(changes) else 0.0
    limit = min(max(largest, _LEAST_RANGE), _MOST_RANGE)
    figure, axes = panels(len(grids), title, across=2, size=(6.4 if len(grids) == 1 else 3.6, 3.6))
    for panel, grid, table in zip(axes, grids, tables, strict=True):
        drawn = _growth_map(panel, table, limit)
        cut = "" if grid.complete else f" of {grid.planned}: interrupted"
        headline(panel, f"{_named(grid)}, {grid.steps} steps{cut}")
    bar = figure.colorbar(drawn, ax=axes, extend="both" if largest > limit else "neither")
    bar.set_label("end norm / start norm", size=8)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:.3g}"))
    bar.ax.tick_params(labelsize=7.5)
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
    _ticks(axes.xaxis, list(grid.columns))
    _ticks(axes.yaxis, list(grid.index))
    label(axes, x="learning rate", y="weight decay")
    axes.tick_params(axis="x", labelrotation=45)
    axes.spines[:].set_visible(False)
    return drawn


def _octaves(growth: pd.Series) -> pd.Series:
    """Return growth in doublings."""
    return np.log2(growth.clip(lower=_COLLAPSED))


def _ticks(axis: Any, values: list[float]) -> None:
    step = math.ceil(len(values) / 10)
    axis.set_ticks(range(0, len(values), step), [f"{v:.2g}" for v in values[::step]])
