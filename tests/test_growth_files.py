"""Growth over files: all kinds are read, none runs code, and mistakes are named."""

from __future__ import annotations

import json
import math
import os
import pickle

import pandas as pd
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sat_lens.errors import (
    ArgumentError,
    DataError,
    FileFormatError,
    ModelError,
    NonFiniteError,
    UnsupportedModelError,
)
from sat_lens.norms import NormGrowth, ParameterNorms, norm_growth, parameter_norms
from sat_lens.norms.checkpoints import hub_checkpoints, list_checkpoints
from sat_lens.norms.sources import open_parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run's folder: checkpoints as the Trainer writes them, of a tiny Llama."""
    folder = tmp_path_factory.mktemp("run")
    config = transformers.LlamaConfig(**tiny.SIZE, num_key_value_heads=2, tie_word_embeddings=True)
    model = tiny.hf_model("LlamaForCausalLM", config)
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    before = 0
    for step in (0, 4, 8, 16):
        with torch.no_grad():
            for parameter, way in zip(model.parameters(), ways, strict=True):
                parameter += 0.02 * (step**0.5 - before**0.5) * way
        before = step
        model.save_pretrained(folder / f"checkpoint-{step}")
        torch.save(model.state_dict(), folder / f"checkpoint-{step}" / "weights.pt")
    return folder


def test_all_kinds_of_files_give_the_same(run):
    steps = [0, 4, 8, 16]
    by_folder = norm_growth(run, progress=False)
    models = {
        t: transformers.LlamaForCausalLM.from_pretrained(run / f"checkpoint-{t}") for t in steps
    }
    others = [
        norm_growth([run / f"checkpoint-{t}" for t in steps], progress=False),
        norm_growth([(t, str(run / f"checkpoint-{t}")) for t in steps], progress=False),
        norm_growth({t: run / f"checkpoint-{t}" / "weights.pt" for t in steps}, progress=False),
        norm_growth(
            {t: run / f"checkpoint-{t}" / "model.safetensors" for t in steps}, progress=False
        ),
        norm_growth(models, progress=False),
    ]
    assert by_folder.complete
    assert {"qk_product", "norm_qk", "norm_layer_norm"} <= set(by_folder.columns)
    for other in others:
        pd.testing.assert_frame_equal(other.frame(), by_folder.frame())


def test_data_add_loss_saturation_and_roles(run, tmp_path):
    growth = norm_growth(run, tiny.tokens(length=12), progress=False)
    frame = growth.frame()
    assert frame.filter(like="role_").sum(axis=1).tolist() == [8] * 4
    for name in ("loss", "loss_saturated", "cos_saturated", "cos_random", "lean"):
        assert frame[name].notna().all(), name
    growth.save(tmp_path / "g.safetensors")
    again = NormGrowth.load(tmp_path / "g.safetensors")
    pd.testing.assert_frame_equal(again.frame(), frame)
    assert again.raw_exponent == growth.raw_exponent
    assert growth.plot().axes
    files = {t: run / f"checkpoint-{t}" / "weights.pt" for t in (0, 4)}
    with pytest.raises(ArgumentError, match="no architecture"):
        norm_growth(files, tiny.tokens(), progress=False)


def hand_edited(path, change):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sat_lens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    change(header["meta"], tensors)
    save_file(tensors, path, metadata={"sat_lens": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, tensors: meta["steps"].append(5),
        lambda meta, tensors: meta.update(steps=["a", "b"]),
        lambda meta, tensors: meta.update(steps=3),
        lambda meta, tensors: meta.update(columns="norm"),
        lambda meta, tensors: meta.update(exponent=3),
        lambda meta, tensors: meta["exponent"].pop("value"),
        lambda meta, tensors: tensors.update({"columns/norm": torch.ones(2, 2)}),
        lambda meta, tensors: tensors.pop("columns/norm"),
    ],
)
def test_a_result_that_was_edited_by_hand_is_refused(tmp_path, change):
    path = tmp_path / "g.safetensors"
    norm_growth({0: nn.Linear(2, 2), 1: nn.Linear(2, 2)}, progress=False).save(path)
    hand_edited(path, change)
    with pytest.raises(FileFormatError, match=r"g\.safetensors"):
        NormGrowth.load(path)


