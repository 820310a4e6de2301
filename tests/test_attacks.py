"""Wrong numbers in silence that somebody once found; each stays found."""

import copy
import math

import pytest
import tiny
import torch
import zoo
from everyday import everyday

import sat_lens as sl
from sat_lens.attention import RandomKey
from sat_lens.errors import ArgumentError, NonFiniteError, SatLensError
from sat_lens.roles import merge

METRIC = sl.metrics.logit_difference(5, 6)
TOKENS = tiny.tokens(3, 16)


def model(name):
    return zoo.case(name).build()


@pytest.mark.parametrize("name", everyday(["llama", "gpt_neox", "bert"], "llama"))
def test_a_random_control_is_that_of_the_head_alone_whichever_heads_are_swept(name):
    m = model(name)
    with torch.no_grad():
        soft = float(METRIC(m(TOKENS)))
        with sl.replace_attention(m, RandomKey(0), "L1H3"):
            wanted = float(METRIC(m(TOKENS))) - soft
    for heads in (None, ["L1H0", "L1H3"], ["L1H3"]):
        sweep = sl.sweep_heads(
            m, TOKENS, METRIC, heads=heads, baseline="random", controls=1, progress=False
        )
        assert float(sweep.random_effect[1, 3]) == pytest.approx(wanted, abs=1e-4)


def test_a_suppressed_token_does_not_switch_the_check_of_the_fast_route_off():
    m = model("gpt_neox")

    def suppress(x, hook):
        x = x.clone()
        x[..., 0] = torch.finfo(x.dtype).min
        return x

    m.add_hook("unembed.hook_out", suppress)
    try:
        fast, slow = (
            sl.sweep_heads(m, TOKENS, METRIC, fast=f, progress=False) for f in (True, False)
        )
    finally:
        m.reset_hooks()
    torch.testing.assert_close(fast.values, slow.values, atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", everyday(["gpt_oss_sink", "llama", "t5"], "t5"))
def test_blocks_may_end_in_any_order(name):
    m, case = model(name), zoo.case(name)
    args, kwargs = case.inputs()
    with torch.no_grad():
        soft = m(*args, **kwargs)
        first, second = sl.saturate(m), sl.saturate(m, scale=0.5)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        with sl.saturate(m, scale=0.5):
            pass
        half = m(*args, **kwargs)
        second.__exit__(None, None, None)
        assert torch.equal(m(*args, **kwargs), soft)
        with sl.saturate(m, scale=0.5):
            assert torch.equal(m(*args, **kwargs), half)
    paths = [site.path for site in sl.attention_sites(m)]
    assert not any("forward" in m.get_submodule(path).__dict__ for path in paths)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_model_is_not_copied_while_it_is_intercepted(name):
    m = model(name)
    with sl.saturate(m), pytest.raises(SatLensError, match="Copy it outside"):
        copy.deepcopy(m)
    copy.deepcopy(m)


def test_the_list_of_sites_is_the_callers_own():
    m = model("llama")
    sl.attention_sites(m).clear()
    assert len(sl.attention_sites(m)) == 2


def test_scores_that_are_nan_are_an_error_and_no_role():
    m = model("opt")

    def poison(x, hook):
        return x * math.nan

    m.add_hook("blocks.1.attn.q.hook_out", poison)
    try:
        with pytest.raises(NonFiniteError, match="hold NaN"):
            sl.head_roles(m, TOKENS, progress=False)
    finally:
        m.reset_hooks()


def test_a_fully_padded_sequence_has_no_importance_and_spoils_no_other():
    m = model("llama")
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0] = 0
    frame = sl.head_roles(
        m,
        [{"input": TOKENS, "attention_mask": mask}],
        min_keys=4,
        metric=lambda logits: logits[1:].logsumexp(-1).mean(),
        progress=False,
    ).frame()
    assert frame["tv_argmax"].notna().all()


def test_an_encoder_decoder_s_loss_is_that_of_its_decoder():
    m = model("t5")
    encoder, decoder = tiny.tokens(2, 10), tiny.tokens(2, 10, seed=1)
    curve = sl.scaling_curve(
        m, [{"input": encoder, "decoder_input": decoder}], scales=[1.0], progress=False
    )
    with torch.no_grad():
        logits = m(encoder, decoder_input=decoder)
    wanted = float(sl.metrics.next_token_loss(decoder)(logits))
    assert curve.frame().loc[1.0, "loss"] == pytest.approx(wanted, abs=1e-5)


def test_positions_from_the_end_are_refused_on_padded_sequences(demo):
    with pytest.raises(ArgumentError, match="one length"):
        sl.head_roles(
            demo, ["import os", "import os, sys, re"], query_positions=[-1], progress=False
        )


def test_a_part_is_merged_once(demo):
    part = sl.head_roles(demo, ["import os, sys, re, json"] * 2, progress=False)
    with pytest.raises(ArgumentError, match="Parts 1 and 2 are the same"):
        merge([part, part])


def test_a_learned_sink_does_not_shift_the_positions():
    m = model("gpt_oss_sink")
    frame = sl.head_roles(m, TOKENS, min_keys=2, progress=False).frame()
    with torch.no_grad():
        pattern = m.run_with_cache(TOKENS)[1]["pattern", 0]
    own = pattern.diagonal(dim1=-2, dim2=-1).mean((0, 2))
    previous = pattern[..., 1:, :].diagonal(dim1=-2, dim2=-1).sum((0, 2)) / (3 * 16)
    first_layer = frame[frame["layer"] == 0]
    assert first_layer["self"].tolist() == pytest.approx(own.tolist(), abs=1e-5)
    assert first_layer["previous"].tolist() == pytest.approx(previous.tolist(), abs=1e-5)
