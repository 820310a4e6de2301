"""Statistics of attention rows, taken while a model runs.

All rows are read in blocks: neighbouring rows of as many heads of one sequence as fit into the
processor's cache, because memory traffic costs more than the arithmetic. Keys that lie in the
future of a whole block are left out of it. What needs a sort or a search (nearest saturated row,
critical scales) is computed on sampled rows of each sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sat_lens.attention import AttentionCall
from sat_lens.attention.critical import critical_bins
from sat_lens.attention.distances import distance_to_uniform, distances_to_saturated
from sat_lens.attention.engine import BLOCK_ELEMENTS, has_only_extreme_masks
from sat_lens.attention.masks import EXTREME, mask_threshold
from sat_lens.errors import NonFiniteError
from sat_lens.roles.positions import NO_POSITION, RELATIONS, OneSequence, Positions
from sat_lens.roles.rule import Thresholds, roles_of
from sat_lens.roles.sums import (
    FARTHEST_OFFSET,
    M_BINS,
    M_BINS_PER_OCTAVE,
    ROW_SUMS,
    SAMPLE_SUMS,
    Sums,
)

FUSED_BLOCK_ELEMENTS = 2**22
# Eight pieces leave out seven sixteenths of a causal pattern; short ones would cost more than that.
PIECES = 8
LEAST_ROWS = 64
FARTHER = FARTHEST_OFFSET + 1


def measure(
    sums: Sums,
    scores: Float[Tensor, "batch head query key"],
    positions: Positions,
    min_keys: int,
    thresholds: Thresholds,
) -> None:
    """Add the statistics of one forward pass through one attention module to its sums."""
    raw = scores.detach().float()
    if bool(raw.amax().isnan()):
        raise NonFiniteError(
            "The model's attention scores hold NaN, so there is nothing to measure. Check the "
            "weights and inputs, or run the model in float32."
        )
    # Whatever lies above all finite masks is a score, unless it is an extreme mask.
    threshold = EXTREME if has_only_extreme_masks(raw) else mask_threshold(raw, raw)
    batch, n_heads, n_queries, _ = raw.shape
    weights = positions.weight.expand(batch, n_heads, n_queries)
    for b, sequence in enumerate(positions.sequences):
        totals = torch.zeros(len(ROW_SUMS), n_heads, dtype=torch.float64)
        for heads, queries, n_keys in _blocks(raw[b], sequence, threshold):
            block = raw[b, heads, queries, :n_keys]
            rows, offset, n_visible = _read_block(block, sequence.cut(queries, n_keys), threshold)
            weight = weights[b, heads, queries] * (n_visible >= min_keys)
            totals[:, heads] += _totals(rows, weight, ROW_SUMS)
            if positions.aligned:
                _count(sums.histograms["offsets"][heads], offset, weight)
            sums.counted[heads] += (weight > 0).sum(-1).double().cpu()
        _spread(sums, ROW_SUMS, totals, sequence.resampling)
        if len(sequence.sample):
            picked, weight = raw[b][:, sequence.sample], weights[b][:, sequence.sample]
            at = sequence.query_positions[sequence.sample]
            measure_sample(sums, picked, at, sequence, weight, threshold, min_keys, thresholds)


def shape_of(call: AttentionCall) -> Tensor:
    """Return an empty tensor of the scores' shape, which takes no memory.

    Example:
        >>> shape_of(AttentionCall(*torch.zeros(3, 1, 2, 5, 4))).shape
        torch.Size([1, 2, 5, 5])
    """
    shape = (*call.query.shape[:3], call.key.shape[2])
    return torch.zeros((), device=call.query.device).expand(shape)


def measure_fused(
    sums: Sums, call: AttentionCall, positions: Positions, min_keys: int, thresholds: Thresholds
) -> None:
    """Add the statistics of one run of a fused kernel to the sums of its attention module.

    A fused kernel shows no scores. They are recomputed from its queries and keys, a block of rows
    at a time and then for the sampled rows, in memory linear in the length of the sequence.
    """
    batch, n_heads, n_queries, n_keys = shape_of(call).shape
    size = max(1, FUSED_BLOCK_ELEMENTS // (batch * n_heads * n_keys))
    for start in range(0, n_queries, size):
        rows = torch.arange(start, min(start + size, n_queries), device=call.query.device)
        block = _of_rows(positions, rows)
        measure(sums, call.scores(rows.expand(batch, -1)), block, min_keys, thresholds)
    sample = positions.sample
    scores = call.scores(sample.clamp(min=0))
    weights = positions.weight.expand(batch, n_heads, n_queries)
    for b in range(batch):
        kept = sample[b] >= 0
        if bool(kept.any()):
            rows = sample[b, kept]
            sequence = OneSequence.of(_of_rows(positions, rows[:1]), b, 1, n_keys)
            sequence = dataclasses.replace(sequence, n_searched=positions.n_searched)
            picked, weight = scores[b][:, kept], weights[b][:, rows]
            at = positions.first_query + rows
            measure_sample(sums, picked, at, sequence, weight, EXTREME, min_keys, thresholds)


def _of_rows(positions: Positions, rows: Int[Tensor, " row"]) -> Positions:
    """Return the positions of some neighbouring rows, none of them sampled."""
    return dataclasses.replace(
        positions,
        weight=positions.weight[:, :, rows],
        sample=positions.sample[:, :0],
        first_query=positions.first_query + int(rows[0]),
    )


def _blocks(
    scores: Float[Tensor, "head query key"], sequence: OneSequence, threshold: float
) -> Iterator[tuple[slice, slice, int]]:
    """Cut the scores of one sequence into blocks: heads, query rows, and how many keys they see."""
    n_heads, n_queries, n_keys = scores.shape
    step = max(LEAST_ROWS, -(-n_queries // PIECES))
    for start in range(0, n_queries, step):
        queries = slice(start, min(start + step, n_queries))
        seen = n_keys
        future = int(sequence.query_positions[queries.stop - 1]) + 1
        # Only the scores can tell that nothing of the future is seen.
        if future < n_keys and float(scores[:, queries, future:].amax()) <= threshold:
            seen = future
        together = max(1, BLOCK_ELEMENTS // ((queries.stop - start) * seen))
        for head in range(0, n_heads, together):
            yield slice(head, min(head + together, n_heads)), queries, seen


def _read_block(
    scores: Float[Tensor, "head query key"], sequence: OneSequence, threshold: float
) -> tuple[dict[str, Tensor], Int[Tensor, "head query"], Float[Tensor, "head query"]]:
    """Return the statistics of each row, the bin of its maximum's offset, and its number of keys.

    The softmax itself gives masked keys a probability of 0. Rows without a visible key give
    meaningless numbers, possibly NaN; they have no weight.
    """
    pattern = scores.softmax(-1)
    top, winner = pattern.max(-1)
    # Two comparisons need a tensor of the block's size: one for both, and floats are faster.
    spare = torch.empty_like(pattern)
    n_visible = torch.gt(scores, threshold, out=spare).sum(-1)
    share = 1 / n_visible.clamp(min=1)
    looked_at = pattern @ sequence.looked_at
    rows = {
        "rows": torch.ones_like(top),
        "tv_argmax": 1 - top,
        "tv_mean": 1 - torch.minimum(pattern, share[..., None], out=spare).sum(-1),
        "n_eff_share": share / torch.linalg.vecdot(pattern, pattern),
        "mass_first": looked_at[..., 0],
        "mass_special": looked_at[..., 1],
        "mass_sink": looked_at[..., 2],
        "argmax_first": (winner == sequence.first).float(),
    }
    rows |= {name: torch.full_like(top, value) for name, value in sequence.known.items()}
    for name, (keys, inside) in sequence.keys_near.items():
        at = keys[None, :, None].expand(len(pattern), -1, 1)
        rows[f"mass_{name}"] = pattern.gather(-1, at).squeeze(-1) * inside
    for name in RELATIONS:
        relation, exists = sequence.relations.get(name, (None, None))
        mass = None if relation is None else torch.linalg.vecdot(pattern, relation)
        rows[f"mass_{name}"] = torch.zeros_like(top) if mass is None else mass
        rows[f"{name}_rows"] = torch.zeros_like(top) if exists is None else exists.expand_as(top)
    offset = sequence.key_positions[winner] - sequence.query_positions
    return rows, offset.clamp(-FARTHER, FARTHER) + FARTHER, n_visible


def measure_sample(
    sums: Sums,
    raw: Float[Tensor, "head row key"],
    queries: Int[Tensor, " row"],
    sequence: OneSequence,
    weights: Float[Tensor, "head row"],
    threshold: float,
    min_keys: int,
    thresholds: Thresholds,
) -> None:
    """Add what needs a sort or a search, from rows of one sequence at positions ``queries``."""
    scores = raw.masked_fill(raw <= threshold, -math.inf)
    n_visible = (scores != -math.inf).sum(-1)
    scores.masked_fill_((n_visible == 0)[..., None], 0.0)
    weight = weights * (n_visible >= min_keys)
    soft = distances_to_saturated(scores)
    rest = scores.masked_fill(sequence.looked_at[:, 2].bool(), -math.inf)
    rest.masked_fill_((rest == -math.inf).all(-1, keepdim=True), 0.0)
    pattern = rest.softmax(-1)
    rows = {
        "sampled_rows": torch.ones_like(soft.tv_nearest),
        "tv_nearest": soft.tv_nearest,
        "m_share": soft.m.float() / soft.n_keys,
        "tv_argmax_no_sink": 1 - pattern.amax(-1),
        "tv_mean_no_sink": distance_to_uniform(pattern, rest != -math.inf),
    }
    _spread(sums, SAMPLE_SUMS, _totals(rows, weight, SAMPLE_SUMS), sequence.resampling)
    m_bins = (soft.m.double().log2() * M_BINS_PER_OCTAVE).round().long().clamp(max=M_BINS - 1)
    roles = roles_of(thresholds, soft.tv_argmax, soft.tv_mean, soft.tv_nearest, soft.m)
    _count(sums.histograms["m_keys"], m_bins, weight)
    _count(sums.histograms["row_roles"], roles, weight)
    if sequence.known["aligned_rows"]:
        by_offset = _mass_by_offset(scores, soft.tv_argmax, queries, sequence)
        sums.histograms["offset_mass"] += (by_offset * weight[..., None]).sum(1).double().cpu()
    searched = slice(sequence.n_searched)
    c_lo, c_hi = critical_bins(scores[:, searched])
    _count(sums.histograms["c_lo"], c_lo, weight[:, searched])
    _count(sums.histograms["c_hi"], c_hi, weight[:, searched])


def _mass_by_offset(
    scores: Float[Tensor, "head row key"],
    tv_argmax: Float[Tensor, "head row"],
    queries: Int[Tensor, " row"],
    sequence: OneSequence,
) -> Float[Tensor, "head row offset"]:
    """Return the probability at each offset; the last bin has the rest, which lies farther away."""
    n_places = int((sequence.key_positions < NO_POSITION).sum())
    offsets = torch.arange(-FARTHEST_OFFSET, FARTHEST_OFFSET + 1, device=scores.device)
    at = queries[:, None] + offsets
    near = scores.gather(-1, at.clamp(0, n_places - 1).expand(len(scores), -1, -1))
    mass = (near - scores.amax(-1, keepdim=True)).exp_() * (1 - tv_argmax)[..., None]
    mass *= (at >= 0) & (at < n_places)
    rest = (1 - mass.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([torch.zeros_like(rest), mass, rest], dim=-1)


def _totals(
    rows: dict[str, Float[Tensor, "head row"]],
    weight: Float[Tensor, "head row"],
    names: tuple[str, ...],
) -> Float[Tensor, "name head"]:
    """Sum the rows of one sequence by name."""
    # What does not count may be NaN, and NaN times 0 is NaN.
    values = torch.stack([rows[name] for name in names])
    values = values.where(weight > 0, torch.zeros(()).to(weight))
    return (values * weight).sum(-1, dtype=torch.float64).cpu()


def _spread(
    sums: Sums,
    names: tuple[str, ...],
    totals: Float[Tensor, "name head"],
    resampling: Float[Tensor, " resample"],
) -> None:
    """Add the totals of one sequence, under its weight in every resample."""
    for name, total in zip(names, totals, strict=True):
        sums.by_name[name] += resampling[:, None] * total


def _count(
    histogram: Float[Tensor, "head bin"], bins: Int[Tensor, "head row"], weight: Tensor
) -> None:
    n_heads, n_bins = histogram.shape
    place = bins + n_bins * torch.arange(n_heads, device=bins.device)[:, None]
    counts = torch.bincount(place.flatten(), weight.double().flatten(), minlength=n_heads * n_bins)
    histogram += counts.view(n_heads, n_bins).cpu()