@pytest.mark.parametrize("name", ["squares", "sizes", "heads"])
def test_norms_that_were_edited_by_hand_are_refused(tmp_path, name):
    path = tmp_path / "n.safetensors"
    parameter_norms(nn.Linear(2, 2)).save(path)
    hand_edited(path, lambda meta, tensors: tensors.update({name: torch.ones(5)}))
    with pytest.raises(FileFormatError, match=r"n\.safetensors"):
        ParameterNorms.load(path)


def test_an_interrupt_leaves_what_was_measured(run, monkeypatch):
    import sat_lens.norms.growth as module

    real, calls = module.norms_of, []

    def interrupted(parameters):
        calls.append(parameters)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(parameters)

    monkeypatch.setattr(module, "norms_of", interrupted)
    growth = norm_growth(run, progress=False)
    assert growth.steps == (0, 4)
    assert not growth.complete


def test_no_more_than_three_models_are_open_at_once(run, monkeypatch):
    import sat_lens.norms.growth as module

    opened, most = [0], [0]
    real = module.open_parameters

    class Counted:
        def __init__(self, *args):
            self.inner = real(*args)

        def __enter__(self):
            opened[0] += 1
            most[0] = max(most[0], opened[0])
            return self.inner.__enter__()

        def __exit__(self, *error):
            opened[0] -= 1
            return self.inner.__exit__(*error)

    monkeypatch.setattr(module, "open_parameters", Counted)
    norm_growth(run, progress=False)
    assert most[0] == 3
    assert opened[0] == 0


def test_shards_and_old_files_are_read(run, tmp_path):
    folder = tmp_path / "checkpoint-4"
    model = transformers.LlamaForCausalLM.from_pretrained(run / "checkpoint-4")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    old = tmp_path / "model_8.pt"
    torch.save({"state_dict": model.state_dict()}, old, _use_new_zipfile_serialization=False)
    norms = norm_growth({4: folder, 8: old}, progress=False).frame()["norm"]
    assert norms.loc[4] == pytest.approx(norms.loc[8])
    with open_parameters(run / "checkpoint-4") as parameters:
        assert parameters.config["num_attention_heads"] == tiny.N_HEADS


def test_a_file_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    (tmp_path / "model_1.pt").write_bytes(pickle.dumps({"w": Payload()}))
    torch.save({"w": torch.ones(2), "x": Payload()}, tmp_path / "model_2.pt")
    for step in (1, 2):
        with (
            pytest.raises(FileFormatError, match=r"run code|broken"),
            open_parameters(tmp_path / f"model_{step}.pt"),
        ):
            pass
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_1.safetensors", b"\0" * 40),
        ("model_1.pt", b"hello"),
        ("model_1.pt", b""),
        # Each of these makes the unpickler fail in a way of its own.
        ("model_1.pt", b"\x80\x02junk"),
        ("model_1.pt", b"\x80\x02}q\x00."),
        ("model_1.bin", b"random text"),
        ("model_1.pt", b"PK\x03\x04junk"),
        ("model_1.txt", b"hello"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError), open_parameters(tmp_path / name):
        pass


@pytest.mark.parametrize(
    "index", [b"[" * 100_000, b"\xff\xfe", b'{"weight_map": 3}', b'{"weight_map": {"a": "b"}}']
)
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(FileFormatError), open_parameters(tmp_path):
        pass


def test_texts_need_a_tokenizer_and_the_message_says_how(run, types_unchecked):
    with pytest.raises(DataError, match="tokenizer="):
        norm_growth(run, ["import os, sys, re"], progress=False)
    with pytest.raises(ArgumentError, match="tokenizer is a tokenizer or its directory"):
        norm_growth(run, ["import os, sys, re"], tokenizer=3, progress=False)


