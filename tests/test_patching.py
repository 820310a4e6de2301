"""Sweeps over heads: laws, equality with TransformerLens and with an oracle, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformer_lens.patching as tl
from everyday import everyday
from oracle import rescaled_softmax
from tiny import tokens
from zoo import case, model_of

import sat_lens as sl
from sat_lens.errors import (
    ArgumentError,
    DataError,
    FileFormatError,
    HeadSelectionError,
    NonFiniteError,
    UnsupportedModelError,
)
from sat_lens.patching import HeadSweep, sweep_heads

QUIET: dict[str, Any] = {"progress": False}
DECODERS = ["gpt2", "llama", "native"]


def model_in_eval(name: str) -> Any:
    return model_of(name).eval()


def inputs_of(name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    (inputs, *_), kwargs = case(name).inputs()
    return inputs, kwargs


def difference(logits: torch.Tensor) -> torch.Tensor:
    """A metric of all positions, with a value on any output that has a last axis."""
    return (logits[..., 7 % logits.shape[-1]] - logits[..., 0]).mean()


def last(batch: int = 2) -> Any:
    return sl.metrics.logit_difference([7] * batch, [9] * batch)


def caches(model: Any, ids: torch.Tensor) -> tuple[Any, Any]:
    _, soft = model.run_with_cache(ids)
    with sl.saturate(model):
        _, saturated = model.run_with_cache(ids)
    return soft, saturated


@pytest.mark.parametrize("name", everyday(DECODERS, "gpt2"))
@pytest.mark.parametrize("fast", everyday([True, False], True))
def test_patching_between_runs_is_that_of_transformer_lens(name: str, fast: bool) -> None:
    model, ids = model_in_eval(name), tokens()
    with torch.no_grad():
        soft, saturated = caches(model, ids)
        noised = tl.get_act_patch_attn_head_out_all_pos(model, ids, saturated, last())
        by_position = tl.get_act_patch_attn_head_out_by_pos(model, ids, saturated, last())
        with sl.saturate(model):
            denoised = tl.get_act_patch_attn_head_out_all_pos(model, ids, soft, last())
            back = tl.get_act_patch_attn_head_out_by_pos(model, ids, soft, last())
    for direction, whole, each in (
        ("noising", noised, by_position),
        ("denoising", denoised, back),
    ):
        given: dict[str, Any] = {"source": "run", "direction": direction, "fast": fast, **QUIET}
        ours = sweep_heads(model, ids, last(), **given)
        torch.testing.assert_close(ours.values, whole, atol=1e-5, rtol=0)
        ours = sweep_heads(model, ids, last(), positions="each", **given)
        torch.testing.assert_close(ours.values, each.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("component", "function"),
    [
        ("q", tl.get_act_patch_attn_head_q_all_pos),
        ("v", tl.get_act_patch_attn_head_v_all_pos),
        ("k", tl.get_act_patch_attn_head_k_all_pos),
        ("pattern", tl.get_act_patch_attn_head_pattern_all_pos),
    ],
)
@pytest.mark.parametrize("name", everyday(["gpt2", "llama"], "llama"))
def test_other_components_too(name: str, component: Any, function: Any) -> None:
    model, ids = model_in_eval(name), tokens()
    with torch.no_grad():
        _, saturated = caches(model, ids)
        theirs = function(model, ids, saturated, difference)
    ours = sweep_heads(model, ids, difference, source="run", component=component, **QUIET).values
    # Heads that share keys and values have one entry with them and one each with us.
    theirs = theirs.repeat_interleave(ours.shape[1] // theirs.shape[1], dim=1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    everyday(["gpt2", "llama", "native", "bert", "opt", "gpt_neox", "t5", "vit"], "gpt2", "t5"),
)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_local_saturation_agrees_with_the_oracle(name: str, direction: Any) -> None:
    model, (inputs, kwargs) = model_in_eval(name), inputs_of(name)
    sweep = sweep_heads(
        model, {"input": inputs, **kwargs}, difference, direction=direction, **QUIET
    )
    sites = sl.attention_sites(model)
    everything = {site.path: list(range(site.n_heads)) for site in sites}
    for item, value in list(zip(sweep.items, sweep.item_values, strict=True))[::3]:
        (path, (head,)) = next(iter(item.selection.items()))
        chosen = {path: [head]}
        if direction == "denoising":
            chosen = everything | {path: [h for h in everything[path] if h != head]}
        with torch.no_grad(), rescaled_softmax(model, chosen, math.inf, case(name).n_heads):
            expected = difference(model(inputs, **kwargs))
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_pattern_patching_works_where_that_of_transformer_lens_is_discarded() -> None:
    """OPT computes its attention in Hugging Face's code; the first layer's scores are run-free."""
    model, ids, component = model_in_eval("opt"), tokens(), "pattern"
    with torch.no_grad():
        _, saturated = caches(model, ids)
        theirs = tl.get_act_patch_attn_head_pattern_all_pos(model, ids, saturated, difference)
    ours = sweep_heads(model, ids, difference, source="run", component=component, **QUIET)
    assert bool((theirs == ours.soft).all())
    assert bool((ours.effect.abs() > 1e-5).all())
    for head in range(4):
        with torch.no_grad(), rescaled_softmax(model, {"blocks.0.attn": [head]}, math.inf, 4):
            expected = difference(model(ids))
        torch.testing.assert_close(ours.values[0, head], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", everyday(["gpt2", "t5", "bert"], "gpt2"))
@pytest.mark.parametrize("transform", [None, sl.transforms.Scale(3.0), sl.transforms.RandomKey(1)])
def test_all_heads_at_once_lead_from_one_run_to_the_other(name: str, transform: Any) -> None:
    model, (inputs, kwargs) = model_in_eval(name), inputs_of(name)
    batch, everything = {"input": inputs, **kwargs}, {"all": None}

    def sweep(direction: Any) -> HeadSweep:
        return sweep_heads(
            model,
            batch,
            difference,
            heads=everything,
            direction=direction,
            transform=transform,
            **QUIET,
        )

    noised, denoised = sweep("noising"), sweep("denoising")
    assert noised.values[0].isclose(noised.saturated, atol=1e-6)
    assert denoised.values[0].isclose(denoised.soft, atol=1e-6)
    assert noised.frame().loc["all", "normalised"] == pytest.approx(1, abs=1e-3)


def test_a_head_whose_output_is_zeroed_has_no_effect() -> None:
    model = case("gpt2").build()
    width = model.cfg.d_model // 4
    with torch.no_grad():
        model.blocks[0].attn.o.original_component.weight[width : 2 * width] = 0
    for source in ("local", "run"):
        sweep = sweep_heads(model, tokens(), difference, source=source, **QUIET)
        assert sweep.frame().loc["L0H1", "effect"] == pytest.approx(0, abs=1e-6)
        assert abs(sweep.frame().loc["L0H2", "effect"]) > 1e-4


@pytest.mark.parametrize("name", everyday(["gpt2", "bert"], "gpt2"))
@pytest.mark.parametrize("direction", everyday(["noising", "denoising"], "denoising"))
def test_a_batch_is_its_prompts(name: str, direction: Any) -> None:
    model, ids = model_in_eval(name), tokens(batch=3)

    def values(part: torch.Tensor, n: int) -> torch.Tensor:
        return sweep_heads(model, part, last(n), direction=direction, reduce=None, **QUIET).values

    single = torch.cat([values(ids[i : i + 1], 1) for i in range(3)], dim=-1)
    torch.testing.assert_close(values(ids, 3), single, atol=1e-5, rtol=0)
    mean = sweep_heads(model, ids, last(3), direction=direction, **QUIET).values
    torch.testing.assert_close(mean, single.mean(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_changes_nothing(name: str) -> None:
    model, ids = model_in_eval(name), tokens(batch=1, length=7)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    both = torch.cat([padded, tokens(batch=1, length=10, seed=3)])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    batch = {"input": both, "attention_mask": mask}
    if name == "gpt2":  # its positions are absolute, and Hugging Face counts padding
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    for fast in (True, False):
        plain = sweep_heads(model, ids, last(1), reduce=None, fast=fast, **QUIET)
        beside = sweep_heads(model, batch, last(2), reduce=None, fast=fast, **QUIET)
        torch.testing.assert_close(beside.values[..., :1], plain.values, atol=1e-5, rtol=0)


def test_several_stacks_come_apart() -> None:
    model, batch = (
        model_in_eval("t5"),
        {"input": tokens(), "decoder_input": tokens(length=7, seed=1)},
    )
    sweep = sweep_heads(model, batch, difference, positions=[-1, 0], **QUIET)
    assert set(sweep.values) == {"encoder", "decoder", "cross"}
    assert sweep.values["cross"].shape == (2, 4, 2)
    assert sweep.checks.route == "replay"
    each = sweep_heads(
        model, batch, difference, heads=["encoder.L1H0", "cross.L0H0"], positions="each", **QUIET
    )
    assert each.item_values.isfinite().sum(1).tolist() == [10, 7]
    one = sweep_heads(model, batch, difference, heads=["cross.L1H2"], **QUIET)
    assert int(one.values["cross"].isfinite().sum()) == 1


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_positions_are_rows_of_the_pattern(direction: Any) -> None:
    """At the last position only the last row matters, so it carries the whole effect there."""
    model, ids = model_in_eval("native_attn_only"), tokens()
    top = "L1H0", "L1H3"
    rows = sweep_heads(
        model, ids, last(), heads=[*top], positions="each", direction=direction, **QUIET
    )
    whole = sweep_heads(model, ids, last(), heads=[*top], direction=direction, **QUIET)
    assert rows.positions == tuple(range(10))
    assert rows.item_values[:, -1].allclose(whole.item_values, atol=1e-6)
    assert rows.item_values[:, :-1].allclose(rows.base, atol=1e-6)


def test_a_transform_of_ones_own_and_the_control() -> None:
    model, ids = model_in_eval("llama"), tokens()
    same = sweep_heads(
        model, ids, difference, transform=lambda scores: scores, baseline="random", **QUIET
    )
    assert same.item_values.allclose(same.soft, atol=1e-6)
    assert bool((same.frame()["random_effect"].abs() > 1e-6).all())
    uniform = sweep_heads(model, ids, difference, transform=sl.transforms.Uniform(), **QUIET)
    with sl.saturate(model, "L1H2", scale=0):
        expected = difference(model(ids))
    assert uniform.values[1, 2].isclose(expected.detach(), atol=1e-6)


def test_corruption_is_the_usual_activation_patching() -> None:
    model, clean, corrupted = model_in_eval("gpt2"), tokens(), tokens(seed=5)
    sweep = sweep_heads(model, clean, last(), corrupted, direction="denoising", **QUIET)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        theirs = tl.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, last())
        base = last()(model(corrupted))
    torch.testing.assert_close(sweep.corruption_effect, theirs - base, atol=1e-5, rtol=0)
    assert sweep.frame()["corruption_effect"].notna().all()


def test_the_result_goes_through_a_file_and_can_be_run_again(tmp_path: Any) -> None:
    model, ids = model_in_eval("gpt2"), tokens()
    sweep = sweep_heads(
        model, ids, last(), tokens(seed=2), reduce=None, baseline="random", heads="L1H1", **QUIET
    )
    sweep.save(tmp_path / "sweep.safetensors")
    loaded = HeadSweep.load(tmp_path / "sweep.safetensors")
    assert loaded.frame().equals(sweep.frame())
    assert loaded.arguments == sweep.arguments
    again = sweep_heads(
        model, loaded.inputs, last(), heads=loaded.arguments["heads"], reduce=None, **QUIET
    )
    assert again.item_values.equal(sweep.item_values)
    with pytest.raises(FileFormatError, match="no file"):
        HeadSweep.load(tmp_path / "none")


def test_frame_and_map(demo: Any) -> None:
    metric = sl.metrics.logit_difference(5, 6)
    sweep = sweep_heads(demo, "def f(x):", metric, baseline="random", controls=1, **QUIET)
    frame = sweep.frame()
    assert frame.index[9] == "L1H1"
    assert frame.loc["L1H1", "effect"] == pytest.approx(float(sweep.effect[1, 1]))
    assert {"value", "normalised", "random_effect", "method", "confirmed"} <= set(frame.columns)
    assert sweep.plot().get_axes()
    with pytest.raises(ArgumentError, match="not measured"):
        sweep.plot("corruption_effect")


def test_an_interrupt_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_in_eval("bert"), 0

    def metric(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return difference(logits)

    sweep = sweep_heads(model, tokens(), metric, **QUIET)
    assert not sweep.complete
    assert int(sweep.item_values.isfinite().sum()) == 3


def test_hooks_and_modes_are_left_as_they_were() -> None:
    model, ids = model_in_eval("gpt2"), tokens()
    before = model(ids)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    sweep_heads(model, ids, last(), direction="denoising", source="run", **QUIET)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == after
    assert before.equal(model(ids))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"direction": "sideways"}, ArgumentError, "direction must be one of"),
        ({"source": "elsewhere"}, ArgumentError, "source must be one of"),
        ({"component": "mlp"}, ArgumentError, "component must be one of"),
        ({"method": "guess"}, ArgumentError, "method must be one of"),
        ({"component": "q"}, ArgumentError, 'source="run"'),
        ({"method": "screen", "source": "run", "component": "v"}, ArgumentError, "estimates"),
        ({"heads": []}, HeadSelectionError, "No head"),
        ({"heads": [[]]}, HeadSelectionError, "empty"),
        ({"heads": [["L0H1"], ["L0H1"]]}, HeadSelectionError, "more than once"),
        ({"heads": ["L0H1", (0, 1)]}, HeadSelectionError, "more than once"),
        ({"heads": [["L0H2", "L0H1", "L0H2"]]}, HeadSelectionError, "more than once"),
        ({"heads": ["L0H1", ["L0H2"]]}, HeadSelectionError, "all groups"),
        ({"heads": "L9H9"}, HeadSelectionError, "no head"),
        ({"positions": [99]}, ArgumentError, "positions"),
        ({"positions": [1, 1]}, ArgumentError, "repeats"),
        ({"positions": [-1, 9]}, ArgumentError, "more than once"),
        ({"confirm": 0.0}, ArgumentError, "share"),
        ({"transform": 3}, ArgumentError, "function from scores"),
        ({"corrupted": tokens(length=9)}, ArgumentError, "same shape"),
        ({"metric": lambda logits: logits[:, -1, 3]}, ArgumentError, "scalar"),
        ({"metric": lambda logits: logits.mean() / 0}, NonFiniteError, "gave"),
        ({"metric": lambda logits: torch.tensor(1.0)}, ArgumentError, "does not depend"),
        ({"metric": difference, "reduce": None}, ArgumentError, "one value for each"),
        ({"inputs": tokens()[:0]}, DataError, "holds nothing"),
        ({"inputs": [{"input": tokens()}] * 2}, DataError, "one batch"),
    ],
)
def test_refusals(arguments: dict[str, Any], error: Any, words: str, types_unchecked: None) -> None:
    given = {"inputs": tokens(), "metric": last(), **arguments}
    with pytest.raises(error, match=words):
        sweep_heads(model_in_eval("gpt2"), **given, **QUIET)


def test_a_metric_that_reads_more_than_it_says_is_refused() -> None:
    metric = last()
    liar = type("Liar", (), {"positions": [-1], "__call__": lambda _, logits: logits.mean()})()
    assert sweep_heads(model_in_eval("gpt2"), tokens(), metric, heads="L0H0", **QUIET).complete
    with pytest.raises(ArgumentError, match="another value when all others are hidden"):
        sweep_heads(model_in_eval("gpt2"), tokens(), liar, **QUIET)


def test_a_metric_that_reads_padding_is_refused() -> None:
    mask = torch.ones_like(tokens())
    mask[0, -2:] = 0
    with pytest.raises(ArgumentError, match="padded"):
        sweep_heads(
            model_in_eval("gpt2"), {"input": tokens(), "attention_mask": mask}, last(), **QUIET
        )


def test_a_model_without_z_says_what_to_do_instead() -> None:
    model, ids = model_in_eval("jetmoe"), tokens()
    with pytest.raises(UnsupportedModelError, match='component="pattern"'):
        sweep_heads(model, ids, difference, source="run", heads="L0H0", **QUIET)
    local = sweep_heads(model, ids, difference, heads="L0H0", **QUIET)
    pattern = sweep_heads(
        model, ids, difference, source="run", component="pattern", heads="L0H0", **QUIET
    )
    assert local.item_values.allclose(pattern.item_values, atol=1e-6)


def test_dropout_is_refused() -> None:
    model = model_in_eval("gpt2")
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    dropouts[0].train()
    try:
        with pytest.raises(ArgumentError, match=r"model\.eval"):
            sweep_heads(model, tokens(), difference, **QUIET)
    finally:
        dropouts[0].eval()
