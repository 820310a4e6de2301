"""The tracker in runs of other libraries: the Trainer, saved and resumed; compiled; PEFT's."""

from __future__ import annotations

import types

import pytest
import tiny
import torch
import transformers
from torch import nn

from sat_lens.errors import ModelError, UnsupportedModelError
from sat_lens.metrics import next_token_loss
from sat_lens.training import SaturationTracker, read_training_log

DROPOUT = {"attention_dropout": 0.1}
ROWS = [{"input_ids": row, "labels": row} for row in tiny.tokens(batch=64, seed=1)]


def trainer(folder, steps, callbacks=None):
    """A run with all that a Trainer does between steps."""
    config = transformers.LlamaConfig(**tiny.SIZE, **DROPOUT)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return transformers.Trainer(
        model=tiny.hf_model("LlamaForCausalLM", config, "sdpa"),
        args=arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        callbacks=callbacks,
    )


def tracker_of(path):
    return SaturationTracker(path, tiny.tokens(length=12), every=1, measure_every=2, budget=None)


@pytest.mark.slow
def test_it_is_added_to_a_trainer_that_is_there(tmp_path):
    plain = trainer(tmp_path / "plain", 6)
    plain.train()
    tracked, tracker = trainer(tmp_path / "tracked", 6), tracker_of(tmp_path / "log.jsonl")
    assert isinstance(tracker, transformers.TrainerCallback)
    tracked.add_callback(tracker)
    tracked.train()
    for a, b in zip(plain.model.parameters(), tracked.model.parameters(), strict=True):
        assert torch.equal(a, b)
    frame = read_training_log(tmp_path / "log.jsonl")
    # Steps are the optimiser's, not the batches that are accumulated.
    assert frame.index.tolist() == list(range(7))
    assert frame["loss"].notna().tolist() == [step % 2 == 0 for step in range(7)]
    assert tracked.pop_callback(SaturationTracker) is tracker


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_in_its_log(tmp_path):
    path = tmp_path / "log.jsonl"
    trainer(tmp_path / "run", 6, [tracker_of(path)]).train()
    before = read_training_log(path)
    resumed = trainer(tmp_path / "run", 8, [tracker_of(path)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    frame = read_training_log(path)
    assert frame.index.tolist() == list(range(9))
    assert frame.loc[:4, "norm"].tolist() == pytest.approx(before.loc[:4, "norm"].tolist())
    assert path.read_text().count("\n") == 1 + 7 + 5


def test_norms_that_fail_later_end_no_run(monkeypatch):
    model, tracker = nn.Linear(2, 2), SaturationTracker(every=1)
    tracker.step(model, 0)

    def fails(_model):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("sat_lens.training.parameter_norms", fails)
    assert tracker.step(model, 1)["problem"] == "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        SaturationTracker(every=1).step(model, 0)


def test_a_split_model_ends_the_run_before_it_begins():
    class FullyShardedDataParallel(nn.Module):
        """As PyTorch's own, whose parameters are a part of the model's."""

        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="norm_growth"):
        SaturationTracker().step(FullyShardedDataParallel(), 0)


class LowRank(nn.Module):
    """A linear layer with an update of low rank, as LoRA puts in its place."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.dropout = layer, nn.Dropout(0.5)
        self.lora_a = nn.Linear(layer.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_b(self.lora_a(self.dropout(x)))


class PeftModel(nn.Module):
    """As PEFT's own, which is not installed here: the wrapper around a model with adapters."""

    def __init__(self, model, learned_prompts=False):
        super().__init__()
        self.model = model
        self.peft_config = {"default": types.SimpleNamespace(is_prompt_learning=learned_prompts)}

    def get_base_model(self):
        return self.model


def test_a_model_with_adapters_is_measured_with_them():
    tokens = tiny.tokens(length=12)
    model = tiny.hf_model("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE), "sdpa")
    tracker = SaturationTracker(data=tokens, every=1, measure_every=1, budget=None)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    for step, factor in enumerate((1.0, 5.0)):
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.lora_b.weight.mul_(factor)
            wanted = next_token_loss(tokens)(model.eval()(tokens).logits)
        row = tracker.step(PeftModel(model.train()), step)
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert tracker.frame()[["loss", "norm", "S"]].nunique().tolist() == [2, 2, 2]
    with pytest.raises(UnsupportedModelError, match="found PeftModel"):
        SaturationTracker(data=tokens).step(PeftModel(model, learned_prompts=True), 0)


@pytest.mark.slow
def test_wrappers_change_no_number():
    tokens = tiny.tokens(length=12)
    model = tiny.hf_model("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE), "sdpa")
    row = SaturationTracker(data=tokens).step(model, 0)
    wrapped = nn.DataParallel(torch.compile(model))
    assert SaturationTracker(data=tokens).step(wrapped, 0) == row
