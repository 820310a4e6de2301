"""One head's row of the table, from its sums."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.attention.critical import N_BINS, scale_of_bin
from sat_lens.roles.rule import IDEAL, Targets, Thresholds, lean, role_of, target_of
from sat_lens.roles.sums import DAMAGES, M_BINS_PER_OCTAVE, OFFSET_BINS, Sums
from sat_lens.sites import AttentionSite
from sat_lens.vocabulary import ROLES


def head_row(site: AttentionSite, head: int, sums: Sums, thresholds: Thresholds) -> dict[str, Any]:
    """Return all columns of one head; :meth:`HeadRoles.frame` says what they mean."""
    mean = _Means({name: float(value[0, head]) for name, value in sums.by_name.items()})
    histograms = {name: value[head] for name, value in sums.histograms.items()}
    tv_argmax, tv_mean = mean.distance("tv_argmax"), mean.distance("tv_mean")
    tv_nearest = mean.distance("tv_nearest", "sampled_rows")
    median_m = _median_m(histograms["m_keys"])
    role = role_of(tv_argmax, tv_mean, tv_nearest, median_m, thresholds)
    offset, share = _mode(histograms["offsets"])
    leaning = lean(tv_argmax, tv_mean)
    targets = Targets(mean.masses(), offset, share, mean.of("argmax_first", "aligned_rows"))
    sink_mass = mean.of("mass_sink", "sink_rows")
    # Without a sink that is known there is nothing to leave out.
    rest = "sampled_rows" if mean.sums["sink_rows"] else "sink_rows"
    return {
        "label": site.label(head),
        "stack": site.stack,
        "layer": site.layer,
        "head": head,
        "role": role,
        "target": target_of(leaning, targets, thresholds),
        "saturated": tv_nearest <= thresholds.near,
        "tv_argmax": tv_argmax,
        "tv_mean": tv_mean,
        "tv_nearest": tv_nearest,
        "lean": leaning,
        "lean_se": lean_error(sums, head),
        "median_m": median_m,
        "m_share": mean.of("m_share", "sampled_rows"),
        "n_eff_share": mean.of("n_eff_share"),
        "sink_mass": sink_mass,
        "sink": sink_mass >= thresholds.sink,
        "lean_no_sink": lean(
            mean.distance("tv_argmax_no_sink", rest), mean.distance("tv_mean_no_sink", rest)
        ),
        "modal_offset": offset,
        "modal_share": share,
        "modal_mass": share_at_offset(histograms["offset_mass"], offset),
        **mean.masses(),
        "c_lo": _median_scale(histograms["c_lo"]),
        "c_hi": _median_scale(histograms["c_hi"]),
        **_damage(mean, role),
        "agreement": _share_of(histograms["row_roles"], ROLES.index(role)) if role else math.nan,
        "n_rows": int(sums.counted[head]),
    }


def lean_error(sums: Sums, head: int) -> float:
    """Return the standard deviation of the head's lean over resamples of the sequences."""
    argmax, mean = (sums.by_name[name][1:, head] for name in ("tv_argmax", "tv_mean"))
    leans = (mean / (argmax + mean))[sums.by_name["rows"][1:, head] > 0]
    return float(leans.std()) if len(leans) > 1 else math.nan


def share_at_offset(histogram: Float[Tensor, " offset"], offset: float) -> float:
    """Return the share of a histogram over offsets at one of them; NaN where there is none.

    Example:
        >>> histogram = torch.zeros(OFFSET_BINS)
        >>> histogram[OFFSET_BINS // 2 - 1] = 3
        >>> share_at_offset(histogram, -1), share_at_offset(histogram, 2)
        (1.0, 0.0)
    """
    if math.isnan(offset):
        return math.nan
    return _share_of(histogram, int(offset) + OFFSET_BINS // 2)


@dataclasses.dataclass(frozen=True)
class _Means:
    """Means over rows of one head, from its sums."""

    sums: dict[str, float]

    def of(self, name: str, rows: str = "rows") -> float:
        return self.sums[name] / self.sums[rows] if self.sums[rows] else math.nan

    def distance(self, name: str, rows: str = "rows") -> float:
        # Rounding takes a distance of 0 below it.
        return max(self.of(name, rows), 0.0)

    def masses(self) -> dict[str, float]:
        masses = {
            name: self.of(f"mass_{name}", "aligned_rows")
            for name in ("previous", "self", "next", "first")
        }
        for name in ("special", "induction", "duplicate"):
            masses[name] = self.of(f"mass_{name}", f"{name}_rows")
        return masses


def _damage(mean: _Means, role: str) -> dict[str, float]:
    if not mean.sums["damage_sequences"]:
        return {}
    damage = {name: mean.of(f"damage_{name}", "damage_sequences") for name in DAMAGES}
    own = damage[IDEAL[role]] if role else math.nan
    relative = own / damage["zero"] if damage["zero"] else math.nan
    return {f"damage_{name}": value for name, value in damage.items()} | {
        "relative_damage": relative
    }


def _mode(offsets: Tensor) -> tuple[float, float]:
    """Return the commonest offset and its share; the bins at both ends are of no one offset."""
    best = int(offsets[1:-1].argmax()) + 1
    if not float(offsets[best]):
        return math.nan, 0.0 if float(offsets.sum()) else math.nan
    return float(best - OFFSET_BINS // 2), _share_of(offsets, best)


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
