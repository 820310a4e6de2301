"""Attention found by what runs, in modules of whose attention TransformerLens shows nothing.

Vision towers that it wraps as a whole, hybrids whose attention layers it wraps like the others, and
plain Hugging Face models have no hook point that says where attention is. There, the innermost
module that runs when a fused attention kernel or a softmax over four axes is called is an attention
module, if that softmax has a query for each position of the module's input. The mixing of parallel
residual streams has not, nor has attention among channels.

When not to use it: for attention that a hook point shows. :mod:`sat_lens.sites.probe` says more of
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sat_lens.kernels import AttentionCall, FusedAttention
from sat_lens.sites.softmax import AttentionSoftmax

_WRAPPED = "_original_component."


@dataclasses.dataclass
class Call:
    """What happened while one attention module ran once, in order.

    ``positions`` counts those of its input, 0 where nobody did. ``whole`` says that PyTorch's own
    multi-head attention ran, which shows nothing of itself.
    """

    positions: int = 0
    events: list[tuple[str, Tensor | None]] = dataclasses.field(default_factory=list)
    fused: list[AttentionCall] = dataclasses.field(default_factory=list)
    whole: bool = False

    def order(self, name: str) -> int | None:
        """Give the position of the first event of that name, or None."""
        return next((i for i, (event, _) in enumerate(self.events) if event == name), None)

    def tensors(self, name: str) -> list[Tensor]:
        """All tensors recorded under that name."""
        return [tensor for event, tensor in self.events if event == name and tensor is not None]

    @property
    def is_in_pieces(self) -> bool:
        """Whether several softmaxes ran and each position of the input had its row in one of them.

        So it is in towers that pack images of any size, or windows of one, into one sequence.
        """
        shapes = [scores.shape for scores in self.tensors("softmax")]
        attend_to_themselves = all(shape[-2] == shape[-1] for shape in shapes)
        rows = sum(shape[0] * shape[-2] for shape in shapes)
        return len(shapes) > 1 and attend_to_themselves and rows == self.positions


@dataclasses.dataclass
class _Run:
    """A run of any module, and what happened in it."""

    module: nn.Module
    call: Call

    def is_attention(self) -> bool:
        """Whether its softmaxes have, together, a query for each position of its input.

        They have more where a window is filled up.
        """
        if self.call.fused or self.call.whole:
            return True
        shapes = [scores.shape for scores in self.call.tensors("softmax")]
        queries = sum(shape[0] * shape[2] for shape in shapes)
        before_heads = sum(shape[0] * shape[1] for shape in shapes if shape[2] != shape[3])
        return max(queries, before_heads) >= self.call.positions > 0


class Search:
    """What a search found: the runs of each attention module, and which modules ran at all."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ran: set[nn.Module] = set()
        self._calls: dict[nn.Module, list[Call]] = {}

    def found(self, run: _Run) -> None:
        """Note that a run of a module computed attention."""
        self._calls.setdefault(run.module, []).append(run.call)

    @property
    def calls(self) -> dict[str, list[Call]]:
        """The runs of each attention module, by the shortest name that the model has for it."""
        if not self._calls:
            return {}
        names: dict[nn.Module, list[str]] = {}
        for name, module in _everything_in(self.model, remove_duplicate=False).items():
            if module in self._calls:
                names.setdefault(module, []).append(name)
        return {_best(names[module]): calls for module, calls in self._calls.items()}

    def idle(self) -> list[str]:
        """Name the largest parts in which nothing ran and which could hold attention."""
        parts: list[str] = []
        covered: set[nn.Module] = set()
        for name, module in _everything_in(self.model).items():
            within = set(module.modules())
            if module not in covered and not within & self.ran and _could_attend(module):
                covered |= within
                parts.append(name)
        return parts


def _everything_in(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """List all modules by name, also those that a wrapper keeps outside of its own tree."""
    named = dict(model.named_modules(remove_duplicate=remove_duplicate))
    known = set(named.values())
    original = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):
        for name, module in original.named_modules():
            if module not in known and name:
                named[f"original_model.{name}"] = module
    return named


class WholeAttention(TorchFunctionMode):
    """Calls ``note`` when PyTorch's own multi-head attention runs, from queries to outputs.

    What it calls inside, fused or not, passes by all modes.
    """

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route one PyTorch call."""
        if func is F.multi_head_attention_forward:
            self.note()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def searching(model: nn.Module, known: Collection[nn.Module] = ()) -> Iterator[Search]:
    """While the block lasts, record the attention that runs outside of ``known`` modules."""
    search, running = Search(model), [_Run(model, Call())]

    def is_known() -> bool:
        return any(run.module in known for run in running)

    def fused(call: AttentionCall) -> Tensor:
        if not is_known():
            running[-1].call.fused.append(call)
        return call.run()

    def softmax(scores: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        if scores.dim() == 4 and not is_known():
            running[-1].call.events.append(("softmax", scores))
        return original(scores)

    def whole() -> None:
        running[-1].call.whole |= not is_known()

    def entering(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        search.ran.add(module)
        running.append(_Run(module, Call(_positions(args, kwargs))))

    def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
        run = running.pop()
        if run.is_attention():
            search.found(run)

    with contextlib.ExitStack() as stack:
        for module in set(_everything_in(model).values()) - {model}:
            enter = module.register_forward_pre_hook(entering, prepend=True, with_kwargs=True)
            stack.callback(enter.remove)
            stack.callback(module.register_forward_hook(leaving, always_call=True).remove)
        stack.enter_context(AttentionSoftmax(softmax))
        stack.enter_context(FusedAttention(fused))
        stack.enter_context(WholeAttention(whole))
        yield search


def _positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Count the positions of a module's input, whatever its axes: the last is their width."""
    inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    shape = next(inputs, Tensor()).shape
    return math.prod(shape[:-1]) if len(shape) > 1 else 0


def _best(names: list[str]) -> str:
    """Choose TransformerLens's own name of a module over that of the model inside."""
    shortest = min(names, key=lambda name: (name.count(_WRAPPED), len(name)))
    return f"{shortest}.".replace(_WRAPPED, "").removesuffix(".")


def _could_attend(module: nn.Module) -> bool:
    """Whether it has the weights of two projections, and more to do than to call its parts."""
    weighted = [part for part in module.modules() if part._parameters]
    only_a_list = type(module).forward in (nn.Module.forward, nn.Sequential.forward)
    return len(weighted) > 1 and not only_a_list
