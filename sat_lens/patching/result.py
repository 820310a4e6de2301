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

from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.patching.files import as_file, fields_from_file, read_checks
from sat_lens.patching.items import Item
from sat_lens.results import Provenance, as_grid, read_result, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "head sweep"
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
        random_values: Like ``item_values``, with random keys in place of the patched-in values.
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
        return self._grid(self._effects(self.item_values))

    @property
    def normalised(self) -> Grid:
        """The effect as a share of the difference of the two runs: 1 if one head makes all of it.

        NaN where the soft and the saturated run do not differ in the metric.
        """
        return self._grid(self._normalised())

    @property
    def random_effect(self) -> Grid:
        """The effect of random keys in the same place: what mere disturbance does.

        Raises:
            ArgumentError: It was not measured.
        """
        return self._grid(_measured(self._effects(self.random_values), 'baseline="random"'))

    @property
    def corruption_effect(self) -> Grid:
        """The effect of the head's z from the other prompts, patched in the same direction.

        Raises:
            ArgumentError: No corrupted prompts were given.
        """
        return self._grid(_measured(self._corruption_effects(), "corrupted=..."))

    def frame(self) -> pd.DataFrame:
        """Return one row per head (and position), indexed by label; prompts are averaged.

        Columns: ``stack``, ``layer``, ``head`` (-1 for groups), ``position`` where each was patched
        by itself; ``value`` of the metric, ``effect``, ``normalised``; ``random_effect`` and
        ``corruption_effect``, NaN where not measured; ``effect_se`` over prompts, where kept;
        ``method`` and ``confirmed``: where that is False, the row is a first-order estimate.
        """
        effects = self._effects(self.item_values)
        columns = {
            "value": self.item_values,
            "effect": effects,
            "normalised": _share(self._averaged(effects), (self._other - self.base).mean()),
            "random_effect": self._effects(self.random_values),
            "corruption_effect": self._corruption_effects(),
        }
        rows = []
        for i, item in enumerate(self.items):
            for j, position in enumerate(self.positions or [None]):
                at = (i,) if position is None else (i, j)
                row: dict[str, Any] = {"label": item.label, "stack": item.stack}
                row |= {"layer": item.layer, "head": item.head}
                if position is not None:
                    row["position"] = position
                for name, values in columns.items():
                    row[name] = math.nan if values is None else float(values[at].mean())
                if self.soft.dim():
                    row["effect_se"] = _standard_error(effects[at])
                row |= {"method": self.method, "confirmed": bool(self.confirmed[i])}
                rows.append(row)
        return pd.DataFrame(rows).set_index("label")

    def plot(self, quantity: str = "effect", title: str | None = None) -> Figure:
        """Draw a map of heads: layers down, heads across, colours centred on 0.

        Args:
            quantity: ``"effect"``, ``"normalised"``, ``"random_effect"`` or
                ``"corruption_effect"``.
            title: The title; None writes one.

        Raises:
            ArgumentError: The quantity is unknown or was not measured, groups were swept, or the
                model has several stacks (select the heads of one).
        """
        from sat_lens.figures import sweep_map

        if quantity not in ("effect", "normalised", "random_effect", "corruption_effect"):
            raise ArgumentError(f"There is no quantity {quantity!r} to draw; try 'effect'.")
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
            what = f"largest {what} of {len(self.positions)} positions"
        if not bool(self.confirmed.all()):
            what += f", {self.method}: approximate where not confirmed"
        return sweep_map(grid, title or f"{self.direction.capitalize()}: {self.provenance}", what)

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
        try:
            return cls(**fields_from_file(tensors, meta), checks=Checks(**read_checks(meta)))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error

    def _effects(self, values: Tensor | None) -> Any:
        return None if values is None else values - _aligned(self.base, values)

    def _normalised(self) -> Tensor:
        room = _aligned(self._other - self.base, self.item_values)
        return _share(self._effects(self.item_values), room)

    def _averaged(self, values: Tensor) -> Tensor:
        """Average over prompts, where they are kept apart."""
        return values.mean(-1) if self.soft.dim() else values

    @property
    def _other(self) -> Tensor:
        return self.saturated if self.direction == "noising" else self.soft

    def _corruption_effects(self) -> Tensor | None:
        if self.corruption_values is None or self.corrupted_soft is None:
            return None
        base = self.soft if self.direction == "noising" else self.corrupted_soft
        return self.corruption_values - _aligned(base, self.corruption_values)

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


def _share(effects: Tensor, room: Tensor) -> Tensor:
    return (effects / room).masked_fill(room == 0, math.nan)


def _aligned(base: Tensor, values: Tensor) -> Tensor:
    """Give one number, or one per prompt, the axes of the values."""
    return base if base.dim() == 0 else base.view(*[1] * (values.dim() - 1), -1)


def _standard_error(effects: Tensor) -> float:
    return float(effects.std() / math.sqrt(len(effects))) if len(effects) > 1 else math.nan


def _measured(values: Tensor | None, needed: str) -> Tensor:
    if values is None:
        raise ArgumentError(f"This was not measured. Call sweep_heads with {needed}.")
    return values
