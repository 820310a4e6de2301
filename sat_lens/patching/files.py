"""A sweep as tensors and plain data, for its file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sat_lens.patching.items import Item
from sat_lens.results import Provenance

if TYPE_CHECKING:
    from sat_lens.patching.result import HeadSweep

_TENSORS = ("soft", "saturated", "item_values", "confirmed")
_OPTIONAL = ("random_values", "corrupted_soft", "corruption_values")


def as_file(sweep: HeadSweep) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the tensors of a sweep, and the rest of it as plain data."""
    every = {name: getattr(sweep, name) for name in (*_TENSORS, *_OPTIONAL)}
    tensors = {name: value for name, value in every.items() if value is not None}
    for group in ("inputs", "corrupted"):
        given = getattr(sweep, group) or {}
        tensors |= {f"{group}/{k}": v for k, v in given.items() if isinstance(v, Tensor)}
    meta = {
        "provenance": dataclasses.asdict(sweep.provenance),
        "arguments": dict(sweep.arguments),
        "items": [dataclasses.asdict(item) for item in sweep.items],
        "shapes": {stack: list(shape) for stack, shape in sweep.shapes.items()},
        "positions": sweep.positions,
        "checks": {k: _plain(v) for k, v in dataclasses.asdict(sweep.checks).items()},
        "complete": sweep.complete,
    }
    return tensors, meta


def fields_from_file(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of a sweep, without its checks."""
    positions = meta["positions"]
    return {
        "provenance": Provenance(**meta["provenance"]),
        "arguments": meta["arguments"],
        "inputs": _under(tensors, "inputs/"),
        "corrupted": _under(tensors, "corrupted/") or None,
        "items": tuple(Item(**{**item, "heads": tuple(item["heads"])}) for item in meta["items"]),
        "shapes": {stack: tuple(shape) for stack, shape in meta["shapes"].items()},
        "positions": None if positions is None else tuple(positions),
        "complete": meta["complete"],
        **{name: tensors[name] for name in _TENSORS},
        **{name: tensors.get(name) for name in _OPTIONAL},
    }


def read_checks(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of a sweep's checks."""
    return {name: math.nan if value is None else value for name, value in meta["checks"].items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
