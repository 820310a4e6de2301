"""Theory of norms: degrees, growth rates and resting norms that are known in closed form."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sat_lens as sl
from paper.degrees import degree_of_homogeneity, part_degrees
from paper.flow import descend, norm_flow, stationary_norm
from paper.threshold import flipped_run, relu_network


def logistic(labels):
    return lambda f: F.softplus(-labels * f.flatten()).mean()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_a_relu_network_has_the_degree_of_its_layers(layers):
    net = relu_network([3, *[6] * (layers - 1), 2], seed=1)
    degree = degree_of_homogeneity(net, tiny.noise(7, 3))
    assert float(degree) == pytest.approx(layers, abs=1e-12)
    assert degree.homogeneous
    assert degree.spread < 1e-12
    assert degree.frame()["cosine"].tolist() == pytest.approx([1] * 5)


class LineAndSquare(nn.Module):
    """Gives (theta, theta^2): no power law, and known at every c."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.stack([self.theta, self.theta**2])


@pytest.mark.slow
def test_what_has_no_degree_is_said_to_have_none():
    degree = degree_of_homogeneity(LineAndSquare(), torch.ones(()), scales=[1, 2, 8])
    norms = [math.sqrt(c**2 + c**4) for c in (1, 2, 8)]
    local = [math.log(norms[1] / norms[0], 2), math.log(norms[2] / norms[1], 4)]
    assert degree.local == pytest.approx(local)
    assert 1 < min(local) < float(degree) < max(local) < 2
    assert not degree.homogeneous
    cosines = [(c + c**2) / math.sqrt(2 * (c**2 + c**4)) for c in (1, 2, 8)]
    assert degree.cosines.tolist() == pytest.approx(cosines)
    assert "not homogeneous" in str(degree)


@pytest.mark.slow
@pytest.mark.parametrize(("gain", "expected"), [(False, 0), (True, 1)])
def test_a_layer_norm_has_the_degree_of_its_gain(gain, expected):
    norm = nn.LayerNorm(6, eps=0.0, elementwise_affine=gain)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), norm)
    assert float(degree_of_homogeneity(net, tiny.noise(3, 4))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("pre_norm", "expected"), [(True, 3), (False, 1)])
def test_whole_transformers_near_the_degree_of_their_kind(pre_norm, expected):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True, norm_first=pre_norm, bias=False
    )
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(4, 16, bias=False), body)
    degree = degree_of_homogeneity(net, tiny.noise(3, 6, 4), scales=[1, 2, 4, 256, 512])
    assert degree.local[-1] == pytest.approx(expected, abs=1e-3)
    assert not degree.homogeneous
    # Softmax and skips are what is in the way at c = 1: the direction still turns there.
    assert degree.cosines[2] < 0.999


@pytest.mark.slow
def test_parts_of_a_transformer():
    model = tiny.native(act_fn="relu")
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = part_degrees(model, tiny.tokens(), scales=[1, 8, 64])
    frame = found.frame()
    exact = ["blocks.0.ln1", "blocks.0.attn, saturated", "blocks.0.mlp"]
    assert frame.loc[exact, "degree"].tolist() == pytest.approx([1, 2, 2], abs=1e-9)
    assert frame.loc[exact, "homogeneous"].all()
    assert not frame.loc["blocks.0.attn", "homogeneous"]
    assert frame.loc["blocks.0.attn", "at_largest"] == pytest.approx(2, abs=0.01)
    assert frame.loc["residual stream", "at_largest"] == pytest.approx(3, abs=1e-3)
    assert found.left_out == ()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(found.plot().axes[0].lines) == len(frame)


@pytest.mark.slow
def test_a_post_norm_model_has_the_degree_of_its_last_norm():
    bert = tiny.bridge("BertForMaskedLM", transformers.BertConfig(**tiny.SIZE))
    found = part_degrees(bert, tiny.tokens(), scales=[1, 4, 16])
    assert found.frame().loc["residual stream", "degree"] == pytest.approx(1, abs=1e-3)
    # Hugging Face calls its two halves, so the whole of it has no output of its own.
    assert found.left_out == ("blocks.0.mlp",)


@pytest.mark.slow
def test_gradient_flow_is_followed_to_its_closed_form():
    # f = w x with L = (f - 3)^2 / 2 and x = 1 relaxes to 3 as exp(-t).
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    flow = norm_flow(net, torch.ones(1, 1), lambda f: (f - 3).square().sum() / 2, time=0.5)
    exact = (3 - 2 * math.exp(-0.5)) ** 2 - 1
    limit = flow.frame().loc[0.0]
    assert flow.degree == pytest.approx(1)
    assert limit[["measured", "gradient", "outputs"]].tolist() == pytest.approx(
        [exact] * 3, rel=1e-4
    )
    assert flow.frame()["measured"].iloc[0] != pytest.approx(exact, rel=1e-3)
    assert len(flow.plot().axes[0].lines) == 3


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 3])
def test_eulers_formula_gives_the_growth_of_a_homogeneous_network(layers):
    labels = tiny.noise(20).sign().double()
    net = relu_network([3, *[6] * (layers - 1), 1], seed=0)
    flow = norm_flow(net, tiny.noise(20, 3), logistic(labels))
    assert flow.error < 1e-5
    frame = flow.frame().loc[flow.step_sizes[0] : flow.step_sizes[-1]]
    # What flow does not have is the square of the steps, to the last digit.
    left = frame["measured"] - frame["gradient"]
    assert left.tolist() == pytest.approx(frame["step_term"].tolist(), rel=1e-6)
    assert (frame["step_term"].diff().dropna() < 0).all()


