"""The clickable map of heads on a page: where its cells go, and what they say."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd

from sat_lens.errors import ArgumentError
from sat_lens.figures.drawing import head_stacks, records_of
from sat_lens.roles.result import HeadRoles
from sat_lens.vocabulary import DESCRIPTIONS, TARGET_WORDS, clarity, target_mark

LEVELS = 5


@dataclasses.dataclass(frozen=True)
class Cell:
    """One head on a map: its place in the grid, its classes, its mark, and its alt text."""

    index: int
    row: int
    column: int
    classes: str
    mark: str
    text: str


@dataclasses.dataclass(frozen=True)
class HeadMap:
    """The map of one stack; ``index`` counts heads over all stacks, in the order of the table."""

    stack: str
    layers: list[int]
    heads: int
    cells: list[Cell]

    @property
    def step(self) -> int:
        """Every how many rows and columns a number is written."""
        return 1 if self.heads <= 20 else 2


def check_roles(roles: object) -> None:
    """Raise an ArgumentError unless something is a result of head_roles."""
    if not isinstance(roles, HeadRoles):
        raise ArgumentError(
            "Needed roles, as returned by sat_lens.head_roles(model, data); found "
            f"{type(roles).__name__}."
        )


def role_maps(frame: pd.DataFrame) -> list[HeadMap]:
    """Lay out the head-role map, a panel a stack."""
    # Stacks may alternate in the table; a cell counts by its place there.
    index = {label: place for place, label in enumerate(frame.index)}
    maps = []
    for stack, part in head_stacks(frame):
        layers = sorted(int(layer) for layer in part["layer"].unique())
        cells = []
        for label, record in zip(part.index, records_of(part), strict=True):
            role, target = str(record["role"]), str(record["target"] or "")
            level = max(1, math.ceil(clarity(record) * LEVELS))
            cells.append(
                Cell(
                    index=index[label],
                    row=layers.index(int(record["layer"])),
                    column=int(record["head"]),
                    classes=f"r-{role or 'none'} l{level}",
                    mark=target_mark(target),
                    text=f"{label}: {role_text(role, target)}",
                )
            )
        maps.append(HeadMap(stack, layers, int(part["head"].max()) + 1, cells))
    return maps


def role_text(role: str, target: str) -> str:
    """Return in words what a head does.

    Example:
        >>> role_text("argmax", "previous")
        'argmax, attends to one key at a time; looks at the token before'
    """
    if not role:
        return DESCRIPTIONS[role]
    looks = TARGET_WORDS.get(target) or target.removeprefix("offset ")
    words = f"{role}, {DESCRIPTIONS.get(role, '')}"
    return f"{words}; looks at {looks}" if looks else words


def clearest(frame: pd.DataFrame) -> int:
    """Return which row holds the clearest head: the argmax side first, where a head does most.

    Example:
        >>> frame = pd.DataFrame({"role": ["mean", "argmax"], "target": ["", ""],
        ...                       "agreement": [1.0, 0.9]})
        >>> clearest(frame)
        1
    """
    records = records_of(frame)

    def key(index: int) -> tuple[bool, bool, float]:
        record = records[index]
        settled = record["role"] in ("argmax", "subset")
        return settled, settled and bool(record["target"]), clarity(record)

    return max(range(len(records)), key=key)
