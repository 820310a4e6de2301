"""Saturated attention inside a fused kernel, without the matrix of scores.

A fused kernel shows no scores, but they are sums of products of queries and keys: multiplying a
head's queries by c multiplies its scores by c, and for a power of two does so without rounding.
Time and memory are the kernel's, so texts may be long.

The limit: let B bound a head's scores in absolute value. Two float32 scores that differ do so by
at least 2^-24 of the larger, and the kernel's own rounding blurs what is below some 2^-24 B. A
factor of 2^100 / B moves all that can be told apart by 2^76 and more, of which softmax makes an
exact 0, and keeps every number below the greatest of float32, 2^128. Keys of equal score stay so.

Where Triton runs, heads in the limit have a kernel of their own (`hard_kernel`), which needs no
such factor, judges ties in float32 whatever the model's dtype, and accepts a bias.

The scores of eager attention have to serve where scores themselves are needed (``ties`` other than
exact, a transform of one's own), where something is added to them, and for exact ties in half
precision, in which kernels differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens.attention.masks import lowest_bias
from sat_lens.errors import NonFiniteError, UnsupportedModelError

TARGET_EXPONENT = 100
# A kernel's rounding does not show below this inverse temperature.
LARGE = 1024.0
_log = logging.getLogger(__name__)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Keep autocast, if it is on, from rounding what was taken to float32 on purpose."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """The arguments of ``torch.nn.functional.scaled_dot_product_attention``."""

    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch group key d"]
    value: Float[Tensor, "batch group key dv"]
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Float[Tensor, "batch head query dv"]:
        """Call the kernel."""
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[3:]}
        return F.scaled_dot_product_attention(self.query, self.key, self.value, **rest)

    @property
    def factor(self) -> float:
        """The factor from products of queries and keys to scores."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    def visible(self) -> Bool[Tensor, "*rows key"] | None:
        """Return the mask as bools; None if there is none.

        Raises:
            UnsupportedModelError: The mask adds something to visible scores.
        """
        mask = self.attn_mask
        if mask is None or mask.dtype == torch.bool:
            return mask
        visible = mask == 0
        if not bool((visible | (mask <= lowest_bias(mask.dtype))).all()):
            raise UnsupportedModelError(
                "Fused attention adds a bias to the scores, which a factor on them would scale as "
                'well. Load the model with attn_implementation="eager".'
            )
        return visible

    def scores(self, rows: Int[Tensor, "batch row"]) -> Float[Tensor, "batch head row key"]:
        """Compute the scores of some query rows of each sequence; a masked key holds ``-inf``.

        Raises:
            UnsupportedModelError: The mask adds something to visible scores.
        """
        n_heads, n_queries = self.query.shape[1:3]
        key = self.key.repeat_interleave(n_heads // self.key.shape[1], 1)
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        query = self.query.transpose(1, 2)[batch, rows].transpose(1, 2)
        with without_autocast(query.device):
            scores = query.float() @ key.float().mT * self.factor
        if self.is_causal:
            future = torch.arange(key.shape[2], device=rows.device) > rows[:, None, :, None]
            scores.masked_fill_(future, -math.inf)
        visible = self.visible()
        if visible is not None:
            shape = (len(rows), visible.shape[-3] if visible.dim() > 2 else 1, n_queries)
            of_rows = visible.expand(*shape, -1).transpose(1, 2)[batch, rows].transpose(1, 2)
            scores.masked_fill_(~of_rows, -math.inf)
        return scores


def rescaled_attention(
    call: AttentionCall, c: Float[Tensor, "*batch n_heads"]
) -> Float[Tensor, "batch head query dv"]:
    """Run fused attention with each head's scores multiplied by an inverse temperature.

    Args:
        call: The attention to run.
        c: One number per head of the query, or one for each prompt as well: 1 leaves a head as it
            is, ``inf`` is the limit. Heads may stand in the place of queries, in groups that share
            a key, as when one token is generated. Finite numbers may have a gradient.

    Raises:
        UnsupportedModelError: The number of heads differs, or something but a mask is added to
            scores that no kernel of ours takes to the limit.
        NonFiniteError: Queries or keys hold NaN, or are so large that scores may overflow.

    Example:
        >>> import torch
        >>> from sat_lens.attention import AttentionCall, rescaled_attention
        >>> call = AttentionCall(*torch.randn(3, 1, 2, 5, 4))
        >>> found = rescaled_attention(call, torch.tensor([1.0, torch.inf]))
        >>> torch.allclose(found[:, 0], call.run()[:, 0])
        True
    """
    n_axes, n_rows = call.query.shape[1:3]
    if c.shape[-1] not in (n_axes, n_axes * n_rows):
        raise UnsupportedModelError(
            f"Needed fused attention of {c.shape[-1]} heads, found queries of shape "
            f"{list(call.query.shape)}. If the model has changed, call "
            "sat_lens.attention_sites(model, *your_inputs) to look at it again."
        )
    call = _as_autocast_would(call)
    c = c.to(call.query.device).reshape(*c.shape[:-1], n_axes, -1, 1)
    saturated = c == math.inf
    limit = limit_kernel(call.query.device)
    if limit is None or not bool(saturated.any()):
        return by_queries(call, c)
    hard = limit(call)
    if bool(saturated.all()):
        return hard
    return torch.where(saturated, hard, by_queries(call, c.masked_fill(saturated, 1.0)))


def _as_autocast_would(call: AttentionCall) -> AttentionCall:
    """Round queries, keys and values as autocast would round what the kernel gets."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device) or call.query.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    return dataclasses.replace(call, query=query, key=key, value=value)


# The limit by a kernel of its own.


def limit_kernel(device: torch.device) -> Callable[[AttentionCall], Tensor] | None:
    """Return the kernel made for the limit; None where PyTorch's fused attention has to serve."""
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not wanted or device.type == "meta" or importlib.util.find_spec("triton") is None:
        return None
    return _in_triton


def _in_triton(call: AttentionCall) -> Float[Tensor, "batch head query dv"]:
    # Triton takes a second to import, and of CPUs it knows its interpreter only.
    from sat_lens.attention.hard_kernel import hard_attention

    mask = call.attn_mask
    limit = functools.partial(
        hard_attention,
        call.query,
        call.key,
        call.value,
        factor=call.factor,
        causal=call.is_causal,
    )
    if mask is None or mask.dtype == torch.bool:
        return limit(visible=mask)
    # Under a finite mask, a row without a visible key attends to masked ones; it keeps doing so.
    fully_masked = (mask <= lowest_bias(mask.dtype)).all(-1, keepdim=True)
    return torch.where(fully_masked, call.run(), limit(bias=mask))


# Any inverse temperature by a factor on the queries.


def by_queries(
    call: AttentionCall, c: Float[Tensor, "*batch head row 1"]
) -> Float[Tensor, "batch head query dv"]:
    """Rescale by factors on the queries, whatever else might serve the limit on this device."""
    if not c.requires_grad and bool((c == 1).all()):
        return call.run()
    visible = call.visible()
    # In half precision, a factor that is no power of two would be rounded to three digits.
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    wide = dataclasses.replace(call, query=query, key=key, value=value, attn_mask=visible)
    with without_autocast(query.device):
        new = _with_factors(wide, c.to(dtype)).to(call.query.dtype)
    if visible is None or visible is call.attn_mask:
        return new
    # As above: a row without a visible key is the model's own.
    fully_masked = ~visible.any(-1, keepdim=True)
    return torch.where(fully_masked, call.run(), new) if bool(fully_masked.any()) else new


def _with_factors(
    call: AttentionCall, c: Float[Tensor, "*batch head row 1"]
) -> Float[Tensor, "batch head query dv"]:
    limit_factor = _limit_factor(call)
    # Where the two are equal, the gradient is that of c.
    factor = torch.where(c <= limit_factor, c, limit_factor)
    rescaled = dataclasses.replace(call, query=call.query * factor)
    differentiated = any(x.requires_grad for x in (call.query, call.key, call.value))
    if not torch.is_grad_enabled() or not differentiated:
        return rescaled.run()
    # In the limit scores have no gradient, and a kernel's rounding of 0 would be blown up. That of
    # values is NaN in kernels whose backward takes the pattern from scores of this size anew.
    saturated = (c >= limit_factor) & (c != 1)
    detached = dataclasses.replace(rescaled, query=rescaled.query.detach(), key=call.key.detach())
    soft = dataclasses.replace(call, query=call.query * factor.masked_fill(saturated, 1.0))
    # Fused kernels round a gradient more than softmax does, which large factors would show.
    large = bool((factor.masked_fill(saturated, 1.0) > LARGE).any())
    out = _unfused(soft) if large else soft.run()
    return torch.where(saturated, _unfused(detached), out) if bool(saturated.any()) else out


def _unfused(call: AttentionCall) -> Float[Tensor, "batch head query dv"]:
    n_batches, n_heads, n_queries = call.query.shape[:3]
    rows = torch.arange(n_queries, device=call.query.device).expand(n_batches, -1)
    scores = call.scores(rows)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    pattern = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return pattern @ call.value.repeat_interleave(n_heads // call.value.shape[1], 1)


def _limit_factor(call: AttentionCall) -> Float[Tensor, "head 1 1"]:
    """Return, per head, the power of two that makes the limit."""
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


# Whether a kernel's limit is exact. Kernels may fold the scale into an exponential, whose rounding
# then breaks ties or overflows. That is no fault of theirs: for the scales that they are made for
# it does not show.

N_HEADS, N_TOKENS, HEAD_SIZE = 3, 257, 32


@functools.cache
def limit_is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel's limit equals hard attention in float64; tried once and remembered.

    Queries and keys are small whole numbers, so that every score is exact and many are tied. All
    heads but the first are saturated, under a causal flag, a mask of bools and none. A kernel that
    falls short is logged as a warning.
    """
    # What is remembered must not depend on where it was asked first.
    with without_autocast(device), torch.inference_mode(False):
        return _limit_is_exact(device, dtype)


def _limit_is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    shape = (2, N_HEADS, N_TOKENS, HEAD_SIZE)
    query, key = (torch.randint(-2, 3, shape, generator=generator) for _ in range(2))
    value = torch.randn(shape, generator=generator, dtype=torch.float32)
    causal = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).tril()
    own = torch.arange(N_TOKENS)
    padded = causal & (own >= 9) | (own[:, None] == own)
    plain = AttentionCall(query.to(device, dtype), key.to(device, dtype), value.to(device, dtype))
    for visible, call in (
        (torch.ones_like(causal), plain),
        (causal, dataclasses.replace(plain, is_causal=True)),
        (padded, dataclasses.replace(plain, attn_mask=padded.to(device))),
    ):
        c = torch.tensor([1.0, torch.inf, torch.inf], dtype=torch.float32, device=device)
        found = rescaled_attention(call, c)
        expected = by_definition(query.double(), key.double(), value.to(dtype).double(), visible)
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


def by_definition(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch head key d"],
    value: Float[Tensor, "batch head key dv"],
    visible: Bool[Tensor, "query key"],
) -> Float[Tensor, "batch head query dv"]:
    """Average the values of the keys that win each row, by the definition of the limit."""
    scores = (query @ key.mT).masked_fill(~visible, -torch.inf)
    wins = (scores == scores.amax(-1, keepdim=True)).to(value)
    return wins @ value / wins.sum(-1, keepdim=True)
