"""Is a kernel's limit exact on this device? Tried on planted ties, once per device and dtype.

Kernels may fold the scale into an exponential, whose rounding then breaks ties or overflows. That
is no error of theirs: for the scales that they are made for it does not show.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens.kernels.attention import rescaled_attention
from sat_lens.kernels.call import AttentionCall

N_HEADS, N_TOKENS, HEAD_SIZE = 3, 257, 32
_log = logging.getLogger(__name__)


@functools.cache
def limit_is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare the kernel's limit with hard attention in float64; say once if it falls short.

    Queries and keys are small whole numbers, so that every score is exact and many are tied. All
    heads but the first are saturated, under a causal flag, a mask of bools and none.

    Example:
        >>> limit_is_exact(torch.device("cpu"), torch.float32)
        True
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, N_HEADS, N_TOKENS, HEAD_SIZE)
    query, key = (torch.randint(-2, 3, shape, generator=generator) for _ in range(2))
    value = torch.randn(shape, generator=generator)
    causal = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).tril()
    own = torch.arange(N_TOKENS)
    padded = causal & (own >= 9) | (own[:, None] == own)
    plain = AttentionCall(query.to(device, dtype), key.to(device, dtype), value.to(device, dtype))
    for visible, call in (
        (torch.ones_like(causal), plain),
        (causal, dataclasses.replace(plain, is_causal=True)),
        (padded, dataclasses.replace(plain, attn_mask=padded.to(device))),
    ):
        found = rescaled_attention(call, torch.tensor([1.0, torch.inf, torch.inf], device=device))
        expected = hard_attention(query.double(), key.double(), value.to(dtype).double(), visible)
        soft_agrees = torch.allclose(found[:, 0].float(), call.run()[:, 0].float(), atol=1e-2)
        tolerance = 8 * torch.finfo(dtype).eps
        error = (found[:, 1:].double().cpu() - expected[:, 1:]).abs().nan_to_num(torch.inf).amax()
        if not soft_agrees or float(error) > tolerance:
            _log.warning(
                "The attention kernel on %s in %s misses the saturated limit by %.3g, so eager "
                "attention serves there, with its n by n matrix.",
                device,
                dtype,
                float(error),
            )
            return False
    return True


def hard_attention(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch head key d"],
    value: Float[Tensor, "batch head key dv"],
    visible: Bool[Tensor, "query key"],
) -> Float[Tensor, "batch head query dv"]:
    """Average the values of the keys that win each row, by the definition."""
    scores = (query @ key.mT).masked_fill(~visible, -torch.inf)
    wins = (scores == scores.amax(-1, keepdim=True)).to(value)
    return wins @ value / wins.sum(-1, keepdim=True)
