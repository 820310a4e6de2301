"""Many models of one shape trained together: their parameters stacked, one step for all.

Each cell of a grid has its own learning rate and weight decay, and otherwise shares its initial
parameters and its batches with the others. One forward and backward pass serves all cells
(``torch.func``), which saves the overhead that dominates small models. A cell's numbers are those
of the model trained alone with ``torch.optim``, up to rounding.

When not to use it: for one model, or for models large enough to keep the processor busy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from sat_lens.errors import ArgumentError

Stack = dict[str, Tensor]
TokenLoss = Callable[[Tensor, Tensor], Tensor]
# How many cells share a forward pass; it bounds the memory.
AT_ONCE = 128


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) with a learning rate and a weight decay for each cell.

    The order of operations is that of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        lr: Float[Tensor, " cell"],
        wd: Float[Tensor, " cell"],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.lr, self.wd, self.betas, self.eps = lr, wd, betas, eps
        self.steps = 0
        self.first: Stack = {}
        self.second: Stack = {}

    def step(self, parameters: Stack, gradients: Stack) -> None:
        """Take one step in every cell, in place."""
        self.steps += 1
        beta1, beta2 = self.betas
        for name, parameter in parameters.items():
            gradient = gradients[name]
            first = self.first.setdefault(name, torch.zeros_like(parameter))
            second = self.second.setdefault(name, torch.zeros_like(parameter))
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = second.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(self.eps)
            rate = _per_cell(self.lr, parameter)
            parameter.mul_(1 - rate * _per_cell(self.wd, parameter))
            parameter.sub_(rate / (1 - beta1**self.steps) * (first / scale))


class SGD:
    """Gradient descent with momentum; weight decay is added to the gradient."""

    def __init__(
        self, lr: Float[Tensor, " cell"], wd: Float[Tensor, " cell"], momentum: float = 0.0
    ) -> None:
        self.lr, self.wd, self.momentum = lr, wd, momentum
        self.velocity: Stack = {}

    def step(self, parameters: Stack, gradients: Stack) -> None:
        """Take one step in every cell, in place."""
        for name, parameter in parameters.items():
            push = gradients[name] + _per_cell(self.wd, parameter) * parameter
            if self.momentum:
                known = self.velocity.get(name)
                push = push if known is None else known.mul_(self.momentum).add_(push)
                self.velocity[name] = push
            parameter.sub_(_per_cell(self.lr, parameter) * push)


Optimiser = AdamW | SGD


@dataclasses.dataclass(frozen=True, eq=False)
class CellsRun:
    """The cells after training.

    Attributes:
        parameters: Stacked parameters, ``[cell, ...]`` each.
        broke_at: The first step at which a cell's loss was not finite, 0 if it always was.
        steps: How many steps were taken.
        complete: Whether the run went to its end.
    """

    parameters: Stack
    broke_at: Int[Tensor, " cell"]
    steps: int
    complete: bool


def stacked(model: nn.Module, cells: int) -> Stack:
    """Return a model's parameters, copied once for each cell.

    Raises:
        ArgumentError: There are no cells.
    """
    if cells < 1:
        raise ArgumentError(f"A grid needs at least one cell; found {cells}.")
    return {
        name: parameter.detach().expand(cells, *parameter.shape).clone()
        for name, parameter in model.named_parameters()
    }


def cell(parameters: Stack, index: int) -> Stack:
    """Return one cell's parameters."""
    return {name: parameter[index] for name, parameter in parameters.items()}


def losses_and_gradients(
    model: nn.Module, parameters: Stack, tokens: Int[Tensor, "batch position"], loss: TokenLoss
) -> tuple[Float[Tensor, " cell"], Stack]:
    """Return every cell's loss and its gradient."""
    losses: list[Tensor] = []
    gradients: Stack = {name: torch.empty_like(stack) for name, stack in parameters.items()}

    def of_cell(own: Stack) -> Tensor:
        return loss(functional_call(model, own, (tokens,)), tokens)

    for start in range(0, _cells(parameters), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        leaves = {name: stack[part].requires_grad_() for name, stack in parameters.items()}
        found = vmap(of_cell)(leaves)
        # Cells share nothing, so the gradient of the sum is each cell's own.
        parts = torch.autograd.grad(found.sum(), list(leaves.values()))
        for name, gradient in zip(leaves, parts, strict=True):
            gradients[name][part] = gradient
        losses.append(found.detach())
    return torch.cat(losses), gradients


def train_cells(
    model: nn.Module,
    parameters: Stack,
    optimiser: Optimiser,
    batches: Iterable[Int[Tensor, "batch position"]],
    loss: TokenLoss,
    *,
    total: int | None = None,
    progress: bool = True,
    name: str = "grid",
) -> CellsRun:
    """Train all cells on the same batches; an interrupt keeps the steps that were finished.

    Args:
        model: The model whose shape the cells have; its own parameters are not used.
        parameters: Stacked parameters; changed in place.
        optimiser: An optimiser made for as many cells.
        batches: One batch of tokens for each step.
        loss: A function of logits and tokens.
        total: How many batches there are, for the progress bar.
        progress: Whether to show a progress bar.
        name: What the bar calls the run.
    """
    broke_at = torch.zeros(_cells(parameters), dtype=torch.long)
    steps, complete = 0, True
    try:
        for tokens in tqdm(batches, desc=name, total=total, unit="step", disable=not progress):
            losses, gradients = losses_and_gradients(model, parameters, tokens, loss)
            optimiser.step(parameters, gradients)
            steps += 1
            broke_at[(broke_at == 0) & ~losses.isfinite()] = steps
    except KeyboardInterrupt:
        complete = False
    return CellsRun(parameters, broke_at, steps, complete)


def _cells(parameters: Stack) -> int:
    return len(next(iter(parameters.values())))


def _per_cell(values: Float[Tensor, " cell"], stack: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in stack.shape[1:]))
