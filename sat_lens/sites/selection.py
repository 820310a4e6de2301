"""Which heads, and at which inverse temperature each: the forms people give, read into one."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_lens._checks import is_integer, is_number, shown
from sat_lens.attention.transforms import check_scale
from sat_lens.errors import ArgumentError, HeadSelectionError, UnsupportedModelError
from sat_lens.sites.site import AttentionSite, parse_label

# Called with (layer, head), or with (stack, layer, head)
Predicate = Callable[..., bool]
HeadName = str | tuple[int, int]
Heads = None | HeadName | Sequence[HeadName] | Tensor | Predicate
# path of a site -> its chosen heads, ascending
Selection = dict[str, list[int]]
ScaleLike = float | Tensor | Mapping[Any, float] | Callable[..., float]
# path of a site -> head -> inverse temperature
ScaleOfHead = dict[str, dict[int, float]]

_LAYERS = re.compile(r"(?:(?P<stack>.+)\.)?L(?P<first>[0-9]+)(?:-L(?P<last>[0-9]+))?")


def select_heads(sites: list[AttentionSite], heads: Heads = None) -> Selection:
    """Read a choice of heads into the chosen heads of each site.

    Args:
        sites: The model's attention modules.
        heads: None (all), ``"L5H1"``, ``"5.1"``, ``(5, 1)``, all heads of a layer ``"L5"`` or of
            several ``"L5-L8"``, a list of these, a bool tensor ``[layer, head]``, or a predicate on
            (layer, head). With several stacks a label takes a prefix, ``"encoder.L0H1"`` or
            ``"encoder.L2"``, and a predicate gets (stack, layer, head).

    Raises:
        HeadSelectionError: A head does not exist (the message lists what does), is named twice,
            or nothing is selected, or a predicate takes other arguments.
        UnsupportedModelError: All heads, or one by name, were asked for, and an attention module
            among them cannot be reached at all.

    Example:
        >>> from sat_lens.sites import AttentionSite, select_heads
        >>> sites = [AttentionSite("blocks.0.attn", "", 0, "self", 2, "scores")]
        >>> select_heads(sites, "L0H1")
        {'blocks.0.attn': [1]}
    """
    pairs = _chosen(sites, heads)
    if not pairs:
        raise HeadSelectionError(
            f"No head was selected by {shown(heads)}. Choose at least one of {_available(sites)}."
        )
    counts = Counter((site.path, head) for site, head in pairs)
    ordered = [(s, head) for s in sites for head in range(s.n_heads) if counts[s.path, head]]
    repeated = [site.label(head) for site, head in ordered if counts[site.path, head] > 1]
    if repeated:
        raise HeadSelectionError(f"These heads are named more than once: {', '.join(repeated)}.")
    selection: Selection = {}
    for site, head in ordered:
        selection.setdefault(site.path, []).append(head)
    return selection


def labels_of(sites: list[AttentionSite], selection: Selection) -> list[str]:
    """Return the labels of the selected heads, in the model's order."""
    return [site.label(head) for site in sites for head in selection.get(site.path, [])]


def _chosen(sites: list[AttentionSite], heads: Any) -> list[tuple[AttentionSite, int]]:
    everything = [(site, head) for site in sites for head in range(site.n_heads)]
    if heads is None:
        for site in sites:
            _check_has_heads(site)
        return everything
    if isinstance(heads, Tensor):
        return _from_mask(sites, heads)
    if callable(heads):
        says = _by_place(heads, sites, "heads")
        return [pair for pair in everything if _is_true(says(*pair), pair[0].label(pair[1]))]
    if isinstance(heads, Mapping) or not isinstance(heads, Iterable):
        raise _unreadable(heads)
    names = [heads] if isinstance(heads, str) or _is_pair(heads) else list(heads)
    return [pair for name in names for pair in _named(sites, name)]


