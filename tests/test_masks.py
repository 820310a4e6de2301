"""Masked keys, in all the ways in which models mask them, get no mass; all other scores do."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from everyday import everyday
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sat_lens.attention import Limit, RandomKey, Scale, Uniform, mask_threshold, transform_scores

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CAUSAL = torch.ones(8, 8).triu(1).bool()


def lowest(dtype: torch.dtype, head_size: int = 1) -> float:
    return torch.finfo(dtype).min / math.sqrt(head_size)


def fill(value: float) -> object:
    return lambda scores, hidden: scores.masked_fill(hidden, value)


def add(*values: float) -> object:
    """Add masks one after the other, in the scores' own dtype."""

    def masked(scores: Tensor, hidden: Tensor) -> Tensor:
        for value in values:
            scores = scores + torch.zeros_like(scores).masked_fill(hidden, value)
        return scores

    return masked


def in_turns(one: object, other: object) -> object:
    """Even keys masked in one way, odd keys in the other, as padding and future may be."""

    def masked(scores: Tensor, hidden: Tensor) -> Tensor:
        even = torch.arange(scores.shape[-1]) % 2 == 0
        return other(one(scores, hidden & even), hidden & ~even)

    return masked


CONVENTIONS = {
    "-inf": (fill(-math.inf), F32),
    "-inf in bfloat16": (fill(-math.inf), BF16),
    "-inf in float16": (fill(-math.inf), F16),
    "-inf in float64": (fill(-math.inf), F64),
    "float32's lowest": (fill(lowest(F32)), F32),
    "float32's lowest added": (add(lowest(F32)), F32),
    "float32's lowest added twice": (add(lowest(F32), lowest(F32)), F32),
    "float64's lowest": (fill(lowest(F64)), F64),
    "bfloat16's lowest": (fill(lowest(BF16)), BF16),
    "bfloat16's lowest added": (add(lowest(BF16)), BF16),
    "bfloat16's lowest added twice": (add(lowest(BF16), lowest(BF16)), BF16),
    "float16's lowest": (fill(lowest(F16)), F16),
    "float16's lowest added": (add(lowest(F16)), F16),
    "float16's lowest added twice": (add(lowest(F16), lowest(F16)), F16),
    "float32's lowest by a root": (fill(lowest(F32, 64)), F32),
    "bfloat16's lowest by a root": (fill(lowest(BF16, 128)), BF16),
    "float16's lowest by a root": (fill(lowest(F16, 64)), F16),
    "float16's lowest by a great root": (fill(lowest(F16, 256)), F16),
    "-10,000 added": (add(-1e4), F32),
    "-10,000 added twice": (add(-1e4, -1e4), F32),
    "-10,000 added in bfloat16": (add(-1e4), BF16),
    "-10,000 added in float16": (add(-1e4), F16),
    "-10,000 in float64": (add(-1e4), F64),
    "-100,000 added": (add(-1e5), F32),
    "-1e9 added": (add(-1e9), F32),
    "-1e9 added twice": (add(-1e9, -1e9), F32),
    "-1e9 added in bfloat16": (add(-1e9), BF16),
    "float32's lowest and -10,000": (in_turns(add(lowest(F32)), add(-1e4)), F32),
    "float16's lowest and -10,000": (in_turns(fill(lowest(F16)), add(-1e4)), F16),
    "-1e9 and -10,000": (in_turns(add(-1e9), add(-1e4)), F32),
}
conventions = pytest.mark.parametrize("convention", CONVENTIONS)
# One of each kind of mask, for what draws many examples.
kinds = pytest.mark.parametrize(
    "convention",
    everyday(
        CONVENTIONS,
        "-inf",
        "float32's lowest added twice",
        "bfloat16's lowest added",
        "float16's lowest by a root",
        "-1e9 added",
        "float32's lowest and -10,000",
    ),
)
# Examples for each of the many conventions.
some = settings(max_examples=30)

