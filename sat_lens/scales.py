"""One inverse temperature per head, from the forms in which people give them.

When not to use it: for one number for all heads; every function takes that as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sat_lens._checks import is_number
from sat_lens.attention.transforms import check_scale
from sat_lens.errors import ArgumentError, HeadSelectionError
from sat_lens.sites import AttentionSite, Heads, Selection, labels_of, select_heads

ScaleLike = float | Tensor | Mapping[Any, float] | Callable[[int, int], float]
# path of a site -> head -> inverse temperature
ScaleOfHead = dict[str, dict[int, float]]


def select_with_scales(sites: list[AttentionSite], heads: Heads, scale: ScaleLike) -> ScaleOfHead:
    """Read a choice of heads and their scales into one number per chosen head.

    Args:
        sites: The model's attention modules.
        heads: Which heads; None is all, or those that a mapping names.
        scale: A number, a tensor ``[layer, head]`` of the model's size, a mapping from heads to
            numbers, or a callable ``(layer, head) -> number``.

    Raises:
        HeadSelectionError: A head does not exist, a mapping and the choice of heads disagree, or a
            tensor or callable is used across several stacks, whose layers it cannot tell apart.
        ArgumentError: A scale is negative, NaN, or no number, or a tensor has the wrong shape.

    Example:
        >>> from sat_lens.scales import select_with_scales
        >>> from sat_lens.sites import AttentionSite
        >>> sites = [AttentionSite("blocks.0.attn", "", 0, "self", 2, "scores")]
        >>> select_with_scales(sites, None, {"L0H1": 3.0})
        {'blocks.0.attn': {1: 3.0}}
    """
    if isinstance(scale, Mapping):
        return _from_mapping(sites, heads, scale)
    selection = select_heads(sites, heads)
    chosen = [site for site in sites if site.path in selection]
    if isinstance(scale, Tensor) and scale.dim() > 0:
        _check_one_stack(chosen)
        _check_shape(sites, chosen[0].stack, scale)
        return _each(chosen, selection, lambda site, head: scale[site.layer, head])
    if callable(scale):
        _check_one_stack(chosen)
        _check_takes_two(scale)
        return _each(chosen, selection, lambda site, head: scale(site.layer, head))
    return _each(chosen, selection, lambda _site, _head: scale)


def _each(
    chosen: list[AttentionSite], selection: Selection, scale: Callable[[AttentionSite, int], Any]
) -> ScaleOfHead:
    return {
        site.path: {
            head: _number(scale(site, head), site.label(head)) for head in selection[site.path]
        }
        for site in chosen
    }


def _from_mapping(
    sites: list[AttentionSite], heads: Heads, scale: Mapping[Any, float]
) -> ScaleOfHead:
    named = select_heads(sites, list(scale))
    given: ScaleOfHead = {}
    for name, c in scale.items():
        ((path, (head,)),) = select_heads(sites, [name]).items()
        site = next(site for site in sites if site.path == path)
        given.setdefault(path, {})[head] = _number(c, site.label(head))
    wanted = named if heads is None else select_heads(sites, heads)
    missing = set(labels_of(sites, wanted)) ^ set(labels_of(sites, named))
    if missing:
        raise HeadSelectionError(
            "A mapping of scales must name the chosen heads and no others; the two differ in "
            f"{', '.join(sorted(missing))}. Leave heads out to take those of the mapping."
        )
    return given


def _number(c: Any, label: str) -> float:
    if isinstance(c, Tensor) and c.numel() == 1:
        c = c.item()
    if not is_number(c):
        raise ArgumentError(
            "scale must be a number >= 0, math.inf, a tensor [layer, head], a mapping from heads "
            f"to numbers, or a callable (layer, head) -> number; for {label}, {c!r} was given."
        )
    check_scale(float(c))
    return float(c)


def _check_one_stack(chosen: list[AttentionSite]) -> None:
    if len({site.stack for site in chosen}) > 1:
        raise HeadSelectionError(
            "Scales by (layer, head) are ambiguous across several stacks. Choose heads of one "
            f"stack, or pass a mapping such as {{{chosen[0].label(0)!r}: 2.0}}."
        )


def _check_takes_two(scale: Callable[[int, int], float]) -> None:
    try:
        signature = inspect.signature(scale)
    except ValueError:  # some built-in functions show none
        return
    try:
        signature.bind(0, 0)
    except TypeError as error:
        raise ArgumentError(
            f"scale as a function is called with (layer, head), and {scale!r} does not take two "
            "arguments."
        ) from error


def _check_shape(sites: list[AttentionSite], stack: str, scale: Tensor) -> None:
    own = [site for site in sites if site.stack == stack]
    needed = [max(site.layer for site in own) + 1, max(site.n_heads for site in own)]
    if list(scale.shape) != needed:
        raise ArgumentError(
            f"Scales as a tensor need shape [layer, head] = {needed}; found {list(scale.shape)}."
        )
