"""Parameter norms: laws of the products, and two roads to the same heads and components."""

from __future__ import annotations

import copy
import types

import pandas as pd
import pytest
import tiny
import torch
import transformers
from everyday import everyday
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sat_lens.errors import ArgumentError, FileFormatError, ModelError, NonFiniteError
from sat_lens.norms import ParameterNorms, parameter_norms
from sat_lens.norms.heads import HeadWeights, heads_of, product_norm
from sat_lens.norms.names import canonical_name, parameter_places, superseded
from sat_lens.norms.sources import module_parameters

GQA = {"num_key_value_heads": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": tiny.N_HEADS,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
# One of each layout that projections come in.
LAYOUTS = {
    "conv1d": ("GPT2LMHeadModel", "GPT2Config", tiny.GPT),
    "one key head": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", tiny.GPT),
    "by core": ("CodeGenForCausalLM", "CodeGenConfig", tiny.GPT | {"rotary_dim": 4}),
    "interleaved": ("GPTNeoXForCausalLM", "GPTNeoXConfig", tiny.SIZE),
    "interleaved groups": ("FalconForCausalLM", "FalconConfig", tiny.SIZE),
    "grouped": ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE | GQA),
    "joint": ("Phi3ForCausalLM", "Phi3Config", tiny.SIZE | GQA),
    "qk norm": ("Qwen3ForCausalLM", "Qwen3Config", tiny.SIZE | GQA | {"head_dim": 8}),
    "latent": ("DeepseekV3ForCausalLM", "DeepseekV3Config", tiny.SIZE | LATENT),
    "bert": ("BertForMaskedLM", "BertConfig", tiny.SIZE),
    "stacks": ("T5ForConditionalGeneration", "T5Config", tiny.T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", tiny.BART),
}


def raw_and_bridge(layout):
    architecture, config, settings = LAYOUTS[layout]
    raw = tiny.hf_model(architecture, getattr(transformers, config)(**settings))
    bridge = tiny.build_bridge_from_module(copy.deepcopy(raw), architecture, hf_config=raw.config)
    return raw, bridge


@pytest.mark.parametrize("layout", everyday(LAYOUTS, "conv1d", "grouped", "bart"))
def test_names_and_transformer_lens_agree_on_heads_and_components(layout):
    raw, bridge = raw_and_bridge(layout)
    by_name, by_lens = parameter_norms(raw), parameter_norms(bridge)
    assert by_name.labels == by_lens.labels
    assert len(by_name.labels) == (24 if layout in ("stacks", "bart") else 8)
    torch.testing.assert_close(by_name.heads, by_lens.heads, rtol=1e-6, atol=1e-9)
    for by in ("component", "layer"):
        pd.testing.assert_frame_equal(by_name.frame(by), by_lens.frame(by), rtol=1e-6)


@pytest.mark.parametrize("layout", everyday(LAYOUTS, "conv1d", "grouped", "bart"))
def test_the_total_is_the_norm_of_all_parameters_and_parts_add_up(layout):
    raw, _ = raw_and_bridge(layout)
    norms = parameter_norms(raw)
    expected = torch.cat([p.detach().double().flatten() for p in raw.parameters()])
    assert norms.total == pytest.approx(float(expected.norm()), rel=1e-9)
    assert int(norms.sizes.sum()) == len(expected)
    assert float(norms.frame("component")["share"].sum()) == pytest.approx(1)
    by_layer = norms.frame("layer")
    assert float(by_layer["total"].pow(2).sum()) == pytest.approx(norms.total**2)


@pytest.mark.parametrize("layout", everyday(LAYOUTS, "conv1d", "grouped", "bart"))
def test_components_are_those_of_the_modules_types(layout):
    raw, _ = raw_and_bridge(layout)
    found = parameter_norms(raw)
    by_name: dict[str, set[str]] = {}
    for name, component in zip(found.names, found.components, strict=True):
        by_name.setdefault(name, set()).add(component)
    for path, module in raw.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            components = by_name.get(f"{path}.{leaf}")
            if components is None or "relative_attention_bias" in path:
                continue
            kind = type(module).__name__
            is_norm, is_embedding = "Norm" in kind, "Embed" in kind
            is_latent = path.endswith(("kv_a_proj_with_mqa", "kv_b_proj"))
            assert (components == {"layer norm"}) == is_norm, path
            assert (components == {"embedding"}) == is_embedding, path
            assert "other" not in components, path
            # Latent projections serve keys and values alike.
            assert ("attention" in components) == is_latent, path


def test_the_products_equal_the_matrices_that_are_never_made():
    torch.manual_seed(0)
    weights = HeadWeights(
        "", 0, *(torch.randn(shape) for shape in ((4, 16, 3), (2, 16, 3), (2, 16, 5), (4, 5, 16)))
    )
    norms = weights.norms()
    for head in range(4):
        group = head // 2
        qk = weights.q[head].double() @ weights.k[group].double().T
        ov = weights.v[group].double() @ weights.o[head].double()
        raw = [weights.q[head], weights.k[group], weights.v[group], weights.o[head]]
        expected = [*(float(t.double().norm()) for t in raw), float(qk.norm()), float(ov.norm())]
        torch.testing.assert_close(norms[head], torch.tensor(expected, dtype=torch.float64))


@given(a=st.floats(1e-3, 1e3), head=st.integers(0, 3), seed=st.integers(0, 99))
def test_rescaling_a_pair_changes_raw_norms_and_no_product(a, head, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 8, 3), (4, 8, 3), (4, 8, 3), (4, 3, 8))
    q, k, v, o = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    before = HeadWeights("", 0, q.clone(), k.clone(), v.clone(), o.clone()).norms()
    q[head] *= a
    k[head] /= a
    v[head] *= a
    o[head] /= a
    after = HeadWeights("", 0, q, k, v, o).norms()
    torch.testing.assert_close(after[:, 4:], before[:, 4:], rtol=1e-9, atol=0)
    torch.testing.assert_close(after[head, 0], a * before[head, 0])


