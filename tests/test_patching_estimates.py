"""First-order estimates, screens, the fast route, and greedy search."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from everyday import everyday
from tiny import VOCAB, decoder, native, of_class, tokens
from transformer_lens.tools.analysis import attribution_patch
from zoo import model_of

import sat_lens as sl
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.patching import SaturableHeads, saturable_heads, sweep_heads
from sat_lens.patching.engine import TOLERANCE

QUIET: dict[str, Any] = {"progress": False}


def last(batch: int = 2) -> Any:
    return sl.metrics.logit_difference([7] * batch, [9] * batch)


@pytest.fixture(scope="module")
def deep() -> Any:
    """A GPT-2 of four layers."""
    size = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    return of_class("GPT2LMHeadModel", "GPT2Config", **size)()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("source", ["local", "run"])
@pytest.mark.parametrize("metric", everyday(["last", "loss", "two"], "last"))
def test_the_fast_route_gives_what_whole_passes_give(
    deep: Any, direction: Any, source: Any, metric: str
) -> None:
    ids = tokens(batch=3, length=12)
    of = {
        "last": last(3),
        "loss": sl.metrics.next_token_loss(ids),
        "two": sl.metrics.kl_to_soft(deep(ids), positions=[3, -1]),
    }[metric]
    arguments = {"direction": direction, "source": source, **QUIET}
    fast = sweep_heads(deep, ids, of, **arguments)
    slow = sweep_heads(deep, ids, of, fast=False, **arguments)
    assert (fast.checks.route, slow.checks.route) == ("replay", "generic")
    torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0)
    assert fast.checks.n_checked >= 1
    assert fast.checks.max_error <= TOLERANCE


def test_layers_of_every_kind_are_proven() -> None:
    qwen = decoder(
        "qwen",
        "Qwen3",
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        use_sliding_window=True,
        max_window_layers=0,
        num_hidden_layers=4,
        head_dim=8,
        num_key_value_heads=2,
    )
    sweep = sweep_heads(qwen.build(), tokens(length=12), last(), **QUIET)
    assert sweep.checks.route == "replay"
    assert sweep.checks.n_checked >= 2


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2_soft_cap", "bert", "opt", "native_attn_only"])
def test_other_layouts_take_the_generic_route(name: str) -> None:
    model = model_of(name).eval()
    sweep = sweep_heads(model, tokens(), last(), heads=["L0H0", "L1H1"], **QUIET)
    assert sweep.checks.route == "generic"
    assert sweep.complete


def test_a_route_that_errs_is_given_up(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sat_lens.patching.engine import Engine

    right = sweep_heads(deep, tokens(), last(), **QUIET)
    replayed = Engine.logits
    monkeypatch.setattr(
        Engine, "logits", lambda self, entries: [x + 1e-2 * x for x in replayed(self, entries)]
    )
    wrong = sweep_heads(deep, tokens(), last(), **QUIET)
    assert wrong.checks.route == "generic"
    torch.testing.assert_close(wrong.values, right.values, atol=1e-5, rtol=0)


def test_a_route_that_errs_is_given_up_though_the_metric_is_small(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were only values compared, a metric below the tolerance would let any route pass."""
    from sat_lens.patching.engine import Engine

    def small(logits: torch.Tensor) -> torch.Tensor:
        return 1e-7 * last()(logits)

    right = sweep_heads(deep, tokens(), small, **QUIET)
    assert right.checks.route == "replay"
    replayed = Engine.logits
    monkeypatch.setattr(
        Engine, "logits", lambda self, entries: [x.flip(-1) for x in replayed(self, entries)]
    )
    wrong = sweep_heads(deep, tokens(), small, **QUIET)
    assert wrong.checks.route == "generic"
    torch.testing.assert_close(wrong.values, right.values, atol=1e-12, rtol=1e-3)


@pytest.mark.parametrize("positions", [None, "each"])
def test_a_random_twentieth_is_checked_beside_the_proof(deep: Any, positions: Any) -> None:
    sweep = sweep_heads(deep, tokens(), last(), positions=positions, **QUIET)
    n_values = sweep.item_values.numel()
    assert sweep.checks.n_checked == 1 + round(n_values / 20)


