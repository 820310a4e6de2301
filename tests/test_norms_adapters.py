"""Norms of models with adapters: those of base plus update, as after merging."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers
from everyday import everyday, further
from torch import nn
from transformers.pytorch_utils import Conv1D

import sat_lens as sl
from sat_lens.errors import FileFormatError, ModelError
from sat_lens.norms import norm_growth, parameter_norms, rescaling_share, scaled_parameters

TARGETS = ["q_proj", "k_proj", "v_proj"]
WHICH = ["qk", "attention", "all", "matrices"]


class LoRA(nn.Module):
    """The names and the arithmetic of PEFT's layer, and none of its methods."""

    def __init__(self, layer, scaling=2.0):
        super().__init__()
        self.base_layer, self.scaling, self.dropout = layer, scaling, nn.Dropout(0.5)
        n_in, n_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.T.shape
        self.lora_A = nn.Linear(n_in, 2, bias=False)
        self.lora_B = nn.Linear(2, n_out, bias=False)

    def forward(self, x):
        update = self.lora_B(self.lora_A(self.dropout(x)))
        return self.base_layer(x) + self.scaling * update


def llama():
    return tiny.hf_model("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE)).double()


def with_stand_ins():
    """A model with adapters, and the same model with them merged by hand."""
    model, merged = llama(), llama()
    for layer, plain in zip(model.model.layers, merged.model.layers, strict=True):
        for name in TARGETS:
            adapted = LoRA(getattr(layer.self_attn, name)).double()
            setattr(layer.self_attn, name, adapted)
            update = adapted.scaling * adapted.lora_B.weight @ adapted.lora_A.weight
            getattr(plain.self_attn, name).weight.data += update.detach()
    return model, merged


def changed(model):
    """PEFT begins with updates of zero."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if not {"default", "two"}.isdisjoint(name.split(".")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def assert_same_norms(model, merged):
    found, expected = parameter_norms(model), parameter_norms(merged)
    for by in ("component", "layer", "head"):
        mine, theirs = found.frame(by), expected.frame(by)
        assert list(mine.index) == list(theirs.index)
        torch.testing.assert_close(
            torch.tensor(mine.to_numpy()), torch.tensor(theirs.to_numpy()), rtol=1e-5, atol=1e-5
        )
    assert len(found.labels) == 2 * tiny.N_HEADS


def test_updates_count_with_what_they_are_added_to():
    model, merged = with_stand_ins()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_same_norms(model.train(), merged)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norms = parameter_norms(model)
    assert "after merging: model.layers.0.self_attn.q_proj" in norms.notes[0]
    assert list(norms.names) == list(parameter_norms(merged).names)
    assert rescaling_share(model).share == pytest.approx(rescaling_share(merged).share)
    row = sl.SaturationTracker().step(model, 0)
    assert row["qk_product"] == pytest.approx(parameter_norms(merged).summary()["qk_product"])


@pytest.mark.parametrize("c", everyday([3.0, -2.0], -2.0))
@pytest.mark.parametrize("which", everyday(WHICH, "qk", "all"))
def test_scaling_parameters_scales_what_is_left_after_merging(which, c):
    model, merged = (each.eval() for each in with_stand_ins())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = tiny.tokens()
    with torch.no_grad(), scaled_parameters(model, c, which), scaled_parameters(merged, c, which):
        torch.testing.assert_close(model(tokens).logits, merged(tokens).logits)
        assert_same_norms(model, merged)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_joint_matrices_are_measured_with_their_adapters():
    # TransformerLens splits them, and leaves the adapters out.
    model = tiny.hf_model("GPT2LMHeadModel", transformers.GPT2Config(**tiny.GPT))
    plain = copy.deepcopy(model)
    for block, merged in zip(model.transformer.h, plain.transformer.h, strict=True):
        adapted = block.attn.c_attn = LoRA(block.attn.c_attn)
        update = adapted.scaling * adapted.lora_B.weight @ adapted.lora_A.weight
        merged.attn.c_attn.weight.data += update.detach().T
    assert_same_norms(model, plain)
    tokens = tiny.tokens(length=12)
    tracker = sl.SaturationTracker(data=tokens, every=1, measure_every=1, budget=None)
    for step in (0, 1):
        row = tracker.step(model.train(), step)
        with torch.no_grad():
            loss = model.eval()(tokens, labels=tokens).loss
            model.transformer.h[0].attn.c_attn.lora_B.weight.mul_(5)
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_growth_over_models_with_adapters_and_files_without(tmp_path):
    model, merged = with_stand_ins()
    merged.save_pretrained(tmp_path / "checkpoint-4")
    found = norm_growth({0: model, 4: tmp_path / "checkpoint-4"}, progress=False).frame()
    assert found["distance"][4] == pytest.approx(0, abs=1e-5)
    assert found["qk_product"].nunique() == 1 or found["qk_product"].std() < 1e-5


def test_files_with_adapters_apart_are_refused(tmp_path):
    model, _ = with_stand_ins()
    torch.save(model.state_dict(), tmp_path / "model_1.pt")
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    torch.save(state, tmp_path / "model_2.pt")
    for step in (1, 2):
        with pytest.raises(FileFormatError, match="merge_and_unload"):
            norm_growth({0: model, step: tmp_path / f"model_{step}.pt"}, progress=False)


# PEFT's own layers, against its own merging.
PEFT = {
    "lora": ("LoraConfig", {"r": 2, "lora_dropout": 0.5, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "with a layer trained whole": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
    "with some tokens": ("LoraConfig", {"r": 2, "trainable_token_indices": [1, 2]}),
    "all layers": ("LoraConfig", {"r": 2, "target_modules": "all-linear"}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "loha": ("LoHaConfig", {"r": 2}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
}


def adapted(peft, kind="lora", model=None):
    name, settings = PEFT[kind]
    config = getattr(peft, name)(**{"target_modules": TARGETS} | settings)
    return changed(peft.get_peft_model(model or llama(), config)).eval()


@pytest.mark.parametrize("kind", map(further, PEFT))
def test_adapters_of_peft(kind):
    peft = pytest.importorskip("peft")
    model = adapted(peft, kind)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same_norms(model, merged)
    with model.disable_adapter():
        assert_same_norms(model, llama())
    model.merge_adapter()
    assert_same_norms(model, merged)


@pytest.mark.slow
def test_several_adapters_of_which_some_are_active():
    peft = pytest.importorskip("peft")
    model = adapted(peft)
    model.add_adapter("two", peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    changed(model)
    found = set()
    for active in ("default", "two", ["default", "two"]):
        model.base_model.set_adapter(active)
        merged = copy.deepcopy(model).merge_and_unload()
        assert_same_norms(model, merged)
        found.add(parameter_norms(merged).total)
    assert len(found) == 3


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
def test_scaling_adapters_of_peft(which):
    peft = pytest.importorskip("peft")
    model, tokens = adapted(peft), tiny.tokens()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad(), scaled_parameters(model, -2, which), scaled_parameters(merged, -2, which):
        torch.testing.assert_close(model(tokens).logits, merged(tokens).logits)
    refused = adapted(peft, "dora")
    with (
        pytest.raises(ModelError, match=r"no plain LoRA.*merge_and_unload"),
        scaled_parameters(refused, 2.0, which),
    ):
        pass
    with refused.disable_adapter(), scaled_parameters(refused, 2.0, which):
        pass


@pytest.mark.slow
def test_a_bridge_over_adapters():
    peft = pytest.importorskip("peft")
    model = adapted(peft)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same_norms(
        *(
            tiny.build_bridge_from_module(each, "LlamaForCausalLM", hf_config=merged.config)
            for each in (model.get_base_model(), merged)
        )
    )