@given(seed=st.integers(0, 99))
def test_rotating_a_head_changes_no_product(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64) + 3 * torch.eye(3)
    before = product_norm(q, k)
    after = product_norm(q @ mix, k @ torch.linalg.inv(mix).T)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)


def test_latent_heads_are_the_scores_that_the_factors_make():
    raw, _ = raw_and_bridge("latent")
    attention = raw.model.layers[0].self_attn
    head, *_ = heads_of(module_parameters(raw))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    # Without the norms between the factors, which the products leave out by design.
    q = (x @ attention.q_a_proj.weight.T @ attention.q_b_proj.weight.T).view(5, 4, 12)
    latent, rotary = (x @ attention.kv_a_proj_with_mqa.weight.T).split([16, 4], dim=-1)
    k, v = (latent @ attention.kv_b_proj.weight.T).view(5, 4, 16).split([8, 8], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", q[..., :8], k)
    scores = scores + torch.einsum("qhd,kd->hqk", q[..., 8:], rotary)
    found = torch.einsum("qm,hmd,hnd,kn->hqk", x, head.q, head.k, x)
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.einsum("km,hmd->khd", x, head.v), v, rtol=1e-4, atol=1e-4)


def test_notes_say_what_the_products_leave_out():
    def notes(layout):
        return " ".join(parameter_norms(raw_and_bridge(layout)[0]).notes)

    assert "biases" in notes("bert")
    assert "normalised" in notes("qk norm")
    assert "latent" in notes("latent")
    assert notes("grouped") == ""


def test_tied_parameters_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    apart = parameter_norms(model).total
    model["lm_head"].weight = model["embed"].weight
    tied = parameter_norms(model)
    assert tied.total == pytest.approx(float(model["embed"].weight.detach().norm()))
    assert tied.total < apart
    # Two parameters over the same memory are tied as well, whatever Python says.
    model["lm_head"].weight = nn.Parameter(model["embed"].weight.detach())
    assert parameter_norms(model).total == pytest.approx(tied.total)


