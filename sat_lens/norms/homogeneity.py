"""How near a network comes to its saturated version as all its parameters grow.

This is the curve of the paper's appendix, with the control that it lacks. See
:mod:`sat_lens.norms.scaled` for why it says little about attention alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import check_count, check_module
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.models import last_residual
from sat_lens.norms.arguments import columns_of_length
from sat_lens.norms.measures import undisturbed
from sat_lens.norms.scaled import Which, scaled_parameters
from sat_lens.results import Provenance, read_entries, read_result, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "homogeneity curve"
DEFAULT_SCALES = (1.0, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0, 1000.0)


@dataclasses.dataclass(frozen=True, eq=False)
class HomogeneityCurve:
    """Similarity of a network with scaled parameters; made by :func:`homogeneity_curve`."""

    provenance: Provenance
    scales: tuple[float, ...]
    columns: dict[str, Tensor]

    def frame(self) -> pd.DataFrame:
        """Return one row a factor c.

        Columns, all of the final hidden representation and averaged over positions that are no
        padding:
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

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header."""
        meta = {
            "provenance": dataclasses.asdict(self.provenance),
            "scales": list(self.scales),
            "columns": list(self.columns),
        }
        write_result(path, KIND, self.columns, meta)

    @classmethod
    def load(cls, path: str | Path) -> HomogeneityCurve:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileFormatError: The file is missing, broken, foreign, or holds something else.
        """
        columns, meta = read_result(path, KIND)
        with read_entries(path):
            scales = tuple(float(c) for c in meta["scales"])
            ordered = columns_of_length(columns, meta["columns"], len(scales))
            return cls(Provenance(**meta["provenance"]), scales, ordered)


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
    from sat_lens.caching import normalised_similarity
    from sat_lens.data import batch_sizes, batches
    from sat_lens.models import model_name

    check_module(model)
    check_count("batch_size", batch_size)
    factors = _factors(scales)
    if hidden is not None and not callable(hidden):
        raise ArgumentError(f"hidden is a function of the model and its input; found {hidden!r}.")
    if hidden is None and not hasattr(model, "hook_dict"):
        raise ArgumentError(
            f"A {type(model).__name__} shows no residual stream: pass hidden=, a function of the "
            "model and its input that gives hidden states, or a TransformerLens model."
        )
    read = hidden or _final_residual
    sizes = batch_sizes(data, batch_size)
    runs_a_batch = len(factors) + 2 + hasattr(model, "hook_dict")
    n_runs = None if sizes is None else len(sizes) * runs_a_batch
    sums = torch.zeros(3, len(factors), dtype=torch.float64)
    total = 0
    bar = tqdm(desc="homogeneity", total=n_runs, unit="run", disable=not progress)
    with undisturbed(model), bar:
        for batch in batches(model, data, batch_size):

            def run(c: float, random_keys: bool = False, batch: Any = batch) -> Tensor:
                control = _random_keys(model, seed) if random_keys else contextlib.nullcontext()
                with scaled_parameters(model, c, which), control:
                    states = read(model, batch)
                bar.update()
                if not isinstance(states, Tensor):
                    raise ArgumentError(
                        f"hidden must give a tensor; it gave a {type(states).__name__}."
                    )
                if not bool(states.isfinite().all()):
                    raise NonFiniteError(
                        f"With parameters times {c} the network gives NaN or infinity. Leave that "
                        "c out, or use float32."
                    )
                return states.double()

            saturated, plain = run(max(factors)), run(1.0)
            control = run(max(factors), True) if hasattr(model, "hook_dict") else None
            for i, c in enumerate(factors):
                states = run(c)
                others = (saturated, control, plain)
                sums[:, i] += batch.size * torch.tensor(
                    [
                        math.nan if o is None else _cosine(states, o, batch.non_padding)
                        for o in others
                    ]
                )
            total += batch.size
    cos_saturated, cos_random, cos_model = sums / total
    columns = {
        "cos_saturated": cos_saturated,
        "cos_random": cos_random,
        "S": normalised_similarity(cos_saturated, cos_random),
        "cos_model": cos_model,
    }
    return HomogeneityCurve(Provenance(model_name(model), data_name, which), factors, columns)


def _factors(scales: Any) -> tuple[float, ...]:
    known = isinstance(scales, Iterable) and not isinstance(scales, str)
    found = list(scales) if known else [scales]
    good = all(isinstance(c, numbers.Real) and 0 < float(c) < math.inf for c in found)
    if not good or len(set(found)) < 2:
        raise ArgumentError(f"Needed at least two positive factors c; found {scales!r}.")
    return tuple(float(c) for c in found)


def _final_residual(model: Any, batch: Any) -> Tensor:
    name = last_residual(model)
    _, cache = model.run_with_cache(batch.inputs, names_filter=lambda n: n == name, **batch.kwargs)
    states: Tensor = cache[name]
    return states


def _random_keys(model: Any, seed: int) -> contextlib.AbstractContextManager[Any]:
    from sat_lens.attention import RandomKey
    from sat_lens.intervention import replace_attention

    return replace_attention(model, RandomKey(seed))


def _cosine(first: Tensor, second: Tensor, mask: Tensor | None) -> float:
    cosines = torch.cosine_similarity(first, second, dim=-1)
    if mask is not None and cosines.shape == mask.shape:
        return float(cosines[mask.to(cosines.device)].mean())
    return float(cosines.mean())
