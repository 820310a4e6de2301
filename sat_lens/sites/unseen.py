"""Attention in parts of a model that did not run when it was looked at.

Whoever chooses all heads means those of a vision tower too. Made-up tokens do not run it, so none
of its attention is known; here it is watched, and an error if it computes any.

When not to use it: where heads were chosen by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from sat_lens.errors import NotReachedError
from sat_lens.kernels import AttentionCall, FusedAttention
from sat_lens.sites.discovery import parts_not_seen
from sat_lens.sites.search import WholeAttention
from sat_lens.sites.shadow import run_through
from sat_lens.sites.softmax import AttentionSoftmax


@contextlib.contextmanager
def refusing_unseen_attention(model: Any) -> Iterator[None]:
    """Raise if a part that did not run when the model was looked at computes attention.

    Raises:
        NotReachedError: In the block: it did.
    """
    with contextlib.ExitStack() as stack:
        for path in parts_not_seen(model):
            stack.enter_context(run_through(model.get_submodule(path), partial(_refusing, path)))
        yield


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    def fused(_call: AttentionCall) -> Tensor:
        raise _error(path)

    def softmax(scores: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        if scores.dim() == 4:
            raise _error(path)
        return original(scores)

    def whole() -> None:
        raise _error(path)

    with AttentionSoftmax(softmax), FusedAttention(fused), WholeAttention(whole):
        yield


def _error(path: str) -> NotReachedError:
    return NotReachedError(
        f"All heads were chosen, and {path} computed attention of which nothing is known: it did "
        "not run when the model was looked at. Call sat_lens.attention_sites(model, *your_inputs) "
        "once first, with inputs on which it runs, or choose heads by name."
    )
