"""Statistics of attention rows, summed per sequence and head while a model runs.

Only sums are kept, so memory does not grow with the data, sums of disjoint parts of the data add
up to the sums of the whole, and a bootstrap over sequences is the same sums under other weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens.attention.distances import (
    distance_to_uniform,
    distances_to_saturated,
    effective_keys,
)
from sat_lens.attention.masks import mask_threshold
from sat_lens.roles.rule import ROLES, Thresholds

FARTHEST_OFFSET = 64
NEAR_OFFSETS = {"previous": -1, "self": 0, "next": 1}
M_BINS_PER_OCTAVE = 16
M_OCTAVES = 20
BOOTSTRAPS = 100

# Sums over all counted rows.
ROW_SUMS = (
    "rows",
    "tv_argmax",
    "tv_mean",
    "n_eff_share",
    "mass_first",
    "mass_special",
    "mass_sink",
    "mass_previous",
    "mass_self",
    "mass_next",
    "argmax_first",
    "induction_rows",
    "mass_induction",
    "duplicate_rows",
    "mass_duplicate",
)
# Sums over the sampled rows, where a sort is paid for.
SAMPLE_SUMS = ("sampled_rows", "tv_nearest", "m_share", "tv_argmax_no_sink", "tv_mean_no_sink")


@dataclasses.dataclass(frozen=True)
class Positions:
    """What is known of the positions that one attention module serves, for one batch."""

    counted: Bool[Tensor, "batch query"]
    first: Int[Tensor, " batch"]
    special: Bool[Tensor, "batch key"]
    induction: Bool[Tensor, "batch query key"] | None
    duplicate: Bool[Tensor, "batch query key"] | None
    sample: Int[Tensor, "batch row"]
    weights: Float[Tensor, "batch resample"]

    @property
    def sinks(self) -> Bool[Tensor, "batch key"]:
        """The first and the special tokens."""
        return self.special.scatter(1, self.first[:, None], True)


@dataclasses.dataclass
class Sums:
    """Everything that is kept of one attention module.

    ``by_name`` holds each sum once for the data as it is and once for each resample of its
    sequences, ``[resample, head]``; the histograms are for the data as it is.
    """

    by_name: dict[str, Float[Tensor, "resample head"]]
    offsets: Float[Tensor, "head offset"]
    m_keys: Float[Tensor, "head bin"]
    row_roles: Float[Tensor, "head role"]

    @classmethod
    def empty(cls, n_heads: int) -> Sums:
        """Start with nothing measured."""
        return cls(
            {
                name: torch.zeros(1 + BOOTSTRAPS, n_heads).double()
                for name in ROW_SUMS + SAMPLE_SUMS
            },
            torch.zeros(n_heads, 2 * FARTHEST_OFFSET + 1).double(),
            torch.zeros(n_heads, M_BINS_PER_OCTAVE * M_OCTAVES + 1).double(),
            torch.zeros(n_heads, len(ROLES)).double(),
        )

    def add(self, other: Sums) -> None:
        """Take the sums of other data in."""
        for name, value in other.by_name.items():
            self.by_name[name] += value
        self.offsets += other.offsets
        self.m_keys += other.m_keys
        self.row_roles += other.row_roles


def measure(
    sums: Sums,
    scores: Float[Tensor, "batch head query key"],
    positions: Positions,
    min_keys: int,
    thresholds: Thresholds,
) -> None:
    """Add the statistics of one forward pass through one attention module to its sums."""
    raw = scores.detach().float()
    threshold = mask_threshold(raw)
    masked = raw <= threshold
    dead = masked.all(-1, keepdim=True)
    visible = raw.masked_fill(masked, -math.inf).masked_fill(dead, 0.0)
    n_keys = (~masked).sum(-1)
    counted = positions.counted[:, None, :] & (n_keys >= min_keys)
    _add_row_sums(sums, visible, ~masked, counted, positions)
    _add_sample_sums(sums, visible, counted, positions, thresholds)


def resampling_weights(
    contents: Tensor, count: int = BOOTSTRAPS
) -> Float[Tensor, "batch resample"]:
    """Draw Poisson(1) weights for each sequence, seeded by the sequence's content.

    The first column is 1: the data as it is. Seeding by content makes the weights the same in
    whichever shard or order a sequence comes.
    """
    columns = []
    for row in contents.detach().cpu():
        digest = hashlib.sha256(row.contiguous().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        columns.append(torch.poisson(torch.ones(count), generator=generator))
    drawn = torch.stack(columns)
    return torch.cat([torch.ones(len(drawn), 1), drawn], dim=1).double()


def token_relations(
    tokens: Int[Tensor, "batch position"],
) -> tuple[Bool[Tensor, "batch query key"], Bool[Tensor, "batch query key"]]:
    """Say which keys are induction and which are duplicate targets of each query.

    Example:
        >>> induction, duplicate = token_relations(torch.tensor([[7, 8, 7]]))
        >>> induction[0, 2].tolist(), duplicate[0, 2].tolist()
        ([False, True, False], [True, False, False])
    """
    same = tokens[:, :, None] == tokens[:, None, :]
    duplicate = same.tril(-1)
    induction = torch.zeros_like(duplicate)
    induction[:, :, 1:] = duplicate[:, :, :-1]
    return induction.tril(), duplicate


def _add_row_sums(
    sums: Sums,
    scores: Float[Tensor, "batch head query key"],
    visible: Bool[Tensor, "batch head query key"],
    counted: Bool[Tensor, "batch head query"],
    positions: Positions,
) -> None:
    pattern = scores.softmax(-1)
    top, winner = pattern.max(-1)
    batch, n_heads, n_queries, n_keys = pattern.shape
    first = positions.first.view(-1, 1, 1, 1).expand(batch, n_heads, n_queries, 1)
    # A model may be asked for its newest rows only; they are the last of the keys' positions.
    query_positions = torch.arange(n_keys - n_queries, n_keys, device=pattern.device)
    offset = winner - query_positions
    sinks = torch.stack([positions.special, positions.sinks]).to(pattern.dtype)
    mass_special, mass_sink = torch.einsum("bhqk,sbk->sbhq", pattern, sinks)
    rows = {
        "rows": torch.ones_like(top),
        "tv_argmax": 1 - top,
        "tv_mean": distance_to_uniform(pattern, visible),
        "n_eff_share": effective_keys(pattern) / visible.sum(-1),
        "mass_first": pattern.gather(-1, first).squeeze(-1),
        "mass_special": mass_special,
        "mass_sink": mass_sink,
        "argmax_first": (winner == positions.first.view(-1, 1, 1)).to(pattern.dtype),
    }
    for name, distance in NEAR_OFFSETS.items():
        rows[f"mass_{name}"] = _mass_at_offset(pattern, n_keys - n_queries + distance)
    for name in ("induction", "duplicate"):
        relation: Tensor | None = getattr(positions, name)
        if relation is not None and relation.shape[1:] == pattern.shape[2:]:
            rows[f"mass_{name}"] = torch.einsum(
                "bhqk,bqk->bhq", pattern, relation.to(pattern.dtype)
            )
            has_target = relation.any(-1)[:, None].expand(batch, n_heads, n_queries)
            rows[f"{name}_rows"] = has_target.to(pattern.dtype)
    _add(sums, rows, counted, positions.weights)
    bins = offset.clamp(-FARTHEST_OFFSET, FARTHEST_OFFSET) + FARTHEST_OFFSET
    _count(sums.offsets, bins, counted)


def _add_sample_sums(
    sums: Sums,
    scores: Float[Tensor, "batch head query key"],
    counted: Bool[Tensor, "batch head query"],
    positions: Positions,
    thresholds: Thresholds,
) -> None:
    batch, n_heads, _, n_keys = scores.shape
    at = positions.sample.view(batch, 1, -1).expand(batch, n_heads, -1)
    counted = counted.gather(-1, at) & (positions.sample >= 0)[:, None]
    scores = scores.gather(-2, at.clamp(min=0)[..., None].expand(*at.shape, n_keys))
    soft = distances_to_saturated(scores)
    rest = scores.masked_fill(positions.sinks[:, None, None], -math.inf)
    rest = rest.masked_fill((rest == -math.inf).all(-1, keepdim=True), 0.0)
    pattern = rest.softmax(-1)
    rows = {
        "sampled_rows": torch.ones_like(soft.tv_nearest),
        "tv_nearest": soft.tv_nearest,
        "m_share": soft.m / soft.n_keys,
        "tv_argmax_no_sink": 1 - pattern.amax(-1),
        "tv_mean_no_sink": distance_to_uniform(pattern, rest != -math.inf),
    }
    _add(sums, rows, counted, positions.weights)
    m_bins = (soft.m.double().log2() * M_BINS_PER_OCTAVE).round().long()
    _count(sums.m_keys, m_bins.clamp(max=sums.m_keys.shape[1] - 1), counted)
    roles = _roles_of_rows(soft.tv_argmax, soft.tv_mean, soft.tv_nearest, soft.m, thresholds)
    _count(sums.row_roles, roles, counted)


def _roles_of_rows(
    tv_argmax: Tensor, tv_mean: Tensor, tv_nearest: Tensor, m: Tensor, t: Thresholds
) -> Int[Tensor, "batch head row"]:
    """Apply the rule of :func:`sat_lens.roles.rule.role_of` to single rows."""
    leaning = tv_mean / (tv_argmax + tv_mean).clamp(min=1e-12)
    role = torch.full_like(m, ROLES.index("soft"))
    role[leaning <= t.mean_lean] = ROLES.index("mean-lean")
    role[leaning >= t.argmax_lean] = ROLES.index("argmax-lean")
    role[(tv_nearest <= t.near) & (m > 1)] = ROLES.index("subset")
    role[tv_mean <= t.near] = ROLES.index("mean")
    role[tv_argmax <= t.near] = ROLES.index("argmax")
    return role


def _mass_at_offset(
    pattern: Float[Tensor, "batch head query key"], diagonal: int
) -> Float[Tensor, "batch head query"]:
    """Give each row's mass on the key of a diagonal; 0 where the diagonal leaves the row."""
    *_, n_queries, n_keys = pattern.shape
    keys = torch.arange(n_queries, device=pattern.device) + diagonal
    inside = (keys >= 0) & (keys < n_keys)
    at = keys.clamp(0, n_keys - 1).view(1, 1, -1, 1).expand(*pattern.shape[:3], 1)
    return pattern.gather(-1, at).squeeze(-1) * inside


def _add(
    sums: Sums,
    rows: dict[str, Float[Tensor, "batch head row"]],
    counted: Bool[Tensor, "batch head row"],
    weights: Float[Tensor, "batch resample"],
) -> None:
    for name, values in rows.items():
        per_sequence = values.masked_fill(~counted, 0.0).sum(-1, dtype=torch.float64)
        sums.by_name[name] += torch.einsum(
            "bh,br->rh", per_sequence, weights.to(values.device)
        ).cpu()


def _count(histogram: Tensor, bins: Tensor, counted: Tensor) -> None:
    for head in range(histogram.shape[0]):
        chosen = bins[:, head][counted[:, head]]
        histogram[head] += torch.bincount(chosen.flatten(), minlength=histogram.shape[1]).cpu()
