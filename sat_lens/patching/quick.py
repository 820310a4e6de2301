"""Modules computed in less time while a replay runs, with the same results up to rounding.

When not to use it: where the smallest difference decides which key wins, as in a saturated run.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Forwards = Mapping[nn.Module, Callable[[Tensor], Tensor]]

# Rows that start on a processor's cache line are stored faster; 16 float32 fill one.
_LINE = 16


def quick_gelus(modules: Iterable[nn.Module]) -> Forwards:
    """Let PyTorch compute in one step the GELU that Hugging Face's GPT-2 computes in eight."""
    gelu = functools.partial(F.gelu, approximate="tanh")
    found = [module for module in modules if type(module).__name__ == "NewGELUActivation"]
    return {module: gelu for module in found if "forward" not in module.__dict__}


def aligned_unembedding(unembed: nn.Module) -> Forwards:
    """Let the rows of logits start on cache lines: GPT-2's vocabulary has 50,257 tokens.

    At 512 positions that saves a quarter of the product's time on a CPU. The bias is left out where
    it is the zero that TransformerLens puts there.
    """
    return {
        module: functools.partial(_aligned, module)
        for module in unembed.modules()
        if isinstance(module, nn.Linear) and _is_misaligned(module)
    }


@contextlib.contextmanager
def computed_by(forwards: Forwards) -> Iterator[None]:
    """Put functions in the place of modules' own while the block lasts."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def _is_misaligned(linear: nn.Linear) -> bool:
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
        and linear.out_features % _LINE > 0
    )


def _aligned(linear: nn.Linear, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
    rows = x.flatten(0, -2)
    width = math.ceil(linear.out_features / _LINE) * _LINE
    y = x.new_empty(len(rows), width)[:, : linear.out_features]
    torch.mm(rows, linear.weight.T, out=y)
    if linear.bias is not None and bool(linear.bias.any()):
        y += linear.bias
    return y.unflatten(0, x.shape[:-1])
