"""How much there is to read, for progress bars that know their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sat_lens._checks import is_count


def batch_sizes(data: Any, batch_size: int) -> list[int] | None:
    """Give the sizes of the batches that :func:`sat_lens.data.batches` will make of data.

    Returns:
        None where only reading would tell, as for an iterator or a data set.

    Example:
        >>> from sat_lens.data import batch_sizes
        >>> batch_sizes(["import os", "x = 1", "y = 2"], batch_size=2)
        [2, 1]
    """
    if not is_count(batch_size):
        return None
    if isinstance(data, str):
        return [1]
    if isinstance(data, Tensor):
        count = 1 if data.dim() < 2 else len(data)
    elif isinstance(data, Sequence) and all(isinstance(item, str) for item in data):
        count = len(data)
    elif isinstance(data, Sequence) and all(isinstance(item, Tensor) for item in data):
        return [1 if item.dim() < 2 else len(item) for item in data]
    else:
        return None
    starts = range(0, count, batch_size)
    return [min(batch_size, count - start) for start in starts]
