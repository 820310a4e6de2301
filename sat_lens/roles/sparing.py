"""Spare a forward pass what nobody reads when only its attention is looked at.

Unembedding every position can cost as much as all the layers below it, and its result is the
largest tensor of the pass.

When not to use it: where anybody reads the logits. They are those of the newest position only.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def newest_logits(model: Any) -> Iterator[None]:
    """Unembed the newest position alone while the block lasts, where the model has an unembedding.

    Example:
        >>> import torch
        >>> import sat_lens as sl
        >>> model, tokens = sl.load_model("demo"), torch.tensor([[0, 5, 6]])
        >>> with newest_logits(model):
        ...     model(tokens).shape
        torch.Size([1, 1, 2048])
    """
    unembedding = _unembedding(model)
    if unembedding is None:
        yield
        return
    handle = unembedding.register_forward_pre_hook(_keep_newest)
    try:
        yield
    finally:
        handle.remove()


def without_key_value_cache(model: Any) -> dict[str, Any]:
    """Give the arguments that keep the model from storing keys and values for a later pass."""
    original = getattr(model, "original_model", model)
    taken = inspect.signature(original.forward).parameters
    return {"use_cache": False} if "use_cache" in taken else {}


def _unembedding(model: Any) -> nn.Module | None:
    of_lens = getattr(model, "unembed", None)
    if isinstance(of_lens, nn.Module):
        return of_lens
    of_transformers = getattr(model, "get_output_embeddings", lambda: None)()
    return of_transformers if isinstance(of_transformers, nn.Module) else None


def _keep_newest(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # A classifier of whole sequences gets [batch, d_model], which has no positions to leave out.
    if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
        return (args[0][:, -1:], *args[1:])
    return None
