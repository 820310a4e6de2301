"""A sweep as a table, and in words: its title, and what a reader must know of its numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

if TYPE_CHECKING:
    from sat_lens.patching.result import HeadSweep


def table_of(sweep: HeadSweep) -> pd.DataFrame:
    """Give one row a head (and position), indexed by label, prompts averaged."""
    columns = _columns(sweep)
    rows = []
    for i, item in enumerate(sweep.items):
        for j, position in enumerate(sweep.positions or [None]):
            at = (i,) if position is None else (i, j)
            row: dict[str, Any] = {"label": item.label}
            if position is not None:
                row["position"] = position
            # What a screen cuts off stands in the middle, so the effects come first.
            row |= {name: _mean(values, at) for name, values in columns.items()}
            row |= {"method": sweep.method, "confirmed": bool(sweep.confirmed[i])}
            row |= {"stack": item.stack, "layer": item.layer, "head": item.head}
            rows.append(row)
    return pd.DataFrame(rows).set_index("label")


def _columns(sweep: HeadSweep) -> dict[str, Tensor | None]:
    """Every number of a row; None is one that was asked for and not reached."""
    columns: dict[str, Tensor | None] = {"effect": sweep.item_effects}
    if sweep.soft.dim():
        columns["effect_se"] = _standard_error(sweep.item_effects)
    columns["normalised"] = sweep.mean_normalised
    if sweep.arguments.get("baseline") == "random":
        draws = sweep.random_effects
        means = draws if draws is None or not sweep.soft.dim() else draws.mean(-1)
        columns["random_effect"] = None if means is None else means.nanmean(0)
        columns["random_spread"] = None if means is None else spread(means)
    if sweep.corrupted is not None:
        columns["corruption_effect"] = sweep.corruption_effects
    return columns | {"value": sweep.item_values}


def spread(draws: Tensor) -> Tensor:
    """Give the standard deviation over the first axis, of what is not NaN there.

    Example:
        >>> import torch
        >>> from sat_lens.patching.table import spread
        >>> spread(torch.tensor([[1.0, 1.0], [3.0, torch.nan]]))
        tensor([1.4142,    nan])
    """
    count = draws.isfinite().sum(0)
    squares = (draws - draws.nanmean(0)).square().nansum(0)
    return (squares / (count - 1)).masked_fill(count < 2, math.nan).sqrt()


def random_size(sweep: HeadSweep) -> float | None:
    """Give the root mean square of all random effects: what mere disturbance does to the metric."""
    draws = sweep.random_effects
    return None if draws is None else float(draws.square().nanmean().sqrt())


def title_of(sweep: HeadSweep) -> str:
    """Say in a sentence what was done to which model."""
    given = sweep.arguments
    what = "one group of heads" if sweep.items[0].is_group else "one head"
    done = transformed(given["transform"])
    noising = sweep.direction == "noising"
    if given["source"] == "run":
        runs = (f"the {done} run", "the soft run")
        start, end = runs if noising else runs[::-1]
        change = f"{given['component']} of {what} at a time, from {start} into {end}"
    elif noising:
        change = f"{what} at a time {done}, all others soft"
    else:
        change = f"{what} at a time soft, all others {done}"
    return f"{sweep.provenance.model}: {change}"


def transformed(transform: str | None) -> str:
    """Say what a transform does to heads.

    Example:
        >>> from sat_lens.patching.table import transformed
        >>> transformed(None), transformed("Scale(c=3.0)")
        ('saturated', 'at c = 3')
    """
    if transform is None:
        return "saturated"
    name, _, rest = transform.partition("(")
    if name == "Scale":
        return f"at c = {float(rest.removeprefix('c=').removesuffix(')')):g}"
    plain = {"Uniform": "uniform", "RandomKey": "at random keys"}
    return plain.get(name, f"put through {transform}")


def notes_of(sweep: HeadSweep) -> list[str]:
    """Say what a reader must know before trusting the numbers."""
    notes = []
    gap = float((sweep.saturated - sweep.soft).mean())
    if not bool(sweep.mean_normalised.isfinite().any()) and sweep.item_effects.isfinite().any():
        notes.append(
            f"normalised is not given: the soft and the saturated run differ by {gap:.2g} in the "
            "metric, too little to divide by."
        )
    if sweep.method == "attribution":
        notes.append("All effects are first-order estimates: they rank heads, at best.")
    elif not bool(sweep.confirmed.all()):
        notes.append("Effects that are not confirmed are first-order estimates.")
    if not sweep.complete:
        notes.append("The sweep was interrupted; what is missing is NaN.")
    return notes


def _mean(values: Tensor | None, at: tuple[int, ...]) -> float:
    return math.nan if values is None else float(values[at].mean())


def _standard_error(effects: Tensor) -> Tensor:
    prompts = effects.shape[-1]
    if prompts < 2:
        return effects.new_full(effects.shape[:-1], math.nan)
    return effects.std(-1) / math.sqrt(prompts)
