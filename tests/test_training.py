"""The tracker: it changes nothing, survives a kill, keeps to its budget, and fits three loops."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest
import tiny
import torch
import transformers
from everyday import further
from torch import nn

from sat_lens.errors import ArgumentError, DataError, FileFormatError, UnsupportedModelError
from sat_lens.norms.measures import lens_model, shares_memory
from sat_lens.training import SaturationTracker, is_due, read_training_log

LLAMA = ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE | {"attention_dropout": 0.1})
NEOX = ("GPTNeoXForCausalLM", "GPTNeoXConfig", tiny.SIZE | {"hidden_dropout": 0.1})
FIXED = tiny.tokens(length=12, seed=5)
MEASURED = {"loss", "loss_saturated", "S", "lean", "tv_argmax", "tv_mean", "norm", "qk_product"}


def hf_model(kind=LLAMA, attention="sdpa"):
    architecture, config, settings = kind
    return tiny.hf_model(architecture, getattr(transformers, config)(**settings), attention)


def train(model, steps, after_step):
    """Train with dropout, so that a disturbed random state would show."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        tokens = torch.randint(4, tiny.VOCAB, (2, 10))
        output = model(tokens)
        logits = getattr(output, "logits", output)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        after_step(model, step)
    return [p.detach().clone() for p in model.parameters()]


def native():
    torch.manual_seed(0)
    return tiny.native()


@pytest.mark.parametrize(
    "build",
    [hf_model, further(lambda: hf_model(NEOX)), further(native)],
    ids=["llama", "neox", "transformer_lens"],
)
def test_training_is_the_same_bit_for_bit(build):
    model = build()
    expected = train(copy.deepcopy(model), 5, lambda *_: None)
    tracker = SaturationTracker(data=FIXED, every=1, measure_every=1, budget=None)
    modes, grads = [], []

    def after_step(model, step):
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        row = tracker.step(model, step)
        assert row.keys() >= MEASURED
        modes.append(all(m.training for m in model.modules()))
        after = [p.grad for p in model.parameters() if p.grad is not None]
        grads.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    found = train(model, 5, after_step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(modes)
    assert all(grads)
    frame = tracker.frame()
    assert frame.index.tolist() == [1, 2, 3, 4, 5]
    # Measures follow the weights, also where the view holds copies of them.
    assert frame["loss"].nunique() == 5
    assert frame["norm"].nunique() == 5


def test_the_view_is_the_model_itself_without_a_copy():
    model = hf_model(attention="eager").eval()
    view = lens_model(model)
    assert shares_memory(view, model)
    with torch.no_grad():
        torch.testing.assert_close(view(FIXED), model(FIXED).logits)
        next(model.parameters()).mul_(1.5)
        torch.testing.assert_close(view(FIXED), model(FIXED).logits)
    assert not shares_memory(lens_model(hf_model(NEOX)), hf_model(NEOX))


def test_hooks_and_replaced_forwards_of_the_run_are_not_called():
    model = hf_model()
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.forward = lambda *_args, **_kwargs: calls.append(2)
    SaturationTracker(data=FIXED).step(model, 0)
    assert calls == []


def trainer(folder, tracker, steps):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(batch=16, seed=1)]
    return transformers.Trainer(
        model=hf_model(), args=arguments, train_dataset=rows, callbacks=tracker
    )


def test_a_trainer_takes_it_as_a_callback(tmp_path):
    plain = trainer(tmp_path / "a", [], 5)
    plain.train()
    seen = []
    tracker = SaturationTracker(
        tmp_path / "log.jsonl", FIXED, log=lambda row, step: seen.append((step, row["norm"]))
    )
    tracked = trainer(tmp_path / "b", [tracker], 5)
    tracked.train()
    for a, b in zip(plain.model.parameters(), tracked.model.parameters(), strict=True):
        assert torch.equal(a, b)
    frame = read_training_log(tmp_path / "log.jsonl")
    assert frame.index.tolist() == [0, 1, 2, 4, 5]
    assert [step for step, _ in seen] == [0, 1, 2, 4, 5]
    assert frame.loc[0].notna().all()
    with pytest.raises(AttributeError):
        _ = tracker.nothing


@pytest.mark.slow
def test_a_loop_without_callbacks_is_followed_by_its_optimiser():
    from transformer_lens.tools.training import TrainConfig
    from transformer_lens.tools.training import train as train_lens

    tokens = [{"tokens": row} for row in tiny.tokens(batch=8, seed=2)]
    config = TrainConfig(num_epochs=1, batch_size=2, print_every=None, device="cpu")
    tracker = SaturationTracker(data=FIXED, budget=None)
    model, plain = native(), native()
    with tracker.watching(model):
        train_lens(model, config, tokens)
    train_lens(plain, config, tokens)
    assert tracker.frame().index.tolist() == [0, 1, 2, 4]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    train_lens(model, config, tokens)
    assert len(tracker.rows) == 4


