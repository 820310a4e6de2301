"""What the positions of a batch mean to an attention module: which rows count, where sinks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens.data import Batch
from sat_lens.errors import ArgumentError
from sat_lens.roles.statistics import Positions, token_relations
from sat_lens.roles.sums import resampling_weights
from sat_lens.sites import AttentionSite

Rows = int | Literal["all"]
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
        self.resampling = resampling_weights(batch.inputs)
        self._made: dict[tuple[object, ...], Positions] = {}

    def positions(self, site: AttentionSite, scores: Tensor) -> Positions:
        """Describe the positions behind these scores; modules of one kind share the answer."""
        own = site.path if self.importance is not None else site.stack
        key = (own, tuple(scores.shape))
        if key not in self._made:
            self._made[key] = self._make(site, scores)
        return self._made[key]

    def _make(self, site: AttentionSite, scores: Tensor) -> Positions:
        batch, _, n_queries, n_keys = scores.shape
        device = scores.device
        _, query_real = self._side(decoder=site.stack in ("decoder", "cross"))
        key_tokens, key_real = self._side(decoder=site.stack == "decoder")
        counted = fitting_mask(query_real, (batch, n_queries), device)
        if self.query_positions is not None:
            if not bool(counted.all()) and min(self.query_positions, default=0) < 0:
                raise ArgumentError(
                    "query_positions counted from the end need sequences of one length, and this "
                    "batch is padded. Give positions from the start, or one sequence at a time."
                )
            counted = counted & _only(self.query_positions, n_queries, device)
        special = torch.zeros(batch, n_keys, dtype=torch.bool, device=device)
        relations = {}
        # A learned sink is one more key behind those of the text.
        n_sinks = int(key_tokens is not None and n_keys == key_tokens.shape[1] + 1)
        if key_tokens is not None and special[:, n_sinks:].shape == key_tokens.shape:
            special[:, : n_keys - n_sinks] = torch.isin(key_tokens, self.special.to(device))
            if site.kind == "self" and n_queries == key_tokens.shape[1]:
                relations = {
                    name: torch.nn.functional.pad(relation, (0, n_sinks))
                    for name, relation in token_relations(key_tokens).items()
                }
        weight = counted[:, None].float()
        if self.importance is not None:
            weight = weight * self.importance[site.path].to(device)
        return Positions(
            weight=weight,
            first=fitting_mask(key_real, (batch, n_keys - n_sinks), device).int().argmax(-1),
            special=special,
            relations=relations,
            sample=_sampled_rows(counted, self.rows),
            n_searched=n_queries if self.rows == "all" else SEARCHED_ROWS,
            resampling=self._resampling(batch),
            # A model may be asked for its newest rows only; they are the last of the positions.
            first_query=n_keys - n_sinks - n_queries,
        )

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


def special_ids(model: Any) -> Int[Tensor, " token"]:
    """Give the ids of the tokenizer's special tokens; -1, which is no token, if there are none."""
    tokenizer = getattr(model, "tokenizer", None)
    return torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or [-1]))


def _sampled_rows(counted: Bool[Tensor, "batch query"], rows: Rows) -> Int[Tensor, "batch row"]:
    """Choose rows of each sequence, the same for every head and run; -1 where there are fewer."""
    n_queries = counted.shape[1]
    wanted = n_queries if rows == "all" else min(rows, n_queries)
    generator = torch.Generator().manual_seed(n_queries)
    order = torch.rand(n_queries, generator=generator).to(counted.device)
    # Counted rows come first, in the drawn order; what is left over is marked.
    ranked = torch.where(counted, order, 2.0).argsort(-1)[:, :wanted]
    return ranked.masked_fill(~counted.gather(-1, ranked), -1)


def _only(
    query_positions: Sequence[int], n_queries: int, device: torch.device
) -> Bool[Tensor, "1 query"]:
    if isinstance(query_positions, int):
        raise ArgumentError(f"query_positions is a list, such as [{query_positions}].")
    outside = [p for p in query_positions if not -n_queries <= p < n_queries]
    if outside or not query_positions:
        raise ArgumentError(
            f"query_positions must name positions of a sequence of {n_queries}; found "
            f"{outside or 'none'}."
        )
    chosen = torch.zeros(1, n_queries, dtype=torch.bool, device=device)
    chosen[0, list(query_positions)] = True
    return chosen
