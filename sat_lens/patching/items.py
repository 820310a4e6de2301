"""What a sweep goes over: heads or groups of heads, as a whole or at single query positions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from sat_lens._checks import is_integer
from sat_lens.errors import ArgumentError, HeadSelectionError
from sat_lens.sites import AttentionSite, Heads, Selection, labels_of, select_heads

HeadGroups = Sequence[Sequence[Any]] | Mapping[str, Heads]
PatchedPositions = None | Literal["each"] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that is patched at once: a head, or a group of heads.

    Attributes:
        label: The head's label, or the group's name.
        heads: The labels of its heads.
        selection: The chosen heads by path of their attention module.
        stack: The head's stack; ``""`` for groups.
        layer: The head's layer; -1 for groups.
        head: The head's index; -1 for groups.
    """

    label: str
    heads: tuple[str, ...]
    selection: Selection
    stack: str = ""
    layer: int = -1
    head: int = -1

    @property
    def is_group(self) -> bool:
        """Whether this is a group and not a single head."""
        return self.layer < 0


def read_items(sites: list[AttentionSite], heads: Heads | HeadGroups) -> list[Item]:
    """Read a choice of heads, or of groups of heads, into items.

    Args:
        sites: The model's attention modules.
        heads: What :func:`sat_lens.saturate` takes, for single heads; a list of lists, or a
            mapping from names to choices of heads, for groups.

    Raises:
        HeadSelectionError: A head does not exist or repeats, a group is empty or repeats, or
            nothing is selected.

    Example:
        >>> sites = [AttentionSite("blocks.0.attn", "", 0, "self", 4, "scores")]
        >>> [item.label for item in read_items(sites, ["L0H1", "L0H2"])]
        ['L0H1', 'L0H2']
        >>> [item.label for item in read_items(sites, [["L0H1", "L0H2"]])]
        ['L0H1+L0H2']
    """
    groups = _as_groups(heads)
    if groups is None:
        return _single_heads(sites, select_heads(sites, cast("Heads", heads)))
    items = [_group(sites, name, members) for name, members in groups]
    counts = Counter(item.label for item in items)
    repeated = [label for label, count in counts.items() if count > 1]
    if repeated:
        raise HeadSelectionError(f"These groups are given more than once: {', '.join(repeated)}.")
    return items


# An item and the position at which it is patched; None is all positions.
Spot = tuple[Item, int | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One value of a sweep: of an item at one query position, or at all for None.

    ``index`` is the place of the value in a table: (item,) or (item, position).
    """

    item: Item
    position: int | None
    index: tuple[int, ...]

    @property
    def spot(self) -> Spot:
        """What is patched, and where."""
        return self.item, self.position


def entries_of(
    items: list[Item], positions: PatchedPositions, lengths: Mapping[str, int]
) -> tuple[list[Entry], tuple[int, ...]]:
    """List what is to be computed, and the shape of its table: (items,) or (items, positions).

    Args:
        items: The heads or groups.
        positions: At which positions, each by itself; None is all at once.
        lengths: How many positions each attention module has, by path.

    Raises:
        ArgumentError: A position lies outside, or a group's modules differ in length.
    """
    if positions is None:
        return [Entry(item, None, (i,)) for i, item in enumerate(items)], (len(items),)
    entries: list[Entry] = []
    n_positions = 0
    for i, item in enumerate(items):
        found = {lengths[path] for path in item.selection}
        if len(found) > 1:
            raise ArgumentError(
                f"The heads of {item.label} sit in sequences of {min(found)} to {max(found)} "
                "positions, so that a position means another token in each. Use positions=None, or "
                "groups within one stack."
            )
        resolved = resolve_positions(positions, found.pop())
        n_positions = max(n_positions, len(resolved))
        entries += [Entry(item, position, (i, j)) for j, position in enumerate(resolved)]
    return entries, (len(items), n_positions)


def check_positions(positions: PatchedPositions) -> None:
    """Raise an ArgumentError unless ``positions`` is None, "each" or a sequence of integers."""
    if positions is None or (isinstance(positions, str) and positions == "each"):
        return
    if isinstance(positions, str) or not isinstance(positions, Sequence) or not len(positions):
        found = repr(positions)
    elif not all(is_integer(p) for p in positions):
        found = repr(list(positions))
    elif len(set(positions)) != len(positions):
        found = f"{list(positions)}, in which one repeats"
    else:
        return
    raise ArgumentError(
        'positions must be None (all query positions at once), "each" (every one by itself) or a '
        f"list of integers, each of them by itself; {found} was given."
    )


def resolve_positions(positions: Literal["each"] | Sequence[int], length: int) -> list[int]:
    """Count positions in one attention module's sequence from its start.

    Raises:
        ArgumentError: A position lies outside of the sequence, or is named twice.

    Example:
        >>> resolve_positions([-1, 0], 5), resolve_positions("each", 3)
        ([4, 0], [0, 1, 2])
    """
    if isinstance(positions, str):
        return list(range(length))
    outside = [p for p in positions if not -length <= p < length]
    if outside:
        raise ArgumentError(f"positions must lie in a sequence of {length}, and {outside} do not.")
    resolved = [p % length for p in positions]
    if len(set(resolved)) != len(resolved):
        raise ArgumentError(
            f"positions {list(positions)} name one of {length} positions more than once."
        )
    return resolved


def _as_groups(heads: Any) -> list[tuple[str, Any]] | None:
    """Return groups, which come in a mapping or as lists in a list; None for single heads."""
    if isinstance(heads, Mapping):
        if not heads:
            raise HeadSelectionError("Needed at least one group of heads, and none was given.")
        return list(heads.items())
    if not isinstance(heads, (list, tuple)):
        return None
    nested = [isinstance(member, (list, set, frozenset)) for member in heads]
    if not any(nested):
        return None
    if not all(nested):
        raise HeadSelectionError(
            "heads must be all single heads or all groups (lists of heads), and both were given."
        )
    return [("", list(member)) for member in heads]


def _group(sites: list[AttentionSite], name: str, members: Any) -> Item:
    if isinstance(members, (list, tuple)) and not len(members):
        raise HeadSelectionError(
            f"The group {name!r} is empty. Every group needs at least one head."
            if name
            else "A group is empty. Every group needs at least one head."
        )
    selection = select_heads(sites, members)
    labels = labels_of(sites, selection)
    return Item(name or "+".join(labels), tuple(labels), selection)


def _single_heads(sites: list[AttentionSite], selection: Selection) -> list[Item]:
    return [
        Item(
            label=site.label(head),
            heads=(site.label(head),),
            selection={site.path: [head]},
            stack=site.stack,
            layer=site.layer,
            head=head,
        )
        for site in sites
        for head in selection.get(site.path, [])
    ]
