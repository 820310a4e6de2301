"""Parameters multiplied by a factor while a block runs: how the paper saturates a network.

Multiplying all parameters by c is not attention-only saturation (:func:`sat_lens.saturate`). Scores
grow with c squared, but biases, gains of layer norms and MLPs grow too, each at a power of its own;
what they add comes to dominate the residual stream, and the output has little in common with the
model's long before attention is saturated. On a pretrained sentence encoder the cosine to the model
was .19 at c = 1.5 and .01 at c = 2, while under attention-only saturation it was .66 (control:
random keys, .10). Read a result as a statement about the paper's construction; for one about
attention use ``which="qk"`` or :func:`sat_lens.saturate`. The curve of the paper's appendix on
homogeneity is here too, with the control that it lacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import (
    check_choice,
    check_count,
    check_module,
    check_number,
    is_lens_model,
    is_number,
)
from sat_lens.attention import RandomKey
from sat_lens.caching import mean_cosine, normalised_similarity
from sat_lens.data import Batch, batch_sizes, batches
from sat_lens.errors import ArgumentError, ModelError, NonFiniteError
from sat_lens.intervention import replace_attention
from sat_lens.models import last_residual, model_name
from sat_lens.norms.adapters import check_linear, is_first_factor, name_after_merging
from sat_lens.norms.heads import joint_rows
from sat_lens.norms.measures import undisturbed
from sat_lens.norms.names import ParameterPlace, canonical_name, parameter_places, superseded
from sat_lens.norms.sources import check_has_values, config_of
from sat_lens.results import Provenance, Result, check_columns, column_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (1.0, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0, 1000.0)
Which = Literal["all", "attention", "qk", "matrices"]
Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def scaled_parameters(model: Model, c: float, which: Which = "all") -> Iterator[Model]:
    """Multiply parameters by c while the block lasts (Merrill et al. 2021, section 4).

    Afterwards the parameters hold the very bits that they held before, also if an exception or an
    interrupt ends the block, or several blocks end in another order than they began. Tied
    parameters are multiplied once. The block keeps copies as large as the parameters. Move or cast
    the model before the block, not in it.

    This is not attention-only saturation; see :mod:`sat_lens.norms.scaled`. With ``which="qk"``
    scores are multiplied by c squared and nothing else changes, where queries and keys have no
    norms of their own. What a LoRA adapter adds is multiplied by c once, like what it is added to.

    Args:
        model: A TransformerLens model or any other module.
        c: The factor, finite.
        which: ``"all"`` parameters; those of ``"attention"``; ``"qk"``, the queries' and keys'
            projections with their biases; or ``"matrices"``, all but biases and gains.

    Yields:
        The model.

    Raises:
        ArgumentError: ``c`` is not finite, ``which`` is unknown, or the model has no such
            parameters; at the end, the model was moved, cast or given other parameters in the
            block. Those that it had are back as they were nevertheless.
        ModelError: The model has parameters without values or quantised ones, or active adapters of
            another kind than LoRA.

    Example:
        >>> import torch
        >>> from sat_lens.norms import scaled_parameters
        >>> layer = torch.nn.Linear(2, 2)
        >>> with scaled_parameters(layer, 10.0):
        ...     large = layer.weight.norm()
        >>> round((large / layer.weight.norm()).item(), 4)
        10.0
    """
    check_module(model)
    check_number("c", c)
    check_choice("which", which, get_args(Which))
    block = _Block(model, float(c), which)
    try:
        block.begin()
        yield model
    finally:
        moved = block.end()
    if moved:
        raise ArgumentError(
            f"{moved[0]} was moved, cast or replaced while its model's parameters were scaled. The "
            "parameters that the model had are back, where and as they were; do such things before "
            "the block."
        )


class _Block:
    """What one block multiplied, and what was there before.

    Blocks over the same memory are a stack: to end one below the top, those above are undone, last
    first, and done again without it.
    """

    def __init__(self, model: nn.Module, c: float, which: Which) -> None:
        self.model, self.c, self.which = model, c, which
        self.memory: list[tuple[str, nn.Parameter, Tensor]] = []
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.parts: list[tuple[Tensor, Any]] = []
        self.saved: list[Tensor] = []

    def begin(self) -> None:
        _open_blocks.append(self)
        self._multiply()

    def end(self) -> list[str]:
        """Undo this block, and name the parameters that were not where they had been."""
        above = self._above()
        for block in reversed(above):
            block._restore()
        moved = self._restore()
        _open_blocks.remove(self)
        for block in above:
            block._multiply()
        return moved

    def _multiply(self) -> None:
        self.memory = [(name, p, p.detach()) for name, p in self.model.named_parameters()]
        self.buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.parts = _parts(self.model, self.which)
        self.saved = [tensor[rows].clone() for tensor, rows in self.parts]
        for (tensor, rows), copy in zip(self.parts, self.saved, strict=True):
            tensor[rows] = copy * self.c

    def _restore(self) -> list[str]:
        # An interrupt may have come before the copies were there; then nothing was multiplied.
        for (tensor, rows), copy in zip(self.parts, self.saved, strict=False):
            tensor[rows] = copy
        now = dict(self.model.named_parameters())
        moved = [n for n, p, data in self.memory if now.get(n) is not p or not _in_place(p, data)]
        for _, parameter, data in self.memory:
            if not _in_place(parameter, data):
                parameter.data = data
        if moved:
            for module, name, buffer in self.buffers:
                module._buffers[name] = buffer
        return moved

    def _above(self) -> list[_Block]:
        touched, above = self._keys(), []
        for block in _open_blocks[_open_blocks.index(self) + 1 :]:
            if touched & block._keys():
                touched |= block._keys()
                above.append(block)
        return above

    def _keys(self) -> set[int]:
        return {key for _, p, data in self.memory for key in (id(p), data.data_ptr())}


_open_blocks: list[_Block] = []


def _in_place(parameter: Tensor, data: Tensor) -> bool:
    return parameter.dtype == data.dtype and parameter.data_ptr() == data.data_ptr()


def _parts(model: nn.Module, which: Which) -> list[tuple[Tensor, Any]]:
    """Return what ``which`` means, tensors and their rows, every stretch of memory once."""
    check_linear(model)
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        check_has_values(name, parameter)
        if not parameter.is_floating_point() and parameter.dim() >= 2:
            raise ModelError(
                f"{name} holds integers, as quantised weights do, and cannot be multiplied. Load "
                "the model without quantisation."
            )
        # Of an update B A only B is multiplied: the two together are one parameter.
        if parameter.is_floating_point() and parameter.numel() and not is_first_factor(name):
            named[canonical_name(name)] = parameter.detach()
    after = {name: name_after_merging(name) for name in named}
    found = parameter_places(after.values())
    places = {name: found[after[name]] for name in named}
    whole = [
        parameter for name, parameter in named.items() if _is_meant(places[name], parameter, which)
    ]
    parts: list[tuple[Tensor, Any]] = [(tensor, ...) for tensor in _without_overlap(whole)]
    if which == "qk":
        config, split = config_of(model), superseded(named)
        for name, tensor in named.items():
            joint = None if name in split else joint_rows(places[name], tensor, config)
            if joint is not None:
                weight, qk_rows, _ = joint
                parts.append((weight, qk_rows))
    if not parts:
        raise ArgumentError(
            f"{type(model).__name__} has no parameters of the kind {which!r}: none of its names "
            "says so. Use which='all', or 'matrices'."
        )
    return parts


def _is_meant(place: ParameterPlace, parameter: Tensor, which: Which) -> bool:
    if which == "matrices":
        return parameter.dim() >= 2 and not place.bias and place.component != "layer norm"
    if which == "attention":
        return bool(place.attention)
    return which == "all" or place.component == "qk"


def _without_overlap(parameters: list[Tensor]) -> list[Tensor]:
    """Keep each stretch of memory once: a bridge splits joint projections into views of them."""
    kept: list[Tensor] = []
    taken: dict[int, list[tuple[int, int]]] = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        known = taken.setdefault(parameter.untyped_storage().data_ptr(), [])
        start = int(parameter.storage_offset())
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        end = start + sum((size - 1) * stride for size, stride in sides)
        if not any(low <= start and end <= high for low, high in known):
            known.append((start, int(end)))
            kept.append(parameter)
    return kept


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
        return column_frame(self.columns, "c", self.scales)

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
    scales: Sequence[float] = FACTORS,
    which: Which = "all",
    hidden: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    data_name: str = "",
) -> HomogeneityCurve:
    """Compare a network with parameters times c to its saturated version.

    The curve of the appendix on homogeneity in Merrill et al. 2021, arXiv 2010.09697. The largest c
    stands for the saturated network; in float32, attention is then saturated up to rounding.

    Args:
        model: A TransformerLens model; or any module, then with ``hidden``.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`.
        scales: Factors c > 0, at least two.
        which: Which parameters are multiplied; see :func:`sat_lens.norms.scaled_parameters`.
        hidden: A function ``(model, inputs) -> hidden states``, the features last; None takes the
            residual stream after the last layer.
        seed: Seed of the random keys of the control.
        batch_size: Sequences in a forward pass, for tokens and texts.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.
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
        for batch in batches(
            model, data, batch_size, attention_mask=attention_mask, tokenizer=tokenizer
        ):
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