def test_an_error_in_a_single_head_is_found_by_the_random_checks(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof passes through the first head alone; all others go astray."""
    from sat_lens.patching.engine import Engine

    right = sweep_heads(deep, tokens(), last(), **QUIET)
    replayed = Engine.logits

    def astray(self: Any, entries: Any) -> list[torch.Tensor]:
        logits = replayed(self, entries)
        pairs = zip(entries, logits, strict=True)
        return [x if entry.item.label == "L0H0" else 1.01 * x for entry, x in pairs]

    monkeypatch.setattr(Engine, "logits", astray)
    wrong = sweep_heads(deep, tokens(), last(), **QUIET)
    assert wrong.checks.route == "generic"
    torch.testing.assert_close(wrong.values, right.values, atol=1e-5, rtol=0)


def test_a_few_values_are_not_worth_a_replay(deep: Any) -> None:
    few = sweep_heads(deep, tokens(), last(), heads=["L0H0", "L3H1"], **QUIET)
    assert few.checks.route == "generic"


def test_an_edit_of_somebody_elses_is_part_of_the_model(deep: Any) -> None:
    """A hook between the blocks is not passed by a replay, which must notice."""

    def halved(tensor: Any, hook: Any) -> Any:
        return tensor / 2

    with deep.hooks(fwd_hooks=[("blocks.2.hook_resid_post", halved)]):
        fast = sweep_heads(deep, tokens(), last(), **QUIET)
        slow = sweep_heads(deep, tokens(), last(), fast=False, **QUIET)
    torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", everyday(["local", "run"], "local"))
@pytest.mark.parametrize("reduce", everyday(["mean", None], None))
def test_an_estimate_is_the_derivative(deep: Any, source: Any, reduce: Any) -> None:
    """For a small change of the temperature the exact effect is the estimated one."""
    deep = deep.to(torch.float64)
    try:
        step = 1e-3
        small = sl.transforms.Scale(1 + step)
        arguments = {"transform": small, "source": source, "reduce": reduce, **QUIET}
        exact = sweep_heads(deep, tokens(), last(), **arguments)
        guess = sweep_heads(deep, tokens(), last(), method="attribution", **arguments)
    finally:
        deep.to(torch.float32)
    assert not guess.confirmed.any()
    assert not guess.frame()["confirmed"].any()
    effects = exact.item_values - exact.soft, guess.item_values - guess.soft
    largest = float(effects[0].abs().max())
    torch.testing.assert_close(effects[0], effects[1], atol=0.02 * largest + 2e-6, rtol=0.02)


def test_estimates_of_corruption_are_those_of_transformer_lens(deep: Any) -> None:
    clean, corrupted = tokens(), tokens(seed=4)
    theirs = attribution_patch(deep, clean, corrupted, last(1)).node_scores
    ours = sweep_heads(
        deep, clean, last(), corrupted, direction="denoising", method="attribution", **QUIET
    ).corruption_effect
    expected = torch.zeros_like(ours)
    for node, score in theirs.items():
        if node.kind == "attn_head_out":
            expected[node.layer, node.head] += score
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_estimates_by_position_add_up(deep: Any) -> None:
    each = sweep_heads(deep, tokens(), last(), method="attribution", positions="each", **QUIET)
    whole = sweep_heads(deep, tokens(), last(), method="attribution", **QUIET)
    assert each.effect.sum(-1).allclose(whole.effect, atol=1e-5)


def test_a_screen_confirms_what_it_says(deep: Any) -> None:
    exact = sweep_heads(deep, tokens(), last(), **QUIET)
    guess = sweep_heads(deep, tokens(), last(), method="attribution", **QUIET)
    screen = sweep_heads(deep, tokens(), last(), method="screen", confirm=0.25, **QUIET)
    sure = screen.confirmed
    assert 4 <= int(sure.sum()) < len(sure)
    assert screen.item_values[sure].allclose(exact.item_values[sure], atol=1e-5)
    assert screen.item_values[~sure].equal(guess.item_values[~sure])
    assert 0 <= screen.checks.recall <= 1
    everything = sweep_heads(deep, tokens(), last(), method="screen", confirm=1.0, **QUIET)
    assert everything.checks.recall == 1
    assert everything.confirmed.all()
    assert not screen.frame()["confirmed"].all()


def test_an_estimate_needs_a_gradient(deep: Any) -> None:
    with pytest.raises(ArgumentError, match="gradient"):
        sweep_heads(
            deep, tokens(), lambda logits: logits.detach().mean(), method="attribution", **QUIET
        )


@pytest.mark.parametrize("direction", everyday(["noising", "denoising"], "noising"))
def test_a_search_gives_what_its_set_gives(deep: Any, direction: Any) -> None:
    metric, ids = last(), tokens()
    soft, saturated = _extremes(deep, metric, ids)
    tolerance = 0.2 * abs(saturated - soft)
    found = saturable_heads(deep, ids, metric, tolerance, direction=direction, **QUIET)
    assert found.found
    chosen = set(found.heads)
    every = [f"L{layer}H{head}" for layer in range(4) for head in range(4)]
    hard = [h for h in every if (h in chosen) == (direction == "noising")]
    with torch.no_grad(), sl.saturate(deep, hard):
        value = float(metric(deep(ids)))
    assert abs(value - soft) <= tolerance + 1e-5
    assert value == pytest.approx(float(found.frame()["metric"][len(chosen)]), abs=1e-5)


def test_a_plain_greedy_search_takes_the_best_head_each_time(deep: Any) -> None:
    metric, ids, heads = last(), tokens(), [f"L{layer}H1" for layer in range(4)]
    soft, _ = _extremes(deep, metric, ids)
    found = saturable_heads(
        deep, ids, metric, 0.0, heads, candidates=None, full_curve=True, **QUIET
    )
    chosen: list[str] = []
    for label, value in zip(found.order, found.values.tolist(), strict=True):
        tried = {}
        for head in set(heads) - set(chosen):
            with torch.no_grad(), sl.saturate(deep, [*chosen, head]):
                tried[head] = float(metric(deep(ids)))
        assert label == min(tried, key=lambda head: abs(tried[head] - soft))
        assert value == pytest.approx(tried[label], abs=1e-5)
        chosen.append(label)
    assert found.heads == ()


def test_a_search_goes_on_where_it_stopped(
    deep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sat_lens.patching import search

    arguments = {"candidates": 3, "full_curve": True, **QUIET}
    whole = saturable_heads(deep, tokens(), last(), 0.1, **arguments)
    passes, run = 0, search.patched_logits

    def interrupted(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 10:
            raise KeyboardInterrupt
        return run(*args)

    file = tmp_path / "search.json"
    monkeypatch.setattr(search, "patched_logits", interrupted)
    part = saturable_heads(deep, tokens(), last(), 0.1, state=file, **arguments)
    monkeypatch.setattr(search, "patched_logits", run)
    assert not part.complete
    assert 0 < len(part.order) < 16
    rest = saturable_heads(deep, tokens(), last(), 0.1, state=file, **arguments)
    assert rest.complete
    assert sorted(rest.order) == sorted(whole.order)
    assert rest.order[: len(part.order)] == part.order
    with pytest.raises(ArgumentError, match="differs in direction"):
        saturable_heads(deep, tokens(), last(), 0.1, state=file, direction="denoising", **arguments)
    file.write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(FileFormatError, match="holds no search"):
        saturable_heads(deep, tokens(), last(), 0.1, state=file, **arguments)


def test_the_result_of_a_search_goes_through_a_file(deep: Any, tmp_path: Path) -> None:
    found = saturable_heads(deep, tokens(), last(), 0.1, heads=["L0H0", "L1H0"], **QUIET)
    found.save(tmp_path / "found")
    loaded = SaturableHeads.load(tmp_path / "found")
    assert loaded.frame().equals(found.frame())
    assert loaded.heads == found.heads
    assert found.plot().get_axes()


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf, "much"])
def test_tolerances_that_make_no_sense(deep: Any, tolerance: Any, types_unchecked: None) -> None:
    with pytest.raises(ArgumentError, match="tolerance"):
        saturable_heads(deep, tokens(), last(), tolerance, **QUIET)


def _extremes(model: Any, metric: Any, ids: torch.Tensor) -> tuple[float, float]:
    with torch.no_grad():
        soft = float(metric(model(ids)))
        with sl.saturate(model):
            return soft, float(metric(model(ids)))


def test_natives_are_replayed() -> None:
    sweep = sweep_heads(native().eval(), tokens(), last(), **QUIET)
    assert sweep.checks.route == "replay"
