"""Laws of the transforms and of the engine around them."""

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
    Limit,
    RandomKey,
    Scale,
    Uniform,
    UniformWithoutSinks,
    total_variation,
    transform_scores,
)
from sat_lens.errors import ArgumentError, NonFiniteError, SatLensError

MAX = float(torch.finfo(torch.float32).max)
# One unit in the last place of 1, and the sum of a row of up to 16 rounded numbers.
EPS = float(torch.finfo(torch.float32).eps)
ROUNDING = 16 * EPS

TRANSFORMS = [
    Limit(),
    Limit(0.5),
    Limit("nearest"),
    Scale(0.0),
    Scale(1e-6),
    Scale(1.0),
    Scale(3.0),
    Scale(1e38),
    Scale(math.inf),
    Uniform(),
    UniformWithoutSinks(torch.zeros(1, dtype=torch.bool)),
    RandomKey(seed=3, site="blocks.0.attn"),
]
DETERMINISTIC = [transform for transform in TRANSFORMS if not isinstance(transform, RandomKey)]

# Numbers that break careless arithmetic: ties, neighbours, denormals, differences that vanish
# beside a large maximum, and magnitudes whose sums or products overflow. (Hugely negative ones
# would be masks: tests/test_masks.py.)
AWKWARD = [
    0.0,
    -0.0,
    1e-30,
    -1e-30,
    1e-45,
    -1e-45,
    1.0,
    1 + EPS,
    1 - EPS / 2,
    1e30,
    1e29,
    1e8,
    MAX,
]
awkward = st.sampled_from([float(np.float32(x)) for x in AWKWARD])
ordinary = st.floats(-50, 50, width=32)
few = st.sampled_from([-1.0, 0.0, 0.25, 2.0])
eighths = st.integers(-800, 800).map(lambda n: n / 8)
tame = st.one_of(ordinary, few)
any_score = st.one_of(awkward, ordinary, few)
transforms = st.sampled_from(TRANSFORMS)


@st.composite
def score_tensors(draw: st.DrawFn, elements: st.SearchStrategy[float] = any_score) -> Tensor:
    """Scores [batch, head, query, key] with -inf at masked keys; each row has a visible key."""
    shape = tuple(draw(st.integers(1, limit)) for limit in (2, 2, 3, 8))
    values = draw(hnp.arrays(np.float32, shape, elements=elements))
    hidden = draw(hnp.arrays(np.bool_, shape))
    hidden[..., draw(st.integers(0, shape[-1] - 1))] = False
    return torch.from_numpy(np.where(hidden, -np.inf, values).astype(np.float32))


def pattern(scores: Tensor, transform: object) -> Tensor:
    return transform_scores(scores, transform).softmax(-1)


def rows_of(scores: Tensor) -> list[np.ndarray]:
    return list(scores.double().reshape(-1, scores.shape[-1]).numpy())


def uniform_over(winners: list[np.ndarray], like: Tensor) -> Tensor:
    rows = np.stack([row / row.sum() for row in winners])
    return torch.from_numpy(rows).reshape(like.shape)


# The limit


@given(score_tensors())
def test_limit_keeps_exactly_the_keys_that_win_in_float64(scores: Tensor) -> None:
    expected = uniform_over([row == row.max() for row in rows_of(scores)], scores)
    found = pattern(scores, Limit())
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found.double(), expected, atol=EPS, rtol=0)


@given(
    st.sampled_from([0.0, 1e-30, 1.0, -3.0, 1e8, 1e30]),
    st.integers(0, 6),
    st.integers(0, 6),
    st.booleans(),
)
def test_limit_tells_neighbouring_numbers_apart(
    top: float, winners: int, losers: int, flat: bool
) -> None:
    best = np.float32(top)
    next_lower = np.nextafter(best, np.float32(-np.inf))
    row = [best] * (winners + 1) + [next_lower] * (0 if flat else losers)
    found = pattern(torch.tensor(np.array(row)).reshape(1, 1, 1, -1), Limit())[0, 0, 0]
    assert found[: winners + 1].tolist() == pytest.approx([1 / (winners + 1)] * (winners + 1))
    assert found[winners + 1 :].count_nonzero() == 0


