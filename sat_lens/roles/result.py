"""The roles of all heads: one row a head, with numbers, uncertainty and provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from sat_lens.errors import FileFormatError
from sat_lens.results import Provenance, read_result, write_result
from sat_lens.roles.rule import ROLES, Targets, Thresholds, lean, offset_name, role_of, target_of
from sat_lens.roles.statistics import FARTHEST_OFFSET, M_BINS_PER_OCTAVE, Sums
from sat_lens.sites.naming import AttentionSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "head roles"


@dataclasses.dataclass(frozen=True)
class HeadRoles:
    """What every head does with its attention; made by :func:`sat_lens.head_roles`.

    ``complete`` is False if the pass was interrupted: the numbers then describe the sequences that
    were read.
    """

    provenance: Provenance
    sites: tuple[AttentionSite, ...]
    sums: Mapping[str, Sums]
    thresholds: Thresholds
    min_keys: int
    n_sequences: int
    complete: bool = True

    def frame(self) -> pd.DataFrame:
        """Return one row a head, indexed by label, in the model's order.

        Columns: ``layer``, ``head``, ``stack``; ``role`` and ``target`` in words; ``saturated``
        (tv_nearest within the threshold); ``tv_argmax``, ``tv_mean``, ``tv_nearest`` (means of the
        total variation to the argmax, the uniform and the nearest saturated row, in [0, 1]) and
        ``lean`` in [0, 1] with its standard error ``lean_se`` over sequences; ``median_m`` (keys of
        the nearest saturated row) and ``m_share`` (m over visible keys); ``n_eff_share`` (effective
        keys over visible keys); ``sink_mass`` on the first and on special tokens, and
        ``lean_no_sink`` with those keys left out; ``modal_offset`` (key minus query, of the row's
        maximum) with ``modal_share``; ``previous``, ``self``, ``next``, ``first``, ``induction``,
        ``duplicate`` (mean mass there; the last two over rows that have such a key);
        ``agreement`` (share of sampled rows with the head's own role); ``n_rows``.
        """
        rows = [self._row(site, head) for site in self.sites for head in range(site.n_heads)]
        return pd.DataFrame(rows).set_index("label")

    def plot(self, title: str | None = None) -> Figure:
        """Draw the head-role map: layers down, heads across, one colour a role."""
        from sat_lens.figures import role_map

        return role_map(self.frame(), title or f"Head roles: {self.provenance}")

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header."""
        tensors: dict[str, Tensor] = {}
        for site in self.sites:
            sums = self.sums[site.path]
            tensors |= {f"{site.path}/{name}": value for name, value in sums.by_name.items()}
            for name in ("offsets", "m_keys", "row_roles"):
                tensors[f"{site.path}//{name}"] = getattr(sums, name)
        meta = {
            "provenance": dataclasses.asdict(self.provenance),
            "sites": [
                {**dataclasses.asdict(s), "discarded": sorted(s.discarded)} for s in self.sites
            ],
            "thresholds": dataclasses.asdict(self.thresholds),
            "min_keys": self.min_keys,
            "n_sequences": self.n_sequences,
            "complete": self.complete,
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
                sums={site.path: _read_sums(tensors, site.path) for site in sites},
                thresholds=Thresholds(**meta["thresholds"]),
                min_keys=meta["min_keys"],
                n_sequences=meta["n_sequences"],
                complete=meta["complete"],
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error

    def _row(self, site: AttentionSite, head: int) -> dict[str, Any]:
        sums = self.sums[site.path]
        mean = _Means({name: float(value[0, head]) for name, value in sums.by_name.items()})
        median_m = _median_m(sums.m_keys[head])
        role = role_of(mean.tv_argmax, mean.tv_mean, mean.tv_nearest, median_m, self.thresholds)
        offset, share = _mode(sums.offsets[head])
        targets = Targets(mean.masses(), offset, share, mean.of("argmax_first"))
        sampled = sums.row_roles[head]
        return {
            "label": site.label(head),
            "stack": site.stack,
            "layer": site.layer,
            "head": head,
            "role": role,
            "target": target_of(role, targets, self.thresholds),
            "saturated": mean.tv_nearest <= self.thresholds.near,
            "tv_argmax": mean.tv_argmax,
            "tv_mean": mean.tv_mean,
            "tv_nearest": mean.tv_nearest,
            "lean": lean(mean.tv_argmax, mean.tv_mean),
            "lean_se": _lean_error(sums, head),
            "median_m": median_m,
            "m_share": mean.of("m_share", "sampled_rows"),
            "n_eff_share": mean.of("n_eff_share"),
            "sink_mass": mean.of("mass_sink"),
            "lean_no_sink": lean(
                mean.of("tv_argmax_no_sink", "sampled_rows"),
                mean.of("tv_mean_no_sink", "sampled_rows"),
            ),
            "modal_offset": offset,
            "modal_target": offset_name(offset),
            "modal_share": share,
            **mean.masses(),
            "agreement": float(sampled[ROLES.index(role)] / sampled.sum().clamp(min=1)),
            "n_rows": int(mean.sums["rows"]),
        }


@dataclasses.dataclass(frozen=True)
class _Means:
    """Means over rows of one head, from its sums."""

    sums: dict[str, float]

    def of(self, name: str, rows: str = "rows") -> float:
        return self.sums[name] / self.sums[rows] if self.sums[rows] else float("nan")

    @property
    def tv_argmax(self) -> float:
        return self.of("tv_argmax")

    @property
    def tv_mean(self) -> float:
        return self.of("tv_mean")

    @property
    def tv_nearest(self) -> float:
        return self.of("tv_nearest", "sampled_rows")

    def masses(self) -> dict[str, float]:
        masses = {
            name: self.of(f"mass_{name}")
            for name in ("previous", "self", "next", "first", "special")
        }
        for name in ("induction", "duplicate"):
            masses[name] = self.of(f"mass_{name}", f"{name}_rows")
        return masses


def _mode(offsets: Tensor) -> tuple[int, float]:
    total = float(offsets.sum())
    if total == 0:
        return 0, float("nan")
    best = int(offsets.argmax())
    return best - FARTHEST_OFFSET, float(offsets[best]) / total


def _median_m(histogram: Tensor) -> float:
    total = float(histogram.sum())
    if total == 0:
        return float("nan")
    middle = int((histogram.cumsum(0) >= total / 2).int().argmax())
    return float(round(2 ** (middle / M_BINS_PER_OCTAVE), 2))


def _lean_error(sums: Sums, head: int) -> float:
    """Standard deviation of the head's lean over resamples of the sequences."""
    rows = sums.by_name["rows"][1:, head]
    argmax, mean = (sums.by_name[name][1:, head] for name in ("tv_argmax", "tv_mean"))
    leans = (mean / (argmax + mean))[rows > 0]
    return float(leans.std()) if len(leans) > 1 else float("nan")


def _read_sums(tensors: Mapping[str, Tensor], path: str) -> Sums:
    prefix = f"{path}/"
    return Sums(
        {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix) and not name.startswith(f"{prefix}/")
        },
        *(tensors[f"{path}//{name}"] for name in ("offsets", "m_keys", "row_roles")),
    )
