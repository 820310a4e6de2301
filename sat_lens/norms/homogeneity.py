"""How near a network comes to its saturated version as all its parameters grow.

This is the curve of the paper's appendix on homogeneity, with the control that it lacks. See
:mod:`sat_lens.norms.scaled` for why it says little about attention alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import check_count, check_module, is_lens_model, is_number
from sat_lens.attention import RandomKey
from sat_lens.caching import mean_cosine, normalised_similarity
from sat_lens.data import Batch, batch_sizes, batches
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.intervention import replace_attention
from sat_lens.models import last_residual, model_name
from sat_lens.norms.measures import undisturbed
from sat_lens.norms.scaled import Which, scaled_parameters
from sat_lens.results import Provenance, Result, check_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_SCALES = (1.0, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0, 1000.0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HomogeneityCurve(Result, kind="homogeneity curve"):
    """Similarity of a network with scaled parameters; made by :func:`homogeneity_curve`."""

    scales: tuple[float, ...]
    columns: dict[str, Tensor]

    def frame(self) -> pd.DataFrame:
        """Return one row a factor c.

        Columns, all of the final hidden states, averaged over positions that are no padding:
        ``cos_saturated``, the cosine to the network at the largest c; ``cos_random``, to that
        network attending to random keys, and ``S``, the first normalised by it, both NaN for what
        is no TransformerLens model; ``cos_model``, to the network at c = 1.
        """
        return pd.DataFrame(
            {name: values.tolist() for name, values in self.columns.items()},
            index=pd.Index(self.scales, name="c"),
        )

    def plot(self, title: str | None = None) -> Figure:
        """Draw the similarities against c."""
        named = title or f"Parameters x c: {self.provenance}"
        return figures.scaling_curve_figure(self.frame(), named)

    def _lines(self) -> list[str]:
        return str(self.frame().iloc[[0, -1]].round(3)).splitlines()

    def _check(self) -> None:
        check_columns(self.columns, len(self.scales))


def homogeneity_curve(
    model: nn.Module,
    data: Any,
    *,
    scales: Sequence[float] = DEFAULT_SCALES,
    which: Which = "all",
    hidden: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    data_name: str = "",
) -> HomogeneityCurve:
    """Compare a network with parameters times c to its saturated version.

    The curve of the appendix on homogeneity in Merrill et al. 2021, arXiv 2010.09697.

    The largest c stands for the saturated network; in float32, attention is then saturated up to
    rounding.

    Args:
        model: A TransformerLens model; or any module, then with ``hidden``.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`.
        scales: Factors c > 0, at least two.
        which: Which parameters are multiplied; see :func:`sat_lens.norms.scaled_parameters`.
        hidden: A function ``(model, inputs) -> hidden states``, the features last; None takes the
            residual stream after the last layer.
        seed: Seed of the random keys of the control.
        batch_size: Sequences in a forward pass, for tokens and texts.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        ArgumentError: Fewer than two factors or one that is not positive, or neither a
            TransformerLens model nor ``hidden``.
        NonFiniteError: At some c the network gives NaN or infinity.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.norms import homogeneity_curve
        >>> curve = homogeneity_curve(sl.load_model("demo"), ["import os, sys"], scales=[1, 100],
        ...                           progress=False)
        >>> bool(curve.frame().loc[100, "cos_saturated"] > 0.9999)
        True
    """
    check_module(model)
    check_count("batch_size", batch_size)
    factors = _factors(scales)
    if hidden is not None and not callable(hidden):
        raise ArgumentError(f"hidden is a function of the model and its input; found {hidden!r}.")
    has_hooks = is_lens_model(model)
    if hidden is None and not has_hooks:
        raise ArgumentError(
            f"A {type(model).__name__} shows no residual stream: pass hidden=, a function of the "
            "model and its input that gives hidden states, or a TransformerLens model."
        )
    read = hidden or _final_residual
    sizes = batch_sizes(data, batch_size)
    n_runs = None if sizes is None else len(sizes) * (len(factors) + 2 + has_hooks)
    bar = tqdm(desc="homogeneity", total=n_runs, unit="run", disable=not progress)

    def states_at(c: float, batch: Batch, transform: RandomKey | None = None) -> Tensor:
        replaced = replace_attention(model, transform) if transform else contextlib.nullcontext()
        with scaled_parameters(model, c, which), replaced:
            states = read(model, batch)
        bar.update()
        if not isinstance(states, Tensor):
            raise ArgumentError(f"hidden must give a tensor; it gave a {type(states).__name__}.")
        if not bool(states.isfinite().all()):
            raise NonFiniteError(
                f"With parameters times {c} the network gives NaN or infinity. Leave that c out, "
                "or use float32."
            )
        return states

    sums = torch.zeros(3, len(factors), dtype=torch.float64)
    total = 0
    with undisturbed(model), bar:
        for batch in batches(model, data, batch_size):
            saturated, plain = states_at(max(factors), batch), states_at(1.0, batch)
            control = states_at(max(factors), batch, RandomKey(seed)) if has_hooks else None
            for i, c in enumerate(factors):
                states = states_at(c, batch)
                for row, other in enumerate((saturated, control, plain)):
                    cosine = math.nan if other is None else _cosine(states, other, batch)
                    sums[row, i] += batch.size * cosine
            total += batch.size
    cos_saturated, cos_random, cos_model = sums / total
    columns = {
        "cos_saturated": cos_saturated,
        "cos_random": cos_random,
        "S": normalised_similarity(cos_saturated, cos_random),
        "cos_model": cos_model,
    }
    scale = f"{min(factors):g} to {max(factors):g} ({which} parameters)"
    return HomogeneityCurve(Provenance(model_name(model), data_name, scale), factors, columns)


def _factors(scales: Any) -> tuple[float, ...]:
    found = list(scales) if isinstance(scales, Iterable) and not isinstance(scales, str) else []
    if not all(is_number(c) and 0 < c < math.inf for c in found) or len(set(found)) < 2:
        raise ArgumentError(f"Needed at least two positive factors c; found {scales!r}.")
    return tuple(float(c) for c in found)


def _final_residual(model: Any, batch: Batch) -> Tensor:
    name = last_residual(model)
    _, cache = model.run_with_cache(batch.inputs, names_filter=lambda n: n == name, **batch.kwargs)
    states: Tensor = cache[name]
    return states


def _cosine(first: Tensor, second: Tensor, batch: Batch) -> float:
    """Return the mean cosine, without padding where states are one for each position."""
    by_position = batch.non_padding is not None and batch.non_padding.shape == first.shape[:-1]
    return float(mean_cosine(first, second, batch.non_padding if by_position else None))
