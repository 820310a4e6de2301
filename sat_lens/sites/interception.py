"""Intercepting the operations that make attention, and any run of a module.

Every way to call an operation in PyTorch passes through a torch function mode, so this works for
attention code that offers no hook at all. What tells the attention softmax from others (a
router's, say) is its form: over the last axis of a tensor with at least three.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sat_lens.attention import AttentionCall
from sat_lens.errors import SatLensError, UnsupportedModelError

# (the tensor that softmax received, the call itself) -> the pattern to use in its place
OnSoftmax = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
OnFused = Callable[[AttentionCall], Tensor]

_KIND: dict[Any, str] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax), "softmax"),
    **dict.fromkeys((F.dropout, torch.dropout), "dropout"),
    F.scaled_dot_product_attention: "fused",
    F.multi_head_attention_forward: "whole",
}
_FUSED_ARGUMENTS = [field.name for field in dataclasses.fields(AttentionCall)]


class Interception(TorchFunctionMode):
    """Hands the operations that make attention to handlers while the block lasts.

    Args:
        softmax: Gets every attention softmax, and returns the pattern to use in its place.
        fused: Gets every fused attention, and returns the output to use in its place.
        whole: Is called when PyTorch's own multi-head attention runs, from queries to outputs.
            What that calls inside, fused or not, passes by all interception.
        dropout: Is called when something is dropped out at random, inside fused attention too.
    """

    def __init__(
        self,
        *,
        softmax: OnSoftmax | None = None,
        fused: OnFused | None = None,
        whole: Callable[[], None] | None = None,
        dropout: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.fused = fused
        self.whole = whole
        self.dropout = dropout

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route one PyTorch call."""
        kwargs = kwargs or {}
        kind = _KIND.get(func)
        if kind is None:
            return func(*args, **kwargs)
        if kind == "softmax" and self.softmax is not None and _is_attention(args, kwargs):
            return _call_softmax(self.softmax, func, args, kwargs)
        if kind == "fused" and (self.fused is not None or self.dropout is not None):
            call = AttentionCall(**dict(zip(_FUSED_ARGUMENTS, args, strict=False)), **kwargs)
            if self.dropout is not None and call.dropout_p > 0:
                self.dropout()
            return call.run() if self.fused is None else self.fused(call)
        if kind == "whole" and self.whole is not None:
            self.whole()
        if kind == "dropout" and self.dropout is not None and _drops_out(args, kwargs):
            self.dropout()
        return func(*args, **kwargs)


def _call_softmax(
    handle: OnSoftmax, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    names = ["input", "dim", "dtype"]
    if func is F.softmax:
        names.insert(2, "_stacklevel")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    scores = call.pop("input")
    result_dtype = call.get("dtype") or scores.dtype
    if scores.is_cuda and torch.is_autocast_enabled("cuda"):
        # There autocast takes softmax to float32, and leaves the pattern so.
        result_dtype = torch.promote_types(result_dtype, torch.float32)
    return handle(scores, lambda x: func(x, **call).to(result_dtype))


def _is_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    scores = kwargs.get("input", args[0] if args else None)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(scores, Tensor) or scores.dim() < 3:
        return False
    return dim in (-1, scores.dim() - 1)


def _drops_out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0


# Code around every run of a module, put on and taken off in any order.


@contextlib.contextmanager
def wrap_forward(
    module: nn.Module, around: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Iterator[None]:
    """While the block lasts, run ``module.forward`` inside ``around()``, a fresh one each call.

    The instance's ``forward`` is wrapped rather than hooked, because PyTorch's forward hooks do
    not run when a KeyboardInterrupt passes and a context manager does.
    """
    wrapped = _WrappedForward(module.forward, module.__dict__.get("forward"), around)
    module.__dict__["forward"] = wrapped
    try:
        yield
    finally:
        wrapped.ended = True
        _remove_ended(module)


class Uncopied:
    """What stays on a model while a block lasts, and would outlast it on a copy."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SatLensError(
            "A model cannot be copied or pickled while its attention is intercepted: the copy "
            "would stay so. Copy it outside of the block."
        )


@dataclasses.dataclass(eq=False)
class _WrappedForward(Uncopied):
    """A ``forward`` around a module's own, or around another wrapped one."""

    forward: Callable[..., Any]
    below: Any
    around: Callable[[], contextlib.AbstractContextManager[Any]]
    ended: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ended:
            return self.forward(*args, **kwargs)
        with self.around():
            return self.forward(*args, **kwargs)


def surrounding(module: nn.Module) -> Iterator[Callable[[], Any]]:
    """What runs around every run of a module, from the outside in."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, _WrappedForward):
        if not forward.ended:
            yield forward.around
        forward = forward.below


def _remove_ended(module: nn.Module) -> None:
    """Take off what has ended from the outside in; blocks need not end in the order they began."""
    outermost = module.__dict__.get("forward")
    while isinstance(outermost, _WrappedForward) and outermost.ended:
        outermost = outermost.below
    if outermost is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = outermost


# What torch.compile compiled calls neither a function mode nor a wrapped forward.

_compiler_lock = threading.Lock()
_uncompiled: list[Any] = []  # how the compiler was set before, and an entry for each block since


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run all that torch.compile compiled as it was before, while the block lasts.

    Raises:
        UnsupportedModelError: The block itself is in a compiled function.
    """
    if "torch._dynamo" not in sys.modules:
        # Nothing is compiled, and to import the compiler takes seconds.
        yield
        return
    try:
        with _compiler_lock:
            # Blocks need not end in the order in which they began.
            _uncompiled.append(None if _uncompiled else torch.compiler.set_stance("force_eager"))
    except RuntimeError as error:
        raise UnsupportedModelError(
            "Attention is changed or observed inside a compiled function, where it cannot be "
            "reached. Put the block around the call of what is compiled, which runs uncompiled "
            "there, or mark the function with @torch.compiler.disable."
        ) from error
    try:
        yield
    finally:
        with _compiler_lock:
            if len(_uncompiled) == 1:
                _uncompiled[0].__exit__(None, None, None)
            _uncompiled.pop()