@given(score_tensors(), st.sampled_from([0, 1e-30, 0.1, 0.5, 2, 1e9, 1e300]))
def test_limit_with_a_tolerance_keeps_the_keys_within_it(scores: Tensor, d: float) -> None:
    kept = pattern(scores, Limit(d)).reshape(-1, scores.shape[-1]) > 0
    for row, keeps in zip(rows_of(scores), kept.numpy(), strict=True):
        gap = row.max() - row
        # Two roundings to float32 (of d, and of the difference) leave only a sliver undecided.
        assert keeps[(gap <= d * (1 - EPS)) | (gap == 0)].all()
        assert not keeps[(gap > d * (1 + EPS)) | (gap == math.inf)].any()


@given(score_tensors(eighths), st.integers(0, 100))
def test_limit_with_a_tolerance_is_exact_where_float32_is(scores: Tensor, steps: int) -> None:
    d = steps / 8
    winners = [row.max() - row <= d for row in rows_of(scores)]
    assert torch.equal(pattern(scores, Limit(d)) > 0, uniform_over(winners, scores) > 0)


def test_limit_with_a_tolerance_below_the_spacing_of_large_scores() -> None:
    # float32 has steps of 8 here: the maximum less 5 would round to the second key.
    scores = torch.tensor([[[[1e8, 1e8 - 8, 0.0]]]])
    assert pattern(scores, Limit(5.0)).tolist() == [[[[1.0, 0.0, 0.0]]]]
    assert pattern(scores, Limit(8.0)).tolist() == [[[[0.5, 0.5, 0.0]]]]


@given(score_tensors(tame))
def test_limit_nearest_beats_every_other_row_of_top_keys(scores: Tensor) -> None:
    found = pattern(scores, Limit("nearest")).double().reshape(-1, scores.shape[-1]).numpy()
    for row, chosen in zip(rows_of(scores), found, strict=True):
        soft = np.exp(row - row.max())
        soft /= soft.sum()
        # Every cut between unequal scores: the keys at or above each score that occurs.
        rivals = [np.where(row >= s, 1.0, 0.0) for s in row[row > -np.inf]]
        best = min(np.abs(soft - rival / rival.sum()).sum() / 2 for rival in rivals)
        assert any(np.array_equal(chosen > 0, rival > 0) for rival in rivals)
        assert np.abs(soft - chosen).sum() / 2 <= best + ROUNDING


@given(score_tensors())
def test_ties_share_equally(scores: Tensor) -> None:
    for transform in DETERMINISTIC:
        found = pattern(scores, transform).reshape(-1, scores.shape[-1])
        for row, shares in zip(rows_of(scores), found, strict=True):
            for score in set(row.tolist()):
                assert len(set(shares[torch.from_numpy(row == score)].tolist())) == 1


# The scale


@given(score_tensors())
def test_scale_one_is_the_identity_to_the_bit(scores: Tensor) -> None:
    assert torch.equal(pattern(scores, Scale(1.0)), scores.softmax(-1))


@given(score_tensors(tame), st.sampled_from([0.0, 1e-3, 0.5, 2.0, 7.0]))
def test_scale_is_softmax_of_c_times_the_scores(scores: Tensor, c: float) -> None:
    gaps = scores.double() - scores.double().amax(-1, keepdim=True)
    expected = torch.where(gaps == -math.inf, gaps, c * gaps).softmax(-1)
    # exp turns the rounding of c * gap, relative EPS, into c * gap * EPS; beyond 100 it is 0.
    assert torch.allclose(pattern(scores, Scale(c)).double(), expected, atol=100 * EPS, rtol=0)


