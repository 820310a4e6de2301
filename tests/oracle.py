"""A second road to the same numbers: softmax itself, replaced in PyTorch, by the definition.

Nothing of sat_lens is used here. While one of the chosen attention modules runs, every name under
which PyTorch offers softmax leads to a function that computes, in float64 and row by row, the
softmax of c times the scores, or in the limit an equal share for each key that attains the
row's maximum. It is slow and knows only what the case tells it: the number of heads, and that
a score below -5,000 means a masked key (no score of a zoo model comes near that).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MASKED = -5_000.0


def rescaled_rows(scores: Tensor, c: float) -> Tensor:
    """Softmax of c times the scores over the last axis, in float64; dead rows give zero.

    Which keys are equal is decided in float32, as the definition of exact ties has it.
    """
    exact = scores.float().double() if c == math.inf else scores.double()
    visible = exact >= MASKED
    top = exact.detach().where(visible, -math.inf).amax(-1, keepdim=True)
    if c == math.inf:
        weight = (exact == top).double()
    else:
        # Masked keys get a harmless score first: a gradient through exp(-inf) would be NaN.
        gap = torch.where(visible, exact - top, 0.0)
        weight = torch.exp(c * gap) * visible
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1.0)


def head_of_each_row(scores: Tensor, n_heads: int) -> Tensor:
    """The head that each row belongs to, in the shape of the scores' leading axes."""
    shape = scores.shape
    if scores.dim() == 3:  # batch and head share the first axis, the head runs faster
        heads = (torch.arange(shape[0]) % n_heads)[:, None]
    elif scores.dim() == 4 and shape[1] == n_heads:
        heads = torch.arange(n_heads)[None, :, None]
    elif scores.dim() == 4:  # the query before the head
        assert shape[2] == n_heads
        heads = torch.arange(n_heads)[None, None, :]
    else:  # queries in blocks: batch, block, head, query
        assert scores.dim() == 5
        assert shape[2] == n_heads
        heads = torch.arange(n_heads)[None, None, :, None]
    return heads.expand(shape[:-1])


class _Oracle:
    def __init__(self, chosen: Mapping[str, Sequence[int]], c: float, n_heads: int) -> None:
        self.chosen = chosen
        self.c = c
        self.n_heads = n_heads
        self.running: list[str] = []
        self.replaced = dict.fromkeys(chosen, 0)

    def pattern(self, scores: Tensor, soft: Tensor) -> Tensor:
        path = self.running[-1]
        self.replaced[path] += 1
        heads = head_of_each_row(scores, self.n_heads)
        mine = torch.isin(heads, torch.tensor(list(self.chosen[path])))
        alive = scores.detach().amax(-1) >= MASKED
        new = rescaled_rows(scores, self.c).to(soft.dtype)
        return torch.where((mine & alive)[..., None], new, soft)

    def standing_in_for(self, original: Any) -> Any:
        def softmax(*args: Any, **kwargs: Any) -> Tensor:
            scores = kwargs.get("input", args[0] if args else None)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            where, self.running = self.running, []  # softmax calls softmax: count it once
            try:
                soft = original(*args, **kwargs)
            finally:
                self.running = where
            is_attention = self.running and scores.dim() >= 3 and dim in (-1, scores.dim() - 1)
            return self.pattern(scores, soft) if is_attention else soft

        return softmax


@contextlib.contextmanager
def rescaled_softmax(
    model: Any, chosen: Mapping[str, Sequence[int]], c: float, n_heads: int
) -> Iterator[None]:
    """Run the model with softmax replaced in the named modules, for the given heads.

    Args:
        model: Any module that calls softmax for its attention.
        chosen: Path of an attention module -> its heads.
        c: Factor on the scores; ``math.inf`` is the limit.
        n_heads: How many heads each of these modules has.
    """
    oracle = _Oracle(chosen, c, n_heads)
    with contextlib.ExitStack() as stack:
        for path in chosen:
            module = model.get_submodule(path)
            enter = module.register_forward_pre_hook(
                lambda _module, _args, path=path: oracle.running.append(path)
            )
            leave = module.register_forward_hook(
                lambda _module, _args, _out: oracle.running.pop() and None, always_call=True
            )
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        for owner in (torch.nn.functional, torch, torch.Tensor, torch.special):
            stand_in = oracle.standing_in_for(owner.softmax)
            stack.enter_context(mock.patch.object(owner, "softmax", stand_in))
        yield
    idle = [path for path, times in oracle.replaced.items() if times == 0]
    assert not idle, f"the oracle saw no softmax in {idle}"