def test_another_optimiser_does_not_count():
    tracker, model, other = SaturationTracker(every=1), nn.Linear(2, 2), nn.Linear(2, 2)
    with tracker.watching(model, first_step=7):
        for module in (other, model):
            module(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert tracker.frame().index.tolist() == [7, 8]


def test_a_step_that_is_logged_again_has_one_row():
    model = native()
    tracker = SaturationTracker(every=1)
    for step in (0, 2, 1):
        tracker.step(model, step)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(3)
    again = tracker.step(model, 2)
    frame = tracker.frame()
    assert frame.index.tolist() == [0, 1, 2]
    assert frame.loc[2, "norm"] == again["norm"] > frame.loc[1, "norm"]


def test_the_budget_puts_measures_off_and_makes_them_later(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model = native()
    tracker = SaturationTracker(data=FIXED, every=10**9, measure_every=10, budget=0.1)
    done = []

    def measures(*_args, **_options):
        clock[0] += 1.0
        return {"S": 1.0}

    monkeypatch.setattr("sat_lens.training.saturation_measures", measures)
    for step in range(200):
        if tracker.step(model, step):
            done.append(step)
        clock[0] += 0.25
        assert tracker.overhead <= 0.1 or len(done) == 1
    # A measure takes as long as four steps, so one in forty steps can be afforded.
    assert done[0] == 0
    assert 2 <= len(done) <= 6
    free = SaturationTracker(data=FIXED, every=10**9, measure_every=10, budget=None)
    assert sum(free.step(model, step) is not None for step in range(200)) == 20


def test_what_cannot_be_measured_fails_at_the_start_and_not_in_the_middle(monkeypatch):
    with pytest.raises(UnsupportedModelError, match="Hugging Face"):
        SaturationTracker(data=FIXED).step(nn.Linear(2, 2), 0)
    model = hf_model()
    tracker = SaturationTracker(data=FIXED, measure_every=1, budget=None)
    tracker.step(model, 0)

    def fails(_model):
        raise UnsupportedModelError("gone")

    monkeypatch.setattr(tracker, "_measures", fails)
    assert tracker.step(model, 1)["problem"] == "gone"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("every", (0, 1.5, True, "x")),
        ("measure_every", (-1, 0.5)),
        ("budget", (0.0, 2.0, "x", float("nan"))),
        ("batch_size", (0, "x")),
        ("path", (3,)),
        ("log", (3,)),
        ("data", (3, {"input": FIXED})),
    ],
)
def test_arguments_are_checked(name, wrong, types_unchecked):
    for value in wrong:
        with pytest.raises(ArgumentError, match=f"(?i)^{name} "):
            SaturationTracker(**{name: value})


def test_a_step_is_a_model_and_a_number(types_unchecked):
    tracker, model = SaturationTracker(), nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"step\(model, step\)"):
        tracker.step(3, model)
    for step in ("3", 3.0, -3, True):
        with pytest.raises(ArgumentError, match="whole number"):
            tracker.step(model, step)
    for wrong in ("demo", None):
        with pytest.raises(ArgumentError, match="Needed a model"):
            tracker.step(wrong, 3)
        with pytest.raises(ArgumentError, match="Needed a model"), tracker.watching(wrong):
            pass
    with pytest.raises(ArgumentError, match="first_step"), tracker.watching(model, "x"):
        pass


@pytest.mark.slow
def test_the_first_step_does_not_wait_for_imports():
    code = (
        "import sys, torch\nfrom sat_lens.training import SaturationTracker\n"
        "lens = lambda: 'transformer_lens' in sys.modules\nprint(lens())\n"
        "SaturationTracker(every=1)\nprint(lens())\n"
        "SaturationTracker(data=torch.ones(1, 9).long())\nbefore = sys.modules\n"
        "print(lens(), 'sat_lens.roles' in before, 'sat_lens.caching' in before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "True", "True", "True"]


def test_texts_need_a_tokenizer_and_the_message_says_how():
    with pytest.raises(DataError, match="tokenizer="):
        SaturationTracker(data=["import os, sys, re"]).step(hf_model(), 0)


def test_steps_are_due_on_a_logarithmic_scale():
    assert [s for s in range(70) if is_due(s, None, halves=False)] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert [s for s in range(70) if is_due(s, 30, halves=True)] == [0, 30, 60]


def test_the_random_state_is_left_alone():
    model = hf_model()
    state = torch.get_rng_state()
    SaturationTracker(data=FIXED).step(model, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_put_off_is_said_at_the_end(caplog):
    model = native()
    tracker = SaturationTracker(data=FIXED, measure_every=1, budget=1e-6)
    for step in range(10):
        tracker.step(model, step)
    tracker.close()
    tracker.close()
    (record,) = caplog.records
    assert "9 measures of saturation were put off by budget=1e-06" in record.message
    assert "budget=None" in record.message
    caplog.clear()
    free = SaturationTracker(data=FIXED, measure_every=1, budget=None)
    free.step(model, 0)
    free.close()
    assert not caplog.records


def test_what_was_logged_can_be_drawn():
    tracker = SaturationTracker(data=FIXED, every=1, budget=None)
    with pytest.raises(ArgumentError, match="Nothing was logged yet"):
        tracker.plot()
    for step in range(3):
        tracker.step(native(), step)
    titles = [axes.get_title(loc="left") for axes in tracker.plot("A run").axes]
    assert {"norms", "saturation"} <= set(titles)


def test_a_folder_that_does_not_exist_is_not_made(tmp_path):
    tracker = SaturationTracker(tmp_path / "nowhere" / "log.jsonl")
    with pytest.raises(FileFormatError, match="No such file or directory"):
        tracker.step(native(), 0)
    assert list(tmp_path.iterdir()) == []
