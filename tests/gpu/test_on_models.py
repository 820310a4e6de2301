"""Whole models on a GPU's kernel, run for real or by the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import sat_lens as sl

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def model(device):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(20)
    return model


@pytest.fixture(scope="module")
def tokens(device):
    return torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)


def run(model, tokens, implementation, **kwargs):
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad(), sl.saturate(model, **kwargs):
            return model(tokens).logits.float()
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("heads", [None, "L1H2"])
@pytest.mark.parametrize("scale", [3.0, math.inf])
def test_the_kernel_agrees_with_eager_attention(model, tokens, heads, scale):
    fused = run(model, tokens, "sdpa", heads=heads, scale=scale)
    eager = run(model, tokens, "eager", heads=heads, scale=scale)
    with torch.no_grad():
        soft = model(tokens).logits.float()
    assert (fused - soft).abs().max() > 0.01 * soft.abs().max()
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4 * float(soft.abs().max()))


def test_padding(model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    with torch.no_grad(), sl.saturate(model):
        padded = model(tokens, attention_mask=mask).logits[1, 6:]
        places = torch.arange(14, device=tokens.device)[None] + 6
        alone = model(tokens[1:, 6:], position_ids=places).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-4)


def test_half_precision_needs_no_eager_path(model, tokens, monkeypatch):
    half = transformers.LlamaForCausalLM(model.config).eval().to(tokens.device, torch.bfloat16)

    def refused(*_args, **_kwargs):
        raise AssertionError("the eager path was taken")

    monkeypatch.setattr("sat_lens.intervention.managers.eager_attention", refused)
    with torch.no_grad(), sl.saturate(half):
        assert half(tokens).logits.isfinite().all()
