"""Every way to name heads, every way to get it wrong, and the scales that go with them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sat_lens as sl
from sat_lens.errors import ArgumentError, HeadSelectionError, SatLensError, UnsupportedModelError
from sat_lens.sites import AttentionSite, labels_of, select_heads

# Layers 0, 1 and 3 have attention (layer 2 is of another kind), with 4, 4 and 2 heads.
ONE_STACK = [
    AttentionSite("blocks.0.attn", "", 0, "self", 4, "scores"),
    AttentionSite("blocks.1.attn", "", 1, "self", 4, "scores"),
    AttentionSite("blocks.3.attn", "", 3, "self", 2, "scores"),
]
THREE_STACKS = [
    AttentionSite("encoder_blocks.0.attn", "encoder", 0, "self", 2, "softmax"),
    AttentionSite("decoder_blocks.0.self_attn", "decoder", 0, "self", 2, "softmax"),
    AttentionSite("decoder_blocks.0.cross_attn", "cross", 0, "cross", 2, "softmax"),
]
OUT_OF_REACH = AttentionSite(
    "blocks.2.attn", "", 2, "self", 0, None, why_not="no attention softmax ran inside it"
)


def mask(*heads: tuple[int, int], shape: tuple[int, int] = (4, 4)) -> Tensor:
    chosen = torch.zeros(shape, dtype=torch.bool)
    for head in heads:
        chosen[head] = True
    return chosen


def chosen(heads: Any, sites: list[AttentionSite] = ONE_STACK) -> list[str]:
    return labels_of(sites, select_heads(sites, heads))


@pytest.mark.parametrize(
    "heads",
    [
        ["L0H1", "L3H0"],
        ["3.0", "0.1"],
        [(3, 0), (0, 1)],
        ("L3H0", "L0H1"),
        ((0, 1), (3, 0)),
        ["L0H1", (3, 0)],
        {"L0H1", "3.0"},
        (name for name in ["L3H0", "0.1"]),
        mask((0, 1), (3, 0)),
        mask((0, 1), (3, 0), shape=(6, 4)),
        lambda layer, head: (layer, head) in [(0, 1), (3, 0)],
        lambda stack, layer, head: (layer, head) in [(0, 1), (3, 0)],
        lambda *place: place in [(0, 1), (3, 0)],
        lambda layer, head, wanted=((0, 1), (3, 0)): (layer, head) in wanted,
        lambda layer, head: np.bool_((layer, head) in [(0, 1), (3, 0)]),
        lambda layer, head: mask((0, 1), (3, 0))[layer, head],
        [tuple(pair) for pair in np.argwhere(mask((0, 1), (3, 0)).numpy())],
    ],
    ids=lambda heads: type(heads).__name__,
)
@pytest.mark.usefixtures("types_unchecked")
def test_all_ways_to_name_heads_mean_the_same(heads: Any) -> None:
    assert select_heads(ONE_STACK, heads) == {"blocks.0.attn": [1], "blocks.3.attn": [0]}


@pytest.mark.parametrize("heads", ["L1H2", "1.2", (1, 2), ["1.2"], mask((1, 2)), "L01H02"])
def test_one_head_alone(heads: Any) -> None:
    assert chosen(heads) == ["L1H2"]


def test_none_means_all_heads_in_the_models_order() -> None:
    everything = [f"L{layer}H{head}" for layer, n in ((0, 4), (1, 4), (3, 2)) for head in range(n)]
    assert chosen(None) == everything
    assert chosen(lambda layer, head: True) == everything
    assert chosen(everything[::-1]) == everything


@pytest.mark.parametrize(
    ("heads", "layers"),
    [("L1", [1]), ("L0-L1", [0, 1]), ("L1-L3", [1, 3]), ("L3-L3", [3]), (["L3", "L0"], [0, 3])],
)
def test_whole_layers(heads: Any, layers: list[int]) -> None:
    everything = chosen(None)
    assert chosen(heads) == [f for f in everything if int(f[1]) in layers]
    assert chosen(["L3", "L0H1"]) == ["L0H1", "L3H0", "L3H1"]


@given(st.sets(st.sampled_from([(0, h) for h in range(4)] + [(1, h) for h in range(4)])))
def test_a_mask_and_its_labels_choose_the_same(pairs: set[tuple[int, int]]) -> None:
    if pairs:
        labels = chosen(mask(*pairs))
        assert labels == [f"L{layer}H{head}" for layer, head in sorted(pairs)]
        assert chosen(labels) == labels


def test_several_stacks_take_prefixes() -> None:
    assert chosen(["cross.L0H1", "encoder.L0H0"], THREE_STACKS) == ["encoder.L0H0", "cross.L0H1"]
    assert chosen(lambda stack, layer, head: stack == "cross", THREE_STACKS) == [
        "cross.L0H0",
        "cross.L0H1",
    ]
    assert chosen(lambda *place: place == ("decoder", 0, 1), THREE_STACKS) == ["decoder.L0H1"]
    assert chosen("encoder.L0", THREE_STACKS) == ["encoder.L0H0", "encoder.L0H1"]
    assert len(chosen(None, THREE_STACKS)) == 6
    for label in chosen(None, THREE_STACKS):
        assert chosen(label, THREE_STACKS) == [label]


def test_a_stack_name_may_hold_dots() -> None:
    site = AttentionSite("text.layers.0.attn", "text.layers", 0, "self", 2, "scores")
    assert chosen("text.layers.L0H1", [site]) == ["text.layers.L0H1"]


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ("L0H4", "no head 'L0H4'.*L0H0 to L0H3, L1H0 to L1H3, L3H0 to L3H1"),
        ("L2H0", "no head 'L2H0'"),
        ("L4H0", "no head 'L4H0'"),
        ("3.2", "no head '3.2'"),
        ((0, 4), r"no head \(0, 4\)"),
        ((0, -1), r"no head \(0, -1\)"),
        ((-1, 0), r"no head \(-1, 0\)"),
        ("encoder.L0H0", "no head 'encoder.L0H0'"),
        (["L0H0", "L9H9"], "no head 'L9H9'"),
        (mask((2, 0)), r"no head \(2, 0\)"),
        (mask((3, 3)), r"no head \(3, 3\)"),
        (["L0H0", "0.0"], "more than once: L0H0"),
        (["L1H1", (0, 2), (0, 2), "1.1"], "more than once: L0H2, L1H1"),
        ([], r"No head was selected by \[\].*at least one of L0H0 to L0H3"),
        (mask(), "No head was selected by tensor"),
        (lambda layer, head: False, "No head was selected"),
        (lambda site, head: site.layer == 0, r"\(layer, head\), such as \(0, 0\).*'layer'"),
        (lambda site, head: site.kind == "self", r"called with \(layer, head\)"),
        (lambda site, head: "attn" in site, r"called with \(layer, head\).*failed"),
        (lambda layer: layer == 0, r"called with \(layer, head\).*takes other arguments"),
        (lambda: True, "takes other arguments"),
        (lambda a, b, c, d: True, "takes other arguments"),
        (lambda layer, head, *, wanted: True, "takes other arguments"),
        (lambda layer, head: layer, r"returns True or False; for L0H0 it returned 0"),
        (lambda layer, head: None, r"for L0H0 it returned None"),
        (lambda layer, head: lambda: True, r"returns True or False"),
        ("L2", "no layer 'L2'.*L0H0 to L0H3, L1H0 to L1H3, L3H0 to L3H1"),
        ("L1-L2", "no layer 'L1-L2'"),
        ("L3-L0", "no layer 'L3-L0'"),
        ("encoder.L0", "no layer 'encoder.L0'"),
        (["L0", "L0H1"], "more than once: L0H1"),
        ("L0-", "whole layers like 'L5' or 'L5-L8'"),
        ("", "Heads are named like 'L5H1', '5.1' or \\(5, 1\\).*'' was given"),
        ("all", "'all' was given"),
        ("l0h0", "'l0h0' was given"),
        ("L0H0 ", "Heads are named like"),
        ("L0H0\n", "Heads are named like"),
        ("L0H0,L1H1", "Heads are named like"),
        ("L-1H0", "Heads are named like"),
        ("L٣H0", "Heads are named like"),
        (5, "5 was given"),
        (0.1, "0.1 was given"),
        (True, "True was given"),
        ([0, 1], "0 was given"),
        ((0, 1, 2), "0 was given"),
        ((0, 1.0), "0 was given"),
        ((True, 0), "True was given"),
        ([[0, 1]], r"\[0, 1\] was given"),
        ([None], "None was given"),
        ({"L0H0": 2.0}, "was given"),
        (torch.ones(4, 4), r"dtype bool.*found torch.float32 \[4, 4\]"),
        (torch.ones(4, dtype=torch.bool), r"\[layer, head\]; found torch.bool \[4\]"),
        (mask((0, 0), shape=(2, 4)), r"at least \[4, 4\]; found \[2, 4\]"),
        (mask((0, 0), shape=(8, 2)), r"at least \[4, 4\]; found \[8, 2\]"),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_a_wrong_choice_is_an_error_that_says_what_there_is(heads: Any, words: str) -> None:
    with pytest.raises(HeadSelectionError, match=re.compile(words, re.DOTALL)) as caught:
        select_heads(ONE_STACK, heads)
    assert isinstance(caught.value, SatLensError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ("L0H0", "several stacks: put the stack's name before the label.*encoder.L0H0"),
        ((0, 0), "several stacks"),
        ("0.0", "several stacks"),
        ("decoder.L1H0", "no head 'decoder.L1H0'"),
        (torch.ones(1, 2, dtype=torch.bool), "ambiguous.*'encoder.L0H0'"),
        ("L0", "no layer 'L0'.*several stacks: put the stack's name"),
        ("decoder.L1", "no layer 'decoder.L1'"),
        (lambda layer, head: layer != 0, r"\(stack, layer, head\).*takes other arguments"),
        (lambda site, head: True, r"\(stack, layer, head\).*takes other arguments"),
    ],
)
def test_a_choice_without_its_stack_is_an_error(heads: Any, words: str) -> None:
    with pytest.raises(HeadSelectionError, match=words):
        select_heads(THREE_STACKS, heads)


@pytest.mark.parametrize("heads", [None, "L2H0", (2, 0), ["L0H0", "2.0"], mask((2, 0))])
def test_heads_out_of_reach_are_an_error_that_says_why(heads: Any) -> None:
    sites = [*ONE_STACK[:2], OUT_OF_REACH, *ONE_STACK[2:]]
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.attn.*no attention softmax ran"):
        select_heads(sites, heads)
    assert chosen(["L0H0", "L3H0"], sites) == ["L0H0", "L3H0"]


def test_many_sites_are_listed_in_short() -> None:
    sites = [AttentionSite(f"blocks.{i}.attn", "", i, "self", 32, "scores") for i in range(48)]
    assert len(chosen(None, sites)) == 48 * 32
    with pytest.raises(HeadSelectionError) as caught:
        select_heads(sites, "L48H0")
    assert "L0H0 to L0H31" in str(caught.value)
    assert "L47H0 to L47H31" in str(caught.value)
    assert len(str(caught.value)) < 400


# Scales of chosen heads, in a model

TOKENS = torch.tensor([[5, 9, 200, 31, 9, 200, 77, 5]])


def patterns(model: Any, heads: Any = None, **options: Any) -> Tensor:
    """The patterns [layer, head, query, key] of a saturated run."""
    with torch.no_grad(), sl.saturate(model, heads, **options):
        _, cache = model.run_with_cache(TOKENS)
    return cache.stack_activation("pattern")[:, 0]


def rescaled(model: Any, c: Tensor) -> Tensor:
    """Patterns of layer 0, whose scores depend on no other attention, by definition."""
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    scores = cache["attn_scores", 0][0].double()
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
    rows = (c.double()[:, None, None] * (scores - scores.amax(-1, keepdim=True))).exp()
    rows = torch.where(scores == -math.inf, 0.0, rows)
    return (rows / rows.sum(-1, keepdim=True)).float()


C = torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 2.0, 0.25])


@pytest.mark.parametrize(
    "scale",
    [
        C.expand(4, 8),
        {f"L{layer}H{head}": float(C[head]) for layer in range(4) for head in range(8)},
        {(layer, head): float(C[head]) for layer in range(4) for head in range(8)},
        {f"{layer}.{head}": float(C[head]) for layer in range(4) for head in range(8)},
        lambda layer, head: float(C[head]),
        lambda layer, head: C[head],
    ],
    ids=["tensor", "labels", "pairs", "dotted", "callable", "callable giving tensors"],
)
@pytest.mark.usefixtures("types_unchecked")
def test_each_head_has_its_own_scale(demo: Any, scale: Any) -> None:
    # The scores are of order 10, so c times a float32 rounding of them is below 1e-4.
    assert torch.allclose(patterns(demo, scale=scale)[0], rescaled(demo, C), atol=1e-4)


def test_heads_that_are_not_chosen_keep_their_scale(demo: Any) -> None:
    with torch.no_grad():
        soft = demo.run_with_cache(TOKENS)[1].stack_activation("pattern")[:, 0]
    found = patterns(demo, ["L0H2", "L0H5"], scale={"L0H2": 2.0, "L0H5": 8.0})[0]
    expected = rescaled(demo, C)
    for head in range(8):
        if head in (2, 5):
            assert torch.allclose(found[head], expected[head], atol=1e-4)
        else:
            assert torch.equal(found[head], soft[0, head])


def test_a_mapping_alone_chooses_its_heads(demo: Any) -> None:
    by_both = patterns(demo, ["L0H2", "L1H5"], scale={"L0H2": 2.0, "L1H5": math.inf})
    assert torch.equal(patterns(demo, scale={"L0H2": 2.0, "L1H5": math.inf}), by_both)


def test_a_schedule_by_layer(demo: Any) -> None:
    scheduled = patterns(demo, scale=lambda layer, head: math.inf if layer == 2 else 1.0)
    alone = patterns(demo, lambda layer, head: layer == 2)
    assert torch.equal(patterns(demo, "L2"), alone)
    assert torch.equal(patterns(demo, scale={"L2": math.inf}), alone)
    assert torch.allclose(scheduled, alone, atol=1e-6)
    assert set(scheduled[2].amax(-1).flatten().tolist()) <= {1 / n for n in range(1, 9)}


@pytest.mark.parametrize("scale", [2, 2.0, torch.tensor(2.0), np.float64(2.0)])
def test_a_number_of_any_kind_is_a_scale(demo: Any, scale: Any) -> None:
    assert torch.equal(patterns(demo, scale=scale), patterns(demo, scale=2.0))


@pytest.mark.parametrize(
    ("heads", "scale", "words"),
    [
        (None, -1.0, "number >= 0.*-1.0"),
        (None, math.nan, "number >= 0.*nan"),
        (None, -math.inf, "number >= 0.*-inf"),
        (None, torch.tensor(-2.0), "number >= 0.*-2.0"),
        (None, True, "True was given"),
        (None, "hot", "'hot' was given"),
        (None, None, "None was given"),
        (None, [1.0] * 8, "was given"),
        (None, torch.ones(8), r"shape \[layer, head\].*found \[8\]"),
        (None, torch.ones(4, 8, 1), r"found \[4, 8, 1\]"),
        (None, torch.ones(3, 8), r"found \[3, 8\]"),
        (None, torch.ones(4, 7), r"found \[4, 7\]"),
        (None, -torch.ones(4, 8), "number >= 0.*-1.0"),
        (None, torch.full((4, 8), math.nan), "number >= 0.*nan"),
        (None, lambda layer, head: -1.0 if layer == 3 else 1.0, "number >= 0.*-1.0"),
        (None, lambda layer, head: math.nan, "number >= 0.*nan"),
        (None, {"L0H0": -1.0}, "number >= 0.*-1.0"),
        (["L0H0", "L0H1"], {"L0H0": 2.0}, "the two differ in L0H1"),
        (None, {}, "No head was selected"),
        (None, {"L9H9": 2.0}, "no head 'L9H9'.*L3H0 to L3H7"),
        (None, {"L0H0": 2.0, (0, 0): 3.0}, "more than once: L0H0"),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_an_impossible_scale_is_an_error_before_anything_runs(
    demo: Any, heads: Any, scale: Any, words: str
) -> None:
    with pytest.raises(ArgumentError, match=words), sl.saturate(demo, heads, scale=scale):
        pytest.fail("the block was entered")
    with pytest.raises(ArgumentError, match=words):
        sl.saturation_hooks(demo, heads, scale=scale)


@pytest.mark.parametrize("ties", ["softly", "", -0.5, math.nan, math.inf, True, None])
@pytest.mark.usefixtures("types_unchecked")
def test_unknown_ties_are_an_error_before_anything_runs(demo: Any, ties: Any) -> None:
    with pytest.raises(ArgumentError, match='"exact", "nearest"'), sl.saturate(demo, ties=ties):
        pytest.fail("the block was entered")
    with pytest.raises(ArgumentError, match='"exact", "nearest"'):
        sl.saturation_hooks(demo, ties=ties)


@pytest.mark.parametrize("heads", ["L9H9", [], (0, 8), "nonsense"])
def test_wrong_heads_are_an_error_before_anything_runs(demo: Any, heads: Any) -> None:
    for enter in (
        lambda: sl.saturate(demo, heads),
        lambda: sl.replace_attention(demo, lambda scores: scores, heads),
    ):
        with pytest.raises(HeadSelectionError), enter():
            pytest.fail("the block was entered")
    with pytest.raises(HeadSelectionError):
        sl.saturation_hooks(demo, heads)


@pytest.mark.usefixtures("types_unchecked")
def test_a_transform_has_to_be_callable(demo: Any) -> None:
    with pytest.raises(ArgumentError, match=r"function from scores to scores.*2\.0"):  # noqa: SIM117
        with sl.replace_attention(demo, 2.0):
            pytest.fail("the block was entered")


def test_ties_reach_the_limit(demo: Any) -> None:
    everything = patterns(demo, ties=1e9)[0]
    uniform = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    assert torch.allclose(everything, uniform.expand(8, 8, 8), atol=1e-6)
    assert torch.equal(patterns(demo, scale=0.0)[0], everything)
    nearest = patterns(demo, ties="nearest")[0]
    # Uniform rows: every share is 0 or the row's largest.
    assert ((nearest == 0) | (nearest == nearest.amax(-1, keepdim=True))).all()
