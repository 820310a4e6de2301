"""The roles of all heads: one row a head, with numbers, uncertainty and provenance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor

from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.results import Provenance, read_result, write_result
from sat_lens.roles.rows import head_row
from sat_lens.roles.rule import Thresholds
from sat_lens.roles.sums import Sums
from sat_lens.sites.naming import AttentionSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "head roles"


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRoles:
    """What every head does with its attention; made by :func:`sat_lens.head_roles`.

    ``complete`` is False if the pass was interrupted: the numbers then describe the sequences that
    were read. ``weighted_by`` names the metric by whose importance rows were weighted, if any. A
    label describes the shape of attention and no more: an untrained model labels every head
    ``mean``, and a ``mean`` label alone is no evidence of counting.
    """

    provenance: Provenance
    sites: tuple[AttentionSite, ...] = dataclasses.field(repr=False)
    sums: Mapping[str, Sums] = dataclasses.field(repr=False)
    thresholds: Thresholds
    min_keys: int
    n_sequences: int
    complete: bool = True
    weighted_by: str = ""

    def frame(self) -> pd.DataFrame:
        """Return one row a head, indexed by label, in the model's order.

        Distances, masses and shares lie in [0, 1]; scales are factors on the model's own logits.

        ============== =========================================================================
        column         meaning
        ============== =========================================================================
        stack          "" or the name of the stack
        layer, head    block index and head index
        role           the shape of the attention; see :mod:`sat_lens.roles.rule`
        target         where it looks: previous, self, next, offset k, first, special, induction,
                       duplicate, or ""
        saturated      whether tv_nearest is within the threshold
        tv_argmax      mean total variation to the argmax row
        tv_mean        mean total variation to the uniform row
        tv_nearest     mean total variation to the nearest saturated row (sampled rows)
        lean           tv_mean / (tv_argmax + tv_mean): 1 is argmax, 0 is uniform
        lean_se        its standard error, from resampling sequences; NaN for one sequence
        median_m       median number of keys of the nearest saturated row (sampled rows)
        m_share        mean of that number over the number of visible keys (sampled rows)
        n_eff_share    effective keys over visible keys
        sink_mass      mass on the first and the special tokens
        lean_no_sink   lean with those keys left out (sampled rows)
        modal_offset   commonest place of the row's maximum: key minus query, at most 64 away
        modal_share    share of rows with their maximum there
        previous ...   mean mass on the previous, same and next position, the first and the special
                       tokens; ``induction`` and ``duplicate`` over rows that have such a key
        c_lo           median greatest scale within .1 of uniform (16 of the sampled
                       rows of each sequence); inf if every scale is
        c_hi           median least scale within .1 of the limit; 0 if every scale is
        damage_...     only if asked for: mean rise of the metric if the pattern is replaced by its
                       argmax, uniform, its nearest saturated row, or the head's output by zero
        relative_...   relative_damage: that of the role's own ideal pattern over that of zero
        agreement      share of sampled rows that have the head's own role
        n_rows         number of counted rows
        ============== =========================================================================
        """
        rows = [
            head_row(site, head, self.sums[site.path], self.thresholds)
            for site in self.sites
            for head in range(site.n_heads)
        ]
        table = pd.DataFrame(rows).set_index("label")
        if self.n_sequences < 2:
            # Resamples of one sequence are all alike; that is no certainty.
            table["lean_se"] = math.nan
        return table

    def plot(self, title: str | None = None) -> Figure:
        """Draw the head-role map: layers down, heads across, one colour a role."""
        from sat_lens.figures import role_map

        return role_map(self.frame(), title or f"Head roles: {self.provenance}")

    def compare(self, other: HeadRoles, *, errors: float = 2.0) -> pd.DataFrame:
        """Say which heads changed, beyond the uncertainty.

        Returns:
            One row a head: ``role`` and ``role_other``, ``target`` and ``target_other``, ``lean``,
            ``lean_other``, ``change`` (other minus this), ``change_se``, and ``changed``: whether
            the lean moved by more than ``errors`` standard errors.

        Raises:
            ArgumentError: The two results have different heads.
        """
        mine, theirs = self.frame(), other.frame()
        if list(mine.index) != list(theirs.index):
            raise ArgumentError(
                "Only results with the same heads can be compared; found "
                f"{len(mine)} heads ({mine.index[0]}, ...) and {len(theirs)} "
                f"({theirs.index[0]}, ...)."
            )
        table = pd.DataFrame(index=mine.index)
        for name in ("role", "target", "lean"):
            table[name], table[f"{name}_other"] = mine[name], theirs[name]
        table["change"] = theirs["lean"] - mine["lean"]
        table["change_se"] = (mine["lean_se"] ** 2 + theirs["lean_se"] ** 2) ** 0.5
        table["changed"] = table["change"].abs() > errors * table["change_se"]
        return table

    def relative_to(self, initialisation: HeadRoles, *, errors: float = 2.0) -> pd.DataFrame:
        """Compare with the untrained model: which labels were learned?

        Returns:
            One row a head: ``role``, ``target``, ``lean``, the same of the initialisation with the
            suffix ``_initial``, and ``learned``: whether the lean moved beyond the uncertainty. An
            unlearned ``mean`` is no finding.
        """
        table = initialisation.compare(self, errors=errors)
        renamed = {name: f"{name}_initial" for name in ("role", "target", "lean")}
        renamed |= {f"{name}_other": name for name in ("role", "target", "lean")}
        return table.rename(columns={**renamed, "changed": "learned"})

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header."""
        tensors: dict[str, Tensor] = {}
        for site in self.sites:
            named = self.sums[site.path].tensors()
            tensors |= {f"{site.path}/{name}": tensor for name, tensor in named.items()}
        sites = [{**dataclasses.asdict(s), "discarded": sorted(s.discarded)} for s in self.sites]
        meta = {
            "provenance": dataclasses.asdict(self.provenance),
            "sites": sites,
            "thresholds": dataclasses.asdict(self.thresholds),
            "min_keys": self.min_keys,
            "n_sequences": self.n_sequences,
            "complete": self.complete,
            "weighted_by": self.weighted_by,
        }
        write_result(path, KIND, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> HeadRoles:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileFormatError: The file is missing, broken, foreign, or holds something else.
        """
        tensors, meta = read_result(path, KIND)
        try:
            sites = tuple(
                AttentionSite(**{**site, "discarded": frozenset(site["discarded"])})
                for site in meta["sites"]
            )
            sums = {}
            for site in sites:
                prefix = f"{site.path}/"
                own = {
                    n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
                }
                sums[site.path] = Sums.from_tensors(own)
            return cls(
                provenance=Provenance(**meta["provenance"]),
                sites=sites,
                sums=sums,
                thresholds=Thresholds(**meta["thresholds"]),
                min_keys=meta["min_keys"],
                n_sequences=meta["n_sequences"],
                complete=meta["complete"],
                weighted_by=meta["weighted_by"],
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error
