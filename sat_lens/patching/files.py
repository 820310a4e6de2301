"""A sweep as tensors and plain data, for its file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
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
    """Give the fields of a sweep, without its checks.

    Raises:
        KeyError, TypeError, ValueError: An entry is missing, or does not fit the others.
    """
    positions = meta["positions"]
    fields = {
        "provenance": Provenance(**meta["provenance"]),
        "arguments": dict(meta["arguments"]),
        "inputs": _under(tensors, "inputs/"),
        "corrupted": _under(tensors, "corrupted/") or None,
        "items": tuple(Item(**{**item, "heads": tuple(item["heads"])}) for item in meta["items"]),
        "shapes": {stack: (int(n), int(m)) for stack, (n, m) in meta["shapes"].items()},
        "positions": None if positions is None else tuple(int(p) for p in positions),
        "complete": bool(meta["complete"]),
        **{name: tensors[name] for name in _TENSORS},
        **{name: tensors.get(name) for name in _OPTIONAL},
    }
    _check_arguments(fields)
    _check_items(fields)
    _check_tensors(fields)
    return fields


def _check_arguments(fields: Mapping[str, Any]) -> None:
    known = {
        "method": ("exact", "attribution", "screen"),
        "direction": ("noising", "denoising"),
        "source": ("local", "run"),
    }
    for name, choices in known.items():
        if fields["arguments"][name] not in choices:
            raise ValueError(f"{name} is {fields['arguments'][name]!r}")
    for name in ("component", "transform"):
        if not isinstance(fields["arguments"][name], (str, type(None))):
            raise TypeError(f"{name} is {fields['arguments'][name]!r}")


def _check_items(fields: Mapping[str, Any]) -> None:
    items: tuple[Item, ...] = fields["items"]
    if not all(isinstance(text, str) for item in items for text in (item.label, item.stack)):
        raise TypeError("a label is no text")
    if len({item.is_group for item in items}) != 1 or len({item.label for item in items}) != len(
        items
    ):
        raise ValueError("items are none, repeat, or mix heads with groups")
    for item in items:
        layers, heads = (0, 0) if item.is_group else fields["shapes"][item.stack]
        if not item.is_group and not (item.layer < layers and 0 <= item.head < heads):
            raise ValueError(f"{item.label} is no head of {layers} layers of {heads}")


def _check_tensors(fields: Mapping[str, Any]) -> None:
    """Every tensor must have the shape that the others give it, and be of the right kind."""
    prompts = list(fields["soft"].shape)
    positions = fields["positions"]
    items = [len(fields["items"])]
    whole = [*items, *([] if positions is None else [len(positions)]), *prompts]
    if len(prompts) > 1:
        raise ValueError(f"soft has shape {prompts}")
    random = fields["random_values"]
    shapes = {
        "soft": prompts,
        "saturated": prompts,
        "item_values": whole,
        "confirmed": items,
        "random_values": [*(() if random is None else random.shape[:1]), *whole],
        "corrupted_soft": prompts,
        "corruption_values": whole,
    }
    for name, shape in shapes.items():
        tensor = fields[name]
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, and {shape} was needed")
        if (tensor.dtype != torch.bool) if name == "confirmed" else not tensor.is_floating_point():
            raise TypeError(f"{name} holds {tensor.dtype}")


def read_checks(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of a sweep's checks."""
    return {name: math.nan if value is None else value for name, value in meta["checks"].items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
