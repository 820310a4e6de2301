"""Checks of arguments that the functions of this room share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sat_lens._checks import is_number, shown
from sat_lens.errors import ArgumentError, DataError


def check_range(name: str, first: Any, last: Any) -> None:
    """Refuse a range of steps that is none; its first step may be None.

    Raises:
        ArgumentError: The ends are no numbers, or out of order.
    """
    ends = [last] if first is None else [first, last]
    known = all(is_number(end) for end in ends)
    if not known or any(math.isnan(end) for end in ends) or ends != sorted(ends):
        raise ArgumentError(
            f"{name} goes from a first step to a later one, such as (100, 1000); found "
            f"({shown(first)}, {shown(last)})."
        )


def kept_data(data: Any) -> Any:
    """Make data that can be read several times of what may be an iterator.

    Raises:
        DataError: It is neither tokens, nor texts, nor an iterable of batches.
    """
    if data is None or isinstance(data, (Tensor, str)):
        return data
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(
            "Data are tokens, texts or a list of batches (see sat_lens.data.batches); found "
            f"{type(data).__name__}. A single batch goes into a list."
        )
    return list(data)


def check_readable(model: Any, data: Any) -> None:
    """Refuse texts where the model has nothing to read them with.

    Raises:
        DataError: So it is.
    """
    items = [data] if isinstance(data, (str, Tensor)) else data
    texts = any(
        isinstance(item, str) or (isinstance(item, Mapping) and isinstance(item.get("text"), str))
        for item in items
    )
    if texts and getattr(model, "tokenizer", None) is None:
        raise DataError(
            "The data are texts, and the model brings no tokenizer. Pass tokenizer=, a tokenizer "
            "or its directory, or give token tensors."
        )


def columns_of_length(
    tensors: Mapping[str, Tensor], names: Iterable[str], length: int
) -> dict[str, Tensor]:
    """Take columns of one length out of a file's tensors.

    Raises:
        ValueError: One has another shape.
        KeyError: One is missing.
    """
    columns = {name: tensors[name] for name in names}
    for name, column in columns.items():
        if column.shape != (length,):
            raise ValueError(f"{name} has the shape {list(column.shape)} and not [{length}]")
    return columns
