"""Reading and refusing the arguments of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sat_lens._checks import check_count, check_number, check_share, is_integer
from sat_lens.attention import Limit, Scale, Transform
from sat_lens.data import Batch, Data, batches
from sat_lens.errors import ArgumentError, DataError
from sat_lens.models import model_name
from sat_lens.patching.items import Item
from sat_lens.results import Provenance
from sat_lens.sites import AttentionSite


def read_batch(model: Any, inputs: Data | Mapping[str, Any], name: str) -> Batch:
    """Read what is to be run as one batch.

    Raises:
        DataError: It is empty, or more than one batch.
    """
    data: Any = [inputs] if isinstance(inputs, Mapping) else inputs
    if isinstance(data, Tensor) and data.numel() == 0:
        raise DataError(f"{name} holds nothing: its shape is {list(data.shape)}.")
    size = len(data) if isinstance(data, (list, tuple, Tensor)) else 1
    found = list(batches(model, data, batch_size=max(size, 1)))
    if len(found) != 1:
        raise DataError(
            f"A sweep runs on one batch of prompts, and {name} holds {len(found)}. Put them into "
            "one tensor or dict, or sweep one after the other."
        )
    return found[0]


def check_draws(controls: object, seed: object) -> None:
    """Raise an ArgumentError unless ``controls`` is a count and ``seed`` an integer."""
    check_count("controls", controls)
    if not is_integer(seed):
        raise ArgumentError(f"seed is an integer; {seed!r} was given.")


def check_combination(
    source: str, component: str, method: str, transform: object, confirm: float
) -> None:
    """Raise an ArgumentError for arguments that do not go together."""
    if source == "local" and component not in ("z", "pattern"):
        raise ArgumentError(
            f'With source="local" the pattern of a head is changed in place, and its {component} '
            f'is as it was. Use source="run" to patch {component}.'
        )
    if method != "exact" and source == "run" and component != "z":
        raise ArgumentError(
            f'method={method!r} estimates the effect of z; use component="z", or method="exact".'
        )
    if transform is not None and not callable(transform):
        raise ArgumentError(
            f"A transform is a function from scores to scores, and {transform!r} was given."
        )
    check_share("confirm", confirm)


def check_same_shape(batch: Batch, other: Batch | None) -> None:
    """Raise an ArgumentError unless two batches can exchange activations."""
    if other is None:
        return
    mine, theirs = ({"input": b.inputs, **b.kwargs} for b in (batch, other))
    for name in mine.keys() & theirs.keys():
        first, second = (getattr(given[name], "shape", None) for given in (mine, theirs))
        if first != second:
            raise ArgumentError(
                "Clean and corrupted prompts must have the same shape, because activations are "
                f"exchanged position by position; found {name} of {_listed(first)} and "
                f"{_listed(second)}. Choose prompts with as many tokens, or pad both."
            )


def _listed(shape: Any) -> str:
    return "another kind" if shape is None else str(list(shape))


def provenance_of(model: Any, transform: Transform) -> Provenance:
    """Return which model was put through which transform."""
    name = model_name(model)
    if isinstance(transform, Limit):
        return Provenance(name, scale="inf", ties=str(transform.ties))
    return Provenance(
        name, scale=f"{transform.c:g}" if isinstance(transform, Scale) else name_of(transform)
    )


def name_of(transform: Transform) -> str:
    """Return the name of a transform: of a function its own, which is the same in every session.

    Example:
        >>> from sat_lens.patching.arguments import name_of
        >>> from sat_lens.attention import Scale
        >>> def flat(scores):
        ...     return 0 * scores
        >>> name_of(Scale(3.0)), name_of(flat)
        ('Scale(c=3.0)', 'flat')
    """
    return str(getattr(transform, "__name__", None) or repr(transform))


def heads_argument(items: list[Item]) -> list[Any] | dict[str, list[str]]:
    """Return the ``heads`` that these items were read from, in a form that a file can hold."""
    if not items[0].is_group:
        return [item.label for item in items]
    return {item.label: list(item.heads) for item in items}


def shapes_of(sites: list[AttentionSite]) -> dict[str, tuple[int, int]]:
    """Return the size of the grid ``[layer, head]`` of each stack."""
    stacks = dict.fromkeys(site.stack for site in sites)
    return {
        stack: (
            max(s.layer for s in sites if s.stack == stack) + 1,
            max(s.n_heads for s in sites if s.stack == stack),
        )
        for stack in stacks
    }


def check_tolerance(tolerance: float, candidates: int | None) -> None:
    """Raise an ArgumentError unless a search can be made with these."""
    check_number("tolerance, in the metric's units,", tolerance, at_least=0)
    if candidates is not None:
        check_count("candidates", candidates)
