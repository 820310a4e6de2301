"""Measure the roles of all heads in one streaming pass over data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens.data import Batch, Data, batches
from sat_lens.errors import ArgumentError, DataError
from sat_lens.intervention import observe_attention
from sat_lens.models import model_name
from sat_lens.results import Provenance
from sat_lens.roles.result import HeadRoles
from sat_lens.roles.rule import Thresholds
from sat_lens.roles.statistics import Positions, Sums, measure, resampling_weights, token_relations
from sat_lens.sites import AttentionSite, attention_sites

ROWS_PER_SEQUENCE = 64


def head_roles(
    model: Any,
    data: Data,
    *,
    query_positions: Sequence[int] | None = None,
    min_keys: int = 8,
    rows: int | Literal["all"] = ROWS_PER_SEQUENCE,
    thresholds: Thresholds | None = None,
    batch_size: int = 8,
    progress: bool = True,
    data_name: str = "",
) -> HeadRoles:
    """Measure what every head does with its attention, in one pass over data.

    Statistics are taken inside the forward pass; what is kept does not grow with the data. Rows
    with fewer than ``min_keys`` visible keys are left out, because one key and a few are near to
    each other in any measure; so are padded query rows.

    Args:
        model: A TransformerLens model in evaluation mode.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`.
        query_positions: Count these query positions only; negative ones count from the end. A head
            that acts at one position looks like something else over all of them.
        min_keys: Least number of visible keys of a counted row.
        rows: For the measures that need a sort (tv_nearest, m), how many seeded rows of each
            sequence; ``"all"`` for all.
        thresholds: Where one role ends and the next begins.
        batch_size: Sequences in a forward pass, for tokens and texts.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        DataError: The data is empty, or no row has ``min_keys`` visible keys.
        UnsupportedModelError: The attention cannot be reached.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> roles = sl.head_roles(model, ["import os, sys, re, json"] * 2, progress=False)
        >>> len(roles.frame())
        32
    """
    if min_keys < 1 or (rows != "all" and rows < 1):
        raise ArgumentError(f"min_keys and rows must be at least 1; found {min_keys} and {rows}.")
    sites = attention_sites(model)
    sums = {site.path: Sums.empty(site.n_heads) for site in sites}
    limits = thresholds or Thresholds()
    special = _special_ids(model)
    n_sequences, complete = 0, True
    with torch.no_grad(), tqdm(desc="head roles", unit="seq", disable=not progress) as bar:
        try:
            for batch in batches(model, data, batch_size):
                reader = _Reader(batch, query_positions, rows, special)
                new = {site.path: Sums.empty(site.n_heads) for site in sites}

                def observe(
                    site: AttentionSite,
                    scores: Tensor,
                    reader: _Reader = reader,
                    new: dict[str, Sums] = new,
                ) -> None:
                    positions = reader.positions(site, scores)
                    measure(new[site.path], scores, positions, min_keys, limits)

                with observe_attention(model, observe):
                    batch.run(model)
                for path, part in new.items():
                    sums[path].add(part)
                n_sequences += batch.size
                bar.update(batch.size)
        except KeyboardInterrupt:
            if n_sequences == 0:
                raise
            complete = False
    if all(float(part.by_name["rows"][0].sum()) == 0 for part in sums.values()):
        raise DataError(
            f"No query row has {min_keys} visible keys, so there is nothing to judge heads by. "
            "Give longer sequences, or lower min_keys."
        )
    return HeadRoles(
        provenance=Provenance(model_name(model), data_name),
        sites=tuple(sites),
        sums=sums,
        thresholds=limits,
        min_keys=min_keys,
        n_sequences=n_sequences,
        complete=complete,
    )


class _Reader:
    """Knows one batch, and says what its positions mean to an attention module."""

    def __init__(
        self,
        batch: Batch,
        query_positions: Sequence[int] | None,
        rows: int | Literal["all"],
        special: Int[Tensor, " token"],
    ) -> None:
        self.batch = batch
        self.query_positions = query_positions
        self.rows = rows
        self.special = special
        self.weights = resampling_weights(batch.inputs)
        self._made: dict[tuple[object, ...], Positions] = {}

    def positions(self, site: AttentionSite, scores: Tensor) -> Positions:
        """Describe the positions behind these scores; sites of one kind share the answer."""
        key = (site.stack, tuple(scores.shape))
        if key not in self._made:
            self._made[key] = self._make(site, scores)
        return self._made[key]

    def _make(self, site: AttentionSite, scores: Tensor) -> Positions:
        batch, _, n_queries, n_keys = scores.shape
        device = scores.device
        _, query_real = self._side(site.stack in ("decoder", "cross"))
        key_tokens, key_real = self._side(site.stack == "decoder")
        counted = _fitting(query_real, (batch, n_queries), device)
        real_keys = _fitting(key_real, (batch, n_keys), device)
        if self.query_positions is not None:
            counted = counted & _only(self.query_positions, counted)
        special = torch.zeros(batch, n_keys, dtype=torch.bool, device=device)
        induction = duplicate = None
        if key_tokens is not None and key_tokens.shape == special.shape:
            special = torch.isin(key_tokens, self.special.to(device))
            if site.kind == "self" and n_queries == n_keys:
                induction, duplicate = token_relations(key_tokens)
        return Positions(
            counted=counted,
            first=real_keys.int().argmax(-1),
            special=special,
            induction=induction,
            duplicate=duplicate,
            sample=_sampled_rows(counted, self.rows),
            weights=_fitting_weights(self.weights, batch),
        )

    def _side(self, decoder: bool) -> tuple[Tensor | None, Tensor | None]:
        if decoder and self.batch.decoder_tokens is not None:
            return self.batch.decoder_tokens, self.batch.decoder_real
        return self.batch.tokens, self.batch.real


def _sampled_rows(
    counted: Bool[Tensor, "batch query"], rows: int | Literal["all"]
) -> Int[Tensor, "batch row"]:
    """Choose rows of each sequence, the same for every head and run; -1 where there are fewer."""
    n_queries = counted.shape[1]
    wanted = n_queries if rows == "all" else min(rows, n_queries)
    generator = torch.Generator().manual_seed(n_queries)
    order = torch.rand(n_queries, generator=generator).to(counted.device)
    # Counted rows first, in the drawn order; what is left over is marked.
    ranked = order.masked_fill(~counted, 2.0).argsort(-1)[:, :wanted]
    return ranked.masked_fill(~counted.gather(-1, ranked), -1)


def _fitting(
    mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Bool[Tensor, "batch position"]:
    if mask is not None and tuple(mask.shape) == shape:
        return mask.to(device)
    return torch.ones(shape, dtype=torch.bool, device=device)


def _fitting_weights(weights: Tensor, batch: int) -> Tensor:
    """Repeat weights where a module folds several rows of blocks into its batch axis."""
    return weights if len(weights) == batch else weights.repeat_interleave(batch // len(weights), 0)


def _only(query_positions: Sequence[int], counted: Tensor) -> Bool[Tensor, "1 query"]:
    n_queries = counted.shape[1]
    outside = [p for p in query_positions if not -n_queries <= p < n_queries]
    if outside or not query_positions:
        raise ArgumentError(
            f"query_positions must name positions of a sequence of {n_queries}; found "
            f"{outside or 'none'}."
        )
    chosen = torch.zeros(1, n_queries, dtype=torch.bool, device=counted.device)
    chosen[0, list(query_positions)] = True
    return chosen


def _special_ids(model: Any) -> Int[Tensor, " token"]:
    tokenizer = getattr(model, "tokenizer", None)
    return torch.tensor(sorted(getattr(tokenizer, "all_special_ids", []) or [-1]))
