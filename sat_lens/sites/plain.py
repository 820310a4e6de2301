"""The attention modules of a plain Hugging Face model, found by running it once and watching.

Fused attention is the level ``kernel``, a softmax the level ``softmax``.

When not to use it: for a TransformerLens model, whose hook points say where its attention is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal

import torch
from torch import nn

from sat_lens.errors import UnsupportedModelError
from sat_lens.kernels import AttentionCall
from sat_lens.sites.naming import AttentionSite, Level, stack_in
from sat_lens.sites.probe import cuda_devices, heads_of
from sat_lens.sites.search import Call, searching
from sat_lens.sites.softmax import DropoutWatch

Kind = Literal["self", "cross"]


def is_plain(model: Any) -> bool:
    """Say whether this is a Hugging Face model that TransformerLens has not wrapped."""
    return (
        isinstance(model, nn.Module)
        and hasattr(getattr(model, "config", None), "_attn_implementation")
        and not hasattr(model, "hook_dict")
    )


def probe_plain(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[AttentionSite], list[str]]:
    """Run the model once; give the modules that computed attention, and the parts that did not run.

    Raises:
        UnsupportedModelError: No attention was seen.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices(model)))
        dropout = stack.enter_context(DropoutWatch())
        search = stack.enter_context(searching(model))
        model(*args, **kwargs)
    calls = search.calls
    if not calls:
        raise UnsupportedModelError(
            f"Needed a model with softmax attention, and neither a fused attention of PyTorch nor "
            f"a softmax over scores ran in {type(model).__name__}. Load it with "
            'attn_implementation="sdpa" or "eager", if it has attention.'
        )
    n_heads = getattr(model.config, "num_attention_heads", None)
    order = [path for path, _ in model.named_modules() if path in calls]
    found = [_site(path, calls[path], n_heads) for path in order]
    several = len({site.stack for site in found}) > 1
    sites = [
        dataclasses.replace(site, stack=site.stack if several else "", dropout=dropout.seen)
        for site in found
    ]
    return sites, search.idle()


def _site(path: str, calls: list[Call], hint: int | None) -> AttentionSite:
    layer = next((int(part) for part in path.split(".") if part.isdigit()), 0)
    kind = _kind(calls)
    stack = "cross" if kind == "cross" else stack_in(path)
    fused = [call.fused for call in calls if not call.events]
    if [len(of_call) for of_call in fused] == [1] * len(calls):
        (call,) = fused[0]
        n_heads = call.query.shape[1]
        return AttentionSite(path, stack, layer, kind, n_heads, "kernel", why_not=_bias(call))
    why_not, layout, n_heads = heads_of(calls, hint)
    level: Level | None = None if why_not else "softmax"
    pieces = any(call.is_in_pieces for call in calls)
    return AttentionSite(path, stack, layer, kind, n_heads, level, layout, why_not, pieces)


def _kind(calls: list[Call]) -> Kind:
    """Tell cross attention by its keys: the probe's decoder gets fewer tokens than its encoder."""
    softmax = [scores for call in calls for scores in call.tensors("softmax")]
    shapes = [(scores.shape[-2], scores.shape[-1]) for scores in softmax]
    shapes += [(f.query.shape[-2], f.key.shape[-2]) for call in calls for f in call.fused]
    return "cross" if any(queries < keys for queries, keys in shapes) else "self"


def _bias(call: AttentionCall) -> str:
    """Say what keeps the kernel from serving; empty if nothing does."""
    try:
        call.visible()
    except UnsupportedModelError:
        return "it adds a bias to its scores, which a factor on its queries does not reach"
    return ""
