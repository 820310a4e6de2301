"""Attention by key token: against sums by hand, and on models whose attention is known."""

from __future__ import annotations

import math

import constructed
import pytest
import tiny
import torch
import transformers

import sat_lens as sl
from paper import narrowing
from paper.language import Setting
from sat_lens.norms.narrowing import MIN_KEYS, attention_narrowing, doublings, phase_boundary

TOKENS = constructed.tokens(12)


def model_of(table):
    return constructed.constructed([[table]], causal=True)


def entropy_by_hand(tokens, weights):
    """Mean entropy over key tokens of the counted rows; ``weights(query)`` are those of keys."""
    values = []
    for sequence in tokens.tolist():
        for query in range(MIN_KEYS - 1, len(sequence) - 1):
            mass = {}
            for key, weight in enumerate(weights(query)):
                mass[sequence[key]] = mass.get(sequence[key], 0.0) + weight
            values.append(-sum(m * math.log(m) for m in mass.values() if m))
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def scan():
    """Three uniform checkpoints, two that attend to the last four keys, two to one key."""
    few, one = constructed.last_few_table(4), constructed.offset_table(-1)
    tables = [constructed.UNIFORM] * 3 + [few] * 2 + [one] * 2
    checkpoints = {
        step: model_of(table) for step, table in zip([0, 1, 2, 4, 8, 16, 32], tables, strict=True)
    }
    return attention_narrowing(checkpoints, TOKENS, progress=False)


@pytest.mark.slow
def test_entropies_are_those_of_sums_by_hand(scan):
    frame = scan.frame()
    uniform = entropy_by_hand(TOKENS, lambda query: [1 / (query + 1)] * (query + 1))
    few = entropy_by_hand(TOKENS, lambda query: [0.0] * (query - 3) + [0.25] * 4)
    expected = [uniform] * 3 + [few] * 2 + [0, 0]
    assert frame["entropy"].tolist() == pytest.approx(expected, abs=1e-5)
    assert frame["entropy_uniform"].tolist() == pytest.approx([uniform] * 7, rel=1e-6)
    assert frame["narrowing"].loc[4] == pytest.approx(uniform - few, abs=1e-5)
    assert frame["narrowing"].loc[16] == pytest.approx(few, abs=1e-5)
    assert frame["moved"].loc[[1, 8, 32]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert frame["moved"].loc[4] > 0.1


def test_masses_are_where_attention_is(scan):
    query = scan.queries[0]
    rows = [
        (sequence, place)
        for sequence in range(len(TOKENS))
        for place in range(MIN_KEYS - 1, constructed.N_CTX - 1)
        if TOKENS[sequence, place] == query
    ]
    before = torch.bincount(
        torch.tensor([TOKENS[s, p - 1] for s, p in rows]), minlength=constructed.N_TOKENS
    )
    shares = before / len(rows)
    table = scan.keys(query, largest=3)
    assert table.loc[32].tolist() == pytest.approx(shares.topk(3).values.tolist(), abs=1e-5)
    assert table.loc["uniform"].tolist() == pytest.approx(table.loc[0].tolist(), abs=1e-5)
    assert scan.masses.sum(-1).flatten().tolist() == pytest.approx([1] * 56, abs=1e-5)
    with pytest.raises(sl.SatLensError, match="Query tokens are"):
        scan.keys(999)


@pytest.mark.slow
def test_the_boundary_is_where_narrowing_slows(scan):
    assert phase_boundary([0, 1, 2, 4, 8], [3.0, 3.0, 2.0, 1.9, 1.9]) == 2
    assert phase_boundary([1, 2, 4, 8], [3.0, 2.0, 1.5, 1.2]) is None
    assert phase_boundary([1, 2, 4], [2.0, 2.0, 2.5]) is None
    # Two octaves at half the speed each: the fastest stretch is the last one.
    assert phase_boundary([1, 4, 8, 16], [3.0, 2.0, 1.2, 1.2]) == 8
    assert doublings([0, 1, 4]) == [1.0, 2.0]
    # From 1.70 nats to 1.11, and faster from there to 0.
    assert scan.boundary == 16


@pytest.mark.slow
def test_preference_for_distinct_tokens_is_found():
    # Tokens 1, 2 and 3 say what follows the last 0; token 4, in all rows, does not.
    rows = [[4] * 6 + [key] + [0] * 4 + [4 + key] for key in (1, 2, 3)] * 12
    at_key, at_filler = constructed.one_key_table(6), constructed.one_key_table(0)
    found = attention_narrowing(
        {0: model_of(constructed.UNIFORM), 1: model_of(at_key), 2: model_of(at_filler)},
        torch.tensor(rows), n_queries=1, progress=False,
    )  # fmt: skip
    assert found.queries == (0,)
    _, distinct, common = found.frame()["commonness"]
    # Five keys: three of low entropy and two of high; ranks by hand.
    assert distinct == pytest.approx(-1)
    assert common == pytest.approx(0.6124, abs=1e-4)


@pytest.mark.slow
def test_checkpoints_on_disk_and_in_memory_agree(tmp_path):
    config = transformers.LlamaConfig(**tiny.SIZE)
    models = {0: tiny.hf_model("LlamaForCausalLM", config)}
    models[4] = tiny.randomise(tiny.hf_model("LlamaForCausalLM", config), std=0.6)
    for step, model in models.items():
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    tokens = tiny.tokens(batch=3, length=14)
    memory, disk = (
        attention_narrowing(source, tokens, layer=1, n_queries=2, progress=False)
        for source in (models, tmp_path)
    )
    assert torch.allclose(memory.masses, disk.masses, atol=1e-5)
    assert memory.frame()["entropy"].iloc[1] < memory.frame()["entropy_uniform"].iloc[1]


@pytest.mark.slow
def test_a_whole_reproduction_is_judged(monkeypatch):
    setting = Setting(
        steps=4, layers=1, heads=1, width=16, context=24, batch=2, files=1, held_out=2
    )
    monkeypatch.setattr(narrowing, "QUICK", setting)
    found = narrowing.reproduce(quick=True, progress=False)
    assert list(found.frame.index) == [0, 1, 2, 4]
    assert len(found.claims) == 3
    masses = found.frame.iloc[:, -6:]
    assert all(name.startswith("mass on ") for name in masses)
    assert masses.loc[4].is_monotonic_decreasing
    assert masses.loc[4].sum() <= 1
    assert "WikiText" in found.note
    assert "standard library of Python" in found.note
    # Four steps narrow nothing, and must not be said to.
    assert found.claims[0].verdict == "does not hold here"
    assert len(found.figure.axes) == 3


def test_what_cannot_be_followed_is_refused():
    models = {0: tiny.native(), 1: tiny.native()}
    with pytest.raises(sl.SatLensError, match="longer than 8"):
        attention_narrowing(models, tiny.tokens(length=8), progress=False)
    with pytest.raises(sl.SatLensError, match="no attention in layer 7"):
        attention_narrowing(models, tiny.tokens(), layer=7, progress=False)
    with pytest.raises(sl.SatLensError, match="at least two"):
        attention_narrowing({0: models[0]}, tiny.tokens(), progress=False)
