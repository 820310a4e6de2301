"""Edits as TransformerLens hooks, for workflows that take hooks and nothing else.

A hook cannot tell that it was never called, and a pattern has lost what rounding and underflow took
from the scores, so :func:`sat_lens.saturate` is preferred wherever it can be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.errors import UnsupportedModelError
from sat_lens.intervention.edits import Edit, put

Hook = Callable[..., Tensor]


def scores_hook(edit: Edit) -> Hook:
    """Make a hook for ``hook_attn_scores``, where that carries what the softmax receives."""

    def hook_fn(scores: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001 - TransformerLens names it
        new = edit(scores)
        return scores if new is None else put(scores, new.heads, new.scores.to(scores.dtype))

    return hook_fn


def pattern_hook(edit: Edit) -> Hook:
    """Make a hook for ``hook_pattern``, where that carries what the softmax gave.

    The logarithm of a pattern is its scores up to a constant per row, and neither an inverse
    temperature nor a tie depends on that constant. Keys whose probability underflowed to 0 stay
    at 0, which is right for inverse temperatures of 1 and more.

    Raises:
        UnsupportedModelError: In the run: the pattern is in half precision, where rounding makes
            many more entries equal than scores are.
    """

    def hook_fn(pattern: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001 - TransformerLens names it
        if torch.finfo(pattern.dtype).bits < 32:
            raise UnsupportedModelError(
                f"A hook on patterns needs float32, and this pattern is in {pattern.dtype}: its "
                "rounding makes ties that the scores do not have. Use "
                "`with sat_lens.saturate(model): ...`, which reaches the scores."
            )
        new = edit(_logarithm(pattern))
        if new is None:
            return pattern
        # A row of zeros has no visible key and stays one.
        empty = new.scores.amax(-1, keepdim=True) == -math.inf
        rows = new.scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return put(pattern, new.heads, rows.to(pattern.dtype))

    return hook_fn


def _logarithm(
    pattern: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch head query key"]:
    """Take the logarithm, -inf at 0, with a gradient that is finite there."""
    zero = pattern == 0
    return pattern.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)
