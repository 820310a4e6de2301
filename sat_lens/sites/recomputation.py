"""Blocks that hold again where backward runs a part of a forward pass a second time.

Activation checkpointing keeps the inputs of a layer in the place of its activations, and runs the
layer again when backward needs them. Backward often comes after the block in which the model ran,
as in ``Trainer.compute_loss``, and the second run has to see what the first one saw.

Each block says here how it is entered again. What is handed to PyTorch's checkpointing meanwhile
carries the blocks around it along, and enters them again when it is run outside of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import nn

from sat_lens.errors import NotReachedError, UnsupportedModelError


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    again: Callable[[], contextlib.AbstractContextManager[Any]]


class _Thread(threading.local):
    carried = 0  # how many functions that carry blocks run at the moment


_open: list[_Block] = []
_lock = threading.Lock()
_thread = _Thread()


@contextlib.contextmanager
def held_again(again: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Let what is checkpointed in this block run inside ``again()`` when backward recomputes it."""
    block = _Block(again)
    with _lock:
        if not _open:
            _capture()
        _open.append(block)
    try:
        yield
    finally:
        with _lock:
            _open.remove(block)
            if not _open:
                _release()


def in_backward() -> bool:
    """Whether backward runs in this thread, so that a forward pass now is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def check_recomputation(module: nn.Module, path: str) -> None:
    """Refuse a run of an attention module whose first or second run misses its blocks.

    Raises:
        NotReachedError: It is the second run of a layer whose first was outside of these blocks.
        UnsupportedModelError: It is the first run, and another library would make the second.
    """
    if in_backward():
        if not _thread.carried:
            raise NotReachedError(
                f"backward() recomputes {path}, which is checkpointed, inside a block in which its "
                "forward pass did not run. Call backward() before the block begins."
            )
    elif module.training and not (_thread.carried or torch.is_grad_enabled()):
        name = _foreign_function()
        if name:
            raise UnsupportedModelError(
                f"{path} runs inside {name}, an autograd function whose backward may run it again "
                "without what is done to its attention here. Use PyTorch's own activation "
                "checkpointing (model.gradient_checkpointing_enable()), or none."
            )


def _foreign_function() -> str:
    """Return the name of the autograd function inside of which this runs, if not PyTorch's own."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        code = frame.f_code
        if code.co_name != "forward" or not code.co_argcount:
            continue
        ctx = frame.f_locals.get(code.co_varnames[0])
        if isinstance(ctx, torch.autograd.function.FunctionCtx):
            is_known = code.co_filename == checkpointing.__file__
            return "" if is_known else type(ctx).__name__.removesuffix("Backward")
    return ""


def _carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs inside the blocks that are open now, also after they ended."""
    blocks = list(_open)

    def run(*args: Any, **kwargs: Any) -> Any:
        _thread.carried += 1
        try:
            if _open == blocks:
                return function(*args, **kwargs)
            if _open:
                raise NotReachedError(
                    "backward() recomputes a checkpointed layer while attention is not changed or "
                    "observed as it was in the forward pass. Call backward() inside the same "
                    "blocks as the forward pass, or outside of all."
                )
            with contextlib.ExitStack() as stack:
                for block in blocks:
                    stack.enter_context(block.again())
                return function(*args, **kwargs)
        finally:
            _thread.carried -= 1

    return run


# `checkpoint` is bound early by those who call it, and looks these two up when it is called. A
# public way in, such as `context_fn`, is open to the caller alone.

_ENTRIES = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
_replaced: dict[str, Any] = {}


def _capture() -> None:
    reentrant, other = (getattr(checkpointing, name) for name in _ENTRIES)

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(_carrying(function), *args)

    def without_reentrance(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return other(_carrying(function), *args, **kwargs)

    _replaced.update(zip(_ENTRIES, (reentrant, other), strict=True))
    for name, new in zip(_ENTRIES, (Reentrant, without_reentrance), strict=True):
        setattr(checkpointing, name, new)


def _release() -> None:
    while _replaced:
        setattr(checkpointing, *_replaced.popitem())
