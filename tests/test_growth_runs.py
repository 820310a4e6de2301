"""Growth over whole runs: of the Trainer, of TransformerLens's loop, on the hub."""

from __future__ import annotations

import copy
import json
import logging

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import torch.distributed.fsdp
import transformers
from everyday import everyday
from torch import nn
from transformer_lens.tools.training import TrainConfig, train

from sat_lens.errors import ArgumentError, FileFormatError, ModelError
from sat_lens.norms import norm_growth, parameter_norms
from sat_lens.norms.checkpoints import hub_checkpoints, list_checkpoints

NEOX = ("GPTNeoXForCausalLM", "GPTNeoXConfig", tiny.SIZE)
MOE = {"num_local_experts": 2, "num_key_value_heads": 2}
# transformers saves the first three under other names than they have in memory.
RENAMED = {
    "gpt_neox": NEOX,
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", tiny.SIZE | MOE),
    "ernie": ("Ernie4_5ForCausalLM", "Ernie4_5Config", tiny.SIZE),
    "bart": ("BartForConditionalGeneration", "BartConfig", tiny.BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", tiny.T5),
}


def raw(architecture, config, settings):
    return tiny.hf_model(architecture, getattr(transformers, config)(**settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the Trainer, its initial model, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    model = raw(*NEOX)
    initial = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(batch=16, seed=1)]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    return initial, model, folder


@pytest.mark.slow
def test_what_the_trainer_wrote_is_read_as_it_lies_there(run):
    _, model, folder = run
    assert (folder / "checkpoint-8" / "optimizer.pt").exists()
    growth = norm_growth(folder, tiny.tokens(length=12), progress=False)
    frame = growth.frame()
    assert growth.steps == (2, 4, 6, 8)
    assert frame.loc[8, "norm"] == pytest.approx(parameter_norms(model).total)
    heads = parameter_norms(model).frame("head")
    assert frame.loc[8, "qk_product"] == pytest.approx(heads["qk_product"].mean(), rel=1e-5)
    assert frame["rotation"].iloc[1:].gt(0).all()
    assert frame[["loss", "loss_saturated", "S", "lean"]].notna().all(axis=None)
    # The Trainer saves no step 0.
    assert growth.exponent.n_points == 0


@pytest.mark.slow
def test_the_initial_model_may_be_the_one_in_memory(run, tmp_path):
    initial, _, folder = run
    steps = {step: folder / f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    growth = norm_growth({0: initial} | steps, progress=False)
    initial.save_pretrained(tmp_path / "checkpoint-0")
    by_file = norm_growth({0: tmp_path / "checkpoint-0"} | steps, progress=False)
    pd.testing.assert_frame_equal(growth.frame(), by_file.frame())
    assert growth.frame()["distance"].loc[2:].is_monotonic_increasing


@pytest.mark.slow
def test_saturation_is_drawn_against_the_norm(run):
    growth = norm_growth(run[2], tiny.tokens(length=12), progress=False)
    axes = growth.plot(x="norm").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    frame = growth.frame()
    assert lines["S"].get_xdata().tolist() == frame["norm"].tolist()
    assert lines["S"].get_ydata().tolist() == frame["S"].tolist()
    assert "cos random" in lines
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "norm")
    with pytest.raises(ArgumentError, match="no column 'colour'"):
        growth.plot(x="colour")
    with pytest.raises(ArgumentError, match="data= to norm_growth"):
        norm_growth(run[2], progress=False).plot(x="norm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", everyday(RENAMED, next(iter(RENAMED))))
def test_a_model_is_its_own_checkpoint(kind, tmp_path):
    model = raw(*RENAMED[kind])
    model.save_pretrained(tmp_path / "checkpoint-1")
    torch.save(model.state_dict(), tmp_path / "state_2.pt")
    for file in ("checkpoint-1", "state_2.pt"):
        growth = norm_growth({0: model, 1: tmp_path / file, 2: model}, progress=False).frame()
        assert growth["norm"].tolist() == pytest.approx([parameter_norms(model).total] * 3)
        assert growth["rotation"].loc[1:].tolist() == pytest.approx([0, 0], abs=1e-3)
        assert growth["distance"].loc[1:].tolist() == [0, 0]


def gpt2():
    return tiny.bridge("GPT2LMHeadModel", transformers.GPT2Config(**tiny.GPT))


@pytest.mark.slow
@pytest.mark.parametrize("build", everyday([gpt2, tiny.native], gpt2))
def test_the_loop_of_transformer_lens(build, tmp_path):
    model = build()
    initial = copy.deepcopy(model)
    tokens = [{"tokens": row} for row in tiny.tokens(batch=8, seed=2)]
    saving = {"save_every": 1, "save_dir": str(tmp_path)}
    settings = TrainConfig(1, batch_size=2, print_every=None, device="cpu", **saving)
    train(model, settings, tokens)
    # model_0.pt holds the model after its first step.
    found = {0: initial} | {step + 1: tmp_path / f"model_{step}.pt" for step in range(4)}
    frame = norm_growth(found, progress=False).frame()
    assert frame["distance"].loc[1:].gt(0).all()
    assert frame.loc[4, "norm"] == pytest.approx(parameter_norms(model).total)
    for step, state in ((0, initial), (4, model)):
        heads = parameter_norms(state).frame("head")
        for name in ("qk_product", "ov_product"):
            assert frame.loc[step, name] == pytest.approx(heads[name].mean(), rel=1e-5)


@pytest.mark.slow
def test_files_that_leave_parameters_out_are_said_to(tmp_path, caplog):
    model = tiny.bridge("MixtralForCausalLM", transformers.MixtralConfig(**RENAMED["mixtral"][2]))
    torch.save(model.state_dict(), tmp_path / "model_1.pt")
    with caplog.at_level(logging.WARNING):
        frame = norm_growth({0: model, 1: tmp_path / "model_1.pt"}, progress=False).frame()
    assert frame["norm"].nunique() == 1
    assert "leave out" in caplog.text


def test_shards_of_pickled_weights(run, tmp_path):
    _, model, _ = run
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parts = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    files = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
    for part, file in zip(parts, files, strict=True):
        torch.save(part, tmp_path / file)
    index = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    frame = norm_growth({8: model, 9: tmp_path}, progress=False).frame()
    assert frame.loc[9, "norm"] == pytest.approx(frame.loc[8, "norm"])
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileFormatError, match=r"no checkpoint .*00002-of-00002\.bin"):
        norm_growth({8: model, 9: tmp_path}, progress=False)


@pytest.fixture
def hub(run, tmp_path, monkeypatch):
    """A local cache of the hub, as a download leaves it, with two revisions of a tiny Pythia."""
    initial, model, _ = run
    cache = tmp_path / "models--EleutherAI--pythia-70m"
    for revision, weights in {"step0": initial, "step512": model}.items():
        weights.save_pretrained(cache / "snapshots" / f"hash-of-{revision}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(f"hash-of-{revision}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", everyday(["EleutherAI/pythia-70m", "pythia-70m"], "pythia-70m"))
def test_revisions_that_are_in_the_cache_are_read_offline(run, name):
    initial, model, _ = run
    growth = norm_growth((name, [0, 512]), tiny.tokens(length=12), progress=False)
    assert growth.steps == (0, 512)
    norms = [parameter_norms(initial).total, parameter_norms(model).total]
    assert growth.frame()["norm"].tolist() == pytest.approx(norms)
    assert growth.frame()["loss"].notna().all()
    with pytest.raises(ModelError, match="step1000 is not in the local cache"):
        norm_growth((name, [0, 1000]), progress=False)


def test_models_whose_checkpoints_are_files_are_named_as_such():
    with pytest.raises(ArgumentError, match="mapping from steps to files"):
        hub_checkpoints("NeelNanda/SoLU_1L512W_C4_Code", [0])


@pytest.mark.slow
def test_steps_of_any_kind_of_whole_number():
    models = [nn.Linear(2, 2) for _ in range(2)]
    given = dict(zip(np.array([0, 4]), models, strict=True))
    assert [c.step for c in list_checkpoints(given)] == [0, 4]
    for steps in (np.array([0, 512]), iter([0, 512]), range(0, 1024, 512)):
        found = list_checkpoints(("pythia-70m", steps))
        assert [str(c) for c in found] == [f"EleutherAI/pythia-70m@step{t}" for t in (0, 512)]


def test_a_model_that_is_split_over_processes_is_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(4, 4))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(ModelError, match=r"0\.weight is split over several processes"):
            parameter_norms(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["of_its_own", "llama"])
def test_code_that_a_checkpoint_brings_is_not_run(kind, tmp_path):
    config = transformers.LlamaConfig(**tiny.SIZE)
    marker = tmp_path / "ran"
    for step in (0, 1):
        folder = tmp_path / f"checkpoint-{step}"
        tiny.hf_model("LlamaForCausalLM", config).save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        settings |= {"model_type": kind, "auto_map": classes}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    if kind == "llama":
        assert norm_growth(tmp_path, tiny.tokens(length=12), progress=False).complete
    else:
        with pytest.raises(ModelError, match="which is not run"):
            norm_growth(tmp_path, tiny.tokens(length=12), progress=False)
    # Norms alone need no model.
    assert norm_growth(tmp_path, progress=False).complete
    assert not marker.exists()
