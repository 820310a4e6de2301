"""How a model's parameters move and grow through training, and how saturated it becomes.

The paper fits the growth of the raw norm. At the start of training that norm is mostly the initial
norm, which hides the growth; so the exponent is also given with the initial norm taken out.

A rising cosine between checkpoints at a fixed distance in steps is no evidence that the direction
of the parameters converges: a random walk shows it as well. So rotation is given per doubling of
steps, and the straightness of the path beside that of a random walk.

When not to use it: while a model trains; see :mod:`sat_lens.training`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import check_count, is_number, shown
from sat_lens.data import repeatable
from sat_lens.errors import ArgumentError
from sat_lens.norms.checkpoints import Checkpoint, list_checkpoints
from sat_lens.norms.measures import lens_model, saturation_measures
from sat_lens.norms.parameters import norms_of
from sat_lens.norms.sources import (
    Parameters,
    chunks,
    config_of,
    named_as_in_files,
    open_parameters,
    tied_names,
    wide,
)
from sat_lens.results import Provenance, Result, check_columns, column_frame

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
        previous checkpoint, and ``rotation_per_doubling``, degrees from the checkpoint nearest to
        half the step (``rotation_from``), for one doubling. ``straightness``, the cosine between
        the displacements of this checkpoint and the previous one from the initial parameters, and
        ``random_walk``, what a random walk would have. ``alignment``, the cosine between the
        previous parameters and the step away from them. With data, also what
        :func:`sat_lens.norms.saturation_measures` returns. What cannot be computed is NaN: without
        a checkpoint of step 0, all that refers to the initial parameters.
        """
        return column_frame(self.columns, "step", self.steps)

    def fit(self, column: str, first: float | None = None, last: float = math.inf) -> Exponent:
        """Fit the exponent of any column against the step, on a range of steps.

        Args:
            column: A column of :meth:`frame`, such as ``"qk_product"``.
            first: First step of the range; None is the last five doublings.
            last: Last step of the range.

        Raises:
            ArgumentError: There is no such column, or the ends are no range.
        """
        start, end = _checked_range("The range", (first, last))
        self._check_column(column)
        return _fit(self.steps, self.columns[column], start, end)

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
        title = title or f"Norm growth: {self.provenance}"
        by_step = x == "step"
        if columns is None and by_step:
            return figures.training_figure(self.frame(), title)
        if not by_step:
            self._check_column(x)
        if columns is None:
            columns = [name for name in SATURATION if name in self.columns]
            if not columns:
                raise ArgumentError(
                    "No saturation was measured: pass data= to norm_growth, or columns= here."
                )
        chosen = [columns] if isinstance(columns, str) else columns
        return figures.growth_figure(
            self.frame(), title, x=x, columns=chosen, log_x=by_step, log_y=by_step
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
    attention_mask: Tensor | None = None,
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
        attention_mask: Which tokens of the data are padding; see :func:`sat_lens.data.batches`.
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
    first, last = _checked_range("fit_range", fit_range)
    check_count("batch_size", batch_size)
    if as_model is not None and not callable(as_model):
        raise ArgumentError(f"as_model is a function that makes a model; found {as_model!r}.")
    make = as_model or functools.partial(lens_model, tokenizer=tokenizer)
    kept = None if data is None else repeatable(data)
    found = list_checkpoints(checkpoints)
    run = _Run(found)
    rows: list[dict[str, float]] = []
    with tqdm(found, desc="norm growth", unit="checkpoint", disable=not progress) as bar:
        try:
            for index, checkpoint in enumerate(bar):
                row = run.row(index)
                if kept is not None:
                    model = make(checkpoint.located)
                    row |= saturation_measures(
                        model, kept, batch_size=batch_size, attention_mask=attention_mask
                    )
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
    total = float(residuals.square().sum())
    error = math.sqrt(total / float(spread.square().sum()) / (n - 2))
    correlation = float(residuals[1:] @ residuals[:-1]) / total if total else 0.0
    correlation = min(max(correlation, 0.0), 0.9)
    half = _student(n - 2) * error * math.sqrt((1 + correlation) / (1 - correlation))
    return Exponent(slope, slope - half, slope + half, *ends, n)


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


def _checked_range(name: str, ends: Any) -> tuple[float | None, float]:
    """Return the first and the last step of a range, of which the first may be None."""
    if ends is None:
        return None, math.inf
    is_pair = isinstance(ends, (tuple, list)) and len(ends) == 2
    first, last = ends if is_pair else (math.nan, math.nan)
    given = [last] if first is None else [first, last]
    if not all(map(is_number, given)) or any(map(math.isnan, given)) or given != sorted(given):
        raise ArgumentError(
            f"{name} goes from a first step to a later one, such as (100, 1000); found "
            f"{shown(ends)}."
        )
    return first, last


class _Run:
    """The checkpoints of one run, opened as they are needed, at most three at a time."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self.steps = [checkpoint.step for checkpoint in checkpoints]
        self.tied: set[str] | None = None
        models = [c.source for c in checkpoints if isinstance(c.source, nn.Module)]
        # Files of weights alone do not say how many heads there are; a model of the same run does.
        self._config = config_of(models[0]) if models else {}

    def row(self, index: int) -> dict[str, float]:
        """Measure a checkpoint, and the steps that led to it."""
        with contextlib.ExitStack() as stack:
            now = self._open(index, stack)
            row = norms_of(now).summary()
            if index == 0:
                return row
            before = self._open(index - 1, stack)
            first = self._open(0, stack) if self.steps[0] == 0 else None
            _check_same_model(before, now)
            sums = _inner_products(now, before, first)
        row["rotation"] = _degrees(sums)
        row["alignment"] = _cosine(sums, "step", "before")
        if first is not None:
            row["distance"] = math.sqrt(sums["moved", "moved"])
            if index > 1:
                row["straightness"] = _cosine(sums, "moved", "moved before")
                row["random_walk"] = math.sqrt(self.steps[index - 1] / self.steps[index])
        return row | self._rotation_per_doubling(index, row["rotation"])

    def _rotation_per_doubling(self, index: int, from_before: float) -> dict[str, float]:
        # The checkpoint nearest to half the step, among those before this one and after step 0.
        earlier = [i for i in range(index) if self.steps[i] > 0]
        doublings = {i: math.log2(self.steps[index] / self.steps[i]) for i in earlier}
        if not doublings:
            return {}
        partner = min(earlier, key=lambda i: abs(doublings[i] - 1))
        degrees = from_before
        if partner != index - 1:
            with contextlib.ExitStack() as stack:
                now, then = self._open(index, stack), self._open(partner, stack)
                degrees = _degrees(_inner_products(now, then))
        return {
            "rotation_per_doubling": degrees / doublings[partner],
            "rotation_from": float(self.steps[partner]),
        }

    def _open(self, index: int, stack: contextlib.ExitStack) -> Parameters:
        checkpoint = self.checkpoints[index]
        opened = stack.enter_context(open_parameters(checkpoint.located, str(checkpoint)))
        if isinstance(checkpoint.source, nn.Module) and self._names_in_files:
            opened = named_as_in_files(checkpoint.source, opened, self._names_in_files)
        if not opened.config:
            opened = dataclasses.replace(opened, config=self._config)
        if self.tied is None:
            self.tied = tied_names(opened)
        return opened.without(self.tied)

    @functools.cached_property
    def _names_in_files(self) -> frozenset[str]:
        """The names of parameters in the first checkpoint that is no model in memory."""
        for checkpoint in self.checkpoints:
            if not isinstance(checkpoint.source, nn.Module):
                with open_parameters(checkpoint.located, str(checkpoint)) as opened:
                    return frozenset(opened.shapes)
        return frozenset()


# The inner products of two checkpoints and the first one that a row is made of.
_PRODUCTS = (
    *(("now", "now"), ("before", "before"), ("now", "before")),
    *(("step", "step"), ("step", "before")),
    *(("moved", "moved"), ("moved before", "moved before"), ("moved", "moved before")),
)


def _inner_products(
    now: Parameters, before: Parameters, first: Parameters | None = None
) -> dict[tuple[str, str], float]:
    """Sum inner products over the tensors of two or three checkpoints side by side.

    Differences are taken before they are squared: the first steps move little, and would drown in
    the rounding of the difference of two large sums.
    """
    sums = dict.fromkeys(_PRODUCTS, 0.0)
    for name in now.shapes:
        tensors = [source.read(name) for source in (now, before, first) if source is not None]
        for pieces in zip(*map(chunks, tensors), strict=True):
            a, b, *origin = (wide(piece).cpu() for piece in pieces)
            vectors = {"now": a, "before": b, "step": a - b}
            for start in origin:
                vectors |= {"moved": a - start, "moved before": b - start}
            for left, right in _PRODUCTS:
                if left in vectors:
                    sums[left, right] += float(vectors[left] @ vectors[right])
    return sums


def _cosine(sums: Mapping[tuple[str, str], float], first: str, second: str) -> float:
    """Return the cosine of two vectors, NaN where one of them is zero."""
    square = sums[first, first] * sums[second, second]
    return max(-1.0, min(1.0, sums[first, second] / math.sqrt(square))) if square else math.nan


def _degrees(sums: Mapping[tuple[str, str], float]) -> float:
    """Return the angle between the parameters of two checkpoints."""
    return math.degrees(math.acos(_cosine(sums, "now", "before")))


def _check_same_model(first: Parameters, other: Parameters) -> None:
    for name in first.shapes.keys() | other.shapes.keys():
        shapes = first.shapes.get(name), other.shapes.get(name)
        if shapes[0] != shapes[1]:
            a, b = ("missing" if shape is None else f"of shape {list(shape)}" for shape in shapes)
            raise ArgumentError(
                f"{first.name} and {other.name} are of different architectures: {name} is {a} in "
                f"the one and {b} in the other. Give checkpoints of one training run, saved in one "
                "way."
            )