TRANSFORMS = [
    Limit(),
    Limit(1.0),
    Limit(1e30),
    Limit("nearest"),
    Scale(1e-45),
    Scale(1e-5),
    Scale(1.0),
    Scale(3.0),
    Scale(1e38),
    Uniform(),
    RandomKey(),
    lambda scores: -scores,
    lambda scores: scores.clamp(min=-20.0),
    lambda scores: torch.where(scores == -math.inf, 3e38, scores),
    lambda scores: torch.where(scores == -math.inf, math.inf, 0.0),
    lambda scores: torch.where(scores == -math.inf, math.nan, 1e30),
    lambda scores: torch.where(scores == -math.inf, 0.0, -3e38),
]


@st.composite
def scores_and_hidden(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores of ordinary size, which keys are hidden, with some fully masked rows."""
    shape = (2, 2, 3, draw(st.integers(2, 7)))
    elements = st.one_of(st.floats(-100, 100, width=16), st.sampled_from([0.0, 1.0]))
    scores = torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements)))
    hidden = torch.from_numpy(draw(hnp.arrays(np.bool_, shape)))
    hidden[0, 0, 0] = True
    hidden[0, 0, 1] = False
    return scores, hidden


@kinds
@some
@given(case=scores_and_hidden(), transform=st.sampled_from(TRANSFORMS))
def test_masked_keys_get_no_mass_and_the_others_are_as_without_a_mask(
    convention: str, case: tuple[Tensor, Tensor], transform: object
) -> None:
    mask, dtype = CONVENTIONS[convention]
    scores, hidden = case[0].to(dtype), case[1]
    live = ~hidden.all(-1)
    received = mask(scores, hidden)
    found = transform_scores(received, transform)
    assert not found.isnan().any()
    # Masked keys keep the model's own mask (which float32 cannot hold for a float64 model).
    assert dtype == F64 or torch.equal(found.to(dtype)[hidden], received[hidden])
    # What goes back into the model is in the model's dtype.
    for pattern in (found.softmax(-1), found.to(dtype).softmax(-1)):
        assert pattern[hidden & live[..., None]].count_nonzero() == 0
    # However the keys are masked, the visible ones get what they get under -inf.
    plain = scores.float().masked_fill(hidden, -math.inf)
    assert torch.equal(
        found.softmax(-1)[live], transform_scores(plain, transform).softmax(-1)[live]
    )


@kinds
@some
@given(case=scores_and_hidden(), transform=st.sampled_from(TRANSFORMS))
def test_fully_masked_rows_keep_the_models_own_scores(
    convention: str, case: tuple[Tensor, Tensor], transform: object
) -> None:
    mask, dtype = CONVENTIONS[convention]
    received = mask(case[0].to(dtype), case[1])
    dead = case[1].all(-1)
    found = transform_scores(received, transform)
    if dtype == F64:
        # float32 cannot hold them to the bit; a row of finite scores stays one.
        assert torch.equal(found[dead].isfinite(), received[dead].isfinite())
        assert torch.allclose(
            found[dead].double().clamp(min=-1e38), received[dead].clamp(min=-1e38)
        )
    else:
        assert torch.equal(found[dead], received[dead].float())
        assert torch.equal(found.to(dtype)[dead], received[dead])


@conventions
def test_a_transform_never_sees_a_row_without_a_visible_key(convention: str) -> None:
    mask, dtype = CONVENTIONS[convention]
    hidden = CAUSAL.expand(1, 2, 8, 8).clone()
    hidden[:, :, :3] = True

    def look(scores: Tensor) -> Tensor:
        assert scores.isfinite().any(-1).all()
        assert torch.equal(scores[:, :, 3:] == -math.inf, hidden[:, :, 3:])
        return scores

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 8, 8, generator=generator).to(dtype)
    transform_scores(mask(scores, hidden), look)


LOW = torch.tensor([[1.0, 0.0, 0.0], [-5000.0, 2.0, 0.0], [-5000.5, -5001.0, -4999.0]])


@pytest.mark.parametrize("depth", [1.0, 3.0, 20.0, 1e6])
@pytest.mark.parametrize("mask", [-math.inf, lowest(F32), lowest(BF16), lowest(F32, 64)])
def test_a_low_score_is_no_mask_where_another_number_marks_the_mask(
    depth: float, mask: float
) -> None:
    scores = torch.where(LOW < -1000, LOW * depth, LOW)
    hidden = torch.ones(3, 3).triu(1).bool()
    received = scores.masked_fill(hidden, mask)[None, None]
    plain = scores.double().masked_fill(hidden, -math.inf)
    expected = {
        Limit(): (plain == plain.amax(-1, keepdim=True)).double(),
        Scale(1e-3): (plain * 1e-3).softmax(-1),
        Uniform(): (~hidden).double(),
    }
    for transform, weights in expected.items():
        pattern = transform_scores(received, transform).softmax(-1)[0, 0]
        share = (weights / weights.sum(-1, keepdim=True)).float()
        assert torch.allclose(pattern, share, atol=1e-5), transform


@pytest.mark.parametrize("width", [1e4, 1e6, 1e20])
@pytest.mark.parametrize("mask", [None, -math.inf, lowest(F32), lowest(BF16), lowest(F32, 64)])
def test_a_wide_range_of_scores_is_no_mask(width: float, mask: float | None) -> None:
    """A network with enlarged weights has scores like these."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = (torch.rand(1, 2, 8, 8, generator=generator) * 2 - 1) * width
        hidden = torch.zeros_like(CAUSAL) if mask is None else CAUSAL
        received = scores if mask is None else scores.masked_fill(hidden, mask)
        found = received <= mask_threshold(received)
        assert torch.equal(found, hidden.expand(scores.shape)), f"seed {seed}"
        share = transform_scores(received, Uniform()).softmax(-1)
        assert torch.equal(share > 0, ~hidden.expand(scores.shape)), f"seed {seed}"


def test_wide_scores_with_normal_tails_are_no_mask() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for deviation in (3e2, 3e3, 1e5):
            scores = deviation * torch.randn(1, 4, 6, 6, generator=generator)
            assert mask_threshold(scores) == -math.inf, f"seed {seed}, deviation {deviation}"


def test_a_low_score_of_one_head_is_no_mask() -> None:
    """A mask is the same for all heads; in enlarged weights, one head may look like one."""
    scores = torch.tensor([[[200.0, -3000.0]], [[900.0, 500.0]]])[None]
    one = scores[:, :1]
    assert mask_threshold(one) == -3000.0
    assert mask_threshold(one, scores) == -math.inf
    assert mask_threshold(scores, scores) == -math.inf
    pattern = transform_scores(one, Uniform(), all_heads=scores).softmax(-1)
    assert torch.equal(pattern, torch.full_like(one, 0.5))


@pytest.mark.parametrize("head", [0, 1])
def test_a_mask_of_all_heads_is_one_beside_wide_scores_of_another(head: int) -> None:
    scores = torch.tensor([[[2.0, -1e4 + 1, 3.0]], [[9000.0, -1e4, -9000.0]]])[None]
    scores = torch.cat([scores, scores], dim=-2)
    alone = scores[:, [head]]
    expected = {0: -9999.0, 1: -math.inf}[head]
    assert mask_threshold(alone, scores) == expected


@given(st.integers(1, 6), st.floats(-3e38, -1.0), st.floats(0, 1))
def test_scores_that_are_all_low_are_taken_as_they_are(
    n_keys: int, level: float, spread: float
) -> None:
    scores = (torch.full((1, 1, 2, n_keys), level) - spread).clamp(min=-1e29)
    scores[..., 0] += abs(float(scores[0, 0, 0, 0])) * 2**-20
    assert mask_threshold(scores) == -math.inf
    winners = scores == scores.amax(-1, keepdim=True)
    assert torch.equal(transform_scores(scores, Limit()).softmax(-1) > 0, winners)


def test_nothing_is_masked_where_there_is_nothing() -> None:
    assert mask_threshold(torch.zeros(0, 4)) == -math.inf
    assert mask_threshold(torch.zeros(2, 0)) == -math.inf


@given(hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-1999, 2.0**127, width=32)))
def test_scores_above_every_known_mask_are_never_masked(values: np.ndarray) -> None:
    assert mask_threshold(torch.from_numpy(values)) == -math.inf


def test_a_mask_is_found_from_scores_that_need_a_gradient() -> None:
    scores = torch.tensor([1.0, -1e4], requires_grad=True)
    assert mask_threshold(scores) < -1
