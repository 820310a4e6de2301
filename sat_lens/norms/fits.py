"""Power laws through a few points, with intervals that know the points are not independent."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor

# The last five doublings of steps: before them warm-up and the initial norm set the pace.
RANGE = 32
LEAST_POINTS = 3


@dataclasses.dataclass(frozen=True)
class Exponent:
    """An exponent of the steps: the slope of a quantity against the step, both as logarithms.

    Attributes:
        value: The slope; NaN where fewer than three points could be used.
        low: Lower end of its 95% interval.
        high: Upper end.
        first_step: First step of the range that it was fitted on.
        last_step: Last step of it.
        n_points: Number of checkpoints that were used.
    """

    value: float
    low: float
    high: float
    first_step: int
    last_step: int
    n_points: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if math.isnan(self.value):
            return (
                f"not fitted: needs {LEAST_POINTS} checkpoints in its range, {self.n_points} there"
            )
        return (
            f"{self.value:.3f} (95% {self.low:.3f} to {self.high:.3f}; steps {self.first_step} to "
            f"{self.last_step}, {self.n_points} checkpoints)"
        )


def fit_exponent(
    steps: Float[Tensor, " point"], values: Float[Tensor, " point"], first: float, last: float
) -> Exponent:
    """Fit ``values ~ steps ** exponent`` by least squares of the logarithms.

    Points that are not positive, or outside the range, are left out. Neighbouring checkpoints of
    one run err in the same direction, so the standard error is widened by the first
    autocorrelation r of the residuals, by the factor sqrt((1 + r) / (1 - r)).

    Example:
        >>> import torch
        >>> steps = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> round(fit_exponent(steps, 3 * steps.sqrt(), 1, 8).value, 6)
        0.5
    """
    used = (steps > 0) & (steps >= first) & (steps <= last) & (values > 0)
    x, y = steps[used].double().log(), values[used].double().log()
    n = len(x)
    if n < LEAST_POINTS:
        ends = (int(steps[used].min()), int(steps[used].max())) if n else (0, 0)
        return Exponent(math.nan, math.nan, math.nan, *ends, n)
    spread = x - x.mean()
    slope = float((spread * y).sum() / spread.square().sum())
    residuals = y - y.mean() - slope * spread
    error = math.sqrt(float(residuals.square().sum() / spread.square().sum()) / (n - 2))
    half = _student(n - 2) * error * _widening(residuals)
    return Exponent(
        slope, slope - half, slope + half, int(steps[used].min()), int(steps[used].max()), n
    )


def _widening(residuals: Tensor) -> float:
    total = float(residuals.square().sum())
    if total == 0:
        return 1.0
    correlation = float((residuals[1:] * residuals[:-1]).sum()) / total
    correlation = min(max(correlation, 0.0), 0.9)
    return math.sqrt((1 + correlation) / (1 - correlation))


def _student(freedom: int) -> float:
    """Give the .975 quantile of Student's t, by the expansion around the normal quantile."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
