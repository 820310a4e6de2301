"""Statistics of attention rows, taken while a model runs.

All rows are read block by block, a block being as many heads of one sequence as fit into the
processor's cache: the arithmetic is little, and what would cost is memory traffic. What needs a
sort or a search (nearest saturated row, critical scales) is taken from some rows of each sequence.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens.attention.critical import critical_bins
from sat_lens.attention.distances import distance_to_uniform, distances_to_saturated
from sat_lens.attention.masks import mask_threshold
from sat_lens.errors import NonFiniteError
from sat_lens.roles.rule import Thresholds
from sat_lens.roles.sums import FARTHEST_OFFSET, M_BINS, M_BINS_PER_OCTAVE, Sums
from sat_lens.vocabulary import ROLES

NEAR_OFFSETS = {"previous": -1, "self": 0, "next": 1}
BLOCK_ELEMENTS = 2**18


@dataclasses.dataclass(frozen=True)
class Positions:
    """What is known of the positions that one attention module serves, for one batch.

    ``weight`` is 0 for query rows that do not count and 1 for those that do, or their importance
    per head. Of the rows in ``sample``, which are in random order, critical scales are searched
    in the first ``n_searched``. ``relations`` holds, for ``induction`` and ``duplicate``, which
    keys are such targets of each query. The first row belongs to position ``first_query``.
    """

    weight: Float[Tensor, "batch #head query"]
    first: Int[Tensor, " batch"]
    special: Bool[Tensor, "batch key"]
    relations: dict[str, Bool[Tensor, "batch query key"]]
    sample: Int[Tensor, "batch row"]
    n_searched: int
    resampling: Float[Tensor, "batch resample"]
    first_query: int


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
    threshold = mask_threshold(raw)
    batch, n_heads, n_queries, n_keys = raw.shape
    chunk = max(1, BLOCK_ELEMENTS // (n_queries * n_keys))
    weights = positions.weight.expand(batch, n_heads, n_queries)
    for b in range(batch):
        sequence = _Sequence.of(positions, b, n_queries, n_keys)
        for start in range(0, n_heads, chunk):
            heads = slice(start, start + chunk)
            rows, offset, n_visible = _read_block(raw[b, heads], sequence, threshold)
            weight = weights[b, heads] * (n_visible >= min_keys)
            _add(sums, heads, rows, weight, sequence.resampling)
            _count(sums.histograms["offsets"][heads], offset, weight)
            sums.counted[heads] += (weight > 0).sum(-1).double().cpu()
        if len(sequence.sample):
            _measure_sample(sums, raw[b], sequence, weights[b], threshold, min_keys, thresholds)


def token_relations(
    tokens: Int[Tensor, "batch position"],
) -> dict[str, Bool[Tensor, "batch query key"]]:
    """Say which keys are induction and which are duplicate targets of each query.

    A duplicate is an earlier occurrence of the query's token, an induction target the key that
    follows one.

    Example:
        >>> relations = token_relations(torch.tensor([[7, 8, 7]]))
        >>> relations["induction"][0, 2].tolist(), relations["duplicate"][0, 2].tolist()
        ([False, True, False], [True, False, False])
    """
    same = tokens[:, :, None] == tokens[:, None, :]
    duplicate = same.tril(-1)
    induction = torch.zeros_like(duplicate)
    induction[:, :, 1:] = duplicate[:, :, :-1]
    return {"induction": induction.tril(), "duplicate": duplicate}


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """The positions of one sequence, in the form that the arithmetic wants."""

    looked_at: Float[Tensor, "key 3"]
    first: Tensor
    relations: dict[str, tuple[Float[Tensor, "query key"], Bool[Tensor, " query"]]]
    keys_near: dict[str, tuple[Int[Tensor, " query"], Bool[Tensor, " query"]]]
    query_positions: Int[Tensor, " query"]
    sample: Int[Tensor, " row"]
    n_searched: int
    resampling: Float[Tensor, " resample"]

    @classmethod
    def of(cls, positions: Positions, b: int, n_queries: int, n_keys: int) -> _Sequence:
        first = positions.first[b]
        at_first = torch.arange(n_keys, device=first.device) == first
        special = positions.special[b]
        start = positions.first_query
        queries = torch.arange(start, start + n_queries, device=first.device)
        near = {}
        for name, distance in NEAR_OFFSETS.items():
            at = queries + distance
            near[name] = (at.clamp(0, n_keys - 1), (at >= 0) & (at < n_keys))
        relations = {
            name: (relation[b].float(), relation[b].any(-1))
            for name, relation in positions.relations.items()
        }
        looked_at = torch.stack([at_first, special, at_first | special], dim=-1).float()
        sample = positions.sample[b]
        return cls(
            looked_at,
            first,
            relations,
            near,
            queries,
            sample[sample >= 0],
            positions.n_searched,
            positions.resampling[b],
        )


def _read_block(
    scores: Float[Tensor, "head query key"], sequence: _Sequence, threshold: float
) -> tuple[dict[str, Tensor], Int[Tensor, "head query"], Int[Tensor, "head query"]]:
    """Give the statistics of each row, the offset of its maximum, and its number of keys.

    Masked keys get a probability of 0 from the softmax itself. Rows without a visible key give
    numbers without meaning, possibly NaN; they have no weight.
    """
    pattern = scores.softmax(-1)
    top, winner = pattern.max(-1)
    n_visible = (scores > threshold).sum(-1)
    share = 1 / n_visible.clamp(min=1)
    looked_at = pattern @ sequence.looked_at
    rows = {
        "rows": torch.ones_like(top),
        "tv_argmax": 1 - top,
        "tv_mean": 1 - torch.minimum(pattern, share[..., None]).sum(-1),
        "n_eff_share": share / torch.linalg.vecdot(pattern, pattern),
        "mass_first": looked_at[..., 0],
        "mass_special": looked_at[..., 1],
        "mass_sink": looked_at[..., 2],
        "argmax_first": (winner == sequence.first).float(),
    }
    for name, (keys, inside) in sequence.keys_near.items():
        at = keys[None, :, None].expand(len(pattern), -1, 1)
        rows[f"mass_{name}"] = pattern.gather(-1, at).squeeze(-1) * inside
    for name, (relation, exists) in sequence.relations.items():
        rows[f"mass_{name}"] = torch.linalg.vecdot(pattern, relation)
        rows[f"{name}_rows"] = exists.expand_as(top).float()
    offset = (winner - sequence.query_positions).clamp(-FARTHEST_OFFSET, FARTHEST_OFFSET)
    return rows, offset + FARTHEST_OFFSET, n_visible


def _measure_sample(
    sums: Sums,
    raw: Float[Tensor, "head query key"],
    sequence: _Sequence,
    weights: Float[Tensor, "head query"],
    threshold: float,
    min_keys: int,
    thresholds: Thresholds,
) -> None:
    scores = raw[:, sequence.sample]
    scores = scores.masked_fill(scores <= threshold, -math.inf)
    n_visible = (scores != -math.inf).sum(-1)
    scores.masked_fill_((n_visible == 0)[..., None], 0.0)
    weight = weights[:, sequence.sample] * (n_visible >= min_keys)
    soft = distances_to_saturated(scores)
    rest = scores.masked_fill(sequence.looked_at[:, 2].bool(), -math.inf)
    rest.masked_fill_((rest == -math.inf).all(-1, keepdim=True), 0.0)
    pattern = rest.softmax(-1)
    rows = {
        "sampled_rows": torch.ones_like(soft.tv_nearest),
        "tv_nearest": soft.tv_nearest,
        "m_share": soft.m / soft.n_keys,
        "tv_argmax_no_sink": 1 - pattern.amax(-1),
        "tv_mean_no_sink": distance_to_uniform(pattern, rest != -math.inf),
    }
    _add(sums, slice(0, len(scores)), rows, weight, sequence.resampling)
    m_bins = (soft.m.double().log2() * M_BINS_PER_OCTAVE).round().long().clamp(max=M_BINS - 1)
    roles = _roles_of_rows(soft.tv_argmax, soft.tv_mean, soft.tv_nearest, soft.m, thresholds)
    _count(sums.histograms["m_keys"], m_bins, weight)
    _count(sums.histograms["row_roles"], roles, weight)
    searched = slice(sequence.n_searched)
    c_lo, c_hi = critical_bins(scores[:, searched])
    _count(sums.histograms["c_lo"], c_lo, weight[:, searched])
    _count(sums.histograms["c_hi"], c_hi, weight[:, searched])


def _roles_of_rows(
    tv_argmax: Tensor, tv_mean: Tensor, tv_nearest: Tensor, m: Tensor, t: Thresholds
) -> Int[Tensor, "head row"]:
    """Apply the rule of :func:`sat_lens.roles.rule.role_of` to single rows."""
    leaning = tv_mean / (tv_argmax + tv_mean).clamp(min=1e-12)
    role = torch.full_like(m, ROLES.index("soft"))
    role[leaning <= t.mean_lean] = ROLES.index("mean-lean")
    role[leaning >= t.argmax_lean] = ROLES.index("argmax-lean")
    role[(tv_nearest <= t.near) & (m > 1)] = ROLES.index("subset")
    role[tv_mean <= t.near] = ROLES.index("mean")
    role[tv_argmax <= t.near] = ROLES.index("argmax")
    return role


def _add(
    sums: Sums,
    heads: slice,
    rows: dict[str, Float[Tensor, "head row"]],
    weight: Float[Tensor, "head row"],
    resampling: Float[Tensor, " resample"],
) -> None:
    """Add the rows of one sequence, under its weight in every resample."""
    # What does not count may be NaN, and NaN times 0 is NaN.
    values = torch.stack(list(rows.values())).where(weight > 0, torch.zeros(()).to(weight))
    totals = (values * weight).sum(-1, dtype=torch.float64).cpu()
    for name, total in zip(rows, totals, strict=True):
        sums.by_name[name][:, heads] += resampling[:, None] * total


def _count(
    histogram: Float[Tensor, "head bin"], bins: Int[Tensor, "head row"], weight: Tensor
) -> None:
    n_heads, n_bins = histogram.shape
    place = bins + n_bins * torch.arange(n_heads, device=bins.device)[:, None]
    counts = torch.bincount(place.flatten(), weight.double().flatten(), minlength=n_heads * n_bins)
    histogram += counts.view(n_heads, n_bins).cpu()
