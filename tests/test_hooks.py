"""Saturation as plain TransformerLens hooks, through the scores or through a true pattern."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
import zoo
from everyday import everyday

import sat_lens as sl
from sat_lens.errors import UnsupportedModelError

NATIVE = [case.name for case in zoo.CASES if case.name.startswith("native")]
SCORES = ["gpt2", "llama", "gemma2_soft_cap", "deepseek_v3", "bloom"]
NEITHER = ["gpt_oss_sink", "bert", "xglm", "switch", "longt5_local", "led", "jetmoe"]


def hooked(model, tokens, *heads_and_scale, **kwargs):
    hooks = sl.saturation_hooks(model, *heads_and_scale)
    return model.run_with_hooks(tokens, fwd_hooks=hooks, **kwargs)


@pytest.mark.parametrize("scale", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [2]])
@pytest.mark.parametrize("name", everyday([*SCORES, *NATIVE], "gpt2", "native"))
def test_hooks_agree_with_the_oracle(name, heads, scale):
    model, tokens = zoo.model_of(name), tiny.tokens()
    paths = {site.path: heads for site in sl.attention_sites(model)}
    labels = [f"L{layer}H{head}" for layer in (0, 1) for head in heads]
    with torch.no_grad():
        soft = model(tokens)
        found = hooked(model, tokens, labels, scale)
        with oracle.rescaled_softmax(model, paths, scale, tiny.N_HEADS):
            expected = model(tokens)
    effect = (expected - soft).abs().max()
    assert (effect > 1e-2) == (scale != 1)
    atol = float(1e-4 * effect + 1e-5 * soft.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", NATIVE)
def test_a_pattern_cannot_be_flattened(name):
    model = zoo.model_of(name)
    with pytest.raises(UnsupportedModelError, match=r"below 1.*sat_lens\.saturate"):
        sl.saturation_hooks(model, scale=0.5)
    with pytest.raises(UnsupportedModelError, match="below 1"):
        sl.saturation_hooks(model, ["L0H0", "L0H1"], {"L0H0": 2.0, "L0H1": 0.0})


@pytest.mark.parametrize("name", everyday(NEITHER, "gpt_oss_sink", "bert", "led"))
def test_where_no_hook_point_is_true(name):
    with pytest.raises(UnsupportedModelError, match=r"TransformerLens hook.*sat_lens\.saturate"):
        sl.saturation_hooks(zoo.model_of(name))


def test_a_pattern_in_half_precision_is_refused():
    model = tiny.native()
    hooks = sl.saturation_hooks(model)
    model.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"needs float32.*bfloat16"):
        model.run_with_hooks(tiny.tokens(), fwd_hooks=hooks)


@pytest.mark.parametrize("scale", [3.0, math.inf])
def test_rows_of_zeros_and_their_gradients(scale):
    """Left padding leaves a native model rows without a key, whose pattern is zero."""
    model, tokens = zoo.model_of("native"), tiny.tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    paths = {site.path: range(tiny.N_HEADS) for site in sl.attention_sites(model)}
    weights = [weight for weight in model.parameters() if weight.dim() >= 2]

    def gradients(logits):
        loss = logits[:, 3:].log_softmax(-1)[..., 7].sum()
        return logits, torch.autograd.grad(loss, weights, allow_unused=True)

    found, mine = gradients(hooked(model, tokens, None, scale, attention_mask=mask))
    with oracle.rescaled_softmax(model, paths, scale, tiny.N_HEADS):
        expected, theirs = gradients(model(tokens, attention_mask=mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for one, other in zip(mine, theirs, strict=True):
        zero = torch.zeros(())
        one, other = (zero if gradient is None else gradient for gradient in (one, other))
        torch.testing.assert_close(*torch.broadcast_tensors(one, other), rtol=1e-3, atol=1e-3)


def test_an_edit_of_scores_that_a_native_model_discards():
    model, tokens = zoo.model_of("native"), tiny.tokens()
    edit = ("blocks.0.attn.hook_attn_scores", lambda scores, hook: scores * 2)
    with pytest.raises(sl.SatLensError, match=r"hook_attn_scores.*throws"), sl.saturate(model):
        model.run_with_hooks(tokens, fwd_hooks=[edit])


def test_a_pattern_that_changed_since_the_softmax(monkeypatch):
    model = tiny.native()
    inner = model.get_submodule("blocks.1.attn").original_component
    original = inner.forward

    def halving(*args, pattern_fn, **kwargs):
        return original(*args, pattern_fn=lambda pattern: pattern_fn(pattern / 2), **kwargs)

    monkeypatch.setattr(inner, "forward", halving)
    assert sl.saturation_hooks(model, "L0H0")
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn"):
        sl.saturation_hooks(model, "L1H0")
