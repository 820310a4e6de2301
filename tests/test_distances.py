"""Distances of soft rows to saturated ones, against sums written out by hand in float64."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sat_lens.attention import (
    distances_to_saturated,
    effective_keys,
    nearest_saturated,
    total_variation,
)
from sat_lens.attention.distances import distance_to_uniform

# Each distance sums at most 12 probabilities that float32 holds to within 2**-24 or so.
ROUNDING = 12 * float(torch.finfo(torch.float32).eps)

values = st.one_of(
    st.floats(-30, 30, width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, 1.0, 1e-30, 88.0, 1e30]),
)


@st.composite
def score_rows(draw: st.DrawFn) -> Tensor:
    """Scores [row, key] with -inf at masked keys and a visible key in each row."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 12)))
    scores = draw(hnp.arrays(np.float32, shape, elements=values))
    hidden = draw(hnp.arrays(np.bool_, shape))
    hidden[:, draw(st.integers(0, shape[1] - 1))] = False
    return torch.from_numpy(np.where(hidden, -np.inf, scores).astype(np.float32))


def softmax(row: np.ndarray) -> np.ndarray:
    weight = np.exp(row - row.max())
    return weight / weight.sum()


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2)


def uniform_over(kept: np.ndarray) -> np.ndarray:
    return kept / kept.sum()


@given(score_rows())
def test_distances_are_those_written_out_by_hand(scores: Tensor) -> None:
    found = distances_to_saturated(scores)
    for i, row in enumerate(scores.double().numpy()):
        soft, visible = softmax(row), row > -np.inf
        first = np.arange(len(row)) == row.argmax()
        assert int(found.n_keys[i]) == visible.sum()
        assert float(found.tv_argmax[i]) == pytest.approx(distance(soft, first), abs=ROUNDING)
        assert float(found.tv_mean[i]) == pytest.approx(
            distance(soft, uniform_over(visible)), abs=ROUNDING
        )


@given(score_rows())
def test_nearest_beats_every_other_cut(scores: Tensor) -> None:
    found = nearest_saturated(scores)
    for i, row in enumerate(scores.double().numpy()):
        soft = softmax(row)
        # A cut keeps the keys at or above one of the scores, so that it splits no equal keys.
        cuts = [row >= score for score in row[row > -np.inf]]
        kept = row >= float(found.least_kept[i, 0])
        assert any(np.array_equal(kept, cut) for cut in cuts)
        assert kept.sum() == int(found.m[i])
        claimed = float(found.distance[i])
        assert claimed == pytest.approx(distance(soft, uniform_over(kept)), abs=ROUNDING)
        assert claimed <= min(distance(soft, uniform_over(cut)) for cut in cuts) + ROUNDING


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=6, unique=True))
def test_no_set_of_keys_is_nearer_than_the_nearest_top_keys(row: list[float]) -> None:
    found = float(nearest_saturated(torch.tensor(row)).distance)
    soft = softmax(np.array(row))
    for bits in range(1, 2 ** len(row)):
        kept = np.array([bits >> i & 1 for i in range(len(row))], dtype=float)
        assert found <= distance(soft, uniform_over(kept)) + ROUNDING


@given(score_rows())
def test_nearest_is_no_farther_than_argmax_and_uniform(scores: Tensor) -> None:
    found = distances_to_saturated(scores)
    tops = (scores == scores.amax(-1, keepdim=True)).sum(-1)
    assert (found.tv_nearest <= found.tv_mean + ROUNDING).all()
    # With tied winners argmax is no well-defined cut.
    assert (found.tv_nearest <= found.tv_argmax + ROUNDING)[tops == 1].all()
    assert (found.tv_nearest >= 0).all()
    assert ((found.m >= tops) & (found.m <= found.n_keys)).all()


@given(st.integers(1, 40), st.integers(0, 40))
def test_a_saturated_row_is_its_own_nearest(winners: int, losers: int) -> None:
    scores = torch.tensor([200.0] * winners + [0.0] * losers)
    found = distances_to_saturated(scores)
    assert int(found.m) == winners
    assert float(found.tv_nearest) == pytest.approx(0, abs=40 * ROUNDING)
    assert float(found.tv_argmax) == pytest.approx(1 - 1 / winners, abs=ROUNDING)
    assert float(found.tv_mean) == pytest.approx(losers / (winners + losers), abs=40 * ROUNDING)