def test_what_cannot_be_measured_is_refused_at_once(run, monkeypatch, types_unchecked):
    with pytest.raises(UnsupportedModelError, match="TransformerLens model"):
        norm_growth(run, tiny.tokens(), as_model=lambda _: nn.Linear(2, 2), progress=False)
    monkeypatch.setattr("sat_lens.norms.growth._Run", None)
    for options, kind, words in (
        ({"data": 3}, DataError, "found int"),
        ({"data": {"input": tiny.tokens()}}, DataError, "goes into a list"),
        ({"as_model": "x"}, ArgumentError, "as_model is a function"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be"),
    ):
        with pytest.raises(kind, match=words):
            norm_growth(run, progress=False, **options)


def test_a_foreign_state_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match="state dict"), open_parameters(tmp_path / "a.pt"):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="neither"), open_parameters(tmp_path / "empty"):
        pass
    save_file({"n": torch.ones(2, dtype=torch.int32)}, tmp_path / "i.safetensors")
    with pytest.raises(FileFormatError, match="no weights"):
        open_parameters(tmp_path / "i.safetensors").__enter__()


def test_different_architectures_are_refused_by_name():
    models = {0: nn.Linear(2, 2), 1: nn.Linear(2, 3)}
    with pytest.raises(ArgumentError, match=r"architectures: (weight|bias) is"):
        norm_growth(models, progress=False)
    with pytest.raises(ArgumentError, match=r"bias is of shape .* missing"):
        norm_growth({0: nn.Linear(2, 2), 1: nn.Linear(2, 2, bias=False)}, progress=False)


def test_nan_weights_are_named():
    broken = nn.Linear(2, 2)
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"weight.*step 1"):
        norm_growth({0: nn.Linear(2, 2), 1: broken}, progress=False)


def test_steps_must_be_known_and_in_order(run, tmp_path):
    a, b = run / "checkpoint-0", run / "checkpoint-4"
    with pytest.raises(ArgumentError, match="out of order: 4"):
        norm_growth([b, a], progress=False)
    with pytest.raises(ArgumentError, match="Step 4 is given twice"):
        norm_growth([(4, a), (4, b)], progress=False)
    with pytest.raises(ArgumentError, match="No step can be read"):
        norm_growth([tmp_path / "final", b], progress=False)
    with pytest.raises(FileFormatError, match="no checkpoint"):
        norm_growth([a, run / "checkpoint-5"], progress=False)
    for empty in ([], {}, [a]):
        with pytest.raises(ArgumentError, match="at least two"):
            norm_growth(empty, progress=False)
    with pytest.raises(FileFormatError, match="holds no checkpoints"):
        norm_growth(tmp_path, progress=False)
    with pytest.raises(FileFormatError, match="no directory"):
        norm_growth("EleutherAI/pythia-70m", progress=False)
    with pytest.raises(ArgumentError, match="mapping from steps to models"):
        norm_growth([nn.Linear(2, 2)], progress=False)
    for wrong in (-1, 1.5, True, "4"):
        with pytest.raises(ArgumentError, match="whole number"):
            list_checkpoints([(wrong, a), (5, b)])
    with pytest.raises(ArgumentError, match="Checkpoints are"):
        list_checkpoints(3)


def test_files_of_a_loop_without_callbacks_are_found(tmp_path):
    for step in (0, 2, 10):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / f"model_{step}.pt")
    (tmp_path / "notes.txt").write_text("x")
    assert [c.step for c in list_checkpoints(tmp_path)] == [0, 2, 10]


def test_hub_revisions_are_checked_and_the_offline_error_is_clear():
    assert len(hub_checkpoints("EleutherAI/pythia-70m", None)) == 154
    with pytest.raises(ArgumentError, match="step 3; the nearest are"):
        hub_checkpoints("EleutherAI/pythia-70m", [0, 3])
    with pytest.raises(ArgumentError, match="knows no checkpoints of 'gpt2-of-nobody'"):
        hub_checkpoints("gpt2-of-nobody", [0, 3])
    with pytest.raises(ModelError, match="hub could not be reached"):
        norm_growth(("EleutherAI/pythia-70m", [0, 512]), progress=False)
