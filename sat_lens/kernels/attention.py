"""Attention at one inverse temperature per head, by whatever kernel serves the device.

A kernel's scores are sums of products of queries and keys. Multiplying a head's queries by c
multiplies its scores by c, and for a power of two does so without rounding.

The limit: let B bound a head's scores in absolute value. Two float32 scores that differ do so by
at least 2^-24 of the larger, and the kernel's own rounding blurs what is below some 2^-24 B. A
factor of 2^100 / B moves all that can be told apart by 2^76 and more, of which softmax makes an
exact 0, and keeps every number below the greatest of float32, 2^128. Keys of equal score stay so.

Where Triton runs, heads in the limit have a kernel of their own (:mod:`sat_lens.kernels.hard`),
which needs no such factor, judges ties in float32 whatever the model's dtype, and bears a bias.

When not to use it: for other ties than exact ones.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.errors import NonFiniteError, UnsupportedModelError
from sat_lens.kernels.call import AttentionCall

TARGET_EXPONENT = 100
# A kernel's rounding does not show below this inverse temperature.
LARGE = 1024.0


def rescaled_attention(
    call: AttentionCall, c: Float[Tensor, " n_heads"]
) -> Float[Tensor, "batch head query dv"]:
    """Run fused attention with each head's scores multiplied by an inverse temperature.

    Args:
        call: The attention to run.
        c: One number per head of the query: 1 leaves a head as it is, ``inf`` is the limit. Heads
            may stand in the place of queries, in groups that share a key, as when one token is
            generated.

    Raises:
        UnsupportedModelError: The heads are others, or something but a mask is added to scores of
            which not all in the limit have a kernel of their own.
        NonFiniteError: Queries or keys hold NaN, or are so large that scores may overflow.

    Example:
        >>> import torch
        >>> from sat_lens.kernels import AttentionCall, rescaled_attention
        >>> call = AttentionCall(*torch.randn(3, 1, 2, 5, 4))
        >>> pattern_of_one = rescaled_attention(call, torch.tensor([1.0, torch.inf]))
        >>> torch.allclose(pattern_of_one[:, 0], call.run()[:, 0])
        True
    """
    n_axes, n_rows = call.query.shape[1:3]
    if len(c) not in (n_axes, n_axes * n_rows):
        raise UnsupportedModelError(
            f"Needed fused attention of {len(c)} heads, found queries of shape "
            f"{list(call.query.shape)}. If the model has changed, call "
            "sat_lens.attention_sites(model, *your_inputs) to look at it again."
        )
    c = c.to(call.query.device).view(n_axes, -1, 1)
    saturated = c == math.inf
    limit = limit_kernel(call.query.device)
    if limit is None or not bool(saturated.any()):
        return by_queries(call, c)
    hard = limit(call)
    if bool(saturated.all()):
        return hard
    return torch.where(saturated, hard, by_queries(call, c.masked_fill(saturated, 1.0)))


def limit_kernel(device: torch.device) -> Callable[[AttentionCall], Tensor] | None:
    """Give the kernel made for the limit; None where fused attention has to serve.

    Example:
        >>> import torch
        >>> from sat_lens.kernels import limit_kernel
        >>> limit_kernel(torch.device("meta")) is None
        True
    """
    # Triton takes a second to import, and of CPUs it knows its interpreter only.
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not wanted or device.type == "meta" or importlib.util.find_spec("triton") is None:
        return None
    from sat_lens.kernels.hard import limit_of

    return limit_of


def by_queries(
    call: AttentionCall, c: Float[Tensor, "head row 1"]
) -> Float[Tensor, "batch head query dv"]:
    """Rescale by factors on the queries, whatever else might serve the limit on this device."""
    if bool((c == 1).all()):
        return call.run()
    visible = call.visible()
    # In half precision, a factor that is no power of two would be rounded to three digits.
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    wide = dataclasses.replace(call, query=query, key=key, value=value, attn_mask=visible)
    new = _with_factors(wide, c.to(dtype)).to(call.query.dtype)
    if visible is None or visible is call.attn_mask:
        return new
    # Under a finite mask, a row without a visible key attends to masked ones; it keeps doing so.
    dead = ~visible.any(-1, keepdim=True)
    return torch.where(dead, call.run(), new) if bool(dead.any()) else new


def _with_factors(
    call: AttentionCall, c: Float[Tensor, "head row 1"]
) -> Float[Tensor, "batch head query dv"]:
    limit_factor = _limit_factor(call)
    factor = torch.minimum(c, limit_factor).where(c != 1, 1.0)
    rescaled = dataclasses.replace(call, query=call.query * factor)
    if not torch.is_grad_enabled() or not (call.query.requires_grad or call.key.requires_grad):
        return rescaled.run()
    # In the limit scores have no gradient, and a kernel's rounding of 0 would be blown up.
    saturated = (c >= limit_factor) & (c != 1)
    fixed = dataclasses.replace(rescaled, query=rescaled.query.detach(), key=call.key.detach())
    soft = dataclasses.replace(call, query=call.query * factor.masked_fill(saturated, 1.0))
    # Fused kernels round a gradient more than softmax does, which large factors would show.
    large = bool((factor.masked_fill(saturated, 1.0) > LARGE).any())
    out = _unfused(soft) if large else soft.run()
    return torch.where(saturated, fixed.run(), out) if bool(saturated.any()) else out


def _unfused(call: AttentionCall) -> Float[Tensor, "batch head query dv"]:
    n_batches, n_heads, n_queries = call.query.shape[:3]
    rows = torch.arange(n_queries, device=call.query.device).expand(n_batches, -1)
    scores = call.scores(rows)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    pattern = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return pattern @ call.value.repeat_interleave(n_heads // call.value.shape[1], 1)


def _limit_factor(call: AttentionCall) -> Float[Tensor, "head 1 1"]:
    """Give, per head, the power of two that makes the limit."""
    query, key = call.query.detach(), call.key.detach()
    if query.numel() == 0 or key.numel() == 0:
        return query.new_ones(query.shape[1], 1, 1)
    largest_key = key.abs().amax().double() * abs(call.factor) * key.shape[-1]
    # Queries alone must not overflow either.
    bound = query.abs().amax((0, 2, 3)).double() * largest_key.clamp(min=1.0)
    if not bool(bound.float().isfinite().all()):
        raise NonFiniteError(
            "The model's own queries or keys hold NaN before saturation, or are so large that "
            "their products overflow, so there is no limit to take. Check the weights and inputs."
        )
    exponent = TARGET_EXPONENT - torch.frexp(bound).exponent
    factor = torch.ldexp(query.new_ones(len(bound)), exponent.clamp(0, TARGET_EXPONENT))
    return factor[:, None, None]
