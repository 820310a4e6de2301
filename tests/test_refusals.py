"""Where saturation cannot be what was asked for, an error says so before any number comes back."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import transformers
import zoo
from transformer_lens.model_bridge import TransformerBridge

import sat_lens as sl
from sat_lens.errors import (
    ArgumentError,
    HeadSelectionError,
    NotReachedError,
    UnsupportedModelError,
)

OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
FUSED = {
    "OPTForCausalLM": ("OPTConfig", OPT, tiny.text_inputs),
    "BertForMaskedLM": ("BertConfig", {}, tiny.text_inputs),
    "ViTForImageClassification": (
        "ViTConfig",
        {"image_size": 16, "patch_size": 4},
        tiny.image_inputs,
    ),
}


def saturated(model, *args, heads=None, **kwargs):
    with sl.saturate(model, heads), torch.no_grad():
        return model(*args, **kwargs)


def refusal(error_type, *words):
    """Expect an error of that type, of the library's family, whose message has all these words."""
    assert issubclass(error_type, sl.SatLensError)
    return pytest.raises(error_type, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("MambaForCausalLM", "MambaConfig"), ("RwkvForCausalLM", "RwkvConfig")],
)
def test_a_model_without_attention(architecture, config):
    size = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
    model = tiny.of_class(architecture, config, **size)()
    with refusal(UnsupportedModelError, "softmax attention", "Mamba, RWKV"):
        saturated(model, tiny.tokens())
    with refusal(UnsupportedModelError, "softmax attention"):
        sl.attention_sites(model)


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_attention_until_it_is_eager(architecture):
    config, settings, inputs = FUSED[architecture]
    config = getattr(transformers, config)(**tiny.SIZE, **settings)
    model = tiny.bridge(architecture, config, attn_implementation="sdpa")
    args, kwargs = inputs()
    for heads in (None, "L0H1"):
        with refusal(UnsupportedModelError, "blocks.0.attn", "fused", 'attn_implementation="eager'):
            saturated(model, *args, heads=heads, **kwargs)
    model.original_model.set_attn_implementation("eager")
    with torch.no_grad():
        soft = model(*args, **kwargs)
    assert not torch.allclose(saturated(model, *args, **kwargs), soft)


SINK = tiny.SIZE | {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 4}
HIDDEN = "hidden_dropout_prob"
DROPOUTS = [
    ("GPT2LMHeadModel", "GPT2Config", tiny.GPT, "attn_pdrop", "resid_pdrop"),
    ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE, "attention_dropout", None),
    ("OPTForCausalLM", "OPTConfig", tiny.SIZE | OPT, "attention_dropout", "dropout"),
    ("BertForMaskedLM", "BertConfig", tiny.SIZE, "attention_probs_dropout_prob", HIDDEN),
    ("GptOssForCausalLM", "GptOssConfig", SINK, "attention_dropout", None),
]


@pytest.mark.parametrize(("architecture", "config", "size", "attention", "rest"), DROPOUTS)
def test_training_mode_with_attention_dropout(architecture, config, size, attention, rest):
    model = tiny.of_class(architecture, config, **size, **{attention: 0.1})()
    saturated(model, tiny.tokens())
    model.train()
    with refusal(UnsupportedModelError, "training mode", r"model.eval\(\)"):
        saturated(model, tiny.tokens())
    model.eval()
    saturated(model, tiny.tokens())


@pytest.mark.parametrize(
    ("architecture", "config", "size", "attention", "rest"), [d for d in DROPOUTS if d[-1]]
)
def test_training_mode_with_dropout_outside_of_attention(
    architecture, config, size, attention, rest
):
    model = tiny.of_class(architecture, config, **size, **{attention: 0.0, rest: 0.1})()
    saturated(model, tiny.tokens())
    with refusal(UnsupportedModelError, "training mode", r"model.eval\(\)"):
        saturated(model.train(), tiny.tokens())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_mode_without_any_dropout(name):
    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = (
        zoo.case(name).build()
        if name == "llama"
        else tiny.of_class("GPT2LMHeadModel", "GPT2Config", **tiny.GPT, **none)()
    )
    expected = saturated(model, tiny.tokens())
    assert torch.equal(saturated(model.train(), tiny.tokens()), expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_training_mode_inside_the_block(name):
    model = zoo.case(name).build()
    with sl.saturate(model):
        model.train()
        with refusal(UnsupportedModelError, "training mode inside the block"):
            model(tiny.tokens())
        model.eval()
        model(tiny.tokens())


def test_training_mode_of_a_part():
    model = tiny.of_class("LlamaForCausalLM", "LlamaConfig", **tiny.SIZE, attention_dropout=0.1)()
    saturated(model, tiny.tokens())
    model.original_model.train()
    with refusal(UnsupportedModelError, "training mode"):
        saturated(model, tiny.tokens())


@pytest.mark.parametrize("model", [torch.nn.Linear(3, 3), "gpt2"], ids=["linear", "text"])
def test_something_else_than_a_model(model):
    with refusal(ArgumentError, "TransformerLens model", "Hugging Face", type(model).__name__):
        saturated(model, tiny.tokens())


def halve(tensor, hook):
    return tensor / 2


def halve_in_place(tensor, hook):
    return tensor.div_(2)


@pytest.mark.filterwarnings("ignore:A hook on:UserWarning")
@pytest.mark.parametrize("edit", [halve, halve_in_place])
@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize("name", ["bert", "opt", "t5", "switch", "llama4"])
def test_an_edit_that_the_model_discards(name, point, edit):
    case, model = zoo.case(name), zoo.model_of(name)
    args, kwargs = case.inputs()
    path = sl.attention_sites(model)[0].path
    hook = (f"{path}.{point}", edit)
    with (
        torch.no_grad(),
        refusal(NotReachedError, f"{path}.{point}", "throws", "replace_attention"),
        sl.saturate(model),
    ):
        model.run_with_hooks(*args, fwd_hooks=[hook], **kwargs)
    with (
        torch.no_grad(),
        sl.saturate(model),
        model.hooks(fwd_hooks=[hook]),
        refusal(NotReachedError),
    ):
        model(*args, **kwargs)
    with (
        torch.no_grad(),
        refusal(NotReachedError),
        model.hooks(fwd_hooks=[hook]),
        sl.saturate(model),
    ):
        model(*args, **kwargs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "opt", "jamba"])
