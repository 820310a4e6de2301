"""The derivative of the squared norm under gradient flow, held against gradient descent.

Under gradient flow d|theta|^2/dt = -2 <theta, grad L>, and for outputs f of degree k this is
-2 k sum_i (dL/df_i) f_i (Euler). A step of gradient descent of size h adds h^2 |grad L|^2 to it,
which is why descent with large steps grows norms that flow would leave alone. The same stretch of
time is walked in ever smaller steps, and the limit is extrapolated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from sat_lens import figures
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.norms.measures import kept_random_state
from sat_lens.results import Provenance
from sat_lens.theory.degrees import Forward, call, degree_of_homogeneity, doubled, in_double
from sat_lens.theory.stationary import Loss, growth_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("measured", "gradient", "outputs", "step_term")


@dataclasses.dataclass(frozen=True, eq=False)
class NormFlow:
    """Growth of the squared norm over a stretch of time; made by :func:`norm_flow`.

    Attributes:
        provenance: The model and the versions.
        time: The length of the stretch: steps times step size.
        degree: The degree of homogeneity that was used.
        step_sizes: The step sizes, descending.
        columns: One value a step size; see :meth:`frame`.
    """

    provenance: Provenance
    time: float
    degree: float
    step_sizes: tuple[float, ...]
    columns: dict[str, Tensor]

    def frame(self) -> pd.DataFrame:
        """Return one row a step size, and a last one for steps of size 0.

        Columns, all changes of |theta|^2: ``measured``, from the parameters before and after;
        ``gradient``, -2 <theta, grad L> summed over the steps; ``outputs``, the same by Euler's
        theorem, from outputs alone, and equal to it only for a homogeneous network;
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
        """The relative difference of measurement and Euler's formula at steps of size 0."""
        limit = self.frame().loc[0.0]
        return abs(float(limit["measured"] / limit["outputs"]) - 1)

    def plot(self, title: str | None = None) -> Figure:
        """Draw what was measured and the two formulas against the step size."""
        named = title or f"Change of the squared norm over a time of {self.time:g}"
        columns = ["measured", "gradient", "outputs"]
        frame = self.frame().rename_axis("step size")
        return figures.growth_figure(
            frame, named, x="step size", columns=columns, log_x=False, log_y=False
        )


def norm_flow(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    *,
    time: float = 0.1,
    steps: Sequence[int] = (16, 32, 64, 128),
    degree: float | None = None,
    forward: Forward | None = None,
) -> NormFlow:
    """Follow the squared norm along gradient descent with ever smaller steps (float64, on copies).

    Args:
        model: Any module whose output is a tensor.
        inputs: What it is called with; see :func:`degree_of_homogeneity`.
        loss: A function of the outputs, differentiable.
        time: The length of the stretch, the same for every number of steps.
        steps: Numbers of steps, at least two, ascending.
        degree: The degree of homogeneity of the outputs; None measures it.
        forward: Runs the model, as ``forward(model, inputs)``; None calls it.

    Raises:
        ArgumentError: Fewer than two numbers of steps, or a time that is not positive.
        NonFiniteError: The parameters left the numbers; the time is too long for the steps.

    Example:
        >>> from torch import nn
        >>> import torch
        >>> from sat_lens.theory import norm_flow
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
    columns = dict(zip(COLUMNS, torch.tensor(rows, dtype=torch.float64).T, strict=True))
    sizes = tuple(time / n for n in counts)
    return NormFlow(Provenance(type(model).__name__), time, degree, sizes, columns)


def _walk(
    model: nn.Module, inputs: Any, loss: Loss, run: Forward, size: float, steps: int, degree: float
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
    """Give a model's parameters, all asking for gradients; tied ones once."""
    return [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Give the gradients of a loss; zero for parameters that it does not depend on."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def move(parameters: Sequence[Tensor], gradients: Sequence[Tensor], size: float) -> None:
    """Take one step of gradient descent."""
    with torch.no_grad():
        torch._foreach_add_(list(parameters), list(gradients), alpha=-size)


def squares(tensors: Sequence[Tensor]) -> float:
    """Sum the squares of all tensors."""
    return sum(float(tensor.detach().square().sum()) for tensor in tensors)


def _extrapolated(first: float, second: float, values: Tensor) -> float:
    """Take errors that shrink with the step size to their limit (Richardson)."""
    ratio = first / second
    return float((ratio * values[-1] - values[-2]) / (ratio - 1))
