"""Norms of heads against the maps that a model's own attention computes, as dense matrices."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
import transformers
import zoo
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sat_lens.norms import parameter_norms, rescaling_share

D_MODEL = 32
GQA = {"num_key_value_heads": 2}
# Layouts whose attention goes through transformers' own switch, and has no norms inside.
SEEN = {
    "conv1d": ("GPT2LMHeadModel", "GPT2Config", tiny.GPT),
    "one key head": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", tiny.GPT),
    "interleaved": ("GPTNeoXForCausalLM", "GPTNeoXConfig", tiny.SIZE),
    "grouped": ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE | GQA),
    "wide heads": ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE | GQA | {"head_dim": 12}),
    "joint groups": ("Phi3ForCausalLM", "Phi3Config", tiny.SIZE | GQA),
    "biases": ("Qwen2ForCausalLM", "Qwen2Config", tiny.SIZE | GQA),
    "bert": ("BertForMaskedLM", "BertConfig", tiny.SIZE),
}


@contextlib.contextmanager
def watched(seen, head):
    """Let attention show its queries, keys and values, and pass on the values of one head alone."""

    def show(module, query, key, value, *_args, **_kwargs):
        per_group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(per_group, 1) for t in (key, value))
        seen.append((query.double(), key.double()))
        alone = torch.zeros_like(value)
        alone[:, head] = value[:, head]
        return alone.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["shown"] = show
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["shown"]


def attention_of(model, layer):
    """Find the module that holds one layer's attention, by what is called in it."""
    names = [name for name, _ in model.named_modules() if f".{layer}." in f"{name}."]
    ends = ("self_attn", "attn", "attention", "self")
    found = [name for name in names if name.rsplit(".", 1)[-1] in ends]
    return model.get_submodule(found[0])


def maps(architecture, config, settings, layer, head):
    """Send a basis through one attention module, each vector alone, at position 0."""
    model = tiny.hf_model(architecture, getattr(transformers, config)(**settings)).double()
    # An origin beside the basis, to take biases off.
    basis = torch.cat([torch.zeros(1, D_MODEL), torch.eye(D_MODEL)]).double()[:, None]
    seen, outputs = [], []

    def swap(_module, args, kwargs):
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": basis}
        return (basis, *args[1:]), kwargs

    attention = attention_of(model, layer)
    adds_its_input = hasattr(attention, "output")
    if adds_its_input:
        attention.output.LayerNorm = nn.Identity()
    attention.register_forward_pre_hook(swap, with_kwargs=True)
    attention.register_forward_hook(lambda _m, _i, output: outputs.append(output[0]))
    with watched(seen, head), torch.no_grad():
        model.set_attn_implementation("shown")
        model(torch.full((D_MODEL + 1, 1), 5))
    query, key = (t[:, head, 0] - t[0, head, 0] for t in seen[layer])
    written = outputs[0][:, 0] - outputs[0][0, 0] - adds_its_input * basis[:, 0]
    return parameter_norms(model), query[1:], key[1:], written[1:]


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("layout", SEEN)
def test_products_are_those_of_the_maps_that_attention_computes(layout, head):
    norms, query, key, written = maps(*SEEN[layout], layer=1, head=head)
    row = norms.frame("head").loc[f"L1H{head}"]
    # Dense, d_model by d_model, in float64.
    assert row["qk_product"] == pytest.approx(float((query @ key.T).norm()), rel=1e-9)
    assert row["ov_product"] == pytest.approx(float(written.norm()), rel=1e-9)
    assert row["W_Q"] == pytest.approx(float(query.norm()), rel=1e-9)
    assert row["W_K"] == pytest.approx(float(key.norm()), rel=1e-9)


# One block serves several layers, and its weights are listed at the first.
SHARED = {"zamba2": 4}


@pytest.mark.parametrize("case", zoo.everyday_cases())
def test_heads_have_the_labels_that_they_have_everywhere(case):
    norms = parameter_norms(zoo.model_of(case.name))
    assert len(set(norms.labels)) == len(norms.labels)
    for stack in case.stacks:
        named = [label for label in norms.labels if stack in ("", label.rpartition(".")[0])]
        if set(case.heads(stack)) <= set(named):
            continue
        is_tower = any(part in stack for part in ("vision", "audio"))
        assert is_tower or len(named) == SHARED.get(case.name) or "told apart" in norms.notes[-1]


@pytest.mark.parametrize("name", ["llama4", "nanochat"])
def test_norms_without_parameters_are_seen(name):
    model = next(case for case in zoo.CASES if case.name == name).build()
    assert any("normalised inside" in note for note in parameter_norms(model).notes)
    assert "W_Q, W_K" not in rescaling_share(model).pairs


def test_what_is_inside_a_bridge_has_the_heads_of_the_bridge():
    bridge = tiny.bridge("GPT2LMHeadModel", transformers.GPT2Config(**tiny.GPT))
    # Its queries, keys and values are split there, and its output is still [in, out].
    inside = parameter_norms(bridge.original_model)
    torch.testing.assert_close(inside.heads, parameter_norms(bridge).heads)


def test_a_joint_projection_of_cross_attention_is_not_taken_for_groups():
    config = transformers.GPT2Config(**tiny.GPT, add_cross_attention=True)
    norms = parameter_norms(tiny.hf_model("GPT2LMHeadModel", config))
    assert norms.labels == tuple(f"L{layer}H{head}" for layer in (0, 1) for head in range(4))
    assert any("told apart in transformer.h.0.crossattention and 1" in note for note in norms.notes)
    components = dict(zip(norms.names, norms.components, strict=True))
    assert components["transformer.h.0.crossattention.c_attn.weight"] == "attention"
