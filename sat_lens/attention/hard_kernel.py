"""The exact limit as a Triton kernel: no exponential, and no n by n matrix.

For each block of queries it passes over the keys once and keeps three numbers a row: the greatest
score so far, how many keys reach it, and the sum of their values. A greater score throws the other
two away, an equal one adds to them. What is left at the end, sum over count, is the average of the
values of the winning keys. Scores are float32 whatever the inputs are.

The kernel can be tried on a CPU by Triton's interpreter: set ``TRITON_INTERPRET=1`` before this
file is imported. The interpreter knows no products in bfloat16, so there, and only there, such
inputs are taken to float32 first, which changes no product. So far this ran in the interpreter
only. It compiles to machine code for GPUs of compute capability 8.0 and 9.0; how fast it is there
nobody has measured.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens.attention.masks import EXTREME, lowest_bias
from sat_lens.errors import UnsupportedModelError

INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many queries and keys a program holds at once, and how many warps share its work."""

    queries: int
    keys: int
    warps: int = 4


def hard_attention(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch group key d"],
    value: Float[Tensor, "batch group key dv"],
    *,
    factor: float,
    causal: bool = False,
    visible: Bool[Tensor, "*rows key"] | None = None,
    bias: Float[Tensor, "*rows key"] | None = None,
    blocks: Blocks | None = None,
) -> Float[Tensor, "batch head query dv"]:
    """Average the values of the keys that attain each row's greatest score.

    Memory beside the result does not grow with the number of keys.

    Args:
        query: In float32, bfloat16 or float16.
        key: Each of its heads serves the same number of successive heads of the query.
        value: One for each key.
        factor: What products of queries and keys are multiplied by, to be scores.
        causal: Whether query i sees keys 0 to i only, as in PyTorch's fused attention.
        visible: Which of these keys a query sees. It broadcasts to [batch, head, query, key].
        bias: What is added to the scores, likewise. A number as low as a mask hides its key.
        blocks: How the work is cut; ``blocks_for`` chooses by default.

    Returns:
        In the query's dtype. A row that sees no key is 0, as in PyTorch's fused attention.

    Raises:
        UnsupportedModelError: A gradient is needed.
    """
    (n_batches, n_heads, n_queries, size), n_keys = query.shape, key.shape[2]
    value_size = value.shape[-1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedModelError(
            "The kernel for the limit computes no gradients, and one is needed. Run under "
            'torch.no_grad(), or load it with attn_implementation="eager".'
        )
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty((n_batches, n_heads, n_queries, value_size))
    whole = (n_batches, n_heads, n_queries, n_keys)
    # A pointer has to be given even where nothing is read through it.
    seen = query if visible is None else visible.to(torch.int8).expand(whole)
    added = query if bias is None else bias.expand(whole)
    cut = blocks or blocks_for(query.dtype, size)
    lowest = EXTREME if bias is None else lowest_bias(bias.dtype)
    _average_of_winners[(triton.cdiv(n_queries, cut.queries), n_batches * n_heads)](
        query, key, value, seen, added, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *seen.stride(), *added.stride(), *out.stride()[:3],
        n_heads, n_heads // key.shape[1], n_queries, n_keys, factor,
        SIZE=size, PADDED=_power_of_two(size), VSIZE=value_size, VPADDED=_power_of_two(value_size),
        QUERIES=cut.queries, KEYS=cut.keys, LOWEST=lowest,
        CAUSAL=causal, VISIBLE=visible is not None, BIAS=bias is not None,
        UPCAST=INTERPRETED and query.dtype == torch.bfloat16, num_warps=cut.warps,
    )  # fmt: skip
    return out


def blocks_for(dtype: torch.dtype, size: int) -> Blocks:
    """Return tiles that fit into the shared memory of a GPU; they were never tuned on one."""
    if dtype == torch.float32:
        return Blocks(32, 32)
    return Blocks(128, 64) if size <= 64 else Blocks(64, 64)


def _power_of_two(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@triton.jit  # type: ignore[untyped-decorator]
def _average_of_winners(
    q: tl.tensor, k: tl.tensor, v: tl.tensor,
    visible: tl.tensor, bias: tl.tensor, out: tl.tensor,
    q_b: tl.tensor, q_h: tl.tensor, q_n: tl.tensor,
    k_b: tl.tensor, k_h: tl.tensor, k_n: tl.tensor,
    v_b: tl.tensor, v_h: tl.tensor, v_n: tl.tensor,
    m_b: tl.tensor, m_h: tl.tensor, m_q: tl.tensor, m_k: tl.tensor,
    a_b: tl.tensor, a_h: tl.tensor, a_q: tl.tensor, a_k: tl.tensor,
    o_b: tl.tensor, o_h: tl.tensor, o_n: tl.tensor,
    n_heads: tl.tensor, group: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor,
    factor: tl.tensor,
    SIZE: tl.constexpr, PADDED: tl.constexpr, VSIZE: tl.constexpr, VPADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOWEST: tl.constexpr,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr,
    BIAS: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Serve one block of queries of one head; letters after an underscore name axes of strides."""
    # Masks of long texts have more entries than 32 bits can count.
    batch = (tl.program_id(1) // n_heads).to(tl.int64)
    head = (tl.program_id(1) % n_heads).to(tl.int64)
    start_q = tl.program_id(0) * QUERIES
    rows = start_q + tl.arange(0, QUERIES)
    row_exists = rows < n_queries
    sizes = tl.arange(0, PADDED)
    value_sizes = tl.arange(0, VPADDED)
    wide_rows = rows.to(tl.int64)
    query = tl.load(
        q + batch * q_b + head * q_h + wide_rows[:, None] * q_n + sizes[None, :],
        mask=row_exists[:, None] & (sizes < SIZE)[None, :],
        other=0.0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    count = tl.zeros([QUERIES], tl.float32)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES, VPADDED], tl.float32)
    last = n_keys
    if CAUSAL:
        last = tl.minimum(n_keys, start_q + QUERIES)
    for start in range(0, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_exists = keys < n_keys
        wide_keys = keys.to(tl.int64)
        key = tl.load(
            k + batch * k_b + head // group * k_h + wide_keys[None, :] * k_n + sizes[:, None],
            mask=key_exists[None, :] & (sizes < SIZE)[:, None],
            other=0.0,
        )
        value = tl.load(
            v + batch * v_b + head // group * v_h + wide_keys[:, None] * v_n + value_sizes[None, :],
            mask=key_exists[:, None] & (value_sizes < VSIZE)[None, :],
            other=0.0,
        )
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * factor
        seen = row_exists[:, None] & key_exists[None, :]
        if CAUSAL:
            seen &= keys[None, :] <= rows[:, None]
        if VISIBLE:
            at = batch * m_b + head * m_h + wide_rows[:, None] * m_q + wide_keys[None, :] * m_k
            seen &= tl.load(visible + at, mask=seen, other=0) != 0
        if BIAS:
            at = batch * a_b + head * a_h + wide_rows[:, None] * a_q + wide_keys[None, :] * a_k
            added = tl.load(bias + at, mask=seen, other=0.0).to(tl.float32)
            seen &= added > LOWEST
            scores += added
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        kept = tl.where(best == new_best, 1.0, 0.0)
        winners = seen & (scores == new_best[:, None])
        count = count * kept + tl.sum(winners.to(tl.float32), 1)
        total *= kept[:, None]
        total += tl.dot(winners.to(value.dtype), value, input_precision="ieee")
        best = new_best
    average = total / tl.maximum(count, 1.0)[:, None]
    tl.store(
        out + batch * o_b + head * o_h + wide_rows[:, None] * o_n + value_sizes[None, :],
        average.to(out.dtype.element_ty),
        mask=row_exists[:, None] & (value_sizes < VSIZE)[None, :],
    )
