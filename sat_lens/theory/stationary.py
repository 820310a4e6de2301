"""The norm at which growth stops along a direction of parameter space.

Let the outputs f be homogeneous of degree k in the parameters and L a loss of the outputs. By
Euler's theorem <theta, grad f> = k f, so under gradient flow with weight decay lambda

    d|theta|^2/dt = -2 k sum_i (dL/df_i) f_i - 2 lambda |theta|^2.

Along the ray r theta/|theta| the outputs are (r/|theta|)^k f, so where the right hand side changes
sign is a matter of the present outputs alone. Without weight decay, and for a loss that is convex
in the outputs, that is the r at which the loss along the ray is least: below it the norm grows,
above it it shrinks. It is infinite where larger outputs always help, as they do when every example
is right and the loss is a cross-entropy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.errors import ArgumentError

Loss = Callable[[Tensor], Tensor]
# Powers of two of the present norm, from the top down: beyond them nothing is looked for.
_TOP, _BOTTOM, _PER_OCTAVE, _HALVINGS = 12, -12, 2, 40


def stationary_norm(
    outputs: Float[Tensor, "*outputs"],
    loss: Loss,
    *,
    norm: float,
    degree: float,
    weight_decay: float = 0.0,
) -> float:
    """Give the norm at which gradient flow neither grows nor shrinks the parameters.

    The direction of the parameters is held; where growth stops at several norms, the largest is
    given, because it is the one that larger norms fall back to.

    Args:
        outputs: The network's outputs at the present parameters.
        loss: A function of the outputs.
        norm: The present norm of the parameters.
        degree: The degree of homogeneity k of the outputs.
        weight_decay: lambda; the penalty is lambda/2 |theta|^2.

    Returns:
        The norm; infinity where growth does not stop within 12 doublings of the present norm, 0
        where the parameters shrink at every norm, NaN where the loss does not depend on it.

    Raises:
        ArgumentError: The norm or the degree is not positive, or weight decay is negative.

    Example:
        >>> import math
        >>> import torch
        >>> from sat_lens.theory import stationary_norm
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
    # Far out the derivative of a cross-entropy underflows to 0, which says nothing.
    known = [(octave, rate) for octave in octaves if (rate := growth(octave))]
    if not known:
        return math.nan
    if known[0][1] > 0:
        return math.inf
    for (above, _), (below, rate) in itertools.pairwise(known):
        if rate > 0:
            return norm * 2.0 ** _crossing(growth, below, above)
    return 0.0


def growth_rate(outputs: Tensor, loss: Loss, degree: float) -> float:
    """Give d|theta|^2/dt of gradient flow from the outputs alone, -2 k sum_i (dL/df_i) f_i."""
    values = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(values), values)
    return -2 * degree * float((gradient * values.detach()).sum())


def _crossing(growth: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if growth(middle) > 0 else (low, middle)
    return (low + high) / 2
