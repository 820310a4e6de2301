"""What is kept of the attention of a model: sums over rows, and nothing that grows with the data.

Sums of disjoint parts of the data add up to the sums of the whole, whatever the parts; so shards
merge, and a bootstrap over sequences is the same sums under other weights.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.attention.critical import N_BINS
from sat_lens.vocabulary import ROLES

FARTHEST_OFFSET = 64
M_BINS_PER_OCTAVE = 16
M_BINS = 20 * M_BINS_PER_OCTAVE + 1
BOOTSTRAPS = 100

# Sums over all counted rows.
ROW_SUMS = (
    "rows",
    "aligned_rows",
    "special_rows",
    "sink_rows",
    "tv_argmax",
    "tv_mean",
    "n_eff_share",
    "mass_first",
    "mass_special",
    "mass_sink",
    "mass_previous",
    "mass_self",
    "mass_next",
    "argmax_first",
    "induction_rows",
    "mass_induction",
    "duplicate_rows",
    "mass_duplicate",
)
# Sums over the sampled rows, where a sort and a search are paid for.
SAMPLE_SUMS = ("sampled_rows", "tv_nearest", "m_share", "tv_argmax_no_sink", "tv_mean_no_sink")
# Sums over sequences, where damage was asked for.
DAMAGES = ("argmax", "uniform", "no_sink", "nearest", "zero")
DAMAGE_SUMS = ("damage_sequences", *(f"damage_{name}" for name in DAMAGES))
ALL_SUMS = ROW_SUMS + SAMPLE_SUMS + DAMAGE_SUMS
# Offsets from -64 to 64, with a bin at both ends for all that lies farther away.
OFFSET_BINS = 2 * (FARTHEST_OFFSET + 1) + 1
# Weighted counts of rows by a number of theirs, per head; of offset_mass, the rows' probability.
HISTOGRAMS = {
    "offsets": OFFSET_BINS,
    "offset_mass": OFFSET_BINS,
    "m_keys": M_BINS,
    "c_lo": N_BINS,
    "c_hi": N_BINS,
    "row_roles": len(ROLES),
}


@dataclasses.dataclass
class Sums:
    """Everything that is kept of one attention module.

    ``by_name`` holds each sum once for the data as it is and once for each resample of its
    sequences, ``[resample, head]``. ``histograms`` hold weighted counts of rows, ``[head, bin]``,
    for the data as it is. ``counted`` is the plain number of rows, ``[head]``.
    """

    by_name: dict[str, Float[Tensor, "resample head"]]
    histograms: dict[str, Float[Tensor, "head bin"]]
    counted: Float[Tensor, " head"]

    @classmethod
    def empty(cls, n_heads: int) -> Sums:
        """Start with nothing measured."""
        return cls(
            {name: torch.zeros(1 + BOOTSTRAPS, n_heads, dtype=torch.float64) for name in ALL_SUMS},
            {
                name: torch.zeros(n_heads, n_bins, dtype=torch.float64)
                for name, n_bins in HISTOGRAMS.items()
            },
            torch.zeros(n_heads, dtype=torch.float64),
        )

    def add(self, other: Sums) -> None:
        """Add the sums of other data."""
        for mine, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine += theirs

    def add_damage(
        self,
        damage: dict[str, Float[Tensor, "batch head"]],
        resampling: Float[Tensor, "batch resample"],
    ) -> None:
        """Add the damage that replacements did to each sequence of a batch."""
        self.by_name["damage_sequences"] += resampling.sum(0)[:, None]
        for name in DAMAGES:
            self.by_name[f"damage_{name}"] += resampling.T @ damage[name].double()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, in a fixed order."""
        named = {f"sum.{name}": self.by_name[name] for name in ALL_SUMS}
        named |= {f"histogram.{name}": self.histograms[name] for name in HISTOGRAMS}
        return {**named, "counted": self.counted}

    def check(self, n_heads: int) -> None:
        """Raise a ValueError unless all tensors are finite float64 of the right shapes."""
        found = self.tensors()
        for name, empty in Sums.empty(n_heads).tensors().items():
            wanted, given = (f"{t.dtype} of {list(t.shape)}" for t in (empty, found[name]))
            if wanted != given:
                raise ValueError(f"{name} must be {wanted}; found {given}")
            if not bool(found[name].isfinite().all()):
                raise ValueError(f"{name} is not finite")
