"""The result of a sweep: one value per head, beside what it has to be compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from sat_lens import figures
from sat_lens._checks import check_choice
from sat_lens.errors import ArgumentError
from sat_lens.patching.arguments import Item
from sat_lens.results import Result, largest
from sat_lens.sites.site import Grid, head_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = ("effect", "normalised", "random_effect", "random_spread", "corruption_effect")
# What soft and saturated must differ by for a share of it: in proportion, and beyond rounding.
LEAST_GAP, LEAST_DIFFERENCE = 1e-3, 1e-6
_ARGUMENTS = {
    "method": ("exact", "attribution", "screen"),
    "direction": ("noising", "denoising"),
    "source": ("local", "run"),
}


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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadSweep(Result, kind="head sweep"):
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
    checks: Checks = dataclasses.field(default_factory=Checks)
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
        return self._grid(_spread(_measured(self.random_effects, 'baseline="random"')))

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
        return self.item_values - self.base

    @property
    def random_effects(self) -> Tensor | None:
        """The effect of every draw of random keys, in the shape of ``random_values``."""
        values = self.random_values
        return None if values is None else values - self.base

    @property
    def corruption_effects(self) -> Tensor | None:
        """``corruption_effect`` in the shape of ``item_values``."""
        base = self.soft if self.direction == "noising" else self.corrupted_soft
        values = self.corruption_values
        return None if values is None or base is None else values - base

    @property
    def mean_normalised(self) -> Tensor:
        """``normalised`` in the shape of ``item_values``, taken of means over prompts."""
        effects = self.item_effects.mean(-1) if self.soft.dim() else self.item_effects
        return _share(effects, self.base.mean(), self._other.mean())

    @property
    def notes(self) -> list[str]:
        """What a reader must know before trusting the numbers, in sentences; often nothing."""
        notes = []
        gap = float((self.saturated - self.soft).mean())
        if not bool(self.mean_normalised.isfinite().any()) and self.item_effects.isfinite().any():
            notes.append(
                f"normalised is not given: the soft and the saturated run differ by {gap:.2g} in "
                "the metric, too little to divide by."
            )
        if self.method == "attribution":
            notes.append("All effects are first-order estimates: they rank heads, at best.")
        elif not bool(self.confirmed.all()):
            notes.append("Effects that are not confirmed are first-order estimates.")
        if not self.complete:
            notes.append("The sweep was interrupted; what is missing is NaN.")
        return notes

    def frame(self) -> pd.DataFrame:
        """Return one row per head (and position), indexed by label; prompts are averaged.

        Columns: ``position`` where each was patched by itself; ``effect``; ``effect_se`` over
        prompts, where kept; ``normalised``; ``random_effect`` and ``random_spread``, where random
        keys were asked for: the mean and the standard deviation over their draws;
        ``corruption_effect``, where corrupted prompts were given; ``value`` of the metric;
        ``method`` and ``confirmed``: where that is False, the row is a first-order estimate;
        ``stack``, ``layer``, ``head`` (-1 for groups).
        """
        places = self.positions or (None,)
        items = [item for item in self.items for _ in places]
        table: dict[str, Any] = {}
        if self.positions is not None:
            table["position"] = [*self.positions] * len(self.items)
        # What a narrow screen cuts off stands in the middle, so the effects come first.
        for name, values in self._columns().items():
            table[name] = math.nan if values is None else values.flatten().tolist()
        table["method"] = self.method
        table["confirmed"] = self.confirmed.repeat_interleave(len(places)).tolist()
        for name in ("stack", "layer", "head"):
            table[name] = [getattr(item, name) for item in items]
        return pd.DataFrame(table, index=pd.Index([item.label for item in items], name="label"))

    def _columns(self) -> dict[str, Tensor | None]:
        """Every number of a row; None is one that was asked for and not reached."""
        columns: dict[str, Tensor | None] = {"effect": self._mean(self.item_effects)}
        if self.soft.dim():
            n_prompts = self.item_effects.shape[-1]
            columns["effect_se"] = _spread(self.item_effects.movedim(-1, 0)) / math.sqrt(n_prompts)
        columns["normalised"] = self.mean_normalised
        if self.arguments["baseline"] == "random":
            draws = self._mean(self.random_effects)
            columns["random_effect"] = None if draws is None else draws.nanmean(0)
            columns["random_spread"] = None if draws is None else _spread(draws)
        if self.corrupted is not None:
            columns["corruption_effect"] = self._mean(self.corruption_effects)
        return columns | {"value": self._mean(self.item_values)}

    def _mean(self, values: Tensor | None) -> Tensor | None:
        """Average over prompts, where they are apart."""
        return values if values is None or not self.soft.dim() else values.mean(-1)

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
            peak = grid.nan_to_num().abs().argmax(-1, keepdim=True)
            grid = grid.gather(-1, peak).squeeze(-1)
            what = f"{what}, of {len(self.positions)} positions the largest in absolute value"
        if not bool(grid.isfinite().any()):
            raise ArgumentError(f"No {what} is finite. {' '.join(self.notes)}")
        if not bool(self.confirmed.all()):
            what += f", {self.method}: approximate where not confirmed"
        reference = self._random_size if quantity == "effect" else None
        return figures.sweep_figure(grid, title or self._title, what, reference=reference)

    @property
    def _random_size(self) -> float | None:
        """The root mean square of all random effects: what mere disturbance does to the metric."""
        draws = self.random_effects
        return None if draws is None else float(draws.square().nanmean().sqrt())

    @property
    def _title(self) -> str:
        """What was done to which model."""
        given, done = self.arguments, _transformed(self.arguments["transform"])
        what = "one group of heads" if self.items[0].is_group else "one head"
        noising = self.direction == "noising"
        if given["source"] == "run":
            start, end = (done, "soft") if noising else ("soft", done)
            change = (
                f"{given['component']} of {what} at a time, from the {start} run into the {end} run"
            )
        elif noising:
            change = f"{what} at a time {done}, all others soft"
        else:
            change = f"{what} at a time soft, all others {done}"
        return f"{self.provenance.model}: {change}"

    def _lines(self) -> list[str]:
        frame = self.frame()
        effects = frame["effect"]
        if self.positions is not None:
            effects = effects.set_axis([f"{at} at {p}" for at, p in frame["position"].items()])
        size = self._random_size
        return [
            self._title.partition(": ")[2],
            f"metric: soft {float(self.soft.mean()):.4g}, saturated "
            f"{float(self.saturated.mean()):.4g}",
            f"largest effects: {largest(effects)}",
            *([] if size is None else [f"random keys: {size:.2g} (root mean square)"]),
        ]

    def _check(self) -> None:
        for name, choices in _ARGUMENTS.items():
            check_choice(name, self.arguments[name], choices)
        if not isinstance(self.arguments["transform"], (str, type(None))):
            raise TypeError(f"transform is {self.arguments['transform']!r}")
        labels = {item.label for item in self.items}
        if len({item.is_group for item in self.items}) != 1 or len(labels) != len(self.items):
            raise ValueError("items are none, repeat, or mix heads with groups")
        for item in self.items:
            layers, heads = (0, 0) if item.is_group else self.shapes[item.stack]
            if not item.is_group and not (item.layer < layers and 0 <= item.head < heads):
                raise ValueError(f"{item.label} is no head of {layers} layers of {heads}")
        prompts, items = [*self.soft.shape], [len(self.items)]
        if len(prompts) > 1:
            raise ValueError(f"soft has shape {prompts}")
        whole = [*items, *([] if self.positions is None else [len(self.positions)]), *prompts]
        draws = [] if self.random_values is None else [*self.random_values.shape[:1]]
        shapes = {
            "soft": prompts,
            "saturated": prompts,
            "item_values": whole,
            "confirmed": items,
            "random_values": [*draws, *whole],
            "corrupted_soft": prompts,
            "corruption_values": whole,
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None or (name == "confirmed" and list(tensor.shape) == shape):
                continue
            if list(tensor.shape) != shape or not tensor.is_floating_point():
                found = f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise ValueError(f"{name} holds {found}, and floats of shape {shape} were needed")

    @property
    def _other(self) -> Tensor:
        return self.saturated if self.direction == "noising" else self.soft

    def _grid(self, values: Tensor) -> Grid:
        """Arrange ``[item, ...]`` as ``[layer, head, ...]``, by stack where there are several."""
        if self.items[0].is_group:
            return values
        return head_grid([item.label for item in self.items], values, self.shapes)


def _share(effects: Tensor, base: Tensor, other: Tensor) -> Tensor:
    room = other - base
    least = (LEAST_GAP * base.abs().maximum(other.abs())).clamp(min=LEAST_DIFFERENCE)
    return (effects / room).masked_fill(room.abs() < least, math.nan)


def _measured(values: Tensor | None, needed: str) -> Tensor:
    if values is None:
        raise ArgumentError(f"This was not measured. Call sweep_heads with {needed}.")
    return values


def _spread(draws: Tensor) -> Tensor:
    """The standard deviation over the first axis, of what is not NaN there."""
    count = draws.isfinite().sum(0)
    squares = (draws - draws.nanmean(0)).square().nansum(0)
    return (squares / (count - 1)).masked_fill(count < 2, math.nan).sqrt()


def _transformed(transform: str | None) -> str:
    """What a transform does to heads, in words."""
    if transform is None:
        return "saturated"
    name, _, rest = transform.partition("(")
    if name == "Scale":
        return f"at c = {float(rest.removeprefix('c=').removesuffix(')')):g}"
    plain = {"Uniform": "uniform", "RandomKey": "at random keys"}
    return plain.get(name, f"put through {transform}")
