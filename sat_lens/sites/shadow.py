"""Code around every run of a module, put on and taken off in any order."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from sat_lens.errors import SatLensError


@contextlib.contextmanager
def run_through(
    module: nn.Module, around: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Iterator[None]:
    """While the block lasts, run ``module.forward`` inside ``around()``, a fresh one each call.

    The instance's ``forward`` is shadowed rather than hooked, because PyTorch's forward hooks do
    not run when a KeyboardInterrupt passes and a context manager does.
    """
    shadow = _Shadow(module.forward, module.__dict__.get("forward"), around)
    module.__dict__["forward"] = shadow
    try:
        yield
    finally:
        shadow.ended = True
        _remove_ended(module)


class Uncopied:
    """What stays on a model while a block lasts, and would outlast it on a copy."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SatLensError(
            "A model cannot be copied or pickled while its attention is intercepted: the copy "
            "would stay so. Copy it outside of the block."
        )


@dataclasses.dataclass(eq=False)
class _Shadow(Uncopied):
    """A ``forward`` in front of a module's own, or in front of another shadow."""

    forward: Callable[..., Any]
    below: Any
    around: Callable[[], contextlib.AbstractContextManager[Any]]
    ended: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ended:
            return self.forward(*args, **kwargs)
        with self.around():
            return self.forward(*args, **kwargs)


def _remove_ended(module: nn.Module) -> None:
    """Take shadows that have ended off the top; blocks need not end in the order they began."""
    top = module.__dict__.get("forward")
    while isinstance(top, _Shadow) and top.ended:
        top = top.below
    if top is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = top
