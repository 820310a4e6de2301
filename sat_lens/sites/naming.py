"""Attention modules by name: stacks, layers, kinds, and the labels of heads."""

from __future__ import annotations

import dataclasses
from typing import Literal

Level = Literal["scores", "softmax", "kernel"]


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
    """

    path: str
    stack: str
    layer: int
    kind: Literal["self", "cross"]
    n_heads: int
    level: Level | None
    layout: str = "b h q k"
    why_not: str = ""
    in_pieces: bool = False
    pattern_is_true: bool = False
    discarded: frozenset[str] = frozenset()
    dropout: bool = False

    def label(self, head: int) -> str:
        """Name a head the way every table, figure and argument of this library does.

        Example:
            >>> AttentionSite("blocks.5.attn", "", 5, "self", 12, "scores").label(1)
            'L5H1'
        """
        prefix = f"{self.stack}." if self.stack else ""
        return f"{prefix}L{self.layer}H{head}"

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
    kind: Literal["self", "cross"]


_STACKS = {
    "blocks": "",
    "encoder_blocks": "encoder",
    "encoder": "encoder",
    "decoder_blocks": "decoder",
    "decoder": "decoder",
}


def places(paths: list[str]) -> list[Place]:
    """Read stack, layer and kind off the names of attention modules.

    Example:
        >>> [(p.stack, p.layer) for p in places(["decoder_blocks.0.self_attn",
        ...                                      "decoder_blocks.0.cross_attn"])]
        [('decoder', 0), ('cross', 0)]
    """
    found = [_place(path) for path in paths]
    seen: dict[tuple[str, int], str] = {}
    distinct = []
    for place in found:
        if seen.setdefault((place.stack, place.layer), place.path) != place.path:
            # Two attention modules in one block: the second is named by its own module name.
            stack = ".".join(filter(None, [place.stack, place.path.rsplit(".", 1)[-1]]))
            place = dataclasses.replace(place, stack=stack)
        if seen.setdefault((place.stack, place.layer), place.path) != place.path:
            place = dataclasses.replace(place, stack=place.path)
        distinct.append(place)
    return distinct


def stack_in(path: str) -> str:
    """Find the stack in the name of a Hugging Face module.

    Example:
        >>> stack_in("model.decoder.layers.0.self_attn"), stack_in("model.layers.0.self_attn")
        ('decoder', 'model.layers')
    """
    parts = path.split(".")
    known = [part for part in parts if part in ("encoder", "decoder")]
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return known[-1] if known else ".".join(parts[:index])


def _place(path: str) -> Place:
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if index is None:
        return Place(path, path, 0, "self")
    before, after = ".".join(parts[:index]), ".".join(parts[index + 1 :])
    kind: Literal["self", "cross"] = "cross" if "cross" in after else "self"
    stack = "cross" if kind == "cross" else _STACKS.get(before, before)
    return Place(path, stack, int(parts[index]), kind)
