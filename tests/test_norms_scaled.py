"""Scaled parameters come back bit for bit, and mean what they say; the homogeneity curve."""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sat_lens as sl
from sat_lens.errors import ArgumentError, ModelError, NonFiniteError
from sat_lens.norms import (
    HomogeneityCurve,
    homogeneity_curve,
    parameter_norms,
    scaled_parameters,
)

GPT2 = ("GPT2LMHeadModel", "GPT2Config", tiny.GPT)
NEOX = ("GPTNeoXForCausalLM", "GPTNeoXConfig", tiny.SIZE)
LLAMA = ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE | {"num_key_value_heads": 2})


def raw(architecture, config, settings):
    return tiny.hf_model(architecture, getattr(transformers, config)(**settings))


def bridge(architecture, config, settings):
    return tiny.bridge(architecture, getattr(transformers, config)(**settings))


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow),
        pytest.param(NEOX, id="neox"),
        pytest.param(LLAMA, id="llama", marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize("which", ["all", "attention", "qk", "matrices"])
@pytest.mark.parametrize("build", [raw, bridge])
@kinds
def test_restored_bit_for_bit_also_after_exceptions(kind, build, which):
    model = build(*kind)
    before = bits(model)
    with scaled_parameters(model, 0.1, which) as scaled:
        assert scaled is model
        assert not same(model, before)
    assert same(model, before)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), scaled_parameters(model, 3.7, which):
            raise error
        assert same(model, before)


@given(c=st.floats(-1e3, 1e3).filter(lambda c: abs(c) > 1e-3))
def test_all_parameters_grow_by_the_factor(c):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    total = parameter_norms(model).total
    with scaled_parameters(model, c):
        assert parameter_norms(model).total == pytest.approx(abs(c) * total)


@pytest.mark.parametrize("build", [raw, bridge])
@kinds
def test_each_weight_grows_once_however_often_it_appears(kind, build):
    model = build(*kind)
    norms = parameter_norms(model).frame("component")["norm"]
    with scaled_parameters(model, 3.0):
        grown = parameter_norms(model).frame("component")["norm"]
    pd.testing.assert_series_equal(grown, 3 * norms, rtol=1e-6)
    with scaled_parameters(model, 3.0, "qk"):
        grown = parameter_norms(model).frame("component")["norm"]
    assert grown["qk"] == pytest.approx(3 * norms["qk"], rel=1e-6)
    pd.testing.assert_series_equal(grown.drop("qk"), norms.drop("qk"))


def pair_of_blocks(model):
    """Two open blocks, the later one over a part of what the earlier one multiplied."""
    blocks = scaled_parameters(model, 3.0), scaled_parameters(model, 0.7, "qk")
    for block in blocks:
        block.__enter__()
    return blocks


@pytest.mark.parametrize("build", [raw, bridge])
@kinds
def test_blocks_that_end_in_another_order_leave_the_originals(kind, build):
    model = build(*kind)
    before = bits(model)
    with scaled_parameters(model, 0.7, "qk"):
        inner_alone = bits(model)
    outer, inner = pair_of_blocks(model)
    outer.__exit__(None, None, None)
    assert same(model, inner_alone)
    inner.__exit__(None, None, None)
    assert same(model, before)


def test_blocks_over_a_model_and_its_part_are_one_stack():
    model = raw(*LLAMA)
    before = bits(model)
    outer = scaled_parameters(model, 3.0)
    outer.__enter__()
    inner = scaled_parameters(model.model.layers[0], 2.0)
    inner.__enter__()
    third = scaled_parameters(model, 5.0, "matrices")
    third.__enter__()
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert same(model, before)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float64)])
@pytest.mark.parametrize("build", [raw, bridge])
@pytest.mark.parametrize("kind", [NEOX, LLAMA], ids=["neox", "llama"])
def test_a_cast_in_the_block_is_undone_and_refused(kind, build, cast):
    model = build(*kind)
    before, tokens = bits(model), tiny.tokens()
    with torch.no_grad():
        output = model(tokens)
    with pytest.raises(ArgumentError, match="cast or replaced"), scaled_parameters(model, 3.0):
        cast(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(model, before)
    with torch.no_grad():
        again = model(tokens)
    assert torch.equal(getattr(again, "logits", again), getattr(output, "logits", output))


def test_what_ends_the_block_goes_before_the_complaint():
    model = raw(*LLAMA)
    before = bits(model)

    def cast_and_stop():
        with scaled_parameters(model, 3.0):
            model.half()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cast_and_stop()
    assert same(model, before)


def test_a_cast_among_blocks_that_end_in_another_order_is_undone():
    model = raw(*LLAMA)
    before = bits(model)
    outer = scaled_parameters(model, 3.0)
    outer.__enter__()
    model.half()
    inner = scaled_parameters(model, 0.7, "qk")
    inner.__enter__()
    with pytest.raises(ArgumentError, match="cast or replaced"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert same(model, before)


def test_a_parameter_that_was_replaced_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="weight was"), scaled_parameters(model, 3.0):
        model.weight = nn.Parameter(torch.ones(2, 2))


def test_a_factor_of_one_is_the_identity(demo):
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = demo(tokens)
        with scaled_parameters(demo, 1.0):
            assert torch.equal(demo(tokens), plain)


@pytest.mark.parametrize("build", [raw, bridge])
def test_scaled_queries_and_keys_are_attention_only_scaling(build):
    tokens = tiny.tokens()
    lens = bridge(*LLAMA)
    with torch.no_grad(), sl.saturate(lens, scale=3.0):
        expected = lens(tokens)
    model = build(*LLAMA)
    with torch.no_grad(), scaled_parameters(model, math.sqrt(3.0), "qk"):
        found = model(tokens)
    torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-3, atol=1e-4)


