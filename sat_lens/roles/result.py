"""The roles of all heads: one row per head, with numbers, uncertainty and provenance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens import figures
from sat_lens._checks import check_count, check_number
from sat_lens.attention.critical import N_BINS, scale_of_bin
from sat_lens.errors import ArgumentError
from sat_lens.results import Result, largest
from sat_lens.roles.positions import ROWS_PER_SEQUENCE, Rows
from sat_lens.roles.rule import IDEAL, Targets, Thresholds, lean, role_of, targets_of
from sat_lens.roles.sums import DAMAGES, M_BINS_PER_OCTAVE, OFFSET_BINS, Sums
from sat_lens.sites import AttentionSite
from sat_lens.vocabulary import CAUTION, DESCRIPTIONS, ROLES, TARGET_MARKS, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A change that arithmetic in float32 may make by itself.
ROUNDING = 1e-5
# Standard errors from which a number counts as different from zero.
ERRORS = 2.0
# What each mean is made of: the sum of a number over rows, and that of the rows themselves.
_SUMS = {
    "tv_argmax": ("tv_argmax", "rows"),
    "tv_mean": ("tv_mean", "rows"),
    "n_eff_share": ("n_eff_share", "rows"),
    "tv_nearest": ("tv_nearest", "sampled_rows"),
    "m_share": ("m_share", "sampled_rows"),
    "tv_argmax_no_sink": ("tv_argmax_no_sink", "sampled_rows"),
    "tv_mean_no_sink": ("tv_mean_no_sink", "sampled_rows"),
    "sink_mass": ("mass_sink", "sink_rows"),
    "argmax_first": ("argmax_first", "aligned_rows"),
    "special": ("mass_special", "special_rows"),
    "induction": ("mass_induction", "induction_rows"),
    "duplicate": ("mass_duplicate", "duplicate_rows"),
}
_SUMS |= {name: (f"mass_{name}", "aligned_rows") for name in ("previous", "self", "next", "first")}
_SUMS |= {f"damage_{name}": (f"damage_{name}", "damage_sequences") for name in DAMAGES}
_OF_ROLES = ("tv_argmax", "tv_mean", "tv_nearest")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadRoles(Result, kind="head roles"):
    """What every head does with its attention; made by :func:`sat_lens.head_roles`.

    ``complete`` is False if the pass was interrupted: the numbers then describe the sequences that
    were read. ``weighted_by`` names the metric by whose importance rows were weighted, if any;
    ``rows``, ``query_positions`` and ``damage`` are the arguments of the measurement, and
    ``fingerprint`` identifies the weights (:func:`sat_lens.roles.fingerprint`). Results of disjoint
    parts of the data add up to that of the whole: ``HeadRoles.merge(parts)``. A
    label describes the shape of attention and no more: an untrained model labels every head
    ``mean``, and a ``mean`` label alone is no evidence of counting.
    """

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
    _summed: ClassVar[tuple[str, ...]] = ("sums", "n_sequences")
    _remedies: ClassVar[Mapping[str, str]] = {
        "fingerprint": "They were measured on different weights; use one model, in one dtype."
    }

    def frame(self) -> pd.DataFrame:
        """Return one row per head, indexed by label, in the model's order.

        Distances, masses and shares are fractions of a row's probability or of rows, in [0, 1].
        Scales are factors on the model's own logits, without a unit. Means and medians are over the
        counted rows, weighted if a metric was given; "sampled" marks those over the sampled rows
        of each sequence. What could not be measured is NaN.

        ================= ========================================================================
        column            meaning and unit
        ================= ========================================================================
        stack             "" or the name of the stack
        layer, head       block index and head index, from 0
        role              the shape of the attention, see :mod:`sat_lens.roles.rule`; "" if no row
                          was counted; in an untrained model ``mean`` throughout
        target            where it looks: previous, self, next, offset k, first, special, induction,
                          duplicate, or ""
        second_target     where else, on other rows or as much; or ""
        saturable_exact   whether tv_argmax is small enough for exact saturation, and
        saturable_nearest whether tv_nearest is for ties="nearest": in SmolLM2 all heads so marked
                          can be saturated together for at most .1 nat (docs/real_models.md)
        tv_argmax         mean total variation to the argmax row, in probability
        tv_mean           mean total variation to the uniform row, in probability
        tv_nearest        mean total variation to the nearest saturated row, likewise (sampled)
        lean              tv_mean / (tv_argmax + tv_mean): 1 is argmax, 0 is uniform
        lean_se           its standard error, from resampling sequences; NaN for one sequence
        median_m          median number of keys of the nearest saturated row (sampled)
        m_share           mean of that number over the number of visible keys (sampled)
        n_eff_share       mean of effective keys over visible keys
        sink_mass         mean probability on the first and the special tokens, where known
        sink              whether that mass reaches the threshold
        tv_argmax_no_sink tv_argmax with those keys left out (sampled)
        tv_mean_no_sink   tv_mean, likewise
        lean_no_sink      lean, likewise
        role_no_sink      role, likewise, but never ``subset``
        modal_offset      commonest place of the row's maximum among those at most 64 away: key
                          minus query, in positions; NaN if all maxima lie farther away
        modal_share       share of all rows with their maximum there
        modal_mass        mean probability there (sampled)
        previous, self,   mean probability on the previous, the same and the next position and on
        next, first       the first token that is no padding
        special           mean probability on the special tokens
        induction         mean probability on keys that follow an earlier occurrence of the query's
                          token, over rows that have such a key
        duplicate         mean probability on earlier occurrences of the query's token, likewise
        c_lo              median greatest scale within .1 of uniform (16 of the sampled rows of
                          each sequence); inf if every scale is
        c_hi              median least scale within .1 of the limit (the same rows); 0 if every
                          scale is
        damage_argmax     only if asked for: mean rise of the metric, in its unit, if the pattern
                          is replaced by its argmax
        damage_uniform    the same, by uniform over all visible keys,
        damage_no_sink    by uniform over those that are neither first nor special tokens,
        damage_nearest    by its nearest saturated row,
        damage_zero       or if the head's output is replaced by zero
        damage_zero_se    its standard error; a damage_zero within two of them is of a head that
                          may not be needed at all
        relative_damage   the damage of the role's own ideal pattern over damage_zero; NaN for a
                          head that may not be needed
        agreement         share of sampled rows that have the head's own role
        n_rows            number of counted rows
        ================= ========================================================================

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
            if self.damage:
                table[["damage_zero_se", "relative_damage"]] = math.nan
        return table

    @property
    def notes(self) -> list[str]:
        """What has to be said beside the labels."""
        return [*super().notes, CAUTION]

    def _lines(self) -> list[str]:
        table = self.frame()
        counts = table["role"].value_counts(sort=False)
        named = [(role or "none", int(counts[role])) for role in DESCRIPTIONS if role in counts]
        return [
            f"{counted(self.n_sequences, 'sequence')}, "
            f"query rows with at least {counted(self.min_keys, 'visible key')}",
            ", ".join(f"{count} {role}" for role, count in named),
            f"nearest to argmax (lean): {largest(table['lean'])}",
        ]

    def _check(self) -> None:
        check_count("n_sequences", self.n_sequences, at_least=0)
        check_count("min_keys", self.min_keys)
        for site in self.sites:
            self.sums[site.path].check(site.n_heads)

    def plot(self, title: str | None = None, column: str | None = None) -> Figure:
        """Draw the head-role map, layers down and heads across: one colour per role.

        Args:
            title: What is written above; None names the model and the data.
            column: Draw this column of :meth:`frame` in its place, such as ``"induction"``.

        Raises:
            ArgumentError: There is no such column, or it holds no numbers.
        """
        whole = "" if self.complete else " (interrupted)"
        title = title or f"{column or 'Head roles'}: {self.provenance}{whole}"
        if column is None:
            return figures.role_figure(self.frame(), title)
        return figures.column_figure(self.frame(), column, title)

    def compare(self, other: HeadRoles, *, errors: float = 2.0) -> pd.DataFrame:
        """Return which heads changed by more than the uncertainty.

        At two standard errors about one head in twenty is marked by chance.

        Returns:
            One row per head: ``role`` and ``role_other``, ``target`` and ``target_other``,
            ``lean`` and ``lean_other``; ``change`` (of the lean, other minus this) and
            ``change_se``; ``moved``, the names of the numbers that moved by more than ``errors``
            standard errors (the lean, and where a label differs the distances or masses that it
            rests on); and ``changed``, whether there is any.

        Raises:
            ArgumentError: The other is no such result, or has different heads; or ``errors`` is no
                number of at least 0.
        """
        if not isinstance(other, HeadRoles):
            raise ArgumentError(
                f"Needed another result of head_roles; found {type(other).__name__}."
            )
        check_number("errors, a number of standard errors,", errors, at_least=0)
        return _comparison(self, other, errors)

    def relative_to(self, initialisation: HeadRoles, *, errors: float = 2.0) -> pd.DataFrame:
        """Compare with the untrained model: which labels were learned?

        Returns:
            One row per head: ``role``, ``target`` and ``lean``, the same of the initialisation with
            the suffix ``_initial``, and ``change``, ``change_se`` and ``moved`` as in
            :meth:`compare`; ``learned`` is whether anything moved. An unlearned ``mean`` is no
            finding.

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


@dataclasses.dataclass(frozen=True)
class _Head:
    """Means of one head over its rows, with their standard errors."""

    sums: Sums
    head: int

    def counts(self, rows: str) -> bool:
        return bool(self.sums.by_name[rows][0, self.head] > 0)

    def mean(self, name: str) -> float:
        total, rows = (float(self.sums.by_name[part][0, self.head]) for part in _SUMS[name])
        return total / rows if rows else math.nan

    def distance(self, name: str) -> float:
        # Rounding takes a distance of 0 below it.
        return max(self.mean(name), 0.0)

    def error(self, name: str) -> float:
        """The standard deviation of a mean, or of the lean, over resamples of the sequences."""
        if name == "lean":
            argmax, mean = (self._resampled(part) for part in ("tv_argmax", "tv_mean"))
            values = mean / (argmax + mean)
        else:
            values = self._resampled(name)
        return float(values.std()) if len(values) > 1 else math.nan

    def _resampled(self, name: str) -> Float[Tensor, " resample"]:
        total, rows = (self.sums.by_name[part][1:, self.head] for part in _SUMS[name])
        return (total / rows)[rows > 0]


def head_row(site: AttentionSite, head: int, sums: Sums, thresholds: Thresholds) -> dict[str, Any]:
    """Return all columns of one head; :meth:`HeadRoles.frame` says what they mean."""
    of_head = _Head(sums, head)
    histograms = {name: value[head] for name, value in sums.histograms.items()}
    tv_argmax, tv_mean, tv_nearest = map(of_head.distance, _OF_ROLES)
    median_m = _median_m(histograms["m_keys"])
    role = role_of(tv_argmax, tv_mean, tv_nearest, median_m, thresholds)
    leaning = lean(tv_argmax, tv_mean)
    masses = {name: of_head.mean(name) for name in TARGET_MARKS}
    offset, share = _mode(histograms["offsets"])
    looks = Targets(masses, offset, share, of_head.mean("argmax_first"))
    target, second_target = targets_of(leaning, looks, thresholds)
    sink_mass = of_head.mean("sink_mass")
    row = {
        "label": site.label(head),
        "stack": site.stack,
        "layer": site.layer,
        "head": head,
        "role": role,
        "target": target,
        "second_target": second_target,
        "saturable_exact": tv_argmax <= thresholds.saturable_exact,
        "saturable_nearest": tv_nearest <= thresholds.saturable_nearest,
        "tv_argmax": tv_argmax,
        "tv_mean": tv_mean,
        "tv_nearest": tv_nearest,
        "lean": leaning,
        "lean_se": of_head.error("lean"),
        "median_m": median_m,
        "m_share": of_head.mean("m_share"),
        "n_eff_share": of_head.mean("n_eff_share"),
        "sink_mass": sink_mass,
        "sink": sink_mass >= thresholds.sink,
        "tv_argmax_no_sink": math.nan,
        "tv_mean_no_sink": math.nan,
        "lean_no_sink": math.nan,
        "role_no_sink": "",
        "modal_offset": offset,
        "modal_share": share,
        "modal_mass": _share_at_offset(histograms["offset_mass"], offset),
        **masses,
        "c_lo": _median_scale(histograms["c_lo"]),
        "c_hi": _median_scale(histograms["c_hi"]),
    }
    # Without a sink that is known there is nothing to leave out.
    if of_head.counts("sink_rows"):
        to_argmax, to_mean = map(of_head.distance, ("tv_argmax_no_sink", "tv_mean_no_sink"))
        row |= {"tv_argmax_no_sink": to_argmax, "tv_mean_no_sink": to_mean}
        row["lean_no_sink"] = lean(to_argmax, to_mean)
        # Which of the remaining keys form a subset is not measured.
        row["role_no_sink"] = role_of(to_argmax, to_mean, math.inf, 1, thresholds)
    if of_head.counts("damage_sequences"):
        damage = {name: of_head.mean(f"damage_{name}") for name in DAMAGES}
        row |= {f"damage_{name}": value for name, value in damage.items()}
        zero_error = of_head.error("damage_zero")
        row["damage_zero_se"] = zero_error
        # A ratio to a number that may be zero means nothing.
        needed = abs(damage["zero"]) > ERRORS * zero_error
        own = damage[IDEAL[role]] if role and needed else math.nan
        row["relative_damage"] = own / damage["zero"] if needed else math.nan
    row["agreement"] = _share_of(histograms["row_roles"], ROLES.index(role)) if role else math.nan
    row["n_rows"] = int(sums.counted[head])
    return row


def _mode(offsets: Tensor) -> tuple[float, float]:
    """Return the commonest offset and its share; the bins at both ends are of no one offset."""
    best = int(offsets[1:-1].argmax()) + 1
    if not float(offsets[best]):
        return math.nan, 0.0 if float(offsets.sum()) else math.nan
    return float(best - OFFSET_BINS // 2), _share_of(offsets, best)


def _share_at_offset(histogram: Tensor, offset: float) -> float:
    if math.isnan(offset):
        return math.nan
    return _share_of(histogram, int(offset) + OFFSET_BINS // 2)


def _share_of(histogram: Tensor, place: int) -> float:
    total = float(histogram.sum())
    return float(histogram[place]) / total if total else math.nan


def _median_bin(histogram: Tensor) -> int | None:
    cumulative = histogram.cumsum(0)
    total = cumulative[-1:]
    # searchsorted wants the first bin that reaches half; rounding may leave the sum short of it.
    return int(torch.searchsorted(cumulative, total / 2)) if float(total) else None


def _median_m(histogram: Tensor) -> float:
    middle = _median_bin(histogram)
    # Sixteen bins an octave tell whole numbers apart up to 22; above, this is to 4 %.
    return math.nan if middle is None else float(round(2 ** (middle / M_BINS_PER_OCTAVE)))


def _median_scale(histogram: Tensor) -> float:
    middle = _median_bin(histogram)
    if middle is None:
        return math.nan
    if middle == 0:
        return 0.0
    return math.inf if middle == N_BINS - 1 else float(scale_of_bin(torch.tensor(middle)))


def _comparison(first: HeadRoles, other: HeadRoles, errors: float) -> pd.DataFrame:
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
    heads = zip(_heads(first), _heads(other), table.to_dict("records"), strict=True)
    table["moved"] = [
        ", ".join(
            name
            for name in _names_behind(row)
            if _moved(_estimate(one, name, first), _estimate(two, name, other), errors)
        )
        for one, two, row in heads
    ]
    table["changed"] = table["moved"] != ""
    return table


def _heads(roles: HeadRoles) -> list[_Head]:
    return [
        _Head(roles.sums[site.path], head) for site in roles.sites for head in range(site.n_heads)
    ]


def _names_behind(row: dict[Any, Any]) -> list[str]:
    """The numbers to compare: the lean, and those behind a label that changed."""
    names = ["lean"]
    if row["role"] != row["role_other"]:
        names += _OF_ROLES
    if row["target"] != row["target_other"]:
        names += filter(None, (row["target"], row["target_other"]))
    return names


def _estimate(head: _Head, name: str, roles: HeadRoles) -> tuple[float, float]:
    """Return a number of a head, and its standard error."""
    if roles.n_sequences < 2:
        return math.nan, math.nan
    if name == "lean":
        return lean(head.distance("tv_argmax"), head.distance("tv_mean")), head.error("lean")
    if name in _SUMS:
        return head.mean(name), head.error(name)
    offset = int(name.removeprefix("offset "))
    share = _share_at_offset(head.sums.histograms["offsets"][head.head], offset)
    # A share varies most if the rows of a sequence are all alike.
    return share, math.sqrt(share * (1 - share) / roles.n_sequences)


def _moved(before: tuple[float, float], after: tuple[float, float], errors: float) -> bool:
    limit = max(ROUNDING, errors * math.hypot(before[1], after[1]))
    return abs(after[0] - before[0]) > limit
