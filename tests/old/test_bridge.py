"""TransformerBridge of TransformerLens 3.9, where it differs from that of version 4.

All that does not differ is tested by the files that test version 4; see `differences.py`.
"""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
import transformers
import zoo

import sat_lens as sl
from sat_lens.errors import ModelError, NotReachedError, UnsupportedModelError
from sat_lens.models import DEMO_FOLDER

INSTALLED = r"TransformerLens 3\.9\.0 is installed; version 4\.3 runs more models"
ROBERTA = transformers.RobertaConfig(**tiny.SIZE)


def halve(tensor, hook):
    return tensor / 2


def double_in_place(tensor, hook):
    return tensor.mul_(2)


@pytest.mark.parametrize("edit", [halve, double_in_place])
@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize("name", ["native", "bert", "opt", "gptj", "jamba", "bart", "llama4"])
def test_an_edit_that_is_discarded_without_a_word_is_an_error(name, point, edit):
    case, model = zoo.case(name), zoo.model_of(name)
    args, kwargs = case.inputs()
    hook = (f"{sl.attention_sites(model)[0].path}.{point}", edit)
    with torch.no_grad():
        soft = model(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            edited = model.run_with_hooks(*args, fwd_hooks=[hook], **kwargs)
        # This is why the library has to say it.
        assert torch.equal(edited, soft)
        for heads in (None, sl.attention_sites(model)[0].label(1)):
            with (
                pytest.raises(NotReachedError, match=rf"{point}.*throws.*replace_attention"),
                sl.saturate(model, heads),
            ):
                model.run_with_hooks(*args, fwd_hooks=[hook], **kwargs)
        assert torch.equal(model(*args, **kwargs), soft)


def test_an_edit_that_leaks_into_later_layers_is_an_error():
    """In Switch, TransformerLens takes the edited pattern for the later layers' position bias."""
    case, model = zoo.case("switch"), zoo.model_of("switch")
    args, kwargs = case.inputs()
    hook = (f"{sl.attention_sites(model)[0].path}.hook_pattern", halve)
    with torch.no_grad():
        soft = model(*args, **kwargs)
        assert not torch.equal(model.run_with_hooks(*args, fwd_hooks=[hook], **kwargs), soft)
        with pytest.raises(NotReachedError, match="hook_pattern"), sl.saturate(model):
            model.run_with_hooks(*args, fwd_hooks=[hook], **kwargs)


@pytest.mark.parametrize("scale", [0.5, 3.0, float("inf")])
@pytest.mark.parametrize("name", ["native", "native_rotary_gqa_cap", "native_bidirectional"])
def test_native_models_cannot_be_saturated_through_hooks(name, scale):
    """Their pattern became a true hook point in version 4."""
    with pytest.raises(UnsupportedModelError, match=r"TransformerLens hook.*sat_lens\.saturate"):
        sl.saturation_hooks(zoo.model_of(name), scale=scale)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_t5_runs_in_version_4(name):
    model = zoo.case(name).build()
    (ids,), kwargs = zoo.case(name).inputs()
    # The bridge itself cannot run it.
    with pytest.raises(ValueError, match="too many values to unpack"):
        model(ids, **kwargs)
    with pytest.raises(UnsupportedModelError, match=INSTALLED), sl.saturate(model):
        pass


def test_an_architecture_that_version_4_knows(tmp_path):
    model = tiny.hf_model("RobertaForMaskedLM", ROBERTA)
    for step in (1, 2):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(DEMO_FOLDER))
    tokenizer.save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(UnsupportedModelError, match=INSTALLED):
        sl.load_model(str(tmp_path / "checkpoint-2"))
    with pytest.raises(UnsupportedModelError, match=INSTALLED):
        sl.norm_growth(tmp_path, data=tiny.tokens(), progress=False)


def test_growth_over_revisions_of_the_hub():
    with pytest.raises(ModelError, match=r"need TransformerLens 4"):
        sl.norm_growth(("EleutherAI/pythia-70m", [0, 512]), progress=False)


def test_growth_over_directories_on_data(tmp_path):
    for step in (1, 2):
        model = tiny.hf_model("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE))
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    growth = sl.norm_growth(tmp_path, data=tiny.tokens(), progress=False).frame()
    assert growth["S"].between(-1, 1).all()
    assert growth["S"].nunique() == 1


def test_a_model_trained_on_a_task():
    task = sl.tasks.previous_token(8, 8)
    model = sl.tasks.train_on(task, steps=150)
    with torch.no_grad(), sl.saturate(model):
        right = model(task.tokens)[..., : task.n_answers].argmax(-1) == task.answers
    assert float(right[task.counted].float().mean()) > 0.9
