"""Transformers whose weights are written by hand, so that every head's attended set is known.

The residual stream holds the token and the position, one number each; a head's scores are a table
that is looked up by position and multiplied by a number so large that softmax underflows to a
saturated pattern exactly.
"""

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

N_CTX = 16
N_TOKENS = 8
SHARPNESS = 400.0


def constructed(tables, causal, sharpness=SHARPNESS):
    """Build a model whose head [layer][head] scores key k from query q with ``tables[...][q, k]``.

    Each head copies a random linear map of the attended tokens into the residual stream.
    """
    n_layers, n_heads = len(tables), len(tables[0])
    d_model = N_TOKENS + N_CTX
    model = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            d_model=d_model,
            d_head=N_CTX,
            n_heads=n_heads,
            n_layers=n_layers,
            n_ctx=N_CTX,
            d_vocab=N_TOKENS,
            act_fn="gelu",
            attn_only=True,
            normalization_type=None,
            attention_dir="causal" if causal else "bidirectional",
            seed=0,
        )
    ).eval()
    generator = torch.Generator().manual_seed(1)
    weights = dict(model.original_model.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            parameter.zero_()
        _find(weights, "tok_embed")[:, :N_TOKENS] = torch.eye(N_TOKENS)
        _find(weights, "pos.")[:, N_TOKENS:] = torch.eye(N_CTX)
        _find(weights, "head.")[:] = torch.randn(N_TOKENS, d_model, generator=generator)
        for layer, row in enumerate(tables):
            for head, table in enumerate(row):
                part = slice(head * N_CTX, (head + 1) * N_CTX)
                own = {n: p for n, p in weights.items() if n.startswith(f"layers.{layer}.")}
                q, k, v, o = (_find(own, f"attn._original_component.{n}.") for n in "qkvo")
                # The model divides scores by the square root of the head size.
                q[part, N_TOKENS:] = table.T * sharpness * N_CTX**0.5
                k[part, N_TOKENS:] = torch.eye(N_CTX)
                v[part, :N_TOKENS] = torch.randn(N_CTX, N_TOKENS, generator=generator)
                o[:N_TOKENS, part] = torch.randn(N_TOKENS, N_CTX, generator=generator) / N_CTX
    return model


def tokens(n_sequences=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(N_TOKENS, (n_sequences, N_CTX), generator=generator)


def offset_table(offset):
    """Attend to the key at an offset; a row whose key would lie outside attends to key 0."""
    table = torch.zeros(N_CTX, N_CTX)
    for q in range(N_CTX):
        table[q, q + offset if 0 <= q + offset < N_CTX else 0] = 1
    return table


def last_few_table(m):
    """Attend equally to the newest m keys."""
    rows, keys = torch.arange(N_CTX)[:, None], torch.arange(N_CTX)
    return ((rows - keys >= 0) & (rows - keys < m)).float()


def one_key_table(key):
    table = torch.zeros(N_CTX, N_CTX)
    table[:, key] = 1
    return table


UNIFORM = torch.zeros(N_CTX, N_CTX)


def _find(weights, part):
    return next(p for name, p in weights.items() if part in name and name.endswith("weight"))
