"""What views and reports are given: of the right kind, and of one model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import pandas as pd

from sat_lens.caching import SaturationPair
from sat_lens.errors import ArgumentError
from sat_lens.roles.result import HeadRoles
from sat_lens.viz.patterns import Patterns

log = logging.getLogger(__name__)

# The name of every model that was built in memory, so that it tells nothing.
_NAMELESS = ("", "external")


def check_roles(roles: object) -> None:
    """Raise an ArgumentError unless something is a result of head_roles."""
    if not isinstance(roles, HeadRoles):
        raise ArgumentError(
            "Needed roles, as sat_lens.head_roles(model, data) gives them; found "
            f"{type(roles).__name__}."
        )


def check_pair(pair: object) -> None:
    """Raise an ArgumentError unless something is a pair of runs."""
    if not isinstance(pair, SaturationPair):
        raise ArgumentError(
            "Needed a pair of runs, as sat_lens.run_with_saturation_cache(model, text) gives it; "
            f"found {type(pair).__name__}."
        )


def frame_of(name: str, result: Any) -> pd.DataFrame:
    """Read the table of a result.

    Raises:
        ArgumentError: It has none, or an empty one.
    """
    frame = result.frame() if callable(getattr(result, "frame", None)) else None
    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise ArgumentError(
            f"{name} must be a result with a frame() of at least one row; found "
            f"{type(result).__name__}."
        )
    return frame


def check_same_heads(roles: HeadRoles, found: Sequence[Patterns], sweep: Any) -> None:
    """Raise an ArgumentError if the results are of models with other layers or heads."""
    known = {(site.stack, site.layer): site.n_heads for site in roles.sites}
    for patterns in found:
        site = patterns.site
        if known.get((site.stack, site.layer)) != site.n_heads:
            raise ArgumentError(
                f"The pair and the roles are of different models: the pair has {site.n_heads} "
                f"heads in {site.path}, and the roles {_counted(known, site.stack)}. Measure both "
                "on one model."
            )
    for stack, (layers, heads) in getattr(sweep, "shapes", {}).items():
        of_stack = [(layer, n) for (name, layer), n in known.items() if name == stack]
        size = max((n for _, n in of_stack), default=0)
        if (layers, heads) != (max((n for n, _ in of_stack), default=-1) + 1, size):
            raise ArgumentError(
                f"The sweep and the roles are of different models: the sweep's has {layers} layers "
                f"of {heads} heads, and the roles {_counted(known, stack)}. Measure both on one "
                "model."
            )


def names_that_differ(roles: HeadRoles, **results: Any) -> list[str]:
    """Say which results carry the name of another model than the roles do.

    A name is no proof: one model can be loaded from two places, and all models built in memory
    share theirs. So this is for the reader of the page to judge.
    """
    own = _plain_name(roles)
    notes = []
    for what, result in results.items():
        name = _plain_name(result)
        if own and name and name != own:
            notes.append(
                f"The roles were measured on a model called {own}, the {what} on one called {name}."
            )
    for note in notes:
        log.warning(note)
    return notes


def _plain_name(result: Any) -> str:
    """The last part of a model's name, or nothing where it tells nothing."""
    name = str(getattr(getattr(result, "provenance", None), "model", ""))
    return "" if name in _NAMELESS else PurePath(name).name


def _counted(known: dict[tuple[str, int], int], stack: str) -> str:
    heads = [n for (name, _), n in known.items() if name == stack]
    return f"{len(heads)} layers of {max(heads, default=0)}"