@given(score_tensors(), st.sampled_from([0.25, 1.0, 4.0, 64.0, 1e6, 1e30, 3e38]))
def test_scale_goes_to_the_limit_as_fast_as_the_gap_allows(scores: Tensor, c: float) -> None:
    distance = total_variation(pattern(scores, Scale(c)), pattern(scores, Limit())).reshape(-1)
    for row, found in zip(rows_of(scores), distance.tolist(), strict=True):
        gaps = row.max() - row
        gaps = gaps[(gaps > 0) & (gaps < math.inf)]
        # Each loser weighs exp(-c gap) against at least one winner of weight 1.
        assert found <= np.exp(-c * gaps).sum() + ROUNDING


def test_a_scale_that_can_resolve_a_gap_of_1e_minus_30_gives_the_limit() -> None:
    scores = torch.tensor([[[[1e-30, 0.0, 1e-30, -1.0]]]])
    assert torch.equal(pattern(scores, Scale(1e38)), pattern(scores, Limit()))


@given(score_tensors(tame), st.sampled_from([0.0, 1e-45, 1e-39, 1e-30, 1e-6, 1e-3]))
def test_scale_goes_to_uniform_as_fast_as_the_range_allows(scores: Tensor, c: float) -> None:
    distance = total_variation(pattern(scores, Scale(c)), pattern(scores, Uniform())).reshape(-1)
    for row, found in zip(rows_of(scores), distance.tolist(), strict=True):
        spread = np.ptp(row[row > -np.inf])
        # Each share is within a factor exp(c spread) of uniform.
        assert found <= math.expm1(c * spread) / 2 + ROUNDING


@given(score_tensors(tame), st.floats(0, 100), st.floats(0, 100))
def test_a_greater_scale_is_nearer_to_the_limit(scores: Tensor, one: float, other: float) -> None:
    limit = pattern(scores, Limit())
    far = total_variation(pattern(scores, Scale(min(one, other))), limit)
    near = total_variation(pattern(scores, Scale(max(one, other))), limit)
    assert (near <= far + ROUNDING).all()


@given(score_tensors())
def test_the_ends_of_the_scale_are_uniform_and_the_limit(scores: Tensor) -> None:
    assert torch.equal(pattern(scores, Scale(0)), pattern(scores, Uniform()))
    assert torch.equal(pattern(scores, Scale(math.inf)), pattern(scores, Limit()))
    assert torch.equal(pattern(scores, Scale(1e300)), pattern(scores, Limit()))


@given(score_tensors())
def test_uniform_shares_among_all_visible_keys(scores: Tensor) -> None:
    expected = uniform_over([row > -np.inf for row in rows_of(scores)], scores)
    assert torch.allclose(pattern(scores, Uniform()).double(), expected, atol=EPS, rtol=0)


@given(score_tensors(tame), st.sampled_from([0.5, 1.0, 3.0]))
def test_gradients_flow_through_scale(scores: Tensor, c: float) -> None:
    leaf = scores.clone().requires_grad_()
    weights = torch.linspace(-1, 1, scores.shape[-1])
    (pattern(leaf, Scale(c)) * weights).sum().backward()
    p = pattern(scores, Scale(c)).double()
    expected = c * p * (weights - (p * weights).sum(-1, keepdim=True))
    assert torch.allclose(leaf.grad.double(), expected, atol=c * ROUNDING, rtol=0)


@given(score_tensors(), transforms)
def test_no_gradient_is_nan(scores: Tensor, transform: object) -> None:
    leaf = scores.clone().requires_grad_()
    with_a_dead_row = torch.cat([leaf, torch.full_like(leaf[:1], -1e9)])
    weights = torch.linspace(-1, 1, scores.shape[-1])
    (pattern(with_a_dead_row, transform) * weights).sum().backward()
    assert leaf.grad.isfinite().all()


# Laws of all transforms


@given(score_tensors(), transforms)
def test_rows_sum_to_one_and_masked_keys_get_nothing(scores: Tensor, transform: object) -> None:
    found = pattern(scores, transform)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=ROUNDING, rtol=0)
    assert found[scores == -math.inf].count_nonzero() == 0