def test_nearest_of_rows_done_by_hand() -> None:
    # p = (1/2, 1/4, 1/4): to its first key it is 1/2 far, to all three 1/6.
    scores = torch.tensor([2.0, 1.0, 1.0]).log()
    assert int(nearest_saturated(scores).m) == 3
    # p = (2/3, 1/3): 1/3 far from one key, 1/6 from two.
    assert int(nearest_saturated(torch.tensor([2.0, 1.0]).log()).m) == 2
    # All mass on one key: the first key alone, however many more keys hold exactly nothing.
    assert int(nearest_saturated(torch.tensor([500.0, 0.0, -1.0])).m) == 1


def test_a_cut_between_equal_keys_is_no_choice_even_where_it_would_be_nearest() -> None:
    # The best two keys are .46 away, but the second is one of ten equals. Without them it is .5,
    # with all of them .51.
    probabilities = torch.tensor([0.5] + [0.04] * 10 + [0.001] * 100)
    found = nearest_saturated(probabilities.log())
    assert int(found.m) == 1
    assert float(found.distance) == pytest.approx(0.5, abs=ROUNDING)


def test_long_rows_keep_their_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4096, generator=generator)
    found = distances_to_saturated(scores)
    for i, row in enumerate(scores.double().numpy()):
        soft = np.sort(softmax(row))[::-1]
        sizes = np.arange(1, len(soft) + 1)
        capped = np.array([np.minimum(soft[:m], 1 / m).sum() for m in sizes])
        # A cumulative sum of 4096 numbers in float32.
        assert float(found.tv_nearest[i]) == pytest.approx(1 - capped.max(), abs=2e-5)
        assert float(found.tv_mean[i]) == pytest.approx(
            np.abs(soft - 1 / len(soft)).sum() / 2, abs=2e-5
        )


@given(score_rows())
def test_axes_before_the_keys_are_rows(scores: Tensor) -> None:
    stacked = torch.stack([scores, scores.flip(-1)])[:, None]
    alone, together = distances_to_saturated(scores), distances_to_saturated(stacked)
    for name in ("n_keys", "tv_argmax", "tv_nearest", "m"):
        assert getattr(together, name).shape == (2, 1, len(scores))
        assert torch.equal(getattr(together, name)[0, 0], getattr(alone, name))


@given(score_rows())
def test_effective_keys_lie_between_one_and_the_visible_keys(scores: Tensor) -> None:
    pattern = scores.softmax(-1)
    found = effective_keys(pattern)
    visible = (scores > -math.inf).sum(-1)
    tops = (scores == scores.amax(-1, keepdim=True)).sum(-1)
    assert (found >= tops * (1 - 2 * ROUNDING)).all()
    assert (found <= visible * (1 + 2 * ROUNDING)).all()
    by_hand = 1 / (pattern.double() ** 2).sum(-1)
    assert torch.allclose(found.double(), by_hand, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_effective_keys_count_the_keys_of_a_uniform_row(m: int) -> None:
    row = torch.tensor([1 / m] * m + [0.0] * 3)
    assert float(effective_keys(row)) == pytest.approx(m, rel=ROUNDING)


@given(score_rows(), st.data())
def test_total_variation_is_a_metric(scores: Tensor, data: st.DataObject) -> None:
    one, other, third = (
        (scores * data.draw(st.sampled_from([0.5, 1.0, 2.0, 8.0]))).softmax(-1) for _ in range(3)
    )
    there = total_variation(one, other)
    assert torch.equal(there, total_variation(other, one))
    assert torch.equal(total_variation(one, one), torch.zeros(len(scores)))
    assert ((there >= 0) & (there <= 1 + ROUNDING)).all()
    detour = total_variation(one, third) + total_variation(third, other)
    assert (there <= detour + ROUNDING).all()


def test_rows_without_common_keys_are_one_apart() -> None:
    one, other = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert total_variation(one, other).tolist() == [1.0]


def test_distance_to_uniform_counts_visible_keys_only() -> None:
    pattern = torch.tensor([[0.75, 0.25, 0.0, 0.0]])
    visible = torch.tensor([[True, True, False, False]])
    assert distance_to_uniform(pattern, visible).tolist() == [0.25]
    assert distance_to_uniform(pattern, torch.ones_like(visible)).tolist() == [0.5]


def test_distances_of_half_the_mass() -> None:
    assert float(total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))) == 0.5
