"""The roles of all heads: one row a head, with numbers, uncertainty and provenance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from sat_lens._checks import check_number
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.results import Provenance, read_result, write_result
from sat_lens.roles.comparing import comparison
from sat_lens.roles.positions import ROWS_PER_SEQUENCE, Rows
from sat_lens.roles.rows import head_row
from sat_lens.roles.rule import Thresholds
from sat_lens.roles.sums import Sums
from sat_lens.sites.naming import AttentionSite
from sat_lens.vocabulary import CAUTION, DESCRIPTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "head roles"
INCOMPLETE = "The measurement was interrupted: these are the numbers of what was read."


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadRoles:
    """What every head does with its attention; made by :func:`sat_lens.head_roles`.

    ``complete`` is False if the pass was interrupted: the numbers then describe the sequences that
    were read. ``weighted_by`` names the metric by whose importance rows were weighted, if any;
    ``rows``, ``query_positions`` and ``damage`` are the arguments of the measurement, and
    ``fingerprint`` tells the weights that it was made on (:func:`sat_lens.roles.fingerprint`). A
    label describes the shape of attention and no more: an untrained model labels every head
    ``mean``, and a ``mean`` label alone is no evidence of counting.
    """

    provenance: Provenance
    sites: tuple[AttentionSite, ...]
    sums: Mapping[str, Sums]
    thresholds: Thresholds
    min_keys: int
    n_sequences: int
    complete: bool = True
    weighted_by: str = ""
    rows: Rows = ROWS_PER_SEQUENCE
    query_positions: tuple[int, ...] | None = None
    damage: bool = False
    fingerprint: str = ""

    def frame(self) -> pd.DataFrame:
        """Return one row a head, indexed by label, in the model's order.

        Distances, masses and shares are fractions of a row's probability or of rows, in [0, 1].
        Scales are factors on the model's own logits, without a unit. Means and medians are over the
        counted rows, weighted if a metric was given; "sampled" marks those over the sampled rows
        of each sequence. What could not be measured is NaN.

        =============== ========================================================================
        column          meaning and unit
        =============== ========================================================================
        stack           "" or the name of the stack
        layer, head     block index and head index, from 0
        role            the shape of the attention, see :mod:`sat_lens.roles.rule`; "" if no row was
                        counted; in an untrained model ``mean`` throughout
        target          where it looks: previous, self, next, offset k, first, special, induction,
                        duplicate, or ""
        saturated       whether tv_nearest is within the threshold
        tv_argmax       mean total variation to the argmax row, in probability
        tv_mean         mean total variation to the uniform row, in probability
        tv_nearest      mean total variation to the nearest saturated row, in probability (sampled)
        lean            tv_mean / (tv_argmax + tv_mean): 1 is argmax, 0 is uniform
        lean_se         its standard error, from resampling sequences; NaN for one sequence
        median_m        median number of keys of the nearest saturated row (sampled)
        m_share         mean of that number over the number of visible keys (sampled)
        n_eff_share     mean of effective keys over visible keys
        sink_mass       mean probability on the first and the special tokens, where known
        sink            whether that mass reaches the threshold
        lean_no_sink    lean with those keys left out (sampled)
        modal_offset    commonest place of the row's maximum among those at most 64 away: key minus
                        query, in positions; NaN if all maxima lie farther away
        modal_share     share of all rows with their maximum there
        modal_mass      mean probability there (sampled)
        previous, self, mean probability on the previous, the same and the next position and on the
        next, first     first real token
        special         mean probability on the special tokens
        induction       mean probability on keys that follow an earlier occurrence of the query's
                        token, over rows that have such a key
        duplicate       mean probability on earlier occurrences of the query's token, likewise
        c_lo            median greatest scale within .1 of uniform (16 of the sampled rows of each
                        sequence); inf if every scale is
        c_hi            median least scale within .1 of the limit (the same rows); 0 if every scale
                        is
        damage_argmax,  only if asked for: mean rise of the metric, in its unit, if the pattern is
        damage_uniform, replaced by its argmax, by uniform, by its nearest saturated row, or the
        damage_nearest, head's output by zero
        damage_zero
        relative_damage the damage of the role's own ideal pattern over damage_zero
        agreement       share of sampled rows that have the head's own role
        n_rows          number of counted rows
        =============== ========================================================================

        Distances between query and key (modal_offset, modal_share, modal_mass, previous, self,
        next, first, induction, duplicate) are NaN where rows and keys do not count the positions of
        one sequence: in cross-attention, in attention within blocks, and where a decoder's keys and
        those of its encoder share a softmax. No target is given from them there. A learned sink is
        a key without a position.
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

    @property
    def notes(self) -> list[str]:
        """What has to be said beside the labels."""
        return [CAUTION] if self.complete else [INCOMPLETE, CAUTION]

    def __repr__(self) -> str:
        """Show how many heads have each role, and the notes."""
        counts = self.frame()["role"].value_counts(sort=False)
        named = {role or "none": int(counts[role]) for role in DESCRIPTIONS if role in counts}
        line = ", ".join(f"{count} {role}" for role, count in named.items())
        first = f"Head roles of {self.provenance}, {self.n_sequences} sequences: {line}"
        return "\n".join([first, *self.notes])

    def plot(self, title: str | None = None) -> Figure:
        """Draw the head-role map: layers down, heads across, one colour a role."""
        from sat_lens.figures import role_map

        whole = "" if self.complete else " (interrupted)"
        return role_map(self.frame(), title or f"Head roles: {self.provenance}{whole}")

    def compare(self, other: HeadRoles, *, errors: float = 2.0) -> pd.DataFrame:
        """Say which heads changed, beyond the uncertainty.

        Returns:
            One row a head: ``role`` and ``role_other``, ``target`` and ``target_other``, ``lean``,
            ``lean_other``, ``change`` (of the lean, other minus this), ``change_se``; ``moved``,
            the names of what moved by more than ``errors`` standard errors: the lean, and where
            the label is another also the numbers behind it (distances, the mass on a target); and
            ``changed``, whether anything did.

        Raises:
            ArgumentError: The other is no such result, or has different heads; or ``errors`` is no
                number of at least 0.
        """
        if not isinstance(other, HeadRoles):
            raise ArgumentError(
                f"Needed another result of head_roles; found {type(other).__name__}."
            )
        check_number("errors, in standard errors,", errors, at_least=0)
        return comparison(self, other, errors)

    def relative_to(self, initialisation: HeadRoles, *, errors: float = 2.0) -> pd.DataFrame:
        """Compare with the untrained model: which labels were learned?

        Returns:
            One row a head: ``role``, ``target``, ``lean``, the same of the initialisation with the
            suffix ``_initial``, the change of the lean, what ``moved``, and ``learned``: whether
            anything did, beyond the uncertainty. An unlearned ``mean`` is no finding.

        Raises:
            ArgumentError: The initialisation is no such result, or has different heads.
        """
        if not isinstance(initialisation, HeadRoles):
            raise ArgumentError(
                "Needed the result of head_roles for the untrained model; found "
                f"{type(initialisation).__name__}."
            )
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
            "rows": self.rows,
            "query_positions": self.query_positions,
            "damage": self.damage,
            "fingerprint": self.fingerprint,
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
            return cls(
                provenance=Provenance(**meta["provenance"]),
                sites=sites,
                sums={site.path: _sums_of(site, tensors) for site in sites},
                thresholds=Thresholds(**meta["thresholds"]),
                min_keys=_count(meta["min_keys"]),
                n_sequences=_count(meta["n_sequences"]),
                complete=bool(meta["complete"]),
                weighted_by=str(meta["weighted_by"]),
                rows=meta["rows"] if meta["rows"] == "all" else _count(meta["rows"]),
                query_positions=_positions(meta["query_positions"]),
                damage=bool(meta["damage"]),
                fingerprint=str(meta["fingerprint"]),
            )
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error


def _sums_of(site: AttentionSite, tensors: Mapping[str, Tensor]) -> Sums:
    prefix = f"{site.path}/"
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return Sums.from_tensors(own, _count(site.n_heads))


def _positions(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(position) for position in value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a count was needed, and {value!r} was found")
    return value
