"""Saturated attention inside a fused kernel, without the matrix of scores.

A fused kernel shows no scores, but a head's queries may be multiplied by a number before it runs.
A power of two large enough is the exact limit: it rounds nothing, and moves every key that does
not win out of reach of the softmax. Time and memory are the kernel's, so texts may be long. The
perplexity of 4,096 tokens, say, here under a random model:

    >>> import math, torch, transformers, sat_lens as sl
    >>> size = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 4096}
    >>> special = {"bos_token_id": 0, "eos_token_id": 0}
    >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **special)).eval()
    >>> tokens = torch.randint(64, (1, 4096))
    >>> with torch.no_grad(), sl.saturate(model):
    ...     loss = model(tokens, labels=tokens, use_cache=False).loss
    >>> 60 < math.exp(loss) < 70
    True

When not to use it: where scores themselves are needed (``ties`` other than exact, a transform of
one's own), where something is added to them, and for exact ties in half precision, in which
kernels differ. The eager path serves there.
"""

from sat_lens.kernels.attention import limit_kernel, rescaled_attention
from sat_lens.kernels.call import AttentionCall, FusedAttention
from sat_lens.kernels.check import limit_is_exact

__all__ = [
    "AttentionCall",
    "FusedAttention",
    "limit_is_exact",
    "limit_kernel",
    "rescaled_attention",
]
