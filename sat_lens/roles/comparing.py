"""Which heads do something else in one result than in another, beyond the uncertainty?

A head counts as changed if its lean moved, or if it has another label and a number that the label
rests on moved: by more than some standard errors, which come from resampling the sequences.

When not to use it: to count changes among many heads. At two standard errors about one head in
twenty is marked by chance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from sat_lens.errors import ArgumentError
from sat_lens.roles.rows import lean_error, share_at_offset
from sat_lens.roles.sums import Sums

if TYPE_CHECKING:
    from sat_lens.roles.result import HeadRoles

# A change that arithmetic in float32 may make by itself.
ROUNDING = 1e-5
# What labels rest on: the sum of a number over rows, and that of the rows themselves.
_SUMS = {
    "tv_argmax": ("tv_argmax", "rows"),
    "tv_mean": ("tv_mean", "rows"),
    "tv_nearest": ("tv_nearest", "sampled_rows"),
    "previous": ("mass_previous", "aligned_rows"),
    "self": ("mass_self", "aligned_rows"),
    "next": ("mass_next", "aligned_rows"),
    "first": ("mass_first", "aligned_rows"),
    "special": ("mass_special", "special_rows"),
    "induction": ("mass_induction", "induction_rows"),
    "duplicate": ("mass_duplicate", "duplicate_rows"),
}
_OF_ROLES = ("tv_argmax", "tv_mean", "tv_nearest")


def comparison(first: HeadRoles, other: HeadRoles, errors: float) -> pd.DataFrame:
    """Make the table that :meth:`HeadRoles.compare` describes.

    Raises:
        ArgumentError: The results have different heads.
    """
    mine, theirs = first.frame(), other.frame()
    if list(mine.index) != list(theirs.index):
        raise ArgumentError(
            "Only results with the same heads can be compared; found "
            f"{len(mine)} heads ({mine.index[0]}, ...) and {len(theirs)} ({theirs.index[0]}, ...)."
        )
    table = pd.DataFrame(index=mine.index)
    for name in ("role", "target", "lean"):
        table[name], table[f"{name}_other"] = mine[name], theirs[name]
    table["change"] = theirs["lean"] - mine["lean"]
    table["change_se"] = (mine["lean_se"] ** 2 + theirs["lean_se"] ** 2) ** 0.5
    heads = zip(table.to_dict("records"), _heads(first, mine), _heads(other, theirs), strict=True)
    table["moved"] = [", ".join(_moved(*head, errors)) for head in heads]
    table["changed"] = table["moved"] != ""
    return table


@dataclasses.dataclass(frozen=True)
class _Head:
    """One head of a result, whose numbers come with their standard errors."""

    sums: Sums
    head: int
    lean: float
    n_sequences: int

    def estimate(self, name: str) -> tuple[float, float]:
        if self.n_sequences < 2:
            return math.nan, math.nan
        if name == "lean":
            return self.lean, lean_error(self.sums, self.head)
        if name in _SUMS:
            total, rows = (self.sums.by_name[part][:, self.head] for part in _SUMS[name])
            means = (total / rows)[rows > 0]
            return (float(means[0]), float(means[1:].std())) if rows[0] > 0 else (math.nan,) * 2
        offset = int(name.removeprefix("offset "))
        share = share_at_offset(self.sums.histograms["offsets"][self.head], offset)
        # A share varies most if the rows of a sequence are all alike.
        return share, math.sqrt(share * (1 - share) / self.n_sequences)


def _heads(roles: HeadRoles, frame: pd.DataFrame) -> list[_Head]:
    places = [(roles.sums[site.path], head) for site in roles.sites for head in range(site.n_heads)]
    return [
        _Head(*place, lean, roles.n_sequences)
        for place, lean in zip(places, frame["lean"].tolist(), strict=True)
    ]


def _moved(row: dict[Any, Any], first: _Head, other: _Head, errors: float) -> list[str]:
    """Name the numbers that moved: the lean, and those behind a label that is another."""
    names = ["lean"]
    if row["role"] != row["role_other"]:
        names += _OF_ROLES
    if row["target"] != row["target_other"]:
        names += filter(None, (row["target"], row["target_other"]))
    moved = []
    for name in names:
        (before, before_error), (after, after_error) = first.estimate(name), other.estimate(name)
        limit = max(ROUNDING, errors * math.hypot(before_error, after_error))
        if abs(after - before) > limit:
            moved.append(name)
    return moved