def _named(sites: list[AttentionSite], name: Any) -> list[tuple[AttentionSite, int]]:
    layers = _LAYERS.fullmatch(name) if isinstance(name, str) else None
    if layers is not None:
        stack, first = layers["stack"] or "", int(layers["first"])
        last = int(layers["last"] or first)
        # A layer between the two may be of another kind; the two themselves have to be there.
        own = [site for site in sites if site.stack == stack and first <= site.layer <= last]
        if not {first, last} <= {site.layer for site in own}:
            raise _missing(sites, name, stack, "layer")
        for site in own:
            _check_has_heads(site)
        return [(site, head) for site in own for head in range(site.n_heads)]
    stack, layer, head = _parse(name)
    for site in sites:
        if (site.stack, site.layer) == (stack, layer):
            _check_has_heads(site)
            if 0 <= head < site.n_heads:
                return [(site, head)]
    raise _missing(sites, name, stack, "head")


def _missing(sites: list[AttentionSite], name: Any, stack: str, what: str) -> HeadSelectionError:
    hint = ""
    if not stack and all(site.stack for site in sites):
        hint = " This model has several stacks: put the stack's name before the label."
    elif stack and stack not in {site.stack for site in sites}:
        hint = (
            " A part of it that did not run on a few made-up tokens is looked at by "
            "sat_lens.attention_sites(model, *your_inputs)."
        )
    return HeadSelectionError(
        f"There is no {what} {shown(name)} in this model.{hint} It has {_available(sites)}."
    )


def _parse(name: Any) -> tuple[str, int, int]:
    if _is_pair(name):
        return "", int(name[0]), int(name[1])
    parsed = parse_label(name) if isinstance(name, str) else None
    if parsed is None:
        raise _unreadable(name)
    return parsed


def _from_mask(sites: list[AttentionSite], mask: Tensor) -> list[tuple[AttentionSite, int]]:
    if len({site.stack for site in sites}) > 1:
        raise HeadSelectionError(
            "A tensor [layer, head] is ambiguous in a model with several stacks. Use labels "
            f"such as {sites[0].label(0)!r}, or a predicate on (stack, layer, head)."
        )
    if str(mask.dtype) != "torch.bool" or mask.dim() != 2:
        raise HeadSelectionError(
            f"Heads as a tensor need dtype bool and shape [layer, head]; found {mask.dtype} "
            f"{list(mask.shape)}."
        )
    layers, heads = max(s.layer for s in sites) + 1, max(s.n_heads for s in sites)
    if mask.shape[0] < layers or mask.shape[1] < heads:
        raise HeadSelectionError(
            f"Heads as a tensor [layer, head] need an entry for every head, at least "
            f"[{layers}, {heads}]; found {list(mask.shape)}."
        )
    named = (_named(sites, (int(layer), int(head))) for layer, head in mask.nonzero().tolist())
    return [pair for pairs in named for pair in pairs]


def _check_has_heads(site: AttentionSite) -> None:
    if site.n_heads == 0:
        raise UnsupportedModelError(
            f"The attention of {site.path} cannot be reached: {site.why_not}. Choose heads of "
            "other attention modules by name."
        )


def _is_pair(name: Any) -> bool:
    return isinstance(name, tuple) and len(name) == 2 and all(is_integer(part) for part in name)


def _available(sites: list[AttentionSite]) -> str:
    ranges = [f"{s.label(0)} to {s.label(s.n_heads - 1)}" for s in sites if s.n_heads]
    if len(ranges) > 8:
        ranges = [*ranges[:4], "...", *ranges[-3:]]
    return ", ".join(ranges) or "no heads that can be reached"


def _unreadable(heads: Any) -> HeadSelectionError:
    return HeadSelectionError(
        f"Heads are named like 'L5H1', '5.1' or (5, 1), whole layers like 'L5' or 'L5-L8', in "
        "several stacks with a prefix like 'encoder.L2'; as a list of these, a bool tensor "
        f"[layer, head], or a predicate on (layer, head); {shown(heads)} was given."
    )


# Functions of a head, for ``heads`` and for ``scale``.


def _by_place(
    function: Callable[..., Any], sites: list[AttentionSite], argument: str
) -> Callable[[AttentionSite, int], Any]:
    """Turn a function of (layer, head), or of (stack, layer, head), into one of (site, head)."""
    several = len({site.stack for site in sites}) > 1
    form = "(stack, layer, head)" if several else "(layer, head)"
    with_stack = _takes_stack(function, several)
    if with_stack is None or (several and not with_stack):
        raise HeadSelectionError(
            f"{argument} as a function is called with {form} in this model, and {shown(function)} "
            "takes other arguments."
        )

    def call(site: AttentionSite, head: int) -> Any:
        place = (site.stack, site.layer, head) if with_stack else (site.layer, head)
        try:
            return function(*place)
        except (AttributeError, TypeError) as error:
            raise HeadSelectionError(
                f"{argument} as a function is called with {form}, such as {place}; with these "
                f"{shown(function)} failed: {error}."
            ) from error

    return call


