"""One attention module of a model: its place, the labels of its heads, the order of its axes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from einops import EinopsError, rearrange
from jaxtyping import Float
from torch import Tensor

from sat_lens.errors import UnsupportedModelError

Level = Literal["scores", "softmax", "kernel"]
Kind = Literal["self", "cross"]
# Numbers of heads as [layer, head, ...], NaN where none is known; by stack where there are several.
Grid = Tensor | dict[str, Tensor]

_LABEL = re.compile(r"(?:(?P<stack>.+)\.)?L(?P<layer>[0-9]+)H(?P<head>[0-9]+)")
_DOTTED = re.compile(r"(?P<stack>)(?P<layer>[0-9]+)\.(?P<head>[0-9]+)")


def head_label(stack: str, layer: int, head: int) -> str:
    """Name a head as every table, figure and argument of this library does."""
    return f"{stack}.L{layer}H{head}" if stack else f"L{layer}H{head}"


def parse_label(label: str) -> tuple[str, int, int] | None:
    """Read stack, layer and head off a label, ``"L5H1"`` or ``"5.1"``; None if it is neither."""
    match = _LABEL.fullmatch(label) or _DOTTED.fullmatch(label)
    return match and (match["stack"] or "", int(match["layer"]), int(match["head"]))


def head_grid(
    labels: Sequence[str],
    values: Float[Tensor, "head *rest"],
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> Grid:
    """Arrange numbers of heads as ``[layer, head, ...]``, NaN elsewhere.

    Args:
        labels: The labels of the heads.
        values: Their numbers, ``[head, ...]``.
        shapes: The numbers of layers and of heads in each stack of the model. None takes the stacks
            that the labels name, as far as their last layer and head.

    Returns:
        A tensor, or a dict of these by stack where there are several.

    Example:
        >>> import torch
        >>> from sat_lens.sites.site import head_grid
        >>> head_grid(["L0H1", "L1H0"], torch.tensor([1.0, 2.0]))
        tensor([[nan, 1.],
                [2., nan]])
    """
    rows: dict[str, list[int]] = {}
    read = [parse_label(label) or ("", 0, 0) for label in labels]
    for row, (stack, _, _) in enumerate(read):
        rows.setdefault(stack, []).append(row)
    grids: dict[str, Tensor] = {}
    for stack, of_stack in rows.items():
        layers, heads = (torch.tensor([read[row][axis] for row in of_stack]) for axis in (1, 2))
        size = shapes[stack] if shapes else (int(layers.max()) + 1, int(heads.max()) + 1)
        empty = values.new_full((*size, *values.shape[1:]), math.nan)
        grids[stack] = empty.index_put((layers, heads), values[of_stack])
    return grids if len(shapes or grids) > 1 else next(iter(grids.values()))


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model and how it can be touched.

    Attributes:
        path: Name of the module inside the model, such as ``blocks.5.attn``.
        stack: ``""`` for the one stack of a decoder or an encoder; ``"encoder"``, ``"decoder"``
            or ``"cross"`` where there are several.
        layer: The model's own block index.
        kind: ``"self"`` or ``"cross"``.
        n_heads: Number of query heads; 0 where none could be reached.
        level: ``"scores"``, ``"softmax"`` or ``"kernel"``, found by running the model; None where
            none of them works.
        layout: The order of axes in which its softmax keeps the heads.
        why_not: For a level of None, the reason, and what to do about it; for ``"kernel"``, why
            only the eager path can serve, if so.
        in_pieces: Whether one run has several softmaxes, each for a part of the positions, as in
            towers that pack images of any size into one sequence.
        pattern_is_true: Whether its pattern's hook shows all that the softmax gave, and edits act.
        discarded: Names of hook points whose edits this module throws away.
        dropout: Whether anything in the model was dropped out at random when it was looked at.
        runs_in: For ``"kernel"``, the device and dtype of the queries that its fused attention
            got. Those of its weights may be others, where these are offloaded or quantised.
    """

    path: str
    stack: str
    layer: int
    kind: Kind
    n_heads: int
    level: Level | None
    layout: str = "b h q k"
    why_not: str = ""
    in_pieces: bool = False
    pattern_is_true: bool = False
    discarded: frozenset[str] = frozenset()
    dropout: bool = False
    runs_in: tuple[torch.device, torch.dtype] | None = None

    def label(self, head: int) -> str:
        """Return the label of a head."""
        return head_label(self.stack, self.layer, head)

    @property
    def labels(self) -> list[str]:
        """The labels of all heads of this module."""
        return [self.label(head) for head in range(self.n_heads)]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an attention module stands, read off its name alone."""

    path: str
    stack: str
    layer: int
    kind: Kind


_STACKS = {
    "blocks": "",
    "encoder_blocks": "encoder",
    "encoder": "encoder",
    "decoder_blocks": "decoder",
    "decoder": "decoder",
}


def places(paths: list[str]) -> list[Place]:
    """Read stack, layer and kind off the names of attention modules.

    For example, the stack of ``decoder_blocks.0.cross_attn`` is ``cross``, and its layer 0.
    """
    seen: dict[tuple[str, int], str] = {}
    distinct = []
    for place in map(_place, paths):
        if seen.setdefault((place.stack, place.layer), place.path) != place.path:
            # Two attention modules in one block: the second is named by its own module name.
            stack = ".".join(filter(None, [place.stack, place.path.rsplit(".", 1)[-1]]))
            place = dataclasses.replace(place, stack=stack)
        if seen.setdefault((place.stack, place.layer), place.path) != place.path:
            place = dataclasses.replace(place, stack=place.path)
        distinct.append(place)
    return distinct


def _place(path: str) -> Place:
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if index is None:
        return Place(path, path, 0, "self")
    before, after = ".".join(parts[:index]), ".".join(parts[index + 1 :])
    kind: Kind = "cross" if "cross" in after else "self"
    stack = "cross" if kind == "cross" else _STACKS.get(before, before)
    return Place(path, stack, int(parts[index]), kind)


def plain_place(path: str, kind: Kind) -> Place:
    """Read the place of a plain Hugging Face module off its name."""
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    layer = int(parts[index]) if index < len(parts) else 0
    known = [part for part in parts if part in ("encoder", "decoder")]
    own_stack = known[-1] if known else ".".join(parts[:index])
    return Place(path, "cross" if kind == "cross" else own_stack, layer, kind)


# Orders of axes in which models keep their scores -> the order that edits see. Batch and head may
# be packed into one axis (XGLM), queries may be cut into blocks (LongT5) or stand before the heads
# (LED), and heads may stand in groups that share a key.
_LAYOUTS = {
    "b h q k": "b h q k",
    "b q h k": "b h q k",
    "(b h) q k": "b h q k",
    "b block h q k": "(b block) h q k",
    "b group h q k": "b (group h) q k",
}


def layout_of(shape: Sequence[int], hint: int | None) -> str | None:
    """Return the order of axes in which a softmax keeps its heads, or None if that is not clear.

    ``shape`` is that of the tensor that softmax received, ``hint`` the number of heads that the
    configuration claims; four axes can do without.
    """
    if len(shape) == 4:
        # A tower may have other numbers of heads than the configuration claims for the text.
        is_square = shape[2] == shape[3]
        return "b q h k" if shape[1] != hint == shape[2] and not is_square else "b h q k"
    if not hint:
        return None
    if len(shape) == 3 and shape[0] % hint == 0:
        return "(b h) q k"
    if len(shape) == 5 and shape[2] == hint:
        return "b block h q k"
    if len(shape) == 5 and shape[1] * shape[2] == hint:
        return "b group h q k"
    return None


def heads_in(shape: Sequence[int], layout: str, hint: int | None) -> int:
    """Return the number of heads in a softmax of that shape and layout."""
    return shape[layout.split().index("h")] if len(shape) == 4 else hint or 0


def as_heads(scores: Tensor, layout: str, n_heads: int) -> Float[Tensor, "batch head query key"]:
    """View what a softmax received as ``[batch, head, query, key]``.

    Raises:
        UnsupportedModelError: The tensor does not have that layout.
    """
    sizes = _sizes(layout, scores, n_heads)
    try:
        heads = rearrange(scores, f"{layout} -> {_LAYOUTS[layout]}", **sizes)
    except EinopsError:
        heads = None
    if heads is None or heads.shape[1] != n_heads:
        raise UnsupportedModelError(
            f"Needed attention scores of {n_heads} heads with the axes {layout!r}, found a softmax "
            f"over a tensor of shape {list(scores.shape)}. If the model has changed, call "
            "sat_lens.attention_sites(model, *your_inputs) to look at it again."
        )
    return heads


def from_heads(heads: Float[Tensor, "batch head query key"], layout: str, like: Tensor) -> Tensor:
    """Undo :func:`as_heads`: give ``heads`` the layout and shape of ``like``."""
    sizes = _sizes(layout, like, heads.shape[1])
    return rearrange(heads, f"{_LAYOUTS[layout]} -> {layout}", **sizes)


def _sizes(layout: str, scores: Tensor, n_heads: int) -> dict[str, int]:
    if layout == "(b h) q k":
        return {"h": n_heads}
    packed = next((axis for axis in ("block", "group") if axis in layout), None)
    return {packed: scores.shape[1]} if packed else {}