def test_an_edit_at_a_true_point_acts_on_the_saturated_values(name):
    case, model = zoo.case(name), zoo.model_of(name)
    args, _ = case.inputs()
    point = f"{sl.attention_sites(model)[-1].path}.o.hook_in"
    seen = []

    def silence(z, hook):
        seen.append(z.clone())
        return z * 0

    with torch.no_grad(), sl.saturate(model, case.heads("")[0]):
        whole = model(*args)
        edited = model.run_with_hooks(*args, fwd_hooks=[(point, silence)])
        _, cache = model.run_with_cache(*args)
    assert not torch.allclose(whole, edited)
    assert torch.equal(seen[0].flatten(), cache[point].flatten())


def test_an_edit_of_the_pattern_where_the_pattern_is_true():
    model, tokens = zoo.model_of("llama"), tiny.tokens()

    def first_key(pattern, hook):
        return torch.zeros_like(pattern).index_fill(-1, torch.tensor([0]), 1.0)

    hooks = [(f"blocks.{layer}.attn.hook_pattern", first_key) for layer in (0, 1)]
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with sl.saturate(model):
            found = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_layer_that_ran_without_its_attention(name):
    model = zoo.case(name).build()
    layer = model.get_submodule("blocks.1")
    sl.attention_sites(model)
    forward = layer.forward
    layer.__dict__["forward"] = lambda hidden, *args, **kwargs: hidden
    with refusal(NotReachedError, "blocks.1", "without its attention"):
        saturated(model, tiny.tokens(), heads="L1H0")
    saturated(model, tiny.tokens(), heads="L0H0")
    layer.__dict__["forward"] = forward
    saturated(model, tiny.tokens(), heads="L1H0")


def test_attention_that_no_longer_runs_as_it_did():
    model = zoo.case("opt").build()
    sl.attention_sites(model)
    with sl.saturate(model), torch.no_grad():
        model.original_model.set_attn_implementation("sdpa")
        with refusal(NotReachedError, "blocks.0.attn", "0 times", "look again"):
            model(tiny.tokens())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "native", "t5"])
def test_reset_hooks_inside_the_block_does_not_end_it(name):
    case, model = zoo.case(name), zoo.model_of(name)
    args, kwargs = case.inputs()
    with torch.no_grad():
        soft = model(*args, **kwargs)
        with sl.saturate(model):
            before = model(*args, **kwargs)
            model.reset_hooks()
            after = model(*args, **kwargs)
            model.reset_hooks(including_permanent=True)
            last = model(*args, **kwargs)
        assert torch.equal(before, after)
        assert torch.equal(before, last)
        assert not torch.allclose(before, soft)
        assert torch.equal(model(*args, **kwargs), soft)


def test_a_hook_removed_by_force_is_an_error():
    model = zoo.case("llama").build()
    with sl.saturate(model), torch.no_grad():
        model.get_submodule("blocks.1.attn.hook_attn_scores")._forward_hooks.clear()
        with refusal(NotReachedError, "blocks.1.attn", "0 times"):
            model(tiny.tokens())


@pytest.mark.usefixtures("types_unchecked")
def test_heads_that_a_hybrid_does_not_have():
    model = zoo.model_of("jamba")
    with refusal(HeadSelectionError, "L0H1", "L1H0 to L1H3"):
        saturated(model, tiny.tokens(), heads="L0H1")


def test_labels_without_a_stack_where_there_are_several():
    model = zoo.model_of("t5")
    with refusal(HeadSelectionError, "L0H1", "several stacks", "encoder.L0H0"):
        saturated(model, tiny.tokens(), heads="L0H1")


def test_hooks_for_a_site_that_no_hook_point_reaches():
    with refusal(UnsupportedModelError, "blocks.0.attn", "sat_lens.saturate"):
        sl.saturation_hooks(zoo.model_of("bert"), scale=math.inf)


def test_boot_transformers_makes_attention_eager_itself(tmp_path):
    model = tiny.hf_model("OPTForCausalLM", transformers.OPTConfig(**tiny.SIZE, **OPT), "sdpa")
    model.save_pretrained(tmp_path)
    # The demo's tokenizer stands in: loading a model needs one, running on ids does not.
    tokenizer = transformers.AutoTokenizer.from_pretrained("sat_lens/demo/model")
    tokenizer.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    assert {site.level for site in sl.attention_sites(bridge)} == {"softmax"}
