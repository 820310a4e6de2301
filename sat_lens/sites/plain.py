"""The attention modules of a plain Hugging Face model, found by running it once and watching.

The innermost module that runs when a fused attention kernel or a softmax over four axes is called
is an attention module. Fused attention is the level ``kernel``, a softmax the level ``softmax``.

When not to use it: for a TransformerLens model, whose hook points say where its attention is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sat_lens.errors import UnsupportedModelError
from sat_lens.kernels import AttentionCall, FusedAttention
from sat_lens.sites.naming import AttentionSite, stack_in
from sat_lens.sites.softmax import AttentionSoftmax, DropoutWatch, layout_of

Kind = Literal["self", "cross"]


@dataclasses.dataclass
class _Seen:
    """What ran inside one attention module."""

    fused: list[AttentionCall] = dataclasses.field(default_factory=list)
    softmax: list[Tensor] = dataclasses.field(default_factory=list)


def is_plain(model: Any) -> bool:
    """Say whether this is a Hugging Face model that TransformerLens has not wrapped."""
    return (
        isinstance(model, nn.Module)
        and hasattr(getattr(model, "config", None), "_attn_implementation")
        and not hasattr(model, "hook_dict")
    )


def probe_plain(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[AttentionSite]:
    """Run the model once and list the modules in which attention was computed.

    Raises:
        UnsupportedModelError: No attention was seen.
    """
    seen: dict[str, _Seen] = {}
    running: list[str] = []

    def inside() -> _Seen:
        return seen.setdefault(running[-1] if running else "", _Seen())

    def fused(call: AttentionCall) -> Tensor:
        inside().fused.append(call)
        return call.run()

    def softmax(scores: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        if scores.dim() == 4:
            inside().softmax.append(scores)
        return original(scores)

    with contextlib.ExitStack() as stack:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(_following(model, running))
        dropout = stack.enter_context(DropoutWatch())
        stack.enter_context(AttentionSoftmax(softmax))
        stack.enter_context(FusedAttention(fused))
        model(*args, **kwargs)
    if not seen:
        raise UnsupportedModelError(
            f"Needed a model with softmax attention, and neither a fused attention of PyTorch nor "
            f"a softmax over scores ran in {type(model).__name__}. Load it with "
            'attn_implementation="sdpa" or "eager", if it has attention.'
        )
    n_heads = getattr(model.config, "num_attention_heads", None)
    found = [_site(path, seen[path], n_heads) for path, _ in model.named_modules() if path in seen]
    several = len({site.stack for site in found}) > 1
    return [
        dataclasses.replace(site, stack=site.stack if several else "", dropout=dropout.seen)
        for site in found
    ]


@contextlib.contextmanager
def _following(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules that run, outermost first, in ``running``."""

    def entering(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _args: running.append(name)

    def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(entering(name), prepend=True).remove)
            stack.callback(module.register_forward_hook(leaving, always_call=True).remove)
        yield


def _site(path: str, seen: _Seen, hint: int | None) -> AttentionSite:
    layer = next((int(part) for part in path.split(".") if part.isdigit()), 0)
    kind = _kind(seen)
    stack = "cross" if kind == "cross" else stack_in(path)
    n = len(seen.fused) + len(seen.softmax)
    if n != 1:
        why = f"{n} attentions were computed in one run, where one was needed"
        return AttentionSite(path, stack, layer, kind, 0, None, why_not=why)
    if seen.fused:
        (call,) = seen.fused
        n_heads = call.query.shape[1]
        return AttentionSite(path, stack, layer, kind, n_heads, "kernel", why_not=_bias(call))
    (scores,) = seen.softmax
    layout = layout_of(scores.shape, hint) or "b h q k"
    n_heads = scores.shape[layout.split().index("h")]
    return AttentionSite(path, stack, layer, kind, n_heads, "softmax", layout)


def _kind(seen: _Seen) -> Kind:
    """Tell cross attention by its keys: the probe's decoder gets fewer tokens than its encoder."""
    pairs = [(call.query.shape[-2], call.key.shape[-2]) for call in seen.fused]
    pairs += [(scores.shape[-2], scores.shape[-1]) for scores in seen.softmax]
    return "cross" if any(queries < keys for queries, keys in pairs) else "self"


def _bias(call: AttentionCall) -> str:
    """Say what keeps the kernel from serving; empty if nothing does."""
    try:
        call.visible()
    except UnsupportedModelError:
        return "it adds a bias to its scores, which a factor on its queries does not reach"
    return ""