@pytest.mark.slow
def test_eulers_formula_fails_where_biases_break_homogeneity():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1))
    flow = norm_flow(net, tiny.noise(20, 3), logistic(tiny.noise(20).sign().double()), degree=2)
    limit = flow.frame().loc[0.0]
    assert limit["measured"] == pytest.approx(limit["gradient"], rel=1e-5)
    assert flow.error > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("right", [60, 75, 95])
def test_the_threshold_of_equal_margins_is_the_log_odds_of_accuracy(degree, right):
    labels = torch.tensor([1.0] * right + [-1.0] * (100 - right), dtype=torch.float64)
    outputs = torch.full((100,), 0.7, dtype=torch.float64)
    found = stationary_norm(outputs, logistic(labels), norm=2.0, degree=degree)
    log_odds = math.log(right / (100 - right))
    assert found == pytest.approx(2.0 * (log_odds / 0.7) ** (1 / degree), rel=1e-9)


@settings(max_examples=10)
@given(st.integers(0, 999), st.integers(0, 19))
def test_righting_an_example_raises_the_threshold(seed, index):
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randn(20, generator=generator, dtype=torch.float64).abs() + 0.1
    margins[:6] *= -1
    wrong = margins.clone()
    wrong[index] = -wrong[index].abs()
    righted = margins.clone()
    righted[index] = righted[index].abs()
    low, high = (
        stationary_norm(m, logistic(torch.ones(20)), norm=1.0, degree=2.0) for m in (wrong, righted)
    )
    assert low < high or low == high == 0.0


@pytest.mark.slow
def test_growth_never_stops_when_all_is_right_and_never_starts_when_all_is_wrong():
    outputs = torch.linspace(0.1, 2, 9).double()
    for label, expected in ((1.0, math.inf), (-1.0, 0.0)):
        labels = torch.full((9,), label).double()
        assert stationary_norm(outputs, logistic(labels), norm=5.0, degree=3.0) == expected
    flat = stationary_norm(outputs, lambda f: 0 * f.sum(), norm=5.0, degree=3.0)
    assert math.isnan(flat)


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.05, 0.2])
def test_weight_decay_stops_growth_where_it_should(weight_decay):
    # Two equal numbers w, f = w^2, one example: at rest lambda = sigmoid(-w^2).
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in net:
        nn.init.constant_(layer.weight, 0.5)
    run = descend(
        net, torch.ones(1, 1), logistic(torch.ones(1)),
        steps=400, learning_rate=0.5, weight_decay=weight_decay,
    )  # fmt: skip
    frame = run.frame()
    rest = math.sqrt(2 * math.log(1 / weight_decay - 1))
    assert frame["norm"].iloc[-1] == pytest.approx(rest, rel=1e-9)
    # The direction never turns, so the prediction is right from the start.
    assert frame["stationary"].tolist() == pytest.approx([rest] * len(frame), rel=1e-9)
    assert frame["decay"].iloc[-1] == pytest.approx(frame["gradient"].iloc[-1], rel=1e-6)
    assert net[0].weight.item() == 0.5
    assert run.plot().axes[0].lines


@pytest.mark.slow
def test_norms_end_at_a_threshold_that_rises_with_accuracy():
    runs = [flipped_run(2, share, seed=0, points=300, steps=1024) for share in (0.3, 0.1, 0.0)]
    last = [run.frame().iloc[-1] for run in runs]
    assert [row["accuracy"] for row in last] == pytest.approx([0.7, 0.9, 1], abs=0.02)
    assert last[0]["norm"] < last[1]["norm"] < last[2]["norm"]
    for row in last[:2]:
        assert row["norm"] == pytest.approx(row["stationary"], rel=0.02)
        assert row["gradient"] == pytest.approx(row["outputs"], abs=1e-9)
    assert last[2]["stationary"] == math.inf
    assert runs[2].growth_per_doubling > 0.02 > runs[1].growth_per_doubling


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net: degree_of_homogeneity(net, torch.ones(1, 2), scales=[1]), "at least two"),
        (lambda net: degree_of_homogeneity(net, torch.ones(1, 2), scales=[0, 1]), "positive"),
        (lambda net: degree_of_homogeneity(net, torch.ones(1, 2), part="x"), "no submodule 'x'"),
        (lambda net: degree_of_homogeneity(net, torch.zeros(1, 2)), "norm 0.0"),
        (lambda net: norm_flow(net, torch.ones(1, 2), torch.sum, steps=[4]), "two numbers"),
        (lambda net: norm_flow(net, torch.ones(1, 2), torch.sum, time=0.0), "positive time"),
        (lambda net: descend(net, torch.ones(1, 2), torch.sum, steps=0, learning_rate=1), "step"),
        (
            lambda net: descend(
                net, torch.ones(1, 2), lambda f: f.pow(4).sum(), steps=40, learning_rate=9.0
            ),
            "too large",
        ),
        (lambda net: stationary_norm(net.weight, torch.sum, norm=0, degree=1), "positive norm"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    torch.manual_seed(0)
    with pytest.raises(sl.SatLensError, match=words):
        call(nn.Linear(2, 1, bias=False))


def test_a_layer_without_attention_is_refused(demo):
    with pytest.raises(sl.SatLensError, match="No attention in layer 9"):
        part_degrees(demo, tiny.tokens(), layer=9)
