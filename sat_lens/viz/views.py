"""Views for notebooks: each displays itself, and saves itself as a page.

A view is a page of its own, in a frame of fixed height, so a notebook can neither shrink it nor
disturb it. Frames with patterns carry circuitsvis (1.3 MB), because frames cannot share it.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens import figures
from sat_lens._checks import check_count
from sat_lens.caching import SaturationPair
from sat_lens.errors import ArgumentError
from sat_lens.figures.drawing import figure_format
from sat_lens.results import write_whole
from sat_lens.roles.result import HeadRoles
from sat_lens.sites.selection import Heads, select_heads
from sat_lens.viz.page import inline_svg, render
from sat_lens.viz.patterns import (
    Patterns,
    Tokens,
    check_roles,
    inert,
    packed,
    patterns_of,
    scale_of,
)
from sat_lens.vocabulary import CAUTION, clarity, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_HEADS = 8


@dataclasses.dataclass(frozen=True)
class View:
    """A view that displays itself in a notebook.

    Example:
        >>> from sat_lens.viz import View
        >>> View("A title", "<!doctype html><p>text</p>", 100)._repr_html_()[:7]
        '<iframe'
    """

    title: str
    page: str = dataclasses.field(repr=False)
    height: int

    def save_html(self, path: str | Path) -> Path:
        """Write the view as one HTML file that opens without a network."""
        write_whole(path, self.page.encode())
        return Path(path)

    def _repr_html_(self) -> str:
        title, source = html.escape(visible(self.title)), html.escape(self.page)
        return (
            f'<iframe title="{title}" srcdoc="{source}" width="100%" height="{self.height}" '
            f'style="border:0;min-height:{self.height}px" sandbox="allow-scripts"></iframe>'
        )


@dataclasses.dataclass(frozen=True)
class FigureView(View):
    """A view of a matplotlib figure, which ``save`` also writes for a paper."""

    figure: Figure = dataclasses.field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the figure as PNG, SVG or PDF, by the ending of the path.

        Raises:
            ArgumentError: The path ends otherwise.
        """
        written = figures.figure_bytes(self.figure, figure_format(Path(path)))
        write_whole(path, written)
        return Path(path)


def role_map(roles: HeadRoles, title: str | None = None) -> FigureView:
    """Show the head-role map.

    Args:
        roles: The roles of all heads.
        title: A title; None says what was measured on what.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.viz import role_map
        >>> model = sl.load_model("demo")
        >>> roles = sl.head_roles(model, ["import os, sys, re, json, time"], progress=False)
        >>> role_map(roles).save_html("roles.html")  # doctest: +SKIP
    """
    check_roles(roles)
    name = title or f"Head roles: {roles.provenance}"
    figure = roles.plot(name)
    page = render(
        "view.html",
        styles=["base.css", "view.css"],
        scripts=[],
        title=name,
        drawing=inline_svg(figure, name),
    )
    return FigureView(name, page, int(figure.get_size_inches()[1] * 96) + 40, figure)


def attention(
    pair: SaturationPair,
    heads: Heads = None,
    *,
    tokens: Tokens | None = None,
    roles: HeadRoles | None = None,
) -> View:
    """Show soft attention beside saturated attention, through circuitsvis.

    Cross-attention, whose queries and keys are different texts, is drawn as a rectangle.

    Args:
        pair: Both runs of one text, with their patterns in the caches.
        heads: Which heads; None is the clearest ones, at most 8, or without roles the first.
        tokens: What stands at each position, see :func:`sat_lens.viz.token_strings`; with several
            stacks a dict ``{"encoder": [...], "decoder": [...]}``; None numbers the positions.
        roles: Roles to name the heads by.

    Raises:
        ArgumentError: The caches hold no pattern or more than one text, or the tokens do not fit.
        HeadSelectionError: There is no such head.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.viz import attention
        >>> model = sl.load_model("demo")
        >>> pair = sl.run_with_saturation_cache(model, "def f(x): return x")
        >>> attention(pair, ["L1H0", "L1H1"]).title
        'Attention, soft and saturated: L1H0, L1H1'
    """
    if roles is not None:
        check_roles(roles)
    found = patterns_of(pair)
    frame = pd.DataFrame() if roles is None else roles.frame()
    chosen = _default_heads(found, frame) if heads is None else heads
    selection = select_heads([p.site for p in found], chosen)
    texts: list[list[str]] = []
    # A group shares its axes: heads of one stack, of one shape.
    groups: dict[tuple[object, ...], dict[str, Any]] = {_kind(p): {"names": []} for p in found}
    for patterns in found:
        if patterns.site.path in selection:
            heads_here = selection[patterns.site.path]
            group = groups[_kind(patterns)]
            group["names"] += [_named(patterns.site.label(head), frame) for head in heads_here]
            for name, value in packed(patterns, heads_here, tokens, texts).items():
                group[name] = group.get(name, []) + value if isinstance(value, list) else value
    drawn = [group for group in groups.values() if group["names"]]
    limit = f"c = {scale_of(pair)}, ties {pair.provenance.ties}"
    data = {"groups": drawn, "texts": texts, "limit": limit}
    labels = [name.split()[0] for group in drawn for name in group["names"]]
    title = f"Attention, soft and saturated: {', '.join(labels)}"
    note = "Rows are queries, columns keys. Soft patterns are kept in steps of 1/255."
    note = note if roles is None else f"{note} {CAUTION}"
    return _component_view(title, note, data, height=860 * len(drawn))


