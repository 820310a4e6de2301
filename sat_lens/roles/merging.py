"""Put the statistics of disjoint parts of the data together: from files, or across processes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from sat_lens.errors import ArgumentError
from sat_lens.roles.result import HeadRoles
from sat_lens.roles.sums import Sums

SETTINGS = ("sites", "thresholds", "min_keys", "rows", "query_positions", "damage", "weighted_by")
VALUES_PER_PARAMETER = 16


def fingerprint(model: Any) -> str:
    """Tell models apart by more than their names, which may be the same for two of them.

    It is a hash of the name and shape of every parameter and of 16 evenly spaced values of each,
    as float32; so it changes with training and with the dtype that the weights were rounded to,
    and not with the device.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.roles import fingerprint
        >>> fingerprint(sl.load_model("demo")) == fingerprint(sl.load_model("demo"))
        True
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            step = max(1, len(flat) // VALUES_PER_PARAMETER)
            digest.update(flat[::step][:VALUES_PER_PARAMETER].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def merge(parts: Sequence[HeadRoles]) -> HeadRoles:
    """Merge results of disjoint parts of the data into the result of the whole.

    Raises:
        ArgumentError: There are no parts, one is no result of :func:`sat_lens.head_roles` or comes
            twice, or they were measured on different models or with different settings.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.roles import merge
        >>> model, texts = sl.load_model("demo"), ["import os, sys, re", "class A: x = y + z"]
        >>> parts = [sl.head_roles(model, [text], min_keys=4, progress=False) for text in texts]
        >>> merge(parts).n_sequences
        2
    """
    if not parts:
        raise ArgumentError("Needed at least one result to merge, and none was given.")
    for part in parts:
        if not isinstance(part, HeadRoles):
            raise ArgumentError(
                "Needed results of head_roles to merge, such as HeadRoles.load gives; found "
                f"{type(part).__name__}."
            )
    first = parts[0]
    _check_distinct(parts)
    for other in parts[1:]:
        for name in SETTINGS:
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise ArgumentError(
                    f"Only results of one model and one setting can be merged; {name} differs "
                    f"({_shown(mine)} and {_shown(theirs)})."
                )
        if other.fingerprint != first.fingerprint:
            raise ArgumentError(
                "Only results of one model can be merged, and these were measured on different "
                f"weights ({first.provenance.model!r} and {other.provenance.model!r}). Measure all "
                "parts on one model, in one dtype."
            )
    sums = {site.path: Sums.empty(site.n_heads) for site in first.sites}
    for part in parts:
        for path, value in part.sums.items():
            sums[path].add(value)
    return dataclasses.replace(
        first,
        sums=sums,
        n_sequences=sum(part.n_sequences for part in parts),
        complete=all(part.complete for part in parts),
    )


def _check_distinct(parts: Sequence[HeadRoles]) -> None:
    """Refuse the same part twice; different data do not give the same sums to the last bit."""
    for i, part in enumerate(parts):
        for j, other in enumerate(parts[:i]):
            if part.sums.keys() == other.sums.keys() and all(
                torch.equal(a, b)
                for path, sums in part.sums.items()
                for a, b in zip(
                    sums.tensors().values(), other.sums[path].tensors().values(), strict=True
                )
            ):
                raise ArgumentError(
                    f"Parts {j + 1} and {i + 1} are the same, and each may be merged once only."
                )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
