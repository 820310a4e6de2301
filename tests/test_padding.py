"""Padded prompts: real tokens do not see the padding, and rows without a key stay as they are."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
import zoo
from everyday import everyday

import sat_lens as sl

N_PADS = 3
SCALES = [0.0, 2.0, math.inf]
# For the whole zoo, the scales that lose a mask first; right padding leaves no row without a key.
FEW_SCALES = {"left": [0.0, math.inf], "right": [0.0]}
TEXT = zoo.everyday_names(lambda case: case.inputs is tiny.text_inputs)
PAIRS = zoo.everyday_names(lambda case: case.inputs is tiny.pair_inputs)
# Here the padding leaks without any saturation: OpenAI GPT loses its causal mask when it is given
# an attention mask, the sparse attention of GLM with DSA picks its keys before it masks them, and
# RecurrentGemma's recurrence runs through padding.
LEAKY = {
    ("openai_gpt", "left"),
    ("openai_gpt", "right"),
    ("glm_moe_dsa", "left"),
    ("recurrent_gemma", "left"),
}
COMPATIBLE = ["gpt2", "gpt_neox", "llama", "gemma2_soft_cap", "bloom", "deepseek_v3"]


def padded(side):
    """Two prompts, the first of them padded: tokens, attention mask, where its real tokens are."""
    tokens = tiny.tokens()
    length = tokens.shape[1]
    pads = slice(0, N_PADS) if side == "left" else slice(length - N_PADS, length)
    real = slice(N_PADS, length) if side == "left" else slice(0, length - N_PADS)
    mask = torch.ones_like(tokens)
    mask[0, pads], tokens[0, pads] = 0, 0
    return tokens, mask, real


def tolerance(effect, soft):
    return float(1e-4 * effect.abs().max() + 1e-5 * soft.abs().max())


def rescaled(model, scale):
    everything = {site.path: range(tiny.N_HEADS) for site in sl.attention_sites(model)}
    return oracle.rescaled_softmax(model, everything, scale, tiny.N_HEADS)


def check_decoder(model, side, scales, leaky=False):
    tokens, mask, real = padded(side)
    with torch.no_grad():
        soft = model(tokens, attention_mask=mask)
        soft_alone = model(tokens[:1, real])
    assert torch.allclose(soft[:1, real], soft_alone, atol=tolerance(soft, soft)) != leaky
    for scale in scales:
        with torch.no_grad():
            with sl.saturate(model, scale=scale):
                found = model(tokens, attention_mask=mask)
                alone = model(tokens[:1, real])
            with rescaled(model, scale):
                expected = model(tokens, attention_mask=mask)
        atol = tolerance(expected - soft, soft)
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        if not leaky:
            torch.testing.assert_close(found[:1, real], alone, rtol=0, atol=atol)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_real_tokens_do_not_see_the_padding(name, side):
    check_decoder(zoo.model_of(name), side, FEW_SCALES[side], leaky=(name, side) in LEAKY)


@pytest.mark.filterwarnings("ignore:DeepSeekV3ArchitectureAdapter does not support fold_ln")
@pytest.mark.parametrize("name", everyday(COMPATIBLE, "gpt2"))
def test_compatibility_mode(name):
    """There, masked scores are -inf, and a row without a key has a pattern of zeros."""
    model = zoo.case(name).build()
    before = sl.attention_sites(model)
    model.enable_compatibility_mode()
    assert sl.attention_sites(model) == before
    for side in ("left", "right"):
        check_decoder(model, side, SCALES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_encoder_and_cross_attention_do_not_see_the_padding(name, side):
    model = zoo.model_of(name)
    tokens, mask, _ = padded(side)
    # Not the padding's own token, from which M2M100 counts positions.
    tokens, other = (tokens.masked_fill(mask == 0, filler) for filler in (4, 5))
    inputs = {"decoder_input": tiny.tokens(length=7, seed=1), "attention_mask": mask}
    with torch.no_grad():
        soft = model(tokens, **inputs)
        for scale in FEW_SCALES[side]:
            with sl.saturate(model, scale=scale):
                found = model(tokens, **inputs)
                blind = model(other, **inputs)
            with rescaled(model, scale):
                expected = model(tokens, **inputs)
            atol = tolerance(expected - soft, soft)
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)
            torch.testing.assert_close(found, blind, rtol=0, atol=atol)


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize(
    "name", everyday(["gpt2", "llama", "bloom", "opt", "gptj", "gpt_oss_sink"], "gpt2", "opt")
)
def test_rows_without_a_visible_key_stay_as_they_are(name, compatible):
    model = zoo.case(name).build()
    if compatible:
        model.enable_compatibility_mode()
    tokens, mask, _ = padded("left")
    first = sl.attention_sites(model)[0].path + ".hook_pattern"
    with torch.no_grad():
        _, soft = model.run_with_cache(tokens, attention_mask=mask)
        for scale in SCALES:
            with sl.saturate(model, scale=scale):
                _, hard = model.run_with_cache(tokens, attention_mask=mask)
            assert torch.equal(hard[first][0, :, :N_PADS], soft[first][0, :, :N_PADS])
            live = hard[first][0, :, N_PADS:]
            assert not live[..., :N_PADS].any()
            assert not torch.allclose(live, soft[first][0, :, N_PADS:])


@pytest.mark.parametrize("scale", [2.0, math.inf])
@pytest.mark.parametrize("compatible", everyday([False, True], False))
@pytest.mark.parametrize("name", everyday(["gpt2", "llama", "opt"], "gpt2"))
def test_gradients_beside_padding(name, compatible, scale):
    model = zoo.case(name).build()
    if compatible:
        model.enable_compatibility_mode()
    tokens, mask, real = padded("left")
    weight = model.get_submodule("blocks.0.attn.v").original_component.weight
    gradients = []
    for block in (sl.saturate(model, scale=scale), rescaled(model, scale)):
        with block:
            loss = model(tokens, attention_mask=mask)[:, real].log_softmax(-1)[..., 7].sum()
            gradients.append(torch.autograd.grad(loss, weight)[0])
    assert gradients[0].isfinite().all()
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0, math.inf])
def test_texts_of_different_lengths_go_on_together_as_they_do_alone(demo, scale):
    """As reported of TransformerLens: shorter prompts of a batch were continued beside padding."""
    prompts = ["import os, sys, re", "def area(width, height):\n    return width", "for i in"]
    options = {"max_new_tokens": 5, "do_sample": False}
    with sl.saturate(demo, scale=scale):
        together = demo.generate(prompts, verbose=False, **options)
        alone = [demo.generate(prompt, verbose=False, **options) for prompt in prompts]
        by_transformers = demo.hf_generate(prompts, return_type="input", **options)
        each = [demo.hf_generate(prompt, return_type="input", **options) for prompt in prompts]
    assert together == alone
    assert by_transformers == each
