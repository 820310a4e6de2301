"""What a reader of a sweep sees: controls, columns, titles and notes."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tokens
from zoo import model_of

import sat_lens as sl
from sat_lens.attention import RandomKey
from sat_lens.errors import ArgumentError
from sat_lens.patching import HeadSweep, sweep_heads

QUIET: dict[str, Any] = {"progress": False}
HEADS = ["L0H1", "L1H2"]


def last(batch: int = 2) -> Any:
    return sl.metrics.logit_difference([7] * batch, [9] * batch)


def swept(**arguments: Any) -> HeadSweep:
    given = {"heads": HEADS, "metric": last(), **arguments, **QUIET}
    return sweep_heads(model_of("gpt2").eval(), tokens(), **given)


@pytest.mark.parametrize("reduce", ["mean", None])
def test_a_control_is_the_mean_and_spread_of_several_draws(reduce: Any) -> None:
    model, effects = model_of("gpt2").eval(), []
    with torch.no_grad():
        soft = float(last()(model(tokens())))
        for seed in (3, 4, 5):
            with sl.replace_attention(model, RandomKey(seed), "L1H2"):
                effects.append(float(last()(model(tokens()))) - soft)
    sweep = swept(baseline="random", controls=3, seed=3, reduce=reduce)
    row = sweep.frame().loc["L1H2"]
    expected = pd.Series(effects)
    assert row["random_effect"] == pytest.approx(expected.mean(), abs=1e-5)
    assert row["random_spread"] == pytest.approx(expected.std(), abs=1e-5)
    assert expected.std() > 1e-3
    if reduce:
        assert float(sweep.random_spread[1, 2]) == pytest.approx(expected.std(), abs=1e-5)


def test_one_draw_has_no_spread() -> None:
    frame = swept(baseline="random", controls=1).frame()
    assert frame["random_effect"].notna().all()
    assert frame["random_spread"].isna().all()


def test_controls_from_another_run_are_drawn_too() -> None:
    frame = swept(baseline="random", controls=2, source="run").frame()
    assert (frame["random_spread"] > 0).all()


def test_an_interrupt_among_controls_keeps_those_that_are_done() -> None:
    calls, each = 0, len(HEADS)
    sure = 3  # the soft run twice, hidden positions among them, and the saturated one

    def metric(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > sure + 3 * each:
            raise KeyboardInterrupt
        return logits.mean()

    sweep = swept(metric=metric, baseline="random", controls=5, fast=False)
    assert not sweep.complete
    assert sweep.random_values is not None
    assert 1 <= len(sweep.random_values) < 5
    assert sweep.frame()["random_effect"].notna().all()


@pytest.mark.parametrize("source", ["run", "local"])
def test_an_interrupt_between_sweeps_keeps_the_first(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before random keys from a run, or other prompts, there is a run that may be interrupted."""
    from sat_lens.patching import sweep as module

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "activations_of", interrupted)
    sweep = swept(baseline="random", controls=2, source=source, corrupted=tokens(seed=3))
    assert not sweep.complete
    assert sweep.item_values.isfinite().all()
    assert (sweep.random_values is None) == (source == "run")
    frame = sweep.frame()
    assert frame["effect"].notna().all()
    assert frame["corruption_effect"].isna().all()
    assert frame["random_effect"].notna().all() == (source == "local")


@pytest.mark.parametrize("controls", [0, -1, 1.5, True, "5"])
def test_a_number_of_draws_that_is_none(controls: Any, types_unchecked: None) -> None:
    with pytest.raises(ArgumentError, match="controls"):
        swept(baseline="random", controls=controls)


