"""Watching or replacing the attention softmax while an attention module runs.

Every way to call softmax in PyTorch passes through a torch function mode, so this works for
attention code that offers no hook at all. What tells the attention softmax from others (a
router's, say) is its form: over the last axis of a tensor with at least three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sat_lens.errors import UnsupportedModelError

# (the tensor that softmax received, the call itself) -> the pattern to use in its place
Handler = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_FUSED = frozenset({F.scaled_dot_product_attention})
_DROPOUT = frozenset({F.dropout, torch.dropout})


class AttentionSoftmax(TorchFunctionMode):
    """Hands every attention softmax that runs inside the block to ``handle``.

    ``fused`` and ``dropout`` say whether a fused attention kernel or an active dropout was seen.
    """

    def __init__(self, handle: Handler) -> None:
        super().__init__()
        self.handle = handle
        self.fused = False
        self.dropout = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route one PyTorch call."""
        kwargs = kwargs or {}
        if func in _SOFTMAX and _is_attention(args, kwargs):
            return self._softmax(func, args, kwargs)
        if func in _FUSED:
            self.fused = True
        elif func in _DROPOUT and _is_active_dropout(args, kwargs):
            self.dropout = True
        return func(*args, **kwargs)

    def _softmax(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        names = (
            ("input", "dim", "_stacklevel", "dtype")
            if func is F.softmax
            else ("input", "dim", "dtype")
        )
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        scores = call.pop("input")
        return self.handle(scores, lambda x: func(x, **call))


def as_heads(scores: Tensor, n_heads: int) -> Float[Tensor, "batch head query key"]:
    """View what a softmax received as ``[batch, head, query, key]``.

    Batch and head may be packed into one axis (XGLM), the query axis may be cut into blocks
    (LongT5: ``[batch, block, head, query, key]``), and heads may stand in groups
    (``[batch, group, head, query, key]``).

    Raises:
        UnsupportedModelError: The heads cannot be told apart in this shape.

    Example:
        >>> import torch
        >>> as_heads(torch.zeros(6, 5, 5), n_heads=3).shape
        torch.Size([2, 3, 5, 5])
    """
    shape = scores.shape
    if scores.dim() == 4 and shape[1] == n_heads:
        return scores
    if scores.dim() == 3 and shape[0] % n_heads == 0:
        return rearrange(scores, "(b h) q k -> b h q k", h=n_heads)
    if scores.dim() == 5 and shape[2] == n_heads:
        return rearrange(scores, "b block h q k -> (b block) h q k")
    if scores.dim() == 5 and shape[1] * shape[2] == n_heads:
        return rearrange(scores, "b group h q k -> b (group h) q k")
    raise UnsupportedModelError(
        f"Needed attention scores of {n_heads} heads, found a softmax over a tensor of shape "
        f"{list(shape)}, in which they cannot be told apart. Please report the architecture."
    )


def heads_in(shape: Sequence[int], hint: int | None) -> int | None:
    """Say how many heads a softmax of this shape serves; ``hint`` is what the configuration says.

    Example:
        >>> heads_in([2, 4, 8, 8], hint=None), heads_in([8, 5, 5], hint=4), heads_in([8, 5], hint=4)
        (4, 4, None)
    """
    if len(shape) == 4:
        return shape[1]
    if len(shape) == 3 and hint and shape[0] % hint == 0:
        return hint
    if len(shape) == 5 and hint in (shape[2], shape[1] * shape[2]):
        return hint
    return None


def _is_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    scores = kwargs.get("input", args[0] if args else None)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(scores, Tensor) or scores.dim() < 3:
        return False
    return dim in (-1, scores.dim() - 1)


def _is_active_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0
