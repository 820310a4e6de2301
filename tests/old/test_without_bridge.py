"""TransformerLens 2: what it cannot do is an error that names the version that can."""

from __future__ import annotations

import math
import subprocess
import sys

import hooked
import oracle
import pytest
import torch
import transformers
from hooked import N_HEADS, VOCAB, tokens

import sat_lens as sl
from sat_lens.errors import ArgumentError, ModelError

NEEDS_A_BRIDGE = r"needs TransformerLens 3\.9 or newer"
CONFIG = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": N_HEADS, "n_positions": 64}


def hf_model(seed):
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG)).eval()


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints of a Hugging Face model, as its Trainer would leave them."""
    for step in (1, 2):
        hf_model(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
    return tmp_path


@pytest.mark.parametrize("name", ["demo", "gpt2"])
def test_loading_a_model_by_name(name):
    with pytest.raises(ModelError, match=rf"{NEEDS_A_BRIDGE}.*HookedTransformer\.from_pretrained"):
        sl.load_model(name)


def test_loading_a_model_on_the_command_line():
    command = [sys.executable, "-m", "sat_lens", "check", "demo"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "needs TransformerLens 3.9 or newer" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_training_a_model_on_a_task():
    with pytest.raises(ModelError, match=rf"{NEEDS_A_BRIDGE}.*Train a model of your own"):
        sl.tasks.train_on(sl.tasks.previous_token(8, 8), steps=1)


def test_growth_over_directories_is_measured_without_data(checkpoints):
    growth = sl.norm_growth(checkpoints, progress=False).frame()
    squares = [
        sum(float(p.detach().double().square().sum()) for p in hf_model(step).parameters())
        for step in (1, 2)
    ]
    assert growth["norm"].tolist() == pytest.approx([math.sqrt(square) for square in squares])


def test_growth_over_directories_on_data(checkpoints):
    with pytest.raises(ModelError, match=rf"on data {NEEDS_A_BRIDGE}.*leave data out"):
        sl.norm_growth(checkpoints, data=tokens(), progress=False)


def test_growth_over_revisions_of_the_hub():
    with pytest.raises(ModelError, match=r"need TransformerLens 4"):
        sl.norm_growth(("EleutherAI/pythia-70m", [0, 512]), progress=False)


def test_a_tracker_of_a_hugging_face_model():
    model = hf_model(seed=0)
    assert sl.SaturationTracker(every=1).step(model, 0)["norm"] > 0
    with pytest.raises(ModelError, match=NEEDS_A_BRIDGE):
        sl.SaturationTracker(data=tokens(), every=1, measure_every=1).step(model, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hugging_face_model_needs_no_bridge_to_be_saturated(attention):
    model = hooked.randomise(hf_model(seed=0))
    model.set_attn_implementation("eager")
    paths = {site.path: range(N_HEADS) for site in sl.attention_sites(model)}
    assert len(paths) == 2
    with torch.no_grad():
        with oracle.rescaled_softmax(model, paths, math.inf, N_HEADS):
            expected = model(tokens()).logits
        model.set_attn_implementation(attention)
        soft = model(tokens()).logits
        with sl.saturate(model):
            found = model(tokens()).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, soft)
    with pytest.raises(ArgumentError, match="needs a TransformerLens model"):
        sl.saturation_hooks(model)
