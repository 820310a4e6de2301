"""Growth: paths whose exponent, rotation and straightness are known are found again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sat_lens.errors import ArgumentError
from sat_lens.norms import norm_growth
from sat_lens.norms.growth import fit_exponent

STEPS = [0, *(2**k for k in range(12))]
SIZE = 4096


class Weights(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.h = nn.ParameterList([nn.Parameter(values.float())])


def growth_of(path, steps=STEPS, **options):
    return norm_growth({t: Weights(path(t)) for t in steps}, progress=False, **options)


def orthogonal_pair(seed):
    generator = torch.Generator().manual_seed(seed)
    start, way = (torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    way -= start * (way @ start) / (start @ start)
    return start, way / way.norm()


@pytest.mark.slow
@settings(max_examples=8)
@given(exponent=st.floats(0.2, 1.5), seed=st.integers(0, 99), noise=st.floats(0.01, 0.1))
def test_a_known_exponent_is_found_within_its_interval(exponent, seed, noise):
    start, way = orthogonal_pair(seed)
    errors = torch.randn(len(STEPS), generator=torch.Generator().manual_seed(seed))
    size = {t: t**exponent * math.exp(noise * float(e)) for t, e in zip(STEPS, errors, strict=True)}
    growth = growth_of(lambda t: start + size[t] * way, fit_range=(1, math.inf))
    # A 95% interval misses one time in twenty: three half-widths hardly ever.
    half = (growth.exponent.high - growth.exponent.low) / 2
    assert abs(float(growth.exponent) - exponent) <= 3 * half
    assert half < 5 * noise
    assert growth.exponent.n_points == 12
    assert (growth.exponent.first_step, growth.exponent.last_step) == (1, 2048)


def test_the_initial_norm_hides_the_growth():
    start, way = orthogonal_pair(0)
    growth = growth_of(lambda t: start + t**0.5 * way, fit_range=(1, math.inf))
    assert float(growth.exponent) == pytest.approx(0.5, abs=1e-3)
    assert float(growth.raw_exponent) < 0.1
    assert growth.exponent.low <= growth.exponent.value <= growth.exponent.high
    assert "95%" in str(growth.exponent)


def test_a_straight_path_is_straight():
    start, way = orthogonal_pair(1)
    frame = growth_of(lambda t: start + 0.1 * t * way).frame()
    assert frame["straightness"].loc[2:].tolist() == pytest.approx([1] * 11, abs=1e-4)
    assert frame.loc[1, ["straightness", "random_walk"]].isna().all()
    assert frame["distance"].loc[2048] == pytest.approx(204.8, rel=1e-4)


def test_a_random_walk_has_the_straightness_of_a_random_walk():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(257, SIZE, generator=generator) * 0.01
    path = torch.cat([torch.ones(1, SIZE), 1 + steps.cumsum(0)])
    frame = growth_of(lambda t: path[t], [0, 4, 16, 64, 256]).frame().loc[16:]
    assert frame["straightness"].tolist() == pytest.approx(frame["random_walk"].tolist(), abs=0.05)
    assert frame["random_walk"].tolist() == pytest.approx([0.5] * 3)


def test_rotation_is_for_one_doubling_whatever_the_spacing():
    def on_a_circle(t):
        angle = math.radians(10) * math.log2(t) if t else 0.0
        return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)

    frame = growth_of(on_a_circle, [0, 16, 23, 32, 45, 64, 256]).frame()
    assert frame["rotation_per_doubling"].loc[23:].tolist() == pytest.approx([10] * 5, rel=1e-3)
    assert frame["rotation_from"].loc[23:].tolist() == [16, 16, 23, 32, 64]
    assert frame.loc[256, "rotation"] == pytest.approx(20, rel=1e-3)


def test_alignment_is_the_cosine_of_step_and_parameters():
    start, way = orthogonal_pair(2)
    outward = growth_of(lambda t: start * (1 + t), [0, 1, 2]).frame()["alignment"]
    sideways = growth_of(lambda t: start + t * way, [0, 1]).frame()["alignment"]
    assert outward.loc[1:].tolist() == pytest.approx([1, 1])
    assert sideways.loc[1] == pytest.approx(0, abs=1e-5)


def test_without_step_zero_only_the_raw_exponent_is_known():
    start, way = orthogonal_pair(3)
    growth = growth_of(lambda t: start + t * way, [1, 2, 4, 8])
    assert math.isnan(float(growth.exponent))
    assert "not fitted" in str(growth.exponent)
    assert "3 checkpoints" in str(growth.exponent)
    drawn = growth.plot().axes[0].get_legend_handles_labels()[1]
    assert "norm grown" not in drawn
    assert not math.isnan(float(growth.raw_exponent))
    assert "distance" not in growth.frame()


def test_a_shrinking_norm_is_no_error():
    growth = growth_of(lambda t: torch.ones(SIZE) * 0.5**t, [0, 1, 2, 4])
    assert growth.frame()["norm_grown"].loc[1:].isna().all()
    assert growth.exponent.n_points == 0


def test_a_model_of_zeros_has_no_direction():
    frame = growth_of(lambda t: torch.full((4,), float(t > 1)), [0, 1, 2, 4]).frame()
    assert frame["norm"].tolist() == [0, 0, 2, 2]
    assert frame["rotation"].isna().tolist() == [True, True, True, False]
    assert frame.loc[4, "rotation"] == pytest.approx(0)


@pytest.mark.parametrize(
    "wrong", [(1,), (1, 2, 3), (2, 1), "ab", 5, ("1", "2"), (math.nan, 2), (1, None)]
)
def test_a_range_that_is_none(wrong, types_unchecked):
    def unread(step):
        return torch.ones(2) * (1 + step)

    with pytest.raises(ArgumentError, match="fit_range"):
        growth_of(unread, [0, 1, 2], fit_range=wrong)
    if isinstance(wrong, tuple) and len(wrong) == 2:
        with pytest.raises(ArgumentError, match="range"):
            growth_of(unread, [0, 1, 2]).fit("norm", *wrong)


def test_intervals_widen_where_residuals_are_of_one_kind():
    steps = torch.tensor([2.0**k for k in range(12)])
    sign = torch.tensor([1.0, -1.0] * 6)
    bent = torch.linspace(-1, 1, 12) ** 2
    bent = bent / bent.std() * sign.std()
    independent = fit_exponent(steps, steps**0.5 * (0.1 * sign).exp(), 1, 1e9)
    smooth = fit_exponent(steps, steps**0.5 * (0.1 * bent).exp(), 1, 1e9)
    assert smooth.high - smooth.low > 1.5 * (independent.high - independent.low)
