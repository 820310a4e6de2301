"""How gradient descent changes the norm of the parameters, and the norm at which it stops.

Let the outputs f be homogeneous of degree k in the parameters theta (:mod:`paper.degrees`), and L a
loss of the outputs. By Euler's theorem <theta, grad f> = k f, so under gradient flow with weight
decay lambda

    d|theta|^2/dt = -2 <theta, grad L> - 2 lambda |theta|^2
                  = -2 k sum_i (dL/df_i) f_i - 2 lambda |theta|^2.

Three measurements rest on this:

- :func:`stationary_norm`, the norm at which growth stops along the present direction. Along the ray
  r theta/|theta| the outputs are (r/|theta|)^k f, so the r at which the right hand side changes
  sign follows from the present outputs alone. Without weight decay, and for a loss that is convex
  in the outputs, it is the r at which the loss along the ray is least: below it the norm grows,
  above it it shrinks. It is infinite where larger outputs always help, as they do when every
  example is classified correctly and the loss is a cross-entropy.
- :func:`norm_flow`, the formula against measurement. A step of gradient descent of size h adds
  h^2 |grad L|^2 to the squared norm, which is why descent with large steps grows norms that
  gradient flow would leave alone. The same stretch of time is covered in ever smaller steps, and
  the limit is extrapolated.
- :func:`descend`, gradient descent that records the norm beside what the theory says of it. With
  weight decay, it comes to rest where lambda |theta|^2 = -<theta, grad L>.

Everything is computed in float64, on copies.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from paper.degrees import Forward, call, degree_of_homogeneity, doubled, in_double
from paper.network import log_spaced_steps
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.figures import growth_figure
from sat_lens.norms.measures import kept_random_state
from sat_lens.results import Provenance, Result

OutputLoss = Callable[[Tensor], Tensor]
_FLOW = ("measured", "gradient", "outputs", "step_term")
_DESCENT = ("norm", "loss", "accuracy", "gradient", "outputs", "decay", "step_term", "stationary")
# The search for where growth stops: powers of two of the present norm from the largest down, how
# many per doubling, and how often the interval found is halved.
_TOP, _BOTTOM, _PER_OCTAVE, _HALVINGS = 12, -12, 2, 40


def stationary_norm(
    outputs: Float[Tensor, "*outputs"],
    loss: OutputLoss,
    *,
    norm: float,
    degree: float,
    weight_decay: float = 0.0,
) -> float:
    """Return the norm at which gradient flow neither grows nor shrinks the parameters.

    The direction of the parameters is held fixed. Where growth stops at several norms this is the
    largest, the one that larger norms shrink to.

    Args:
        outputs: The network's outputs at the present parameters.
        loss: A function of the outputs.
        norm: The present norm of the parameters.
        degree: The degree of homogeneity k of the outputs.
        weight_decay: lambda of the penalty lambda/2 |theta|^2.

    Returns:
        The norm; infinity where growth does not stop within 12 doublings of the present norm, 0
        where the parameters shrink at every norm, NaN where the loss does not depend on it.

    Raises:
        ArgumentError: The norm or the degree is not positive, or weight decay is negative.

    Example:
        >>> import math
        >>> import torch
        >>> from paper.flow import stationary_norm
        >>> labels = torch.tensor([1.0, 1.0, 1.0, -1.0])
        >>> loss = lambda f: torch.nn.functional.softplus(-labels * f).mean()
        >>> outputs = torch.ones(4, dtype=torch.float64)  # three quarters are right
        >>> round(math.exp(stationary_norm(outputs, loss, norm=1.0, degree=1.0)), 6)
        3.0
    """
    if norm <= 0 or degree <= 0 or weight_decay < 0:
        raise ArgumentError(
            "Needed a positive norm and degree and a weight decay of at least 0; found "
            f"{norm}, {degree} and {weight_decay}."
        )
    values = outputs.detach().double()

    def growth(octave: float) -> float:
        factor = 2.0**octave
        pull = 2 * weight_decay * (factor * norm) ** 2
        return growth_rate(values * factor**degree, loss, degree) - pull

    octaves = [k / _PER_OCTAVE for k in range(_TOP * _PER_OCTAVE, _BOTTOM * _PER_OCTAVE - 1, -1)]
    # At large norms the derivative of a cross-entropy underflows to 0, which says nothing.
    known = [(octave, rate) for octave in octaves if (rate := growth(octave))]
    if not known:
        return math.nan
    if known[0][1] > 0:
        return math.inf
    for (above, _), (below, rate) in itertools.pairwise(known):
        if rate > 0:
            return norm * 2.0 ** _crossing(growth, below, above)
    return 0.0


def growth_rate(outputs: Tensor, loss: OutputLoss, degree: float) -> float:
    """Return d|theta|^2/dt of gradient flow from the outputs alone, -2 k sum_i (dL/df_i) f_i."""
    values = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(values), values)
    return -2 * degree * float((gradient * values.detach()).sum())


def _crossing(growth: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if growth(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NormFlow(Result, kind="norm flow"):
    """Growth of the squared norm over a stretch of time, as :func:`norm_flow` measures it.

    Attributes:
        provenance: The model and the versions.
        time: The length of the stretch: steps times step size.
        degree: The degree of homogeneity that was used.
        step_sizes: The step sizes, descending.
        columns: One value per step size; see :meth:`frame`.
    """

    time: float
    degree: float
    step_sizes: tuple[float, ...]
    columns: dict[str, Tensor]

    def frame(self) -> pd.DataFrame:
        """Return one row per step size, and a last one for steps of size 0.

        Columns, all changes of |theta|^2: ``measured``, from the parameters before and after;
        ``gradient``, -2 <theta, grad L> summed over the steps; ``outputs``, the same by Euler's
        theorem, from the outputs alone, which is equal only for a homogeneous network;
        ``step_term``, h^2 |grad L|^2 summed over the steps. The last row is extrapolated from the
        two smallest step sizes.
        """
        index = pd.Index([*self.step_sizes, 0.0], name="step_size")
        first, second = self.step_sizes[-2:]
        rows = {
            name: [*values.tolist(), _extrapolated(first, second, values)]
            for name, values in self.columns.items()
        }
        return pd.DataFrame(rows, index=index)

    @property
    def error(self) -> float:
        """The relative difference between measurement and Euler's formula at steps of size 0."""
        limit = self.frame().loc[0.0]
        return abs(float(limit["measured"] / limit["outputs"]) - 1)

    def plot(self, title: str | None = None) -> Figure:
        """Draw what was measured and the two formulas against the step size."""
        named = title or f"Change of the squared norm over a time of {self.time:g}"
        columns = ["measured", "gradient", "outputs"]
        frame = self.frame().rename_axis("step size")
        return growth_figure(frame, named, x="step size", columns=columns, log_x=False, log_y=False)


