"""What the positions of a batch mean to an attention module: which rows count, where sinks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens.attention import mask_threshold
from sat_lens.data import Batch
from sat_lens.errors import ArgumentError
from sat_lens.roles.sampling import NOT_DRAWN, content_seeds, drawn_order, resampling_weights
from sat_lens.roles.sequences import Positions
from sat_lens.sites import AttentionSite

Rows = int | Literal["all"]
ROWS_PER_SEQUENCE = 64
# A search costs several times as much as a sort, so fewer rows have to do for it.
SEARCHED_ROWS = 16


class BatchReader:
    """Knows one batch, and describes its positions to each attention module that asks."""

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
        """Describe the positions behind these scores; modules of one kind share the answer."""
        own = site.path if self.importance is not None else site.stack
        # The layers of a large model are spread over devices.
        key = (own, tuple(scores.shape), scores.device)
        if key not in self._made:
            self._made[key] = self._make(site, scores)
        return self._made[key]

    def _make(self, site: AttentionSite, scores: Tensor) -> Positions:
        batch, _, n_queries, n_keys = scores.shape
        device = scores.device
        query_tokens, query_real = self._side(decoder=site.stack in ("decoder", "cross"))
        key_tokens, key_real = self._side(decoder=site.stack == "decoder")
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
        counted = self._counted(query_real, length, (batch, n_queries), device)
        weight = counted[:, None].float()
        if self.importance is not None:
            own = as_rows(self.importance[site.path].to(device), (batch, n_queries))
            weight = weight * (1.0 if own is None else own)
        return Positions(
            weight=weight,
            aligned=aligned,
            tokens_known=whole and key_tokens is not None,
            first=fitting_mask(key_real, (batch, n_keys - n_sinks), device).int().argmax(-1),
            special=special,
            tokens=tokens,
            sample=_sampled_rows(counted, self._order(query_real, length, counted), self.rows),
            n_searched=n_queries if self.rows == "all" else SEARCHED_ROWS,
            resampling=self._resampling(batch),
            # A model may be asked for its newest rows only; they are the last of the positions.
            first_query=n_keys - n_sinks - n_queries,
            n_sinks=n_sinks,
        )

    def _counted(
        self, real: Tensor | None, length: int, shape: tuple[int, int], device: torch.device
    ) -> Bool[Tensor, "batch query"]:
        """Say which rows count, in the shape that the module gives to its rows."""
        counted = fitting_mask(real, (self.batch.size, length), device)
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
        self, real: Tensor | None, length: int, counted: Bool[Tensor, "batch query"]
    ) -> Float[Tensor, "batch query"]:
        """Say in which order rows are sampled."""
        batch, n_queries = counted.shape
        positions = fitting_mask(real, (self.batch.size, length), counted.device)
        order = as_rows(drawn_order(self.seeds, positions), (batch, n_queries))
        return drawn_order([0] * batch, torch.ones_like(counted)) if order is None else order

    def _side(self, *, decoder: bool) -> tuple[Tensor | None, Tensor | None]:
        if decoder and self.batch.decoder_tokens is not None:
            return self.batch.decoder_tokens, self.batch.decoder_real
        return self.batch.tokens, self.batch.real

    def _resampling(self, batch: int) -> Float[Tensor, "batch resample"]:
        """Repeat the weights where a module folds the blocks of a sequence into its batch axis."""
        return self.resampling.repeat_interleave(batch // len(self.resampling), 0)


def fitting_mask(
    mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Bool[Tensor, "batch position"]:
    """Give the mask if it is of that shape, and a mask that lets everything through otherwise."""
    if mask is not None and tuple(mask.shape) == shape:
        return mask.to(device)
    return torch.ones(shape, dtype=torch.bool, device=device)


def as_rows(values: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Bring values of positions, ``[batch, ..., position]``, into the rows that a module has.

    It may have a row for each position, for the newest ones only, or blocks of a sequence folded
    into the batch axis, the last one filled up; what fills it gets 0. None if it is none of these.

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
    """Tell a learned sink, which stands behind the keys of the text, from a key of a window."""
    raw = scores.detach().float()
    return bool((raw[..., -1] > mask_threshold(raw, raw)).all())


def special_ids(model: Any) -> Int[Tensor, " token"]:
    """Give the ids of the tokenizer's special tokens; -1, which is no token, if there are none."""
    tokenizer = getattr(model, "tokenizer", None)
    return torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or [-1]))


def _sampled_rows(
    counted: Bool[Tensor, "batch query"], order: Float[Tensor, "batch query"], rows: Rows
) -> Int[Tensor, "batch row"]:
    """Choose rows of each sequence, the same for every head; -1 where there are fewer."""
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
