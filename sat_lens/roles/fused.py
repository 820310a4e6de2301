"""The same statistics of attention that runs in a fused kernel, in memory linear in its length.

A fused kernel shows no scores, so they are made anew from its queries and keys, for some rows at a
time: each block of rows is measured as a small batch of its own, and so are the sampled rows.

When not to use it: where scores can be looked at. They cost nothing then.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Int
from torch import Tensor

from sat_lens.attention.masks import EXTREME
from sat_lens.kernels import AttentionCall
from sat_lens.roles.rule import Thresholds
from sat_lens.roles.sequences import OneSequence, Positions
from sat_lens.roles.statistics import measure, measure_sample
from sat_lens.roles.sums import Sums

BLOCK_ELEMENTS = 2**22


def shape_of(call: AttentionCall) -> Tensor:
    """Give an empty stand-in of the scores' shape, which takes no memory.

    Example:
        >>> shape_of(AttentionCall(*torch.zeros(3, 1, 2, 5, 4))).shape
        torch.Size([1, 2, 5, 5])
    """
    shape = (*call.query.shape[:3], call.key.shape[2])
    return torch.zeros((), device=call.query.device).expand(shape)


def measure_fused(
    sums: Sums, call: AttentionCall, positions: Positions, min_keys: int, thresholds: Thresholds
) -> None:
    """Add the statistics of one run of a fused kernel to the sums of its attention module."""
    batch, n_heads, n_queries, n_keys = shape_of(call).shape
    size = max(1, BLOCK_ELEMENTS // (batch * n_heads * n_keys))
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
    """Describe some neighbouring rows, none of them sampled."""
    return dataclasses.replace(
        positions,
        weight=positions.weight[:, :, rows],
        sample=positions.sample[:, :0],
        first_query=positions.first_query + int(rows[0]),
    )