def norm_flow(
    model: nn.Module,
    inputs: Any,
    loss: OutputLoss,
    *,
    time: float = 0.1,
    steps: Sequence[int] = (16, 32, 64, 128),
    degree: float | None = None,
    forward: Forward | None = None,
) -> NormFlow:
    """Follow the squared norm along gradient descent with ever smaller steps.

    Args:
        model: Any module whose output is a tensor.
        inputs: What it is called with; see :func:`paper.degrees.degree_of_homogeneity`.
        loss: A differentiable function of the outputs.
        time: The length of the stretch, the same for every number of steps.
        steps: Numbers of steps, at least two, ascending.
        degree: The degree of homogeneity of the outputs; None measures it.
        forward: Runs the model as ``forward(model, inputs)``; None calls it with the inputs.

    Raises:
        ArgumentError: Fewer than two numbers of steps, or a time that is not positive.
        NonFiniteError: Parameters became NaN or infinite; the time is too long for the steps.

    Example:
        >>> from torch import nn
        >>> import torch
        >>> from paper.flow import norm_flow
        >>> net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 1, bias=False))
        >>> flow = norm_flow(net, torch.ones(4, 3), lambda f: torch.exp(-f).mean(), time=0.01)
        >>> flow.error < 1e-4
        True
    """
    counts = tuple(sorted(set(steps)))
    if len(counts) < 2 or counts[0] < 1 or not time > 0:
        raise ArgumentError(
            f"Needed a positive time and two numbers of steps; found {time} and {list(steps)}."
        )
    run = forward or call
    if degree is None:
        degree = degree_of_homogeneity(model, inputs, forward=run).value
    rows = [_walk(model, doubled(inputs), loss, run, time / n, n, degree) for n in counts]
    columns = dict(zip(_FLOW, torch.tensor(rows, dtype=torch.float64).T, strict=True))
    sizes = tuple(time / n for n in counts)
    return NormFlow(Provenance(type(model).__name__), time, degree, sizes, columns)