def test_any_module_has_norms():
    norms = parameter_norms(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    assert norms.labels == ()
    assert norms.frame("head").shape == (0, 6)
    encoder = nn.TransformerEncoderLayer(8, 2)
    assert set(parameter_norms(nn.ModuleDict({"layers": nn.ModuleList([encoder])})).components) == {
        "attention",
        "ov",
        "mlp",
        "layer norm",
    }


def test_a_demo_has_norms_by_layer_and_head(demo, tmp_path):
    norms = parameter_norms(demo)
    assert norms.frame("layer").index.tolist() == ["outside", "L0", "L1", "L2", "L3"]
    assert norms.frame("head").index[0] == "L0H0"
    assert norms.summary()["norm"] == norms.total
    norms.save(tmp_path / "n.safetensors")
    again = ParameterNorms.load(tmp_path / "n.safetensors")
    for by in ("component", "layer", "head", "parameter"):
        pd.testing.assert_frame_equal(again.frame(by), norms.frame(by))
    assert again.provenance == norms.provenance
    assert norms.plot().axes


def test_half_precision_is_summed_in_full():
    layer = nn.Linear(300, 300)
    half = copy.deepcopy(layer).half()
    with torch.no_grad():
        layer.weight.copy_(half.weight)
        layer.bias.copy_(half.bias)
    assert parameter_norms(half).total == pytest.approx(parameter_norms(layer).total, rel=1e-12)


def integer_parameter(*shape):
    return nn.Parameter(torch.ones(*shape, dtype=torch.int8), requires_grad=False)


def test_quantised_weights_are_named_and_left_out():
    model = nn.Linear(3, 3)
    total = parameter_norms(model).total
    model.packed, model.other = integer_parameter(3, 3), integer_parameter(2)
    norms = parameter_norms(model)
    assert norms.total == total
    assert any("packed and 1 others" in note for note in norms.notes)
    with pytest.raises(ModelError, match="quantised"):
        parameter_norms(nn.ParameterList([integer_parameter(2, 2)]))


def test_a_layer_that_was_taken_out_is_not_counted(demo):
    model = copy.deepcopy(demo)
    del model.blocks[1]
    model.blocks[0].attn = nn.Identity()
    norms = parameter_norms(model)
    # TransformerLens reads no attention there, and the weights of neither are named any more.
    assert norms.total < parameter_norms(demo).total
    assert "blocks.0.attn" not in " ".join(norms.names)


def test_names_are_stripped_of_wrappers_and_doubles():
    assert canonical_name("module.h.0._original_component.attn.q.weight") == "h.0.attn.q.weight"
    assert superseded(["m.gate_up_proj.weight", "m.gate.weight", "m.in.weight"]) == {
        "m.gate_up_proj.weight"
    }
    assert superseded(["m.gate_up_proj.weight"]) == set()
    places = parameter_places(["encoder.layer.0.attention.self.query.weight"])
    assert [(p.stack, p.layer, p.projection) for p in places.values()] == [("", 0, "q")]


def test_refusals(tmp_path, types_unchecked):
    broken = nn.Linear(2, 2)
    with torch.no_grad():
        broken.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="bias"):
        parameter_norms(broken)
    with pytest.raises(ModelError, match="no parameters"):
        parameter_norms(nn.ReLU())
    with pytest.raises(ModelError, match="meta"):
        parameter_norms(nn.Linear(2, 2, device="meta"))
    for wrong in ("demo", None, nn.Linear(2, 2).state_dict()):
        with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
            parameter_norms(wrong)
    with pytest.raises(ArgumentError, match=r"sat_lens\.load_model"):
        parameter_norms("demo")
    norms = parameter_norms(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="by is"):
        norms.frame("colour")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError):
        ParameterNorms.load(tmp_path / "x.safetensors")


def test_a_model_of_ones_own_shows_its_heads_by_a_plain_configuration():
    model = nn.ModuleDict(
        {"h": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict(
            {"c_attn": nn.Linear(8, 24), "c_proj": nn.Linear(8, 8)}
        )})])}
    )  # fmt: skip
    model.config = types.SimpleNamespace(n_head=2, n_embd=8)
    norms = parameter_norms(model)
    assert norms.labels == ("L0H0", "L0H1")
    joint = model["h"][0]["attn"]["c_attn"].weight.detach().double()
    expected = (joint[:4].T @ joint[8:12]).norm()
    assert norms.frame("head").loc["L0H0", "qk_product"] == pytest.approx(float(expected))
