"""What the statistics of attention rows have to know of the positions behind rows and keys."""

from __future__ import annotations

import dataclasses
import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RELATIONS = ("induction", "duplicate")
NEAR_OFFSETS = {"previous": -1, "self": 0, "next": 1}
# What a learned sink has for a position: one that is far from all.
NO_POSITION = 2**40


@dataclasses.dataclass(frozen=True)
class Positions:
    """What is known of the positions that one attention module serves, for one batch.

    ``weight`` is 0 for query rows that do not count and 1 for those that do, or their importance
    per head. Of the rows in ``sample``, which are in random order, critical scales are searched
    in the first ``n_searched``. ``tokens`` are those behind the keys, where targets by token can be
    told; a sink has -1. Where rows and keys are not ``aligned``, that is do not count the positions
    of one sequence (cross-attention, attention within blocks), distances and the first key mean
    nothing; where ``tokens_known`` is False, no key is known to be special. The first row belongs
    to position ``first_query``; the last ``n_sinks`` keys are learned sinks and have no position.
    """

    weight: Float[Tensor, "batch #head query"]
    aligned: bool
    tokens_known: bool
    first: Int[Tensor, " batch"]
    special: Bool[Tensor, "batch key"]
    tokens: Int[Tensor, "batch key"] | None
    sample: Int[Tensor, "batch row"]
    n_searched: int
    resampling: Float[Tensor, "batch resample"]
    first_query: int
    n_sinks: int

    @functools.cached_property
    def sequences(self) -> list[OneSequence]:
        """The positions of each sequence; many modules share them."""
        shape = (self.weight.shape[-1], self.special.shape[-1])
        return [OneSequence.of(self, b, *shape) for b in range(len(self.special))]


def token_relations(
    tokens: Int[Tensor, " key"], queries: Int[Tensor, " query"]
) -> dict[str, Bool[Tensor, "query key"]]:
    """Say which keys are induction and which are duplicate targets of the queries at positions.

    A duplicate is an earlier occurrence of the query's token, an induction target the key that
    follows one.

    Example:
        >>> relations = token_relations(torch.tensor([7, 8, 7]), torch.tensor([2]))
        >>> relations["induction"].tolist(), relations["duplicate"].tolist()
        ([[False, True, False]], [[True, False, False]])
    """
    same = tokens[queries, None] == tokens
    duplicate = same & (torch.arange(len(tokens), device=tokens.device) < queries[:, None])
    return {"induction": duplicate.roll(1, -1), "duplicate": duplicate}


@dataclasses.dataclass(frozen=True)
class OneSequence:
    """The positions of one sequence, in the form that the arithmetic wants."""

    looked_at: Float[Tensor, "key 3"]
    known: dict[str, float]
    first: Tensor
    relations: dict[str, tuple[Float[Tensor, "query key"], Bool[Tensor, " query"]]]
    keys_near: dict[str, tuple[Int[Tensor, " query"], Bool[Tensor, " query"]]]
    query_positions: Int[Tensor, " query"]
    key_positions: Int[Tensor, " key"]
    sample: Int[Tensor, " row"]
    n_searched: int
    resampling: Float[Tensor, " resample"]

    def cut(self, queries: slice, n_keys: int) -> OneSequence:
        """Leave all but some query rows and the first keys out."""
        return dataclasses.replace(
            self,
            looked_at=self.looked_at[:n_keys],
            relations={
                name: (relation[queries, :n_keys], exists[queries])
                for name, (relation, exists) in self.relations.items()
            },
            keys_near={
                name: (keys[queries].clamp(max=n_keys - 1), (inside & (keys < n_keys))[queries])
                for name, (keys, inside) in self.keys_near.items()
            },
            query_positions=self.query_positions[queries],
            key_positions=self.key_positions[:n_keys],
        )

    @classmethod
    def of(cls, positions: Positions, b: int, n_queries: int, n_keys: int) -> OneSequence:
        """Take the positions of sequence b."""
        # No key and no winner is at -1.
        first = positions.first[b] if positions.aligned else torch.full_like(positions.first[b], -1)
        special = positions.special[b]
        start = positions.first_query
        queries = torch.arange(start, start + n_queries, device=first.device)
        keys = torch.arange(n_keys, device=first.device)
        n_places = n_keys - positions.n_sinks
        near = {}
        for name, distance in NEAR_OFFSETS.items():
            at = queries + distance
            near[name] = (at.clamp(0, n_keys - 1), (at >= 0) & (at < n_places) & positions.aligned)
        tokens = positions.tokens
        targets = {} if tokens is None else token_relations(tokens[b], queries)
        relations = {name: (target.float(), target.any(-1)) for name, target in targets.items()}
        at_first = keys == first
        looked_at = torch.stack([at_first, special, at_first | special], dim=-1).float()
        sample = positions.sample[b]
        known = {
            "aligned_rows": float(positions.aligned),
            "special_rows": float(positions.tokens_known),
            "sink_rows": float(positions.aligned or positions.tokens_known),
        }
        return cls(
            looked_at,
            known,
            first,
            relations,
            near,
            queries,
            keys.masked_fill(keys >= n_places, NO_POSITION),
            sample[sample >= 0],
            positions.n_searched,
            positions.resampling[b],
        )
