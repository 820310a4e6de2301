"""How a model's parameters move and grow through training, and how saturated it becomes.

The paper fits the growth of the raw norm. At the start of training that norm is mostly the initial
norm, which hides the growth; so the exponent is also given with the initial norm taken out.

When not to use it: while a model trains; see :mod:`sat_lens.training`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import check_count, is_number, shown
from sat_lens.data import repeatable
from sat_lens.errors import ArgumentError
from sat_lens.norms.checkpoints import Checkpoint, list_checkpoints
from sat_lens.norms.measures import lens_model, saturation_measures
from sat_lens.norms.trajectory import Trajectory
from sat_lens.results import Provenance, Result, check_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SATURATION = ("cos_saturated", "cos_random", "S", "lean")
# The last five doublings of steps: before them warm-up and the initial norm set the pace.
RANGE = 32
LEAST_POINTS = 3


@dataclasses.dataclass(frozen=True)
class Exponent:
    """The slope of a quantity against the training step, both as logarithms.

    Attributes:
        value: The slope; NaN where fewer than three points could be used.
        low: Lower end of its 95% interval.
        high: Upper end.
        first_step: First step that was used.
        last_step: Last step that was used.
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
            return f"not fitted: needs {LEAST_POINTS} checkpoints in its range, has {self.n_points}"
        return (
            f"{self.value:.3f} (95% {self.low:.3f} to {self.high:.3f}; steps {self.first_step} to "
            f"{self.last_step}, {self.n_points} checkpoints)"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NormGrowth(Result, kind="norm growth"):
    """Norms and paths of a model's parameters by step; made by :func:`norm_growth`.

    Attributes:
        provenance: The checkpoints, the data and the versions.
        steps: The step of each checkpoint.
        columns: One value a checkpoint; see :meth:`frame`.
        exponent: Of the norm with the initial norm taken out.
        raw_exponent: Of the norm as it is.
        complete: False if the run was interrupted: what was measured until then is here.
    """

    steps: tuple[int, ...]
    columns: dict[str, Tensor]
    exponent: Exponent
    raw_exponent: Exponent
    complete: bool = True

    def frame(self) -> pd.DataFrame:
        """Return one row a checkpoint, indexed by step.

        Columns: ``norm``; ``norm_grown``, sqrt(norm^2 - initial norm^2); ``distance`` from the
        initial parameters; ``norm_...`` for each component; ``qk_product`` and ``ov_product``,
        means over heads of norms that rescaling cannot change. ``rotation``, degrees from the
        checkpoint before, and ``rotation_per_doubling``, degrees from the checkpoint nearest to
        half the step (``rotation_from``), for one doubling. ``straightness``, the cosine between
        the ways from the initial parameters to this checkpoint and to the one before, and
        ``random_walk``, what a random walk would have. ``alignment``, the cosine between the way
        from the checkpoint before and the parameters there. With data, also what
        :func:`sat_lens.norms.saturation_measures` returns. A value that does not exist is NaN:
        without a checkpoint of step 0, all that refer to the initial parameters.
        """
        return pd.DataFrame(
            {name: values.tolist() for name, values in self.columns.items()},
            index=pd.Index(self.steps, name="step"),
        )

    def fit(self, column: str, first: float | None = None, last: float = math.inf) -> Exponent:
        """Fit the exponent of any column against the step, on a range of steps.

        Args:
            column: A column of :meth:`frame`, such as ``"qk_product"``.
            first: First step of the range; None is the last five doublings.
            last: Last step of the range.

        Raises:
            ArgumentError: There is no such column, or the ends are no range.
        """
        _check_range("The range", first, last)
        self._check_column(column)
        return _fit(self.steps, self.columns[column], first, last)

    def plot(
        self,
        title: str | None = None,
        columns: str | Sequence[str] | None = None,
        x: str = "step",
    ) -> Figure:
        """Draw columns against the step, or against another column, such as the norm.

        Args:
            title: What was measured on what; None says so.
            columns: Which columns. None draws norms, saturation and losses, a panel each; against
                another column than the step, the saturation measures.
            x: The column of the horizontal axis; both axes are linear where it is not the step.

        Raises:
            ArgumentError: There is no such column, or no saturation was measured.
        """
        if columns is not None and not isinstance(columns, (str, list, tuple)):
            raise ArgumentError(f"columns are names of columns of frame(); found {columns!r}.")
        named = title or f"Norm growth: {self.provenance}"
        frame, by_step = self.frame(), x == "step"
        if columns is None and by_step:
            return figures.training_figure(frame, named)
        if not by_step:
            self._check_column(x)
        chosen = [columns] if isinstance(columns, str) else columns
        if chosen is None:
            chosen = [name for name in SATURATION if name in self.columns]
            if not chosen:
                raise ArgumentError(
                    "No saturation was measured: pass data= to norm_growth, or columns= here."
                )
        return figures.growth_figure(
            frame, named, x=x, columns=chosen, log_x=by_step, log_y=by_step
        )

    def _lines(self) -> list[str]:
        first, last = self.columns["norm"][[0, -1]].tolist()
        return [
            f"Norm {first:.4g} at step {self.steps[0]}, {last:.4g} at step {self.steps[-1]}",
            f"Exponent without the initial norm: {self.exponent}",
            f"Exponent of the raw norm: {self.raw_exponent}",
        ]

    def _check(self) -> None:
        check_columns(self.columns, len(self.steps))

    def _check_column(self, name: object) -> None:
        if name not in self.columns:
            raise ArgumentError(f"There is no column {name!r}; found {', '.join(self.columns)}.")


def norm_growth(
    checkpoints: Any,
    data: Any = None,
    *,
    fit_range: tuple[float, float] | None = None,
    tokenizer: Any = None,
    as_model: Callable[[Any], Any] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    data_name: str = "",
) -> NormGrowth:
    """Follow parameter norms through training (Merrill et al. 2021, section 3).

    Checkpoints are read tensor by tensor where their files allow; at most three are open at a time.
    Ctrl-C returns what was measured so far, marked incomplete.

    Without a checkpoint of step 0, growth cannot be told from the initial norm, and ``exponent`` is
    not fitted. The Trainer saves none: save the model before it trains as ``checkpoint-0``, or give
    a mapping, ``{0: initial_model, 500: "run/checkpoint-500", ...}``.

    Args:
        checkpoints: A directory that holds ``checkpoint-N``; a list of such directories or of files
            of weights (.safetensors, or a state dict, which is loaded without running code); a
            mapping from steps to paths or models in memory; or a hub model and its steps, such as
            ``("EleutherAI/pythia-70m", [0, 512, 1000])``, None for all that were published.
        data: If given, saturation is measured on it at each checkpoint; see
            :func:`sat_lens.data.batches`.
        fit_range: First and last step that exponents are fitted on; None is the last five
            doublings.
        tokenizer: A tokenizer or its directory, for texts, where checkpoints have none.
        as_model: A function that makes a TransformerLens model of a checkpoint's path or model,
            where data are given and the checkpoint is no directory that transformers can load.
        batch_size: Sequences in a forward pass, for tokens and texts.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        ArgumentError: Fewer than two checkpoints, steps that are repeated, out of order or not in
            the names, different architectures, or a ``fit_range`` that is no range.
        DataError: The data cannot be read, or are texts and there is no tokenizer.
        NonFiniteError: A parameter holds NaN or infinity; the message names it.
        FileFormatError: A file is missing, broken, or no checkpoint.

    Example:
        >>> import torch
        >>> from sat_lens.norms import norm_growth
        >>> first, later = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> growth = norm_growth({0: first, 8: later}, progress=False)
        >>> list(growth.frame().index)
        [0, 8]
    """
    first, last = _fit_range(fit_range)
    check_count("batch_size", batch_size)
    if as_model is not None and not callable(as_model):
        raise ArgumentError(f"as_model is a function that makes a model; found {as_model!r}.")
    make = as_model or functools.partial(lens_model, tokenizer=tokenizer)
    kept = None if data is None else repeatable(data)
    found = list_checkpoints(checkpoints)
    trajectory = Trajectory(found)
    rows: list[dict[str, float]] = []
    with tqdm(found, desc="norm growth", unit="checkpoint", disable=not progress) as bar:
        try:
            for index, _ in enumerate(bar):
                row = trajectory.row(index)
                if kept is not None:
                    model = make(trajectory.located(index))
                    row |= saturation_measures(model, kept, batch_size=batch_size)
                rows.append(row)
        except KeyboardInterrupt:
            if len(rows) < 2:
                raise
    return _result(found, rows, first, last, data_name)


def _result(
    found: Sequence[Checkpoint],
    rows: Sequence[dict[str, float]],
    first: float | None,
    last: float,
    data_name: str,
) -> NormGrowth:
    steps = tuple(checkpoint.step for checkpoint in found[: len(rows)])
    # The last row has the most columns, and so sets their order.
    names = list(dict.fromkeys(name for row in reversed(rows) for name in row))
    columns = {
        name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float64)
        for name in names
    }
    squares = columns["norm"].square()
    grown = squares - squares[0] if steps[0] == 0 else torch.full_like(squares, math.nan)
    columns["norm_grown"] = grown.where(grown >= 0, math.nan).sqrt()
    source = found[0].source
    where = source.parent.name if isinstance(source, Path) else getattr(source, "name", "models")
    return NormGrowth(
        provenance=Provenance(f"{where}, {len(steps)} checkpoints", data_name),
        steps=steps,
        columns=columns,
        exponent=_fit(steps, columns["norm_grown"], first, last),
        raw_exponent=_fit(steps, columns["norm"], first, last),
        complete=len(rows) == len(found),
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
    ends = (int(steps[used].min()), int(steps[used].max())) if n else (0, 0)
    if n < LEAST_POINTS:
        return Exponent(math.nan, math.nan, math.nan, *ends, n)
    spread = x - x.mean()
    slope = float((spread * y).sum() / spread.square().sum())
    residuals = y - y.mean() - slope * spread
    error = math.sqrt(float(residuals.square().sum() / spread.square().sum()) / (n - 2))
    half = _student(n - 2) * error * _widening(residuals)
    return Exponent(slope, slope - half, slope + half, *ends, n)


def _widening(residuals: Tensor) -> float:
    total = float(residuals.square().sum())
    if total == 0:
        return 1.0
    correlation = float((residuals[1:] * residuals[:-1]).sum()) / total
    correlation = min(max(correlation, 0.0), 0.9)
    return math.sqrt((1 + correlation) / (1 - correlation))


def _student(freedom: int) -> float:
    """Return the .975 quantile of Student's t, by its expansion around the normal quantile."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _fit(steps: Sequence[int], values: Tensor, first: float | None, last: float) -> Exponent:
    start = min(last, steps[-1]) / RANGE if first is None else first
    return fit_exponent(torch.tensor(steps, dtype=torch.float64), values, start, last)


def _fit_range(fit_range: Any) -> tuple[float | None, float]:
    if fit_range is None:
        return None, math.inf
    if not isinstance(fit_range, (tuple, list)) or len(fit_range) != 2:
        raise ArgumentError(
            f"fit_range is a first and a last step, such as (100, 1000); found {fit_range!r}."
        )
    _check_range("fit_range", *fit_range)
    return fit_range[0], fit_range[1]


def _check_range(name: str, first: Any, last: Any) -> None:
    ends = [last] if first is None else [first, last]
    if not all(map(is_number, ends)) or any(map(math.isnan, ends)) or ends != sorted(ends):
        raise ArgumentError(
            f"{name} goes from a first step to a later one, such as (100, 1000); found "
            f"({shown(first)}, {shown(last)})."
        )