def test_the_table_shows_what_was_asked_for_and_the_effect_first() -> None:
    plain = swept().frame()
    assert plain.columns[0] == "effect"
    assert not [name for name in plain.columns if "random" in name or "corruption" in name]
    every = swept(baseline="random", controls=2, corrupted=tokens(seed=3), positions=[0, 1])
    with pd.option_context("display.width", 80, "display.max_columns", 20):
        first_lines = str(every.frame()).split("\n\n")[0]
    assert "effect" in first_lines.split()
    assert every.frame()["corruption_effect"].notna().all()


def test_a_title_is_a_sentence() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "one head at a time saturated, all others soft"),
        ({"direction": "denoising"}, "one head at a time soft, all others saturated"),
        ({"source": "run"}, "z of one head at a time, from the saturated run into the soft run"),
        ({"transform": sl.transforms.Scale(3.0)}, "one head at a time at c = 3, all others soft"),
        ({"transform": sl.transforms.Uniform()}, "one head at a time uniform, all others soft"),
    ]
    for arguments, words in cases:
        shown = " ".join(text.get_text() for text in swept(**arguments).plot().texts)
        assert words in " ".join(shown.split())
        assert "(" not in shown


def test_a_share_of_next_to_nothing_is_no_number() -> None:
    """The saturated run is the soft one, up to one part in ten thousand."""
    same = swept(transform=lambda scores: (1 + 1e-4) * scores)
    assert float((same.saturated - same.soft).abs()) < 1e-3 * float(same.soft.abs())
    assert same.frame()["normalised"].isna().all()
    assert bool(same.normalised.isnan().all())
    assert same.frame()["effect"].notna().all()
    assert "too little to divide by" in " ".join(same.notes)
    with pytest.raises(ArgumentError, match="too little to divide by"):
        same.plot("normalised")
    usual = swept()
    assert usual.notes == []
    gap = float(usual.saturated - usual.soft)
    row = usual.frame().loc["L1H2"]
    assert row["normalised"] == pytest.approx(row["effect"] / gap, rel=1e-4)


def test_a_map_says_which_position_it_shows() -> None:
    figure = swept(positions=[0, 4, -1]).plot()
    labels = " ".join(axes.get_xlabel() for axes in figure.get_axes())
    assert "of 3 positions the largest in absolute value" in labels


def test_a_name_is_no_metric(types_unchecked: None) -> None:
    with pytest.raises(ArgumentError, match=r"next_token_loss"):
        swept(metric="loss")
    with pytest.raises(ArgumentError, match=r"next_token_loss"):
        sl.patching.saturable_heads(model_of("gpt2"), tokens(), "loss", 0.1, **QUIET)


def test_a_metric_that_reads_padding_of_a_decoder_is_refused() -> None:
    model, decoder = model_of("t5").eval(), tokens(length=7, seed=1)
    mask = torch.ones_like(decoder)
    mask[0, -2:] = 0
    batch = {"input": tokens(), "decoder_input": decoder, "decoder_attention_mask": mask}
    with pytest.raises(ArgumentError, match=r"\[6\], at which some prompts are padded"):
        sweep_heads(model, batch, last(), **QUIET)
    # Padding of the encoder is no matter of the decoder's positions.
    mask = torch.ones_like(tokens())
    mask[0, 6] = 0
    batch = {"input": tokens(), "decoder_input": decoder, "attention_mask": mask}
    assert sweep_heads(model, batch, last(), heads="decoder.L0H0", **QUIET).complete


def test_nothing_of_a_sweep_is_nan_where_it_was_measured() -> None:
    frame = swept(baseline="random", controls=2, reduce=None).frame()
    assert not [name for name in frame.columns if frame[name].dtype == float and math.isnan(
        frame[name].sum(skipna=False))]  # fmt: skip


def test_a_grid_holds_nan_where_there_is_no_head() -> None:
    sweep = swept()
    assert isinstance(sweep.values, torch.Tensor)
    expected = torch.full((2, 4), math.nan)
    expected[0, 1], expected[1, 2] = sweep.item_values
    torch.testing.assert_close(sweep.values, expected, rtol=0, atol=0, equal_nan=True)
