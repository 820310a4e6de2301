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

from sat_lens.errors import UnsupportedModelError
from sat_lens.kernels.call import AttentionCall

TARGET_EXPONENT = 100


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
        return _by_queries(call, c)
    hard = limit(call)
    if bool(saturated.all()):
        return hard
    return torch.where(saturated, hard, _by_queries(call, c.masked_fill(saturated, 1.0)))


def limit_kernel(device: torch.device) -> Callable[[AttentionCall], Tensor] | None:
    """Give the kernel made for the limit; None where fused attention has to serve.

    Example:
        >>> import torch
        >>> limit_kernel(torch.device("meta")) is None
        True
    """
    # Triton takes a second to import, and of CPUs it knows its interpreter only.
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not wanted or device.type == "meta" or importlib.util.find_spec("triton") is None:
        return None
    from sat_lens.kernels.hard import limit_of

    return limit_of


def _by_queries(
    call: AttentionCall, c: Float[Tensor, "head row 1"]
) -> Float[Tensor, "batch head query dv"]:
    if bool((c == 1).all()):
        return call.run()
    visible = call.visible()
    # In half precision, a factor that is no power of two would be rounded to three digits.
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    wide = dataclasses.replace(call, query=query, key=key, value=value, attn_mask=visible)
    c = c.to(dtype)
    factor = torch.minimum(c, _limit_factor(wide)).where(c != 1, 1.0)
    new = dataclasses.replace(wide, query=query * factor).run().to(call.query.dtype)
    if visible is None or visible is call.attn_mask:
        return new
    # Under a finite mask, a row without a visible key attends to masked ones; it keeps doing so.
    dead = ~visible.any(-1, keepdim=True)
    return torch.where(dead, call.run(), new) if bool(dead.any()) else new


def _limit_factor(call: AttentionCall) -> Float[Tensor, "head 1 1"]:
    """Give, per head, the power of two that makes the limit."""
    query, key = call.query.detach(), call.key.detach()
    largest_key = key.abs().amax() * abs(call.factor) * key.shape[-1]
    largest_query = query.abs().amax((0, 2, 3))
    # Queries alone must not overflow either.
    bound = largest_query * largest_key.clamp(min=1.0)
    exponent = TARGET_EXPONENT - torch.frexp(bound).exponent
    factor = torch.ldexp(torch.ones_like(bound), exponent.clamp(0, TARGET_EXPONENT))
    return factor[:, None, None]
