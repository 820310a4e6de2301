"""The monitor of attention in training: its numbers by hand, its alarms, and that it only looks."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
import zoo
from everyday import everyday

import sat_lens as sl
from sat_lens.errors import ArgumentError
from sat_lens.monitor import Alarms, AttentionMonitor, attention_health, spectral_norms

TOKENS = tiny.tokens()


def by_hand(scores: np.ndarray) -> dict[str, float]:
    """The numbers of one head, row by row; the first row sees one key and does not count."""
    found: dict[str, list[float]] = {name: [] for name in ("entropy", "entropy_share", "top_gap")}
    found |= {"sink_rate": [], "tv_nearest": []}
    tops = []
    for matrix in scores:
        for n in range(2, len(matrix) + 1):
            s = matrix[n - 1, :n].astype(float)
            p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            found["entropy"].append(-(p * np.log(p)).sum())
            found["entropy_share"].append(found["entropy"][-1] / np.log(n))
            first, second = np.sort(s)[::-1][:2]
            found["top_gap"].append(first - second)
            found["sink_rate"].append(p[0])
            ordered = np.sort(p)[::-1]
            uniform = [np.where(np.arange(n) < m, 1 / m, 0) for m in range(1, n + 1)]
            found["tv_nearest"].append(min(np.abs(ordered - u).sum() / 2 for u in uniform))
            tops.append(first)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    visible = np.tril(np.ones(scores.shape[1:], dtype=bool))
    return {
        **means,
        "max_logit": float(scores[:, visible].max()),
        "logit_q50": float(np.quantile(tops, 0.5)),
        "logit_q99": float(np.quantile(tops, 0.99)),
    }


def test_numbers_by_hand(demo):
    tokens = torch.arange(24).reshape(2, 12) + 40
    with torch.no_grad():
        _, cache = demo.run_with_cache(tokens)
    health = attention_health(demo, tokens, rows=12, tau=5.0)
    for head in range(8):
        expected = by_hand(cache["attn_scores", 1][:, head].numpy())
        row = health.loc[f"L1H{head}"]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert row["qk_clip"] == pytest.approx(min(1, 5 / expected["max_logit"]))
    assert len(health) == 32
    assert (health["alarm"] == "").all()


def test_the_spectral_norm_is_the_largest_singular_value():
    model = zoo.model_of("native")
    found = spectral_norms(model)
    attention = model.blocks[1].attn
    for head in range(zoo.N_HEADS):
        product = attention.W_Q[head] @ attention.W_K[head].T
        exact = float(torch.linalg.matrix_norm(product.detach().double(), ord=2))
        assert found[f"L1H{head}"] == pytest.approx(exact, rel=1e-2)


@functools.cache
def plain(attention: str) -> Any:
    config = transformers.LlamaConfig(**tiny.SIZE, num_key_value_heads=2)
    return tiny.hf_model("LlamaForCausalLM", config, attention)


@pytest.mark.parametrize("rows", everyday([4, 32], 4))
def test_fused_attention_gives_the_same(rows):
    mask = torch.ones_like(TOKENS)
    mask[0, 6:] = 0
    data = [{"input_ids": TOKENS, "attention_mask": mask}]
    assert {site.level for site in sl.attention_sites(plain("sdpa"))} == {"kernel"}
    fused, eager = (attention_health(plain(how), data, rows=rows) for how in ("sdpa", "eager"))
    numbers = fused.columns.drop("alarm")
    np.testing.assert_allclose(fused[numbers], eager[numbers], rtol=1e-3, atol=1e-5)
    # Padded query rows do not count, whatever they attend to.
    alone = attention_health(plain("eager"), [TOKENS[:1, :6]], rows=32)
    both = attention_health(plain("eager"), [TOKENS[:1, :6], TOKENS[1:]], rows=32)
    assert not np.allclose(alone["entropy"], both["entropy"])
    if rows == 32:
        np.testing.assert_allclose(eager["entropy"], both["entropy"], rtol=1e-3)


@pytest.mark.parametrize("name", everyday(["t5", "bert", "opt", "gpt_oss_sink", "led"], "t5"))
def test_other_models(name):
    args, kwargs = zoo.case(name).inputs()
    health = attention_health(zoo.model_of(name), [{"input": args[0], **kwargs}])
    assert len(health) == sum(site.n_heads for site in sl.attention_sites(zoo.model_of(name)))
    assert health["entropy_share"].between(0, 1).all()


def small() -> Any:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT))
    return model.train()


def trained(monitor: AttentionMonitor | None, steps: int = 5) -> Any:
    torch.manual_seed(0)
    model = small()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        if monitor is not None:
            monitor.step(model, step)
        optimiser.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    return model


def test_training_with_it_gives_the_same_weights():
    """GPT-2 drops out at random in training, so the random state has to be kept as well."""
    monitor = AttentionMonitor(TOKENS, every=2)
    watched, alone = trained(monitor), trained(None)
    assert watched.training
    assert all(module.training for module in watched.modules())
    for mine, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert sorted(monitor.measurements) == [0, 2, 4]
    assert monitor.frame().shape[0] == 3 * 8


def test_alarms_are_logged_once_and_stand_in_the_table(caplog):
    model = tiny.hf_model("GPT2LMHeadModel", transformers.GPT2Config(**tiny.GPT), "sdpa")
    rows = []
    monitor = AttentionMonitor(TOKENS, every=1, log=lambda row, step: rows.append((step, row)))
    monitor.step(model, 0)
    with torch.no_grad():
        # Queries of one layer a hundred times as large.
        model.transformer.h[1].attn.c_attn.weight[:, :32] *= 100
    with caplog.at_level(logging.WARNING):
        monitor.step(model, 1)
        monitor.step(model, 2)
    table = monitor.frame()["alarm"]
    assert (table.loc[0] == "").all()
    assert all("logit explosion" in table.loc[1, f"L1H{head}"] for head in range(4))
    assert (table.loc[1][:4] == "").all()
    assert caplog.text.count("alarms in 4 heads") == 1
    assert [step for step, _ in rows] == [0, 1, 2]
    assert rows[1][1]["attention/alarms"] == 4
    assert rows[1][1]["attention/max_logit"] > 100 > rows[0][1]["attention/max_logit"]
    assert rows[1][1]["attention/qk_clip"] < 1 == rows[0][1]["attention/qk_clip"]
    # Scaled by what the monitor shows, the largest logit is the one allowed.
    clipped = monitor.measurements[1]["qk_clip"].to_dict()
    assert min(clipped.values()) * monitor.measurements[1]["max_logit"].max() == pytest.approx(100)


def test_lines_over_steps():
    monitor = AttentionMonitor(TOKENS, every=1)
    with pytest.raises(ArgumentError, match="nothing yet"):
        monitor.plot()
    for step in range(2):
        monitor.step(plain("sdpa"), step)
    figure = monitor.plot()
    assert [len(axes.lines) for axes in figure.axes] == [8, 8]
    expected = monitor.frame()["max_logit"].xs("L1H2", level="label")
    assert list(figure.axes[1].lines[6].get_ydata()) == pytest.approx(list(expected))
    with pytest.raises(ArgumentError, match="alarm"):
        monitor.plot(["alarm"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_has_exploded_is_reported_and_not_ended(value):
    model = tiny.hf_model("GPT2LMHeadModel", transformers.GPT2Config(**tiny.GPT), "eager")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] = value
    health = attention_health(model, TOKENS)
    assert "logit explosion" in health.loc["L0H0", "alarm"]


def test_what_counts_as_an_alarm():
    row = {"max_logit": 3.0, "entropy_share": 0.5, "sink_rate": 0.1}
    assert Alarms().of(row) == ""
    assert Alarms(max_logit=2.0).of(row) == "logit explosion"
    assert Alarms(entropy_share=0.6).of(row) == "entropy collapse"
    assert Alarms(sink_rate=0.05).of(row) == "dead: all on the first key"
    assert Alarms(max_logit=None).of(row | {"max_logit": math.nan}) == ""


@pytest.mark.slow
def test_the_trainer_calls_it(tmp_path):
    monitor = AttentionMonitor(TOKENS, every=2)
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    transformers.Trainer(small(), arguments, train_dataset=data, callbacks=[monitor]).train()
    assert sorted(monitor.measurements) == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "every"), ({"tau": -1.0}, "tau"), ({"log": "wandb"}, "log is a function")],
)
def test_refusals(options, message, types_unchecked):
    with pytest.raises(ArgumentError, match=message):
        AttentionMonitor(TOKENS, **options)
