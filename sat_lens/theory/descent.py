"""Gradient descent on all data at once, with what its theory says of the norm beside the norm.

At each recorded step: the norm, what the gradient, the size of the step and weight decay do to it,
and the norm at which growth would stop (:func:`stationary_norm`). With weight decay, descent comes
to rest where lambda |theta|^2 = -<theta, grad L>.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.norms.measures import kept_random_state
from sat_lens.results import Provenance
from sat_lens.theory.degrees import Forward, call, degree_of_homogeneity, doubled, in_double
from sat_lens.theory.flow import gradients_of, move, squares, trainable
from sat_lens.theory.stationary import Loss, growth_rate, stationary_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """A run of gradient descent; made by :func:`descend`.

    Attributes:
        provenance: The model and the versions.
        degree: The degree of homogeneity that was used.
        weight_decay: lambda.
        steps: The recorded steps.
        columns: One value a step; see :meth:`frame`.
    """

    provenance: Provenance
    degree: float
    weight_decay: float
    steps: tuple[int, ...]
    columns: dict[str, Tensor]

    def frame(self) -> pd.DataFrame:
        """Return one row a recorded step.

        Columns: ``norm`` of the parameters; ``loss`` (without the penalty); ``accuracy``, NaN where
        none was asked for; ``gradient``, the growth rate -2 <theta, grad L> of the squared norm;
        ``outputs``, the same from the outputs alone by Euler's theorem; ``decay``, 2 lambda
        |theta|^2, which works against it; ``step_term``, h |grad|^2, what the size h of the steps
        adds; ``stationary``, the norm at which growth stops along the present direction.
        """
        return pd.DataFrame(
            {name: values.tolist() for name, values in self.columns.items()},
            index=pd.Index(self.steps, name="step"),
        )

    @property
    def growth_per_doubling(self) -> float:
        """By which share the norm grew while the number of steps last doubled."""
        norms = self.frame()["norm"]
        half = norms[norms.index <= norms.index[-1] / 2]
        return float(norms.iloc[-1] / half.iloc[-1] - 1)

    def plot(self, title: str | None = None) -> Figure:
        """Draw the norm, and the norm at which it stops growing, against the step."""
        frame = self.frame().replace(math.inf, math.nan)
        drawn = ["norm", *(["stationary"] if frame["stationary"].notna().any() else [])]
        return figures.growth_figure(
            frame, title or f"Gradient descent: {self.provenance}", columns=drawn
        )


def descend(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    degree: float | None = None,
    accuracy: Callable[[Tensor], float] | None = None,
    records: Sequence[int] | None = None,
    forward: Forward | None = None,
    progress: bool = False,
) -> Descent:
    """Run gradient descent on a copy in float64, and record the norm and its theory.

    Args:
        model: Any module whose output is a tensor.
        inputs: What it is called with; see :func:`degree_of_homogeneity`.
        loss: A function of the outputs, differentiable.
        steps: How many steps to take.
        learning_rate: The size of a step.
        weight_decay: lambda of the penalty lambda/2 |theta|^2.
        degree: The degree of homogeneity of the outputs; None measures it.
        accuracy: A function of the outputs, recorded.
        records: Which steps to record; None is step 0, the powers of two and the last.
        forward: Runs the model, as ``forward(model, inputs)``; None calls it.
        progress: Whether to show a progress bar.

    Raises:
        ArgumentError: No steps, a learning rate that is not positive, or a negative weight decay.
        NonFiniteError: The loss became NaN or infinite; the learning rate is too large.

    Example:
        >>> from torch import nn
        >>> import torch
        >>> from sat_lens.theory import descend
        >>> net = nn.Linear(1, 1, bias=False)
        >>> run = descend(net, torch.ones(1, 1), lambda f: torch.nn.functional.softplus(-f).mean(),
        ...               steps=2000, learning_rate=0.5, weight_decay=0.1)
        >>> last = run.frame().iloc[-1]
        >>> bool(abs(last["norm"] - last["stationary"]) < 1e-9)
        True
    """
    if steps < 1 or not learning_rate > 0 or weight_decay < 0:
        raise ArgumentError(
            "Needed at least one step, a positive learning rate and a weight decay of at least 0; "
            f"found {steps}, {learning_rate} and {weight_decay}."
        )
    run = forward or call
    if degree is None:
        degree = degree_of_homogeneity(model, inputs, forward=run).value
    walker, values = in_double(model).eval(), doubled(inputs)
    parameters = trainable(walker)
    kept = set(octaves(steps) if records is None else records) | {0, steps}
    rows: dict[int, dict[str, float]] = {}
    with kept_random_state():
        for step in tqdm(range(steps + 1), desc="descent", unit="step", disable=not progress):
            outputs = run(walker, values)
            value = loss(outputs)
            gradients = gradients_of(value, parameters)
            if step in kept:
                _check(float(value.detach()), step, learning_rate)
                row = _record(parameters, gradients, outputs, loss, degree, weight_decay)
                row["loss"] = float(value.detach())
                row["accuracy"] = math.nan if accuracy is None else accuracy(outputs.detach())
                rows[step] = row | {"step_term": learning_rate * row["step_term"]}
            torch._foreach_add_(gradients, [p.detach() for p in parameters], alpha=weight_decay)
            move(parameters, gradients, learning_rate)
    columns = {
        name: torch.tensor([row[name] for row in rows.values()], dtype=torch.float64)
        for name in ("norm", "loss", "accuracy", "gradient", "outputs", "decay", "step_term",
                     "stationary")
    }  # fmt: skip
    name = Provenance(type(model).__name__)
    return Descent(name, degree, weight_decay, tuple(rows), columns)


def octaves(last: int) -> list[int]:
    """Give step 0, the powers of two, and the last step.

    Example:
        >>> octaves(10)
        [0, 1, 2, 4, 8, 10]
    """
    return sorted({0, last} | {2**k for k in range(last.bit_length())})


def _record(
    parameters: list[Tensor],
    gradients: list[Tensor],
    outputs: Tensor,
    loss: Loss,
    degree: float,
    weight_decay: float,
) -> dict[str, float]:
    square = squares(parameters)
    norm = math.sqrt(square)
    pairs = zip(parameters, gradients, strict=True)
    radial = sum(float((p.detach() * g).sum()) for p, g in pairs)
    decayed = [g + weight_decay * p.detach() for p, g in zip(parameters, gradients, strict=True)]
    stationary = stationary_norm(outputs, loss, norm=norm, degree=degree, weight_decay=weight_decay)
    return {
        "norm": norm,
        "gradient": -2 * radial,
        "outputs": growth_rate(outputs, loss, degree),
        "decay": 2 * weight_decay * square,
        "step_term": squares(decayed),
        "stationary": stationary,
    }


def _check(loss: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The loss is {loss} at step {step}: a learning rate of {learning_rate:g} is too large."
        )