def _walk(
    model: nn.Module,
    inputs: Any,
    loss: OutputLoss,
    run: Forward,
    size: float,
    steps: int,
    degree: float,
) -> list[float]:
    walker = in_double(model).eval()
    parameters = trainable(walker)
    before = squares(parameters)
    sums = [0.0, 0.0, 0.0]
    with kept_random_state():
        for _ in range(steps):
            outputs = run(walker, inputs)
            gradients = gradients_of(loss(outputs), parameters)
            pairs = list(zip(parameters, gradients, strict=True))
            sums[0] -= 2 * size * sum(float((p.detach() * g).sum()) for p, g in pairs)
            sums[1] += size * growth_rate(outputs, loss, degree)
            sums[2] += size**2 * squares(gradients)
            move(parameters, gradients, size)
    measured = squares(parameters) - before
    if not torch.tensor([measured, *sums]).isfinite().all():
        raise NonFiniteError(
            f"In steps of {size:g} the parameters became NaN or infinite. Shorten the time."
        )
    return [measured, *sums]


def trainable(model: nn.Module) -> list[Tensor]:
    """Return a model's parameters, all with gradients on; tied ones once."""
    return [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss; zero for parameters that it does not depend on."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def move(parameters: Sequence[Tensor], gradients: Sequence[Tensor], size: float) -> None:
    """Take one step of gradient descent."""
    with torch.no_grad():
        torch._foreach_add_(list(parameters), list(gradients), alpha=-size)


def squares(tensors: Sequence[Tensor]) -> float:
    """Return the sum of squares over all tensors."""
    return sum(float(tensor.detach().square().sum()) for tensor in tensors)


def _extrapolated(first: float, second: float, values: Tensor) -> float:
    """Extrapolate the values at the two smallest step sizes to 0 (Richardson)."""
    ratio = first / second
    return float((ratio * values[-1] - values[-2]) / (ratio - 1))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Descent(Result, kind="descent"):
    """A run of gradient descent, as :func:`descend` records it.

    Attributes:
        provenance: The model and the versions.
        degree: The degree of homogeneity that was used.
        weight_decay: lambda.
        steps: The recorded steps.
        columns: One value per step; see :meth:`frame`.
    """

    degree: float
    weight_decay: float
    steps: tuple[int, ...]
    columns: dict[str, Tensor]

    def frame(self) -> pd.DataFrame:
        """Return one row per recorded step.

        Columns: ``norm`` of the parameters; ``loss`` (without the penalty); ``accuracy``, NaN where
        none was asked for; ``gradient``, the growth rate -2 <theta, grad L> of the squared norm;
        ``outputs``, the same from the outputs alone by Euler's theorem; ``decay``, 2 lambda
        |theta|^2, which counteracts it; ``step_term``, h |grad|^2, what steps of size h add;
        ``stationary``, the norm at which growth stops along the present direction.
        """
        return pd.DataFrame(
            {name: values.tolist() for name, values in self.columns.items()},
            index=pd.Index(self.steps, name="step"),
        )

    @property
    def growth_per_doubling(self) -> float:
        """The share by which the norm grew while the number of steps last doubled."""
        norms = self.frame()["norm"]
        half = norms[norms.index <= norms.index[-1] / 2]
        return float(norms.iloc[-1] / half.iloc[-1] - 1)

    def plot(self, title: str | None = None) -> Figure:
        """Draw the norm, and the norm at which it stops growing, against the step."""
        frame = self.frame().replace(math.inf, math.nan)
        drawn = ["norm", *(["stationary"] if frame["stationary"].notna().any() else [])]
        return growth_figure(frame, title or f"Gradient descent: {self.provenance}", columns=drawn)


def descend(
    model: nn.Module,
    inputs: Any,
    loss: OutputLoss,
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
    """Run gradient descent on a copy in float64; record the norm and what the theory says of it.

    Args:
        model: Any module whose output is a tensor.
        inputs: What it is called with; see :func:`paper.degrees.degree_of_homogeneity`.
        loss: A differentiable function of the outputs.
        steps: How many steps to take.
        learning_rate: The size of a step.
        weight_decay: lambda of the penalty lambda/2 |theta|^2.
        degree: The degree of homogeneity of the outputs; None measures it.
        accuracy: A function of the outputs to record as well.
        records: Which steps to record; None is step 0, the powers of two and the last.
        forward: Runs the model as ``forward(model, inputs)``; None calls it with the inputs.
        progress: Whether to show a progress bar.

    Raises:
        ArgumentError: No steps, a learning rate that is not positive, or a negative weight decay.
        NonFiniteError: The loss became NaN or infinite; the learning rate is too large.

    Example:
        >>> from torch import nn
        >>> import torch
        >>> from paper.flow import descend
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
    kept = set(log_spaced_steps(steps) if records is None else records) | {0, steps}
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
        for name in _DESCENT
    }
    name = Provenance(type(model).__name__)
    return Descent(name, degree, weight_decay, tuple(rows), columns)


def _record(
    parameters: list[Tensor],
    gradients: list[Tensor],
    outputs: Tensor,
    loss: OutputLoss,
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
