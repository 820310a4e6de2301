"""The result of a search for the heads that can be saturated together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sat_lens import figures
from sat_lens.results import Result
from sat_lens.vocabulary import POSITIVE, QUIET, RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SaturableHeads(Result, kind="saturable heads"):
    """The order in which heads were saturated (or restored), and the metric after each.

    Made by :func:`sat_lens.patching.saturable_heads`.

    Attributes:
        provenance: The model and the versions.
        direction: ``"noising"`` (heads were saturated) or ``"denoising"`` (restored).
        tolerance: How far the metric could move from its soft value.
        soft: The metric with no head saturated.
        saturated: The metric with every head of the model saturated.
        order: The heads in the order in which they were added.
        values: The metric after each, ``[step]``.
        n_heads: Among how many heads was chosen.
        complete: False if the search was interrupted.
    """

    direction: str
    tolerance: float
    soft: float
    saturated: float
    order: tuple[str, ...]
    values: Float[Tensor, " step"]
    n_heads: int
    complete: bool = True

    @property
    def heads(self) -> tuple[str, ...]:
        """Noising: the largest set found that can be saturated. Denoising: the smallest found that
        must stay soft; all that were restored, if the tolerance was not met."""
        start = self.soft if self.direction == "noising" else self.saturated
        values = [start, *self.values.tolist()]
        within = [i for i, v in enumerate(values) if abs(v - self.soft) <= self.tolerance]
        if self.direction == "noising":
            return self.order[: within[-1]]
        return self.order[: within[0]] if within else self.order

    @property
    def found(self) -> bool:
        """Whether the tolerance was met."""
        start = self.soft if self.direction == "noising" else self.saturated
        return any(abs(v - self.soft) <= self.tolerance for v in (start, *self.values.tolist()))

    def frame(self) -> pd.DataFrame:
        """Return the curve: one row a step, indexed by the number of heads added.

        Columns: ``label`` of the head added, ``metric`` from then on, ``change`` from the soft
        value, ``within`` the tolerance.
        """
        start = self.soft if self.direction == "noising" else self.saturated
        frame = pd.DataFrame({"label": ["", *self.order], "metric": [start, *self.values.tolist()]})
        frame["change"] = frame["metric"] - self.soft
        frame["within"] = frame["change"].abs() <= self.tolerance
        frame.index.name = "n_heads"
        return frame

    def plot(self, title: str | None = None) -> Figure:
        """Draw the metric against the number of heads, with the tolerance as a band."""
        done = "saturated" if self.direction == "noising" else "restored"
        named = title or f"Heads {done} together: {self.provenance}"
        figure, (axes,) = figures.panels(1, named, size=(6.4, 3.4))
        band = (self.soft - self.tolerance, self.soft + self.tolerance)
        axes.axhspan(*band, color=RULE, alpha=0.4, lw=0, label="tolerance")
        axes.axhline(self.soft, color=QUIET, lw=1, label="soft model")
        axes.axvline(len(self.heads), color=POSITIVE, lw=1, ls="--")
        figures.lines(
            axes, self.frame(), {"metric": "metric"}, x=f"heads {done}", y="metric", log_x=False
        )
        return figure

    def _lines(self) -> list[str]:
        done = "saturated" if self.direction == "noising" else "restored"
        listed = ", ".join(self.heads[:5]) + (", ..." if len(self.heads) > 5 else "")
        met = "" if self.found else " (the tolerance was not met)"
        return [
            f"{len(self.heads)} of {self.n_heads} heads {done}{met}: {listed or 'none'}",
            f"metric: soft {self.soft:.4g}, saturated {self.saturated:.4g}, tolerance "
            f"{self.tolerance:.4g}",
        ]

    def _check(self) -> None:
        if self.values.shape != (len(self.order),):
            raise ValueError(f"values have the shape {list(self.values.shape)}")
