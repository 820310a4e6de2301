"""What the positions of a batch mean to an attention module.

:class:`BatchReader` knows one batch. For each module it says which query rows count, which of them
are sampled for what needs a sort or a search, and where the first, the special and the related keys
are (:class:`Positions`, and :class:`OneSequence` in the form that the arithmetic needs).

Every random draw is seeded by the content of a sequence alone. It is the same in any shard, order
or batch, and beside any padding, so shards merge to the numbers of one pass.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens.attention import mask_threshold
from sat_lens.data import Batch
from sat_lens.errors import ArgumentError
from sat_lens.roles.sums import BOOTSTRAPS
from sat_lens.sites import AttentionSite

# Above every number that is drawn.
NOT_DRAWN = 2.0


def content_seeds(batch: Batch) -> list[int]:
    """Return a seed for each sequence that depends on its non-padding tokens and nothing else.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> first = Batch(torch.tensor([[5, 6, 0]]), {}, non_padding=mask)
        >>> content_seeds(first) == content_seeds(Batch(torch.tensor([[5, 6]]), {}))
        True
    """
    inputs = _rows(batch.inputs, batch.non_padding)
    if batch.decoder_tokens is None:
        return [_seed(row) for row in inputs]
    decoder = _rows(batch.decoder_tokens, batch.decoder_non_padding)
    return [_seed(*pair) for pair in zip(inputs, decoder, strict=True)]


def resampling_weights(
    seeds: Sequence[int], count: int = BOOTSTRAPS
) -> Float[Tensor, "batch resample"]:
    """Draw Poisson(1) weights for each sequence: a bootstrap whose weights shards can draw alone.

    The first column is 1, for the data as it is. Source: Hanley and MacGibbon, "Creating
    non-parametric bootstrap samples using Poisson frequencies", 2006.

    Example:
        >>> weights = resampling_weights([3, 3])
        >>> weights.shape, bool((weights[0] == weights[1]).all())
        (torch.Size([2, 101]), True)
    """
    drawn = torch.ones(len(seeds), 1 + count, dtype=torch.float64)
    for row, seed in zip(drawn, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        row[1:] = torch.poisson(torch.ones_like(row[1:], dtype=torch.float32), generator=generator)
    return drawn


def drawn_order(
    seeds: Sequence[int], non_padding: Bool[Tensor, "batch position"]
) -> Float[Tensor, "batch position"]:
    """Draw a number in [0, 1) for each non-padding position; the least are sampled.

    Example:
        >>> non_padding = torch.tensor([[True, True, False], [False, True, True]])
        >>> order = drawn_order([3, 3], non_padding)
        >>> bool((order[0, :2] == order[1, 1:]).all()), float(order[0, 2])
        (True, 2.0)
    """
    order = torch.full(non_padding.shape, NOT_DRAWN, dtype=torch.float32)
    for row, kept, seed in zip(order, non_padding.cpu(), seeds, strict=True):
        generator = torch.Generator().manual_seed(seed + 1)
        row[kept] = torch.rand(int(kept.sum()), generator=generator, dtype=torch.float32)
    return order.to(non_padding.device)


def _rows(values: Tensor, non_padding: Tensor | None) -> list[Tensor]:
    values = values.detach().cpu()
    # The dtype that a tensor happens to have is no content.
    values = values.float() if values.is_floating_point() else values.long()
    if non_padding is None or non_padding.shape != values.shape:
        return list(values)
    return [row[kept] for row, kept in zip(values, non_padding.cpu(), strict=True)]


def _seed(*parts: Tensor) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{list(part.shape)}".encode() + part.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")


RELATIONS = ("induction", "duplicate")
NEAR_OFFSETS = {"previous": -1, "self": 0, "next": 1}
# What a learned sink has for a position: one that is far from all.
NO_POSITION = 2**40


@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions behind the query rows and keys of one attention module, for one batch.

    Attributes:
        weight: 0 for query rows that do not count; 1, or their importance per head, for others.
        aligned: Whether rows and keys count the positions of one sequence. Where they do not
            (cross-attention, attention within blocks), offsets and the first key mean nothing.
        tokens_known: Whether it is known which keys are special tokens.
        first: The first key of each sequence that is no padding.
        special: Which keys are special tokens.
        tokens: The tokens behind the keys, -1 at a learned sink; None where targets by token
            (induction, duplicate) cannot be told.
        sample: Sampled query rows, in random order; -1 where there are fewer.
        n_searched: In how many of these critical scales are searched.
        resampling: The bootstrap weights of each sequence.
        first_query: The position of the first row.
        n_sinks: How many of the last keys are learned sinks, which have no position.
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
        """The positions of each sequence, shared by modules of one kind."""
        shape = (self.weight.shape[-1], self.special.shape[-1])
        return [OneSequence.of(self, b, *shape) for b in range(len(self.special))]


def token_relations(
    tokens: Int[Tensor, " key"], queries: Int[Tensor, " query"]
) -> dict[str, Bool[Tensor, "query key"]]:
    """Return which keys are induction and which are duplicate targets of the queries.

    A duplicate is an earlier occurrence of the query's token, an induction target the key that
    follows one (Olsson et al., "In-context Learning and Induction Heads", 2022).

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
    """The positions of one sequence, in the form that the arithmetic needs."""

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
        """Return the same for some query rows and the first keys only."""
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
        """Return the positions of sequence b."""
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


