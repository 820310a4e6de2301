"""Reading the arguments of a sweep: the prompts, and the heads or groups that are swept over."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor

from sat_lens._checks import check_share, is_integer
from sat_lens.attention import Limit, Scale, Transform
from sat_lens.data import Batch
from sat_lens.errors import ArgumentError, HeadSelectionError
from sat_lens.models import model_name
from sat_lens.results import Provenance
from sat_lens.sites import AttentionSite, Heads, Selection, labels_of, select_heads

HeadGroups = Sequence[Sequence[Any]] | Mapping[str, Heads]
PatchedPositions = None | Literal["each"] | Sequence[int]


def check_same_shape(batch: Batch, other: Batch) -> None:
    """Raise an ArgumentError unless two batches can exchange activations."""
    mine, theirs = ({"input": b.inputs, **b.kwargs} for b in (batch, other))
    for name in mine.keys() & theirs.keys():
        first, second = (getattr(given[name], "shape", None) for given in (mine, theirs))
        if first != second:
            shapes = ["another kind" if s is None else str(list(s)) for s in (first, second)]
            raise ArgumentError(
                "Clean and corrupted prompts must have the same shape, because activations are "
                f"exchanged position by position; found {name} of {' and '.join(shapes)}. Choose "
                "prompts with as many tokens, or pad both."
            )
    for mask, its in (
        (batch.non_padding, other.non_padding),
        (batch.decoder_non_padding, other.decoder_non_padding),
    ):
        padding = [None if m is None or bool(m.all()) else m.tolist() for m in (mask, its)]
        if padding[0] != padding[1]:
            raise ArgumentError(
                "Clean and corrupted prompts must be padded at the same positions, because "
                "activations are exchanged position by position. Choose pairs of prompts with as "
                "many tokens."
            )


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


def provenance_of(model: Any, transform: Transform) -> Provenance:
    """Return which model was put through which transform."""
    if isinstance(transform, Limit):
        return Provenance(model_name(model), scale="inf", ties=str(transform.ties))
    scale = name_of(transform)
    if isinstance(transform, Scale) and not isinstance(transform.c, Tensor):
        scale = f"{transform.c:g}"
    return Provenance(model_name(model), scale=scale)


def name_of(transform: Transform) -> str:
    """Return the name of a transform: of a function its own, which is the same in every session."""
    return str(getattr(transform, "__name__", None) or repr(transform))


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


# An item and the position at which it is patched; None is all positions.
Spot = tuple[Item, int | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One value of a sweep: what is patched, and its index in a table by item (and position)."""

    spot: Spot
    index: tuple[int, ...]

    @property
    def item(self) -> Item:
        """What is patched."""
        return self.spot[0]


def read_items(sites: list[AttentionSite], heads: Heads | HeadGroups) -> list[Item]:
    """Read a choice of heads, or of groups of heads, into items.

    Groups are a list of lists, or a mapping from names to choices of heads.

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
        selection = select_heads(sites, cast("Heads", heads))
        return [
            Item(site.label(h), (site.label(h),), {site.path: [h]}, site.stack, site.layer, h)
            for site in sites
            for h in selection.get(site.path, [])
        ]
    items = [_group(sites, name, members) for name, members in groups]
    counts = Counter(item.label for item in items)
    repeated = [label for label, count in counts.items() if count > 1]
    if repeated:
        raise HeadSelectionError(f"These groups are given more than once: {', '.join(repeated)}.")
    return items


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
        which = f"The group {name!r}" if name else "A group"
        raise HeadSelectionError(f"{which} is empty. Every group needs at least one head.")
    selection = select_heads(sites, members)
    labels = labels_of(sites, selection)
    return Item(name or "+".join(labels), tuple(labels), selection)


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


def entries_of(
    items: list[Item], positions: PatchedPositions, lengths: Mapping[str, int]
) -> tuple[list[Entry], tuple[int, ...]]:
    """List what is to be computed, and the shape of its table: (items,) or (items, positions).

    ``lengths`` says how many positions each attention module has, by path.

    Raises:
        ArgumentError: A position lies outside, or a group's modules differ in length.
    """
    if positions is None:
        return [Entry((item, None), (i,)) for i, item in enumerate(items)], (len(items),)
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
        entries += [Entry((item, position), (i, j)) for j, position in enumerate(resolved)]
    return entries, (len(items), n_positions)


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