def tokens(
    tokens: Sequence[str],
    values: Float[Tensor, " position"] | Float[Tensor, "position layer head"],
    title: str = "Values by token",
) -> View:
    """Show a number for every token, by colour; for all heads with a choice of layer and head.

    Args:
        tokens: One text per position.
        values: ``[position]``, or ``[position, layer, head]``; NaN shows as 0.
        title: What the numbers are.

    Raises:
        ArgumentError: The shapes do not fit.

    Example:
        >>> import torch
        >>> from sat_lens.viz import tokens
        >>> tokens(["a", "b"], torch.tensor([0.2, -0.4])).height
        180
    """
    clean = _checked(tokens, values, (1, 3))
    props: dict[str, Any] = {"tokens": inert(tokens)}
    if clean.dim() == 1:
        component, height = "ColoredTokens", 180
        props["values"] = clean.tolist()
    else:
        component, height = "TextNeuronActivations", 300
        props["activations"] = clean.tolist()
        props |= {"firstDimensionName": "Layer", "secondDimensionName": "Head"}
    return _component_view(title, "", {"component": component, "props": props}, height=height)


def top_tokens(
    tokens: Sequence[str],
    values: Float[Tensor, "position layer head"],
    title: str = "Tokens with the largest and smallest values",
    *,
    k: int = 10,
) -> View:
    """Show the tokens with the largest and the smallest values, head by head.

    Args:
        tokens: One text per position.
        values: A number for every position, layer and head, coloured on a scale from 0 to 1; NaN
            counts as 0.
        title: What the numbers are.
        k: How many tokens at each end.

    Raises:
        ArgumentError: The shapes do not fit.

    Example:
        >>> import torch
        >>> from sat_lens.viz import top_tokens
        >>> top_tokens(["a", "b"], torch.rand(2, 1, 3)).title
        'Tokens with the largest and smallest values'
    """
    by_layer = _checked(tokens, values, (3,)).permute(1, 0, 2)
    check_count("k, the number of tokens at each end,", k)
    count = min(k, len(tokens))
    top = by_layer.topk(count, dim=1)
    bottom = by_layer.topk(count, dim=1, largest=False)
    # Given a single text, circuitsvis shows a single head; given it twice, it shows all of them.
    props = {
        "tokens": [inert(tokens)] * 2,
        "topkVals": [top.values.tolist()] * 2,
        "topkIdxs": [top.indices.tolist()] * 2,
        "bottomkVals": [bottom.values.flip(1).tolist()] * 2,
        "bottomkIdxs": [bottom.indices.flip(1).tolist()] * 2,
        "firstDimensionName": "Layer",
        "thirdDimensionName": "Head",
    }
    height = 240 + 52 * count
    return _component_view(title, "", {"component": "TopkTokens", "props": props}, height=height)


def row_changes(pair: SaturationPair, stack: str = "") -> Float[Tensor, "position layer head"]:
    """Measure how far saturating moves each row of attention, for ``tokens`` and ``top_tokens``.

    The value is the total variation between the soft and the saturated row, in [0, 1]; NaN where a
    layer has no such head.

    Args:
        pair: Both runs of one text.
        stack: Which stack, where the model has several.

    Raises:
        ArgumentError: The pair has no patterns of that stack.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.viz import row_changes
        >>> model = sl.load_model("demo")
        >>> list(row_changes(sl.run_with_saturation_cache(model, "import os"))[0].shape)
        [4, 8]
    """
    found = [p for p in patterns_of(pair) if p.site.stack == stack]
    if not found:
        stacks = sorted({p.site.stack for p in patterns_of(pair)})
        raise ArgumentError(f"Needed a stack of the pair, one of {stacks}; found {stack!r}.")
    layers = max(p.site.layer for p in found) + 1
    heads = max(p.site.n_heads for p in found)
    values = torch.full((found[0].soft.shape[1], layers, heads), float("nan"))
    for p in found:
        change = (p.soft - p.saturated).abs().sum(-1) / 2
        values[:, p.site.layer, : p.site.n_heads] = change.T
    return values


def _checked(tokens: Sequence[str], values: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    shapes = {1: "[position]", 3: "[position, layer, head]"}
    needed = " or ".join(shapes[d] for d in dimensions)
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        found = f"{type(tokens).__name__} in place of tokens"
    elif not isinstance(values, Tensor):
        found = f"{type(values).__name__} in place of values"
    elif values.dim() not in dimensions or len(tokens) != len(values) or not values.numel():
        found = f"{len(tokens)} tokens and values of shape {list(values.shape)}"
    else:
        return values.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    raise ArgumentError(
        f"Needed a list of tokens and a tensor of values of shape {needed}; found {found}."
    )


def _default_heads(found: list[Patterns], frame: pd.DataFrame) -> list[str]:
    labels = [label for patterns in found for label in patterns.site.labels]
    if not frame.empty:
        known = [label for label in labels if label in frame.index]
        shares = frame["agreement"].to_dict()
        labels = sorted(known, key=lambda label: -clarity({"agreement": shares[label]}))
    return labels[:MOST_HEADS]


def _named(label: str, frame: pd.DataFrame) -> str:
    """Return a head's label, with its role and target where they are known."""
    words = frame.loc[label, ["role", "target"]] if label in frame.index else ()
    return " ".join(filter(None, [label, *words]))


def _kind(patterns: Patterns) -> tuple[str, int, int, bool]:
    queries, keys = patterns.soft.shape[-2:]
    return patterns.site.stack, queries, keys, patterns.causal


def _component_view(title: str, note: str, data: dict[str, Any], *, height: int) -> View:
    """Show circuitsvis components, described by ``data`` as the view's script reads it."""
    page = render(
        "view.html",
        styles=["base.css", "patterns.css", "view.css"],
        scripts=["patterns.js", "heads.js", "view.js"],
        title=title,
        note=note,
        drawing="",
        data=data,
    )
    return View(title, page, height)