Rows = int | Literal["all"]
ROWS_PER_SEQUENCE = 64
# A search costs several times as much as a sort, so fewer rows have to do for it.
SEARCHED_ROWS = 16


class BatchReader:
    """Describes the positions of one batch to each attention module."""

    def __init__(
        self,
        batch: Batch,
        special: Int[Tensor, " token"],
        query_positions: Sequence[int] | None,
        rows: Rows,
        importance: Mapping[str, Float[Tensor, "batch head query"]] | None,
    ) -> None:
        self.batch = batch
        self.special = special
        self.query_positions = query_positions
        self.rows = rows
        self.importance = importance
        self.seeds = content_seeds(batch)
        self.resampling = resampling_weights(self.seeds)
        self._made: dict[tuple[object, ...], Positions] = {}

    def positions(self, site: AttentionSite, scores: Tensor) -> Positions:
        """Return the positions behind these scores; modules of one kind share them."""
        own = site.path if self.importance is not None else site.stack
        # The layers of a large model are spread over devices.
        key = (own, tuple(scores.shape), scores.device)
        if key not in self._made:
            self._made[key] = self._make(site, scores)
        return self._made[key]

    def sinks(self, site: AttentionSite, scores: Tensor) -> Bool[Tensor, "batch key"]:
        """Return which keys are the first or a special token, as far as that is known."""
        positions = self.positions(site, scores)
        keys = torch.arange(scores.shape[-1], device=scores.device)
        first = (keys == positions.first[:, None]) & positions.aligned
        return first | positions.special

    def _make(self, site: AttentionSite, scores: Tensor) -> Positions:
        batch, _, n_queries, n_keys = scores.shape
        device = scores.device
        query_tokens, query_mask = self._side(decoder=site.stack in ("decoder", "cross"))
        key_tokens, key_mask = self._side(decoder=site.stack == "decoder")
        length = n_queries if query_tokens is None else query_tokens.shape[1]
        n_key_tokens = length if key_tokens is None else key_tokens.shape[1]
        n_sinks = int(n_keys == n_key_tokens + 1 and _last_key_is_always_seen(scores))
        whole = batch == self.batch.size and n_keys - n_sinks == n_key_tokens
        aligned = whole and site.kind == "self" and n_queries <= length
        special = torch.zeros(batch, n_keys, dtype=torch.bool, device=device)
        tokens = None
        if whole and key_tokens is not None:
            # A learned sink stands behind the tokens, and is none; -1 is no token.
            behind = torch.nn.functional.pad(key_tokens.to(device), (0, n_sinks), value=-1)
            special = torch.isin(behind, self.special.to(device)) & (behind >= 0)
            tokens = behind if aligned and n_queries == length else None
        counted = self._counted(query_mask, length, (batch, n_queries), device)
        weight = counted[:, None].float()
        if self.importance is not None:
            own = as_rows(self.importance[site.path].to(device), (batch, n_queries))
            weight = weight * (1.0 if own is None else own)
        return Positions(
            weight=weight,
            aligned=aligned,
            tokens_known=whole and key_tokens is not None,
            first=fitting_mask(key_mask, (batch, n_keys - n_sinks), device).int().argmax(-1),
            special=special,
            tokens=tokens,
            sample=_sampled_rows(counted, self._order(query_mask, length, counted), self.rows),
            n_searched=n_queries if self.rows == "all" else SEARCHED_ROWS,
            resampling=self._resampling(batch),
            # A model may be asked for its newest rows only; they are the last of the positions.
            first_query=n_keys - n_sinks - n_queries,
            n_sinks=n_sinks,
        )

    def _counted(
        self, non_padding: Tensor | None, length: int, shape: tuple[int, int], device: torch.device
    ) -> Bool[Tensor, "batch query"]:
        """Return which rows count, in the shape that the module gives to its rows."""
        counted = fitting_mask(non_padding, (self.batch.size, length), device)
        if self.query_positions is not None:
            if not bool(counted.all()) and min(self.query_positions) < 0:
                raise ArgumentError(
                    "query_positions counted from the end need sequences of one length, and this "
                    "batch is padded. Give positions from the start, or one sequence at a time."
                )
            counted = counted & _only(self.query_positions, length, device)
        rows = as_rows(counted, shape)
        if rows is not None:
            return rows
        if self.query_positions is not None:
            raise ArgumentError(
                f"query_positions cannot be told here: a module has {shape[1]} query rows for "
                f"sequences of {length}. Leave query_positions out."
            )
        return torch.ones(shape, dtype=torch.bool, device=device)

    def _order(
        self, non_padding: Tensor | None, length: int, counted: Bool[Tensor, "batch query"]
    ) -> Float[Tensor, "batch query"]:
        """Return the numbers by which rows are sampled, the least first."""
        batch, n_queries = counted.shape
        positions = fitting_mask(non_padding, (self.batch.size, length), counted.device)
        order = as_rows(drawn_order(self.seeds, positions), (batch, n_queries))
        return drawn_order([0] * batch, torch.ones_like(counted)) if order is None else order

    def _side(self, *, decoder: bool) -> tuple[Tensor | None, Tensor | None]:
        if decoder and self.batch.decoder_tokens is not None:
            return self.batch.decoder_tokens, self.batch.decoder_non_padding
        return self.batch.tokens, self.batch.non_padding

    def _resampling(self, batch: int) -> Float[Tensor, "batch resample"]:
        """Repeat the weights where a module folds the blocks of a sequence into its batch axis."""
        return self.resampling.repeat_interleave(batch // len(self.resampling), 0)


def text_rows(
    batch: Batch, stack: str, shape: tuple[int, int], device: torch.device
) -> Bool[Tensor, "batch query"]:
    """Return False at the padded query rows of a stack; True everywhere where it cannot be told."""
    in_decoder = stack in ("decoder", "cross")
    mask = batch.output_non_padding if in_decoder else batch.non_padding
    return fitting_mask(mask, shape, device)


def fitting_mask(
    mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Bool[Tensor, "batch position"]:
    """Return the mask if it has that shape, and a mask of ones otherwise."""
    if mask is not None and tuple(mask.shape) == shape:
        return mask.to(device)
    return torch.ones(shape, dtype=torch.bool, device=device)


def as_rows(values: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Arrange values of positions, ``[batch, ..., position]``, as the query rows of a module.

    A module may have a row for each position, for the newest ones only, or for blocks of a sequence
    folded into the batch axis, the last one padded (with 0 here). None if it is none of these.

    Example:
        >>> as_rows(torch.tensor([[1, 2, 3]]), (2, 2)).tolist()
        [[1, 2], [3, 0]]
    """
    batch, n_queries = shape
    length = values.shape[-1]
    if batch == len(values) and n_queries <= length:
        return values[..., length - n_queries :]
    blocks = batch // len(values)
    if batch % len(values) or not (blocks - 1) * n_queries < length <= blocks * n_queries:
        return None
    filled = torch.nn.functional.pad(values, (0, blocks * n_queries - length))
    return rearrange(filled, "b ... (block q) -> (b block) ... q", block=blocks)


def _last_key_is_always_seen(scores: Float[Tensor, "batch head query key"]) -> bool:
    """Whether the last key is a learned sink, and not a key of a window."""
    raw = scores.detach().float()
    return bool((raw[..., -1] > mask_threshold(raw, raw)).all())


def special_ids(model: Any, tokenizer: Any = None) -> Int[Tensor, " token"]:
    """Return the ids of the special tokens of a tokenizer, the model's for None; -1 if it has none.

    -1 is no token.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    return torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or [-1]))


def _sampled_rows(
    counted: Bool[Tensor, "batch query"], order: Float[Tensor, "batch query"], rows: Rows
) -> Int[Tensor, "batch row"]:
    """Return sampled rows of each sequence, the same for every head; -1 where there are fewer."""
    wanted = counted.shape[1] if rows == "all" else min(rows, counted.shape[1])
    ranked = order.masked_fill(~counted, NOT_DRAWN).argsort(-1)[:, :wanted]
    return ranked.masked_fill(~counted.gather(-1, ranked), -1)


def _only(
    query_positions: Sequence[int], length: int, device: torch.device
) -> Bool[Tensor, "1 position"]:
    outside = [p for p in query_positions if not -length <= p < length]
    if outside:
        raise ArgumentError(
            f"query_positions must name positions of a sequence of {length}; found {outside}."
        )
    chosen = torch.zeros(1, length, dtype=torch.bool, device=device)
    chosen[0, list(query_positions)] = True
    return chosen
