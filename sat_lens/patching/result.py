"""The result of a sweep: one value per head, beside what it has to be compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens import figures
from sat_lens.errors import ArgumentError
from sat_lens.patching.files import as_file, fields_from_file, read_checks
from sat_lens.patching.items import Item
from sat_lens.patching.table import notes_of, random_size, spread, table_of, title_of
from sat_lens.results import Provenance, as_grid, read_entries, read_result, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "head sweep"
QUANTITIES = ("effect", "normalised", "random_effect", "random_spread", "corruption_effect")
# What soft and saturated must differ by for a share of it: in proportion, and beyond rounding.
LEAST_GAP, LEAST_DIFFERENCE = 1e-3, 1e-6
Grid = Tensor | dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Checks:
    """How exact values were made, and how far they were checked.

    Attributes:
        route: ``"replay"`` (only what comes after a head was run again) or ``"generic"``.
        n_checked: How many values of the replay were computed by whole forward passes too.
        max_error: The largest difference found there.
        recall: Of a screen: the estimated share of the heads of largest effect that it confirmed.
        recall_sample: On how many heads, drawn at random from the rest, that estimate stands.
    """

    route: str = "generic"
    n_checked: int = 0
    max_error: float = 0.0
    recall: float = math.nan
    recall_sample: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class HeadSweep:
    """One value of the metric per head, position and prompt; made by :func:`sat_lens.sweep_heads`.

    The sign is that of TransformerLens: an effect is the value of the patched run minus that of the
    run it was patched into, so a positive one means that the patch raised the metric.

    Attributes:
        provenance: The model and the versions.
        arguments: What :func:`sat_lens.sweep_heads` was called with, apart from model, inputs and
            metric.
        inputs: The model's arguments, by name; ``corrupted`` those of the other prompts.
        items: The heads or groups.
        shapes: The numbers of layers and of heads in each stack of the model.
        positions: The query positions, if each was patched by itself.
        soft: The metric of the soft run: a scalar, or ``[prompt]`` for ``reduce=None``.
        saturated: That of the run with every head transformed.
        item_values: ``[item, position?, prompt?]``; axes that were not asked for are absent.
        confirmed: ``[item]``: whether the value is exact; else it is a first-order estimate.
        random_values: Like ``item_values`` with random keys in place of the patched-in values, and
            with an axis of draws before the others.
        corrupted_soft: The metric of the soft run on the corrupted prompts.
        corruption_values: Like ``item_values``, with z taken from the other prompts' soft run.
        checks: How the values were made and checked.
        complete: False if the sweep was interrupted; missing values are NaN.
    """

    provenance: Provenance
    arguments: Mapping[str, Any]
    inputs: Mapping[str, Any]
    items: tuple[Item, ...]
    shapes: Mapping[str, tuple[int, int]]
    soft: Tensor
    saturated: Tensor
    item_values: Tensor
    confirmed: Bool[Tensor, " item"]
    positions: tuple[int, ...] | None = None
    random_values: Tensor | None = None
    corrupted: Mapping[str, Any] | None = None
    corrupted_soft: Tensor | None = None
    corruption_values: Tensor | None = None
    checks: Checks = Checks()
    complete: bool = True

    @property
    def method(self) -> str:
        """``"exact"``, ``"attribution"`` (approximate) or ``"screen"`` (see ``confirmed``)."""
        return str(self.arguments["method"])

    @property
    def direction(self) -> str:
        """``"noising"`` (into the soft run) or ``"denoising"`` (into the saturated run)."""
        return str(self.arguments["direction"])

    @property
    def labels(self) -> list[str]:
        """The labels of the heads, or the names of the groups."""
        return [item.label for item in self.items]

    @property
    def base(self) -> Tensor:
        """The metric of the run that is patched."""
        return self.soft if self.direction == "noising" else self.saturated

    @property
    def values(self) -> Grid:
        """The metric with each head patched: ``[layer, head, ...]``, NaN where none was asked for.

        A dict of these by stack where the model has several, and ``[group, ...]`` for groups.
        """
        return self._grid(self.item_values)

    @property
    def effect(self) -> Grid:
        """``values`` minus the metric of the run that is patched."""
        return self._grid(self.item_effects)

    @property
    def normalised(self) -> Grid:
        """The effect as a share of the difference of the two runs: 1 if one head makes all of it.

        NaN where the two runs differ by less than a thousandth of the larger, or by less than 1e-6:
        a share of so little is a ratio of rounding errors. :attr:`notes` then says so.
        """
        return self._grid(_share(self.item_effects, self.base, self._other))

    @property
    def random_effect(self) -> Grid:
        """The mean effect of random keys in the same place over their draws.

        Raises:
            ArgumentError: It was not measured.
        """
        return self._grid(_measured(self.random_effects, 'baseline="random"').nanmean(0))

    @property
    def random_spread(self) -> Grid:
        """The standard deviation of that effect over draws; NaN for a single draw.

        What mere disturbance does to the metric is of the size of the two together.

        Raises:
            ArgumentError: It was not measured.
        """
        return self._grid(spread(_measured(self.random_effects, 'baseline="random"')))

    @property
    def corruption_effect(self) -> Grid:
        """The effect of the head's z from the other prompts, patched in the same direction.

        Raises:
            ArgumentError: No corrupted prompts were given.
        """
        return self._grid(_measured(self.corruption_effects, "corrupted=..."))

    @property
    def item_effects(self) -> Tensor:
        """``effect`` in the shape of ``item_values``."""
        return self.item_values - _aligned(self.base, self.item_values)

    @property
    def random_effects(self) -> Tensor | None:
        """The effect of every draw of random keys, in the shape of ``random_values``."""
        values = self.random_values
        return None if values is None else values - _aligned(self.base, values)

    @property
    def corruption_effects(self) -> Tensor | None:
        """``corruption_effect`` in the shape of ``item_values``."""
        base = self.soft if self.direction == "noising" else self.corrupted_soft
        values = self.corruption_values
        return None if values is None or base is None else values - _aligned(base, values)

    @property
    def mean_normalised(self) -> Tensor:
        """``normalised`` in the shape of ``item_values``, taken of means over prompts."""
        effects = self.item_effects.mean(-1) if self.soft.dim() else self.item_effects
        return _share(effects, self.base.mean(), self._other.mean())

    @property
    def notes(self) -> list[str]:
        """What a reader must know before trusting the numbers, in sentences; often nothing."""
        return notes_of(self)

    def frame(self) -> pd.DataFrame:
        """Return one row per head (and position), indexed by label; prompts are averaged.

        Columns: ``position`` where each was patched by itself; ``effect``; ``effect_se`` over
        prompts, where kept; ``normalised``; ``random_effect`` and ``random_spread``, where random
        keys were asked for: the mean and the standard deviation over their draws;
        ``corruption_effect``, where corrupted prompts were given; ``value`` of the metric;
        ``method`` and ``confirmed``: where that is False, the row is a first-order estimate;
        ``stack``, ``layer``, ``head`` (-1 for groups).
        """
        return table_of(self)

    def plot(self, quantity: str = "effect", title: str | None = None) -> Figure:
        """Draw a map of heads: layers down, heads across, colours centred on 0.

        Args:
            quantity: ``"effect"``, ``"normalised"``, ``"random_effect"``, ``"random_spread"`` or
                ``"corruption_effect"``.
            title: The title; None says what was done to which model.

        Raises:
            ArgumentError: The quantity is unknown, was not measured or is NaN everywhere, groups
                were swept, or the model has several stacks (select the heads of one).
        """
        if quantity not in QUANTITIES:
            raise ArgumentError(
                f"There is no quantity {quantity!r} to draw; try one of {', '.join(QUANTITIES)}."
            )
        grid = getattr(self, quantity)
        if not isinstance(grid, Tensor) or self.items[0].is_group:
            raise ArgumentError(
                "A map of heads needs single heads of one stack. Choose such heads, or draw "
                ".frame() as you like."
            )
        what = quantity.replace("_", " ")
        if self.soft.dim():
            grid = grid.mean(-1)
        if self.positions is not None:
            largest = grid.nan_to_num().abs().argmax(-1, keepdim=True)
            grid = grid.gather(-1, largest).squeeze(-1)
            what = f"{what}, of {len(self.positions)} positions the largest in absolute value"
        if not bool(grid.isfinite().any()):
            raise ArgumentError(f"No {what} is finite. {' '.join(self.notes)}")
        if not bool(self.confirmed.all()):
            what += f", {self.method}: approximate where not confirmed"
        reference = random_size(self) if quantity == "effect" else None
        return figures.sweep_map(grid, title or title_of(self), what, reference=reference)

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header."""
        tensors, meta = as_file(self)
        write_result(path, KIND, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> HeadSweep:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileFormatError: The file is missing, broken, foreign, or holds something else.
        """
        tensors, meta = read_result(path, KIND)
        with read_entries(path):
            return cls(**fields_from_file(tensors, meta), checks=Checks(**read_checks(meta)))

    @property
    def _other(self) -> Tensor:
        return self.saturated if self.direction == "noising" else self.soft

    def _grid(self, values: Tensor) -> Grid:
        if self.items[0].is_group:
            return values
        grids = {
            stack: self._grid_of(stack, values)
            for stack in dict.fromkeys(item.stack for item in self.items)
        }
        return grids if len(self.shapes) > 1 else next(iter(grids.values()))

    def _grid_of(self, stack: str, values: Tensor) -> Float[Tensor, "layer head *rest"]:
        chosen = [i for i, item in enumerate(self.items) if item.stack == stack]
        layers, heads = self.shapes[stack]
        places = [(self.items[i].layer, self.items[i].head) for i in chosen]
        return as_grid(values[chosen], layers, heads, places)


def _share(effects: Tensor, base: Tensor, other: Tensor) -> Tensor:
    base, other = _aligned(base, effects), _aligned(other, effects)
    room = other - base
    least = (LEAST_GAP * base.abs().maximum(other.abs())).clamp(min=LEAST_DIFFERENCE)
    return (effects / room).masked_fill(room.abs() < least, math.nan)


def _aligned(base: Tensor, values: Tensor) -> Tensor:
    """Give one number, or one per prompt, the axes of the values."""
    return base if base.dim() == 0 else base.view(*[1] * (values.dim() - 1), -1)


def _measured(values: Tensor | None, needed: str) -> Tensor:
    if values is None:
        raise ArgumentError(f"This was not measured. Call sweep_heads with {needed}.")
    return values