def test_all_parameters_times_c_are_not_attention_only_scaling():
    lens, tokens = bridge(*LLAMA), tiny.tokens()
    with torch.no_grad():
        with sl.saturate(lens, scale=9.0):
            attention_only = lens(tokens)
        with scaled_parameters(lens, 3.0):
            everything = lens(tokens)
    cosine = torch.cosine_similarity(attention_only, everything, dim=-1).mean()
    assert float(cosine) < 0.9


def test_biases_and_gains_can_be_left_out():
    model = raw(*GPT2)
    with scaled_parameters(model, 2.0, "matrices"):
        inside = dict(copy.deepcopy(model).named_parameters())
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.dim() < 2 else 2.0
        assert torch.equal(inside[name], factor * parameter), name


def test_refusals(types_unchecked):
    layer = nn.Linear(2, 2)
    for c in (math.nan, math.inf):
        with pytest.raises(ArgumentError, match="finite"), scaled_parameters(layer, c):
            pass
    with pytest.raises(ArgumentError, match="which"), scaled_parameters(layer, 2, "biases"):
        pass
    with pytest.raises(ArgumentError, match="no parameters"), scaled_parameters(layer, 2, "qk"):
        pass
    for c in ("2", None, torch.ones(2)):
        with pytest.raises(ArgumentError, match="finite number"), scaled_parameters(layer, c):
            pass
    for model in ("demo", None, layer.state_dict()):
        with pytest.raises(ArgumentError, match="a torch"), scaled_parameters(model, 2):
            pass
    with pytest.raises(ArgumentError, match="which"), scaled_parameters(layer, 2, ["qk"]):
        pass
    with pytest.raises(ModelError, match="meta"), scaled_parameters(layer.to("meta"), 2):
        pass
    quantised = nn.Linear(2, 2)
    packed = torch.ones(2, 2, dtype=torch.int8)
    quantised.packed = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ModelError, match="packed holds integers"), scaled_parameters(quantised, 2):
        pass


def test_the_curve_ends_at_the_saturated_network(demo, tmp_path):
    before, state = bits(demo), torch.get_rng_state()
    texts = ["import os, sys, re, json", "def f(x): return x"]
    curve = homogeneity_curve(demo, texts, scales=[1, 2, 1000], progress=False)
    frame = curve.frame()
    assert frame.loc[1000, "cos_saturated"] == pytest.approx(1)
    assert frame.loc[1000, "S"] == pytest.approx(1)
    assert frame.loc[1, "cos_model"] == pytest.approx(1)
    assert frame.loc[1, "cos_saturated"] == pytest.approx(frame.loc[1000, "cos_model"])
    assert same(demo, before)
    assert torch.equal(torch.get_rng_state(), state)
    curve.save(tmp_path / "c.safetensors")
    again = HomogeneityCurve.load(tmp_path / "c.safetensors")
    pd.testing.assert_frame_equal(again.frame(), frame)
    assert curve.plot().axes


def test_a_homogeneous_network_keeps_its_direction():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(0))]
    curve = homogeneity_curve(
        model,
        data,
        scales=[1, 10],
        hidden=lambda network, batch: network(batch.inputs),
        progress=False,
    )
    frame = curve.frame()
    assert frame["cos_saturated"].tolist() == pytest.approx([1, 1])
    assert frame[["S", "cos_random"]].isna().all(axis=None)


def test_a_model_that_is_none_of_transformer_lens_reads_tokens_too():
    model = raw(*LLAMA)
    curve = homogeneity_curve(
        model,
        tiny.tokens(),
        scales=[1, 100],
        hidden=lambda network, batch: network.model(batch.inputs).last_hidden_state,
        progress=False,
    )
    assert curve.frame().loc[100, "cos_saturated"] == pytest.approx(1)


def test_the_curve_refuses(demo, types_unchecked):
    for scales in ([1.0], [0.0, 1.0], [1.0, math.inf], 2.0, "ab", [1.0, "2"], None):
        with pytest.raises(ArgumentError, match="factors"):
            homogeneity_curve(demo, ["import os"], scales=scales, progress=False)
    with pytest.raises(ArgumentError, match="hidden="):
        homogeneity_curve(nn.Linear(2, 2), [torch.ones(1, 2)], progress=False)
    for wrong, words in (
        ({"hidden": 3}, "hidden is a function"),
        ({"hidden": lambda *_: "x"}, "hidden must give a tensor"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"which": "biases"}, "which must be one of"),
    ):
        with pytest.raises(ArgumentError, match=words):
            homogeneity_curve(demo, ["import os"], scales=[1, 2], progress=False, **wrong)
    with pytest.raises(ArgumentError, match="a torch"):
        homogeneity_curve("demo", ["import os"], progress=False)
    with pytest.raises(NonFiniteError, match="1e\\+39"):
        homogeneity_curve(demo, ["import os"], scales=[1.0, 1e39], progress=False)


def test_the_bar_of_the_curve_knows_its_end(demo, capsys):
    homogeneity_curve(demo, ["import os", "import re", "x = 1"], scales=[1, 2], batch_size=2)
    # Two batches, each with two factors, the saturated network, the plain one and the control.
    assert "10/10" in capsys.readouterr().err