def _takes_stack(function: Callable[..., Any], several: bool) -> bool | None:
    """Whether a function takes three arguments; None if it takes neither three nor two."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions show none
        return several
    named = [p for p in signature.parameters.values() if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in named)
    # A default is what a lambda in a loop keeps its own value in.
    with_stack = several if takes_any else len(named) == 3
    try:
        signature.bind(*range(3 if with_stack else 2))
    except TypeError:
        return None
    return with_stack


def _is_true(answer: Any, label: str) -> bool:
    if isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.numel() == 1:
        answer = bool(answer)
    if isinstance(answer, (bool, np.bool_)):
        return bool(answer)
    raise HeadSelectionError(
        f"heads as a function returns True or False; for {label} it returned {shown(answer)}."
    )


# One inverse temperature per head.


def select_with_scales(sites: list[AttentionSite], heads: Heads, scale: ScaleLike) -> ScaleOfHead:
    """Read a choice of heads and their scales into one inverse temperature per chosen head.

    Args:
        sites: The model's attention modules.
        heads: Which heads; None is all, or those that a mapping names.
        scale: A number, a tensor ``[layer, head]`` of the model's size, a mapping from heads to
            numbers, or a callable ``(layer, head) -> number``; ``(stack, layer, head) -> number``
            where the chosen heads are of several stacks.

    Raises:
        HeadSelectionError: A head does not exist, a mapping and the choice of heads disagree, a
            callable takes other arguments, or a tensor is used across several stacks, whose layers
            it cannot tell apart.
        ArgumentError: A scale is negative, NaN, or no number, or a tensor has the wrong shape.

    Example:
        >>> from sat_lens.sites import AttentionSite, select_with_scales
        >>> sites = [AttentionSite("blocks.0.attn", "", 0, "self", 2, "scores")]
        >>> select_with_scales(sites, None, {"L0H1": 3.0})
        {'blocks.0.attn': {1: 3.0}}
    """
    if isinstance(scale, Mapping):
        return _from_mapping(sites, heads, scale)
    selection = select_heads(sites, heads)
    chosen = [site for site in sites if site.path in selection]
    if isinstance(scale, Tensor) and scale.dim() > 0:
        if len({site.stack for site in chosen}) > 1:
            raise HeadSelectionError(
                "Scales by [layer, head] are ambiguous across several stacks. Choose heads of one "
                f"stack, or pass a mapping such as {{{chosen[0].label(0)!r}: 2.0}}."
            )
        _check_shape(sites, chosen[0].stack, scale)
        return _each(chosen, selection, lambda site, head: scale[site.layer, head])
    if callable(scale):
        return _each(chosen, selection, _by_place(scale, chosen, "scale"))
    return _each(chosen, selection, lambda _site, _head: scale)


def _each(
    chosen: list[AttentionSite], selection: Selection, scale: Callable[[AttentionSite, int], Any]
) -> ScaleOfHead:
    return {
        site.path: {h: _number(scale(site, h), site.label(h)) for h in selection[site.path]}
        for site in chosen
    }


def _from_mapping(
    sites: list[AttentionSite], heads: Heads, scale: Mapping[Any, float]
) -> ScaleOfHead:
    named = select_heads(sites, list(scale))
    given: ScaleOfHead = {}
    for name, c in scale.items():
        for site, head in _named(sites, name):
            given.setdefault(site.path, {})[head] = _number(c, site.label(head))
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


def _check_shape(sites: list[AttentionSite], stack: str, scale: Tensor) -> None:
    own = [site for site in sites if site.stack == stack]
    needed = [max(site.layer for site in own) + 1, max(site.n_heads for site in own)]
    if list(scale.shape) != needed:
        raise ArgumentError(
            f"Scales as a tensor need shape [layer, head] = {needed}; found {list(scale.shape)}."
        )
