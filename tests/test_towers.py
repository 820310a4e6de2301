"""Towers for images and sound: made-up tokens do not run them, and they are never left out unsaid.

That all agrees with the oracle once they were looked at is tested in the zoo.
"""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
import towers
import transformers
import zoo
from everyday import everyday

import sat_lens as sl
from sat_lens.errors import HeadSelectionError, NotReachedError, UnsupportedModelError
from sat_lens.intervention import observe_attention
from sat_lens.sites.discovery import parts_not_probed

NAMES = [case.name for case in towers.CASES]
TOWER = {"qwen2_audio": "audio_encoder"}
ours = pytest.mark.parametrize("name", everyday(NAMES, "llava", "qwen2_5_vl"))


def run(name, model):
    args, kwargs = zoo.case(name).inputs()
    with torch.no_grad():
        return model(*args, **kwargs)


@ours
def test_text_alone_needs_no_tower(name):
    model, text = zoo.case(name).build(), tiny.tokens()
    assert {site.stack for site in sl.attention_sites(model)} == {""}
    assert TOWER.get(name, "vision_encoder") in parts_not_probed(model)
    paths = {site.path: range(site.n_heads) for site in sl.attention_sites(model)}
    with torch.no_grad():
        with oracle.rescaled_softmax(model, paths, math.inf, tiny.N_HEADS):
            expected = model(text)
        with sl.saturate(model):
            assert torch.equal(model(text), expected)


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "eager") for name in NAMES), ("mistral3", "sdpa")]
)
def test_all_heads_of_a_model_that_was_not_shown_an_image(name, attention):
    """Otherwise the tower would stay soft, and nobody would know."""
    model = zoo.case(name).build()
    sl.attention_sites(model)
    model.original_model.set_attn_implementation(attention)
    pattern = f"All heads were chosen, and {TOWER.get(name, 'vision_encoder')} computed attention"
    with pytest.raises(NotReachedError, match=f"{pattern}.*attention_sites"), sl.saturate(model):
        run(name, model)
    with (
        pytest.raises(NotReachedError, match=pattern),
        observe_attention(model, lambda _site, _scores: None),
    ):
        run(name, model)
    run(name, model)


@ours
def test_chosen_heads_need_no_look_at_the_tower(name):
    case, fresh, shown = zoo.case(name), zoo.case(name).build(), zoo.model_of(name)
    soft = run(name, fresh)
    with sl.saturate(fresh, "L1H2"):
        found = run(name, fresh)
    with sl.saturate(shown, "L1H2"):
        assert torch.equal(run(name, shown), found)
    assert not torch.allclose(found, soft)
    tower = next(stack for stack in case.stacks if stack)
    with (
        pytest.raises(HeadSelectionError, match=r"did not run.*your_inputs"),
        sl.saturate(fresh, f"{tower}.L0H1"),
    ):
        pass


def test_more_images_in_a_row_than_the_tower_was_shown():
    model = zoo.case("qwen2_5_vl").build()
    (ids,), kwargs = towers.packed_inputs()
    one = {name: value[:1] for name, value in kwargs.items()}
    one["pixel_values"] = kwargs["pixel_values"][:16]
    sites = sl.attention_sites(model, ids[:1], **one)
    assert [site.label(0) for site in sites if site.in_pieces] == ["vision_encoder.blocks.L0H0"]
    with pytest.raises(NotReachedError, match=r"2 times.*look again"), sl.saturate(model):
        run("qwen2_5_vl", model)
    sl.attention_sites(model, ids, **kwargs)
    with sl.saturate(model), torch.no_grad():
        both, alone = run("qwen2_5_vl", model), model(ids[:1], **one)
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5 * float(both.abs().max()))


def test_a_tower_whose_attention_is_fused():
    model = zoo.case("mistral3").build()
    model.original_model.set_attn_implementation("sdpa")
    args, kwargs = zoo.case("mistral3").inputs()
    sites = {site.path: site for site in sl.attention_sites(model, *args, **kwargs)}
    tower = sites["vision_encoder.transformer.layers.0.attention"]
    assert tower.level is None
    assert 'attn_implementation="eager"' in tower.why_not
    with pytest.raises(UnsupportedModelError, match="fused"), sl.saturate(model):
        pass


def test_windows_and_a_number_of_heads_for_each_stage():
    model = towers.florence()
    args, kwargs = towers.florence_inputs()
    sites = [
        site
        for site in sl.attention_sites(model, *args, **kwargs)
        if site.path.endswith("window_attn")
    ]
    assert [site.n_heads for site in sites] == [2, 4]
    with torch.no_grad():
        soft = model(*args, **kwargs)
        for site in sites:
            chosen = {site.path: [1]}
            with oracle.rescaled_softmax(model, chosen, math.inf, site.n_heads):
                expected = model(*args, **kwargs)
            with sl.saturate(model, site.label(1)):
                found = model(*args, **kwargs)
            assert torch.equal(found, expected)
            assert not torch.allclose(found, soft)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_pytorch_computes_as_a_whole(attention):
    """The last layer of this model is a torch.nn.MultiheadAttention."""
    config = transformers.SiglipVisionConfig(**towers.VISION)
    model = tiny.hf_model("SiglipVisionModel", config, attention)
    image = tiny.noise(1, 3, 16, 16)
    with pytest.raises(UnsupportedModelError, match=r"head\.attention.*MultiheadAttention"):
        sl.saturate(model).__enter__()
    labels = [label for site in sl.attention_sites(model) for label in site.labels]
    with torch.no_grad():
        soft = model(image).last_hidden_state
        with sl.saturate(model, labels):
            assert not torch.allclose(model(image).last_hidden_state, soft)