@given(score_tensors(), transforms)
def test_transforms_work_without_the_engine_too(scores: Tensor, transform: object) -> None:
    assert torch.equal(transform(scores).softmax(-1), pattern(scores, transform))
    assert torch.equal(transform(scores).amax(-1), torch.zeros(scores.shape[:-1]))


@given(score_tensors(eighths), st.integers(-4096, 4096), transforms)
def test_a_constant_added_to_a_row_changes_nothing(
    scores: Tensor, constant: int, transform: object
) -> None:
    # Eighths below 2**13 are exact in float32, and so is their sum.
    assert torch.equal(pattern(scores + constant, transform), pattern(scores, transform))


@given(score_tensors(), st.sampled_from(DETERMINISTIC), st.randoms(use_true_random=False))
def test_permuted_keys_permute_the_result(
    scores: Tensor, transform: object, random: object
) -> None:
    order = list(range(scores.shape[-1]))
    random.shuffle(order)
    new = transform_scores(scores, transform)
    assert torch.equal(transform_scores(scores[..., order], transform), new[..., order])


@given(
    score_tensors(),
    transforms,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_finite_scores_of_any_dtype_never_give_nan(
    scores: Tensor, transform: object, dtype: torch.dtype
) -> None:
    cast = scores.clamp(max=min(MAX, torch.finfo(dtype).max)).to(dtype)
    before = cast.clone()
    new = transform_scores(cast, transform)
    assert new.dtype == torch.float32
    assert not new.isnan().any()
    assert not new.softmax(-1).isnan().any()
    assert torch.equal(cast, before)
    # The model's own dtype, in which the result goes back, keeps the rows' order and support.
    assert not new.to(dtype).softmax(-1).isnan().any()


@given(score_tensors(tame), transforms, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_float32_on_the_same_numbers(
    scores: Tensor, transform: object, dtype: torch.dtype
) -> None:
    half = scores.to(dtype)
    assert torch.equal(transform_scores(half, transform), transform_scores(half.float(), transform))


def test_scores_without_batch_or_of_one_key() -> None:
    assert transform_scores(torch.zeros(0, 2, 3, 3), Limit()).shape == (0, 2, 3, 3)
    assert pattern(torch.full((1, 1, 1, 1), -7.0), Scale(5)).item() == 1


# A random key


def chosen_keys(scores: Tensor, transform: RandomKey) -> Tensor:
    return pattern(scores, transform).argmax(-1)


@given(score_tensors(), st.integers(-5, 2**70))
def test_random_key_attends_to_one_visible_key(scores: Tensor, seed: int) -> None:
    state = torch.random.get_rng_state()
    found = pattern(scores, RandomKey(seed))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found.sort(-1).values[..., -1], torch.ones(found.shape[:-1]))
    assert (found > 0).sum() == found[..., 0].numel()
    assert found[scores == -math.inf].count_nonzero() == 0
    assert torch.equal(pattern(scores, RandomKey(seed)), found)


@given(score_tensors(), st.integers(0, 9))
def test_random_key_does_not_look_at_the_scores(scores: Tensor, seed: int) -> None:
    blank = torch.where(scores == -math.inf, scores, 0.0)
    assert torch.equal(pattern(scores, RandomKey(seed)), pattern(blank, RandomKey(seed)))


def test_random_key_does_not_depend_on_the_batch() -> None:
    whole = torch.zeros(4, 3, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    found = pattern(whole, RandomKey(1))
    for i in range(4):
        assert torch.equal(pattern(whole[i : i + 1], RandomKey(1)), found[i : i + 1])


def test_random_key_agrees_with_a_key_value_cache() -> None:
    whole = torch.zeros(1, 4, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    found = chosen_keys(whole, RandomKey(2, site="here"))
    for n in range(1, 10):
        one_step = chosen_keys(torch.zeros(1, 4, 1, n), RandomKey(2, site="here"))
        assert torch.equal(one_step[..., 0], found[..., n - 1])
    assert torch.equal(chosen_keys(whole[..., :5, :5], RandomKey(2, site="here")), found[..., :5])


@pytest.mark.parametrize("seed", range(5))
def test_random_key_is_uniform_over_visible_keys(seed: int) -> None:
    rows, visible = 6000, [0, 2, 3, 4, 6]
    scores = torch.full((1, 1, rows, 7), -math.inf)
    scores[..., visible] = 0
    counts = chosen_keys(scores, RandomKey(seed)).flatten().bincount(minlength=7)[visible]
    expected = rows / len(visible)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Four degrees of freedom: a fair draw exceeds 25 in one case of 20,000.
    assert chi_square < 25


@pytest.mark.parametrize(
    "other",
    [
        lambda scores: chosen_keys(scores, RandomKey(0, site="a"))[:, 1],
        lambda scores: chosen_keys(scores, RandomKey(0, site="b"))[:, 0],
        lambda scores: chosen_keys(scores, RandomKey(1, site="a"))[:, 0],
        lambda scores: chosen_keys(scores, RandomKey(0, site="a"))[:, 0].roll(1, dims=-1),
    ],
    ids=["head", "site", "seed", "query"],
)
def test_random_keys_are_drawn_anew(other: object) -> None:
    scores = torch.zeros(1, 2, 4096, 8)
    first = chosen_keys(scores, RandomKey(0).at("a"))[:, 0]
    agreement = (first == other(scores)).double().mean().item()
    # One in eight by chance, give or take five standard deviations of a mean over 4096.
    assert agreement == pytest.approx(1 / 8, abs=5 * math.sqrt(1 / 8 * 7 / 8 / 4096))


def test_random_key_takes_rows_of_any_number_of_axes() -> None:
    found = pattern(torch.zeros(1, 1, 4, 5), RandomKey(7))
    assert torch.equal(RandomKey(7)(torch.zeros(4, 5)).softmax(-1), found[0, 0])
    assert torch.equal(
        RandomKey(7)(torch.zeros(5)).softmax(-1),
        pattern(torch.zeros(1, 1, 1, 5), RandomKey(7))[0, 0, 0],
    )


# Transforms of one's own, and what can be wrong with them

ROWS = torch.tensor([[[[1.0, 3.0, -math.inf], [2.0, -math.inf, -math.inf]]]])


@given(score_tensors(tame))
def test_a_transform_of_ones_own_is_applied_as_it_is(scores: Tensor) -> None:
    found = pattern(scores, lambda s: 2 * s)
    assert torch.allclose(found, (2 * scores).softmax(-1), atol=ROUNDING, rtol=0)


def test_a_transform_gets_float32_with_minus_infinity_at_masked_keys() -> None:
    seen = []

    def look(scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    transform_scores(ROWS.clamp(min=torch.finfo(torch.bfloat16).min).bfloat16(), look)
    assert torch.equal(seen[0], ROWS)
    assert seen[0].dtype == torch.float32


def test_a_transform_may_work_in_place_without_touching_the_model() -> None:
    scores = ROWS.clone()
    found = pattern(scores, lambda s: s.mul_(2.0))
    assert torch.equal(scores, ROWS)
    assert torch.equal(found, (2 * ROWS).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_a_transform_may_return_another_dtype(dtype: torch.dtype) -> None:
    found = transform_scores(ROWS, lambda s: s.masked_fill(s == -math.inf, 0.0).to(dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found.softmax(-1), ROWS.softmax(-1))


def test_a_transform_may_hide_keys_and_return_huge_scores() -> None:
    hiding = pattern(ROWS, lambda s: torch.where(s == 3.0, -math.inf, s))
    assert hiding[0, 0].tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    huge = pattern(ROWS, lambda s: torch.where(s == 3.0, MAX, -MAX))
    assert huge[0, 0].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_a_subclass_of_a_transform_is_checked_like_any_other() -> None:
    class Broken(Scale):
        def __call__(self, scores: Tensor, /) -> Tensor:
            return torch.full_like(scores, math.nan)

    with pytest.raises(ArgumentError, match="NaN"):
        transform_scores(ROWS, Broken(2.0))


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda s: s[..., :-1], r"shape.*\[1, 1, 2, 3\].*\[1, 1, 2, 2\]"),
        (lambda s: s.sum(), r"shape.*returned \[\]"),
        (lambda s: None, "returned NoneType"),
        (lambda s: s.tolist(), "returned list"),
        (lambda s: s * math.nan, "NaN"),
        (lambda s: torch.where(s == 3.0, math.nan, s), "NaN"),
        (lambda s: torch.where(s == 3.0, math.inf, s), r"\+inf"),
        (lambda s: torch.full_like(s, -math.inf), "no visible key is finite"),
        (lambda s: torch.where(s == 2.0, -math.inf, s), "no visible key is finite"),
        (lambda s: s.double() * 1e39, r"\+inf"),
    ],
)
def test_unusable_results_of_a_transform_are_errors(transform: object, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        transform_scores(ROWS, transform)


def test_an_error_inside_a_transform_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        transform_scores(ROWS, lambda s: s / (1 // 0))


@given(score_tensors(tame), st.sampled_from([math.nan, math.inf]), st.data(), transforms)
def test_scores_that_are_not_finite_are_an_error(
    scores: Tensor, bad: float, data: st.DataObject, transform: object
) -> None:
    scores.view(-1)[data.draw(st.integers(0, scores.numel() - 1))] = bad
    with pytest.raises(NonFiniteError, match="NaN or \\+inf before saturation"):
        transform_scores(scores, transform)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("c", [-1, -1e-9, -math.inf, math.nan, True, "3", None, [1.0], 1j])
def test_an_impossible_scale_is_an_error(c: object) -> None:
    with pytest.raises(ArgumentError, match=r"number >= 0 or math.inf") as caught:
        Scale(c)
    assert repr(c) in str(caught.value)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    "ties", ["", "Exact", "all", -1, -1e-9, math.inf, math.nan, True, None, [0.5], torch.ones(2)]
)
def test_impossible_ties_are_an_error(ties: object) -> None:
    with pytest.raises(ArgumentError, match='"exact", "nearest" or a finite number') as caught:
        Limit(ties)
    assert isinstance(caught.value, (SatLensError, ValueError))


def test_numbers_of_other_kinds_are_numbers() -> None:
    scores = torch.tensor([[[[1.0, 0.5, -2.0]]]])
    assert torch.equal(pattern(scores, Scale(2)), pattern(scores, Scale(np.float64(2.0))))
    assert torch.equal(pattern(scores, Limit(1)), pattern(scores, Limit(np.float64(1.0))))


def test_uniform_without_sinks_by_hand():
    """Two prompts, two heads, twelve causal queries; head 1 looks at key 0, head 0 at itself."""
    n = 12
    visible = torch.ones(n, n).tril().bool()
    own = torch.eye(n) * 50
    first = torch.zeros(n, n)
    first[:, 0] = 50
    scores = torch.stack([own, first]).expand(2, 2, n, n).masked_fill(~visible, -math.inf)
    pattern = UniformWithoutSinks()(scores).softmax(-1)
    count = torch.arange(1, n + 1)
    torch.testing.assert_close(pattern[0, 0], visible / count[:, None])
    without = visible.clone()
    without[1:, 0] = False
    expected = without / (count - 1).clamp(min=1)[:, None]
    torch.testing.assert_close(pattern[1, 1], expected)
    # A mask that is passed holds for all heads, prompt by prompt.
    sinks = torch.zeros(2, n, dtype=torch.bool)
    sinks[1, 0] = True
    pattern = UniformWithoutSinks(sinks)(scores).softmax(-1)
    torch.testing.assert_close(pattern[0], (visible / count[:, None]).expand(2, n, n))
    torch.testing.assert_close(pattern[1], expected.expand(2, n, n))
    assert torch.equal(UniformWithoutSinks()(torch.tensor([2.0, 7.0])), torch.zeros(2))
    with pytest.raises(ArgumentError, match="rate"):
        UniformWithoutSinks(rate=2)
