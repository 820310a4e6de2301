"""What is drawn of a sequence: its weight in each resample, and which of its rows are sampled.

Every draw is seeded by the content of the sequence alone. It is the same in whatever shard, order
or batch the sequence comes, and beside whatever padding, so shards merge to the numbers of one
pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens.data import Batch
from sat_lens.roles.sums import BOOTSTRAPS

# Above every number that is drawn.
NOT_DRAWN = 2.0


def content_seeds(batch: Batch) -> list[int]:
    """Give a seed for each sequence, which depends on its real tokens and on nothing else.

    Example:
        >>> first = Batch(torch.tensor([[5, 6, 0]]), {}, real=torch.tensor([[True, True, False]]))
        >>> content_seeds(first) == content_seeds(Batch(torch.tensor([[5, 6]]), {}))
        True
    """
    inputs = _rows(batch.inputs, batch.real)
    if batch.decoder_tokens is None:
        return [_seed(row) for row in inputs]
    decoder = _rows(batch.decoder_tokens, batch.decoder_real)
    return [_seed(*pair) for pair in zip(inputs, decoder, strict=True)]


def resampling_weights(
    seeds: Sequence[int], count: int = BOOTSTRAPS
) -> Float[Tensor, "batch resample"]:
    """Draw Poisson(1) weights for each sequence; the first column is 1, for the data as it is.

    Example:
        >>> weights = resampling_weights([3, 3])
        >>> weights.shape, bool((weights[0] == weights[1]).all())
        (torch.Size([2, 101]), True)
    """
    drawn = torch.ones(len(seeds), 1 + count, dtype=torch.float64)
    for row, seed in zip(drawn, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        row[1:] = torch.poisson(torch.ones(count), generator=generator)
    return drawn


def drawn_order(
    seeds: Sequence[int], real: Bool[Tensor, "batch position"]
) -> Float[Tensor, "batch position"]:
    """Draw a number in [0, 1) for each real position; sampled are the positions of the least.

    Example:
        >>> real = torch.tensor([[True, True, False], [False, True, True]])
        >>> order = drawn_order([3, 3], real)
        >>> bool((order[0, :2] == order[1, 1:]).all()), float(order[0, 2])
        (True, 2.0)
    """
    order = torch.full(real.shape, NOT_DRAWN)
    for row, kept, seed in zip(order, real.cpu(), seeds, strict=True):
        generator = torch.Generator().manual_seed(seed + 1)
        row[kept] = torch.rand(int(kept.sum()), generator=generator)
    return order.to(real.device)


def _rows(values: Tensor, real: Tensor | None) -> list[Tensor]:
    values = values.detach().cpu()
    # The dtype that a tensor happens to have is no content.
    values = values.float() if values.is_floating_point() else values.long()
    if real is None or real.shape != values.shape:
        return list(values)
    return [row[kept] for row, kept in zip(values, real.cpu(), strict=True)]


def _seed(*parts: Tensor) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{list(part.shape)}".encode() + part.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")
