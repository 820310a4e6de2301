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
from einops import EinopsError, rearrange
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
    """Hands every attention softmax that runs inside the block to ``handle``."""

    def __init__(self, handle: Handler) -> None:
        super().__init__()
        self.handle = handle

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
        result_dtype = call.get("dtype") or scores.dtype
        return self.handle(scores, lambda x: func(x, **call).to(result_dtype))


class DropoutWatch(TorchFunctionMode):
    """Notes in ``seen`` whether anything was dropped out at random inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route one PyTorch call."""
        kwargs = kwargs or {}
        self.seen |= func in _DROPOUT and _is_active(args, kwargs)
        self.seen |= func in _FUSED and kwargs.get("dropout_p", 0.0) > 0
        return func(*args, **kwargs)


# Orders of axes in which models keep their scores -> the order that edits see. Batch and head may
# be packed into one axis (XGLM), queries may be cut into blocks (LongT5) or stand before the heads
# (LED), and heads may stand in groups that share a key.
_LAYOUTS = {
    "b h q k": "b h q k",
    "b q h k": "b h q k",
    "(b h) q k": "b h q k",
    "b block h q k": "(b block) h q k",
    "b group h q k": "b (group h) q k",
}


def layout_of(shape: Sequence[int], hint: int | None) -> str | None:
    """Tell the order of axes in which a softmax keeps its heads, or None if that is not clear.

    Args:
        shape: The shape of the tensor that softmax received.
        hint: The number of heads that the configuration claims. Four axes can do without.

    Example:
        >>> layout_of([2, 4, 8, 8], hint=4), layout_of([2, 8, 4, 9], hint=4)
        ('b h q k', 'b q h k')
        >>> layout_of([8, 5, 5], hint=4), layout_of([8, 5, 5], hint=None)
        ('(b h) q k', None)
    """
    if len(shape) == 4:
        # A tower may have other numbers of heads than the configuration claims for the text.
        is_square = shape[2] == shape[3]
        return "b q h k" if shape[1] != hint == shape[2] and not is_square else "b h q k"
    if not hint:
        return None
    if len(shape) == 3 and shape[0] % hint == 0:
        return "(b h) q k"
    if len(shape) == 5 and shape[2] == hint:
        return "b block h q k"
    if len(shape) == 5 and shape[1] * shape[2] == hint:
        return "b group h q k"
    return None


def heads_in(shape: Sequence[int], layout: str, hint: int | None) -> int:
    """Count the heads in a softmax of that shape and layout.

    Example:
        >>> heads_in([2, 4, 8, 8], "b h q k", hint=None), heads_in([8, 5, 5], "(b h) q k", hint=4)
        (4, 4)
    """
    return shape[layout.split().index("h")] if len(shape) == 4 else hint or 0


def as_heads(scores: Tensor, layout: str, n_heads: int) -> Float[Tensor, "batch head query key"]:
    """View what a softmax received as ``[batch, head, query, key]``.

    Raises:
        UnsupportedModelError: The tensor does not have that layout.

    Example:
        >>> import torch
        >>> as_heads(torch.zeros(6, 5, 5), "(b h) q k", n_heads=3).shape
        torch.Size([2, 3, 5, 5])
    """
    try:
        heads = rearrange(
            scores, f"{layout} -> {_LAYOUTS[layout]}", **_sizes(layout, scores, n_heads)
        )
    except EinopsError:
        heads = None
    if heads is None or heads.shape[1] != n_heads:
        raise UnsupportedModelError(
            f"Needed attention scores of {n_heads} heads with the axes {layout!r}, found a softmax "
            f"over a tensor of shape {list(scores.shape)}. If the model has changed, call "
            "sat_lens.attention_sites(model, *your_inputs) to look at it again."
        )
    return heads


def from_heads(heads: Float[Tensor, "batch head query key"], layout: str, like: Tensor) -> Tensor:
    """Undo :func:`as_heads`: give ``heads`` the layout and shape of ``like``."""
    sizes = _sizes(layout, like, heads.shape[1])
    return rearrange(heads, f"{_LAYOUTS[layout]} -> {layout}", **sizes)


def _sizes(layout: str, scores: Tensor, n_heads: int) -> dict[str, int]:
    if layout == "(b h) q k":
        return {"h": n_heads}
    packed = next((axis for axis in ("block", "group") if axis in layout), None)
    return {packed: scores.shape[1]} if packed else {}


def _is_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    scores = kwargs.get("input", args[0] if args else None)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(scores, Tensor) or scores.dim() < 3:
        return False
    return dim in (-1, scores.dim() - 1)


def _is_active(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0
