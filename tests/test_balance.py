"""Rescaling of weight pairs: known matrices, and the law that the network does not see it."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sat_lens as sl
from sat_lens.norms import rescaling_share
from sat_lens.norms.balance import nuclear_norm, pair_squares, rotary_kind

D_HEAD = 8


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator).double()).Q


def balanced_pair(first, second):
    """The pair of least norm with the same product ``first @ second.T``, by its decomposition."""
    u, s, vh = torch.linalg.svd(first @ second.T, full_matrices=False)
    # A product of lower rank needs fewer dimensions than there are.
    size = min(len(s), first.shape[1])
    root, missing = s[:size].sqrt(), (0, first.shape[1] - size)
    return nn.functional.pad(u[:, :size] * root, missing), nn.functional.pad(
        vh[:size].T * root, missing
    )


def test_squares_of_a_pair_of_known_singular_values():
    first = orthonormal(7, 3, 0) * torch.tensor([4.0, 2.0, 1.0])
    second = orthonormal(5, 3, 1) * torch.tensor([1.0, 3.0, 0.5])
    raw, balanced, least = pair_squares(first, second).tolist()
    assert raw == pytest.approx(16 + 4 + 1 + 1 + 9 + 0.25)
    assert balanced == pytest.approx(2 * math.sqrt(21 * 10.25))
    assert least == pytest.approx(2 * (4 + 6 + 0.5))
    # With one number for each dimension the columns are balanced one by one: here that is as good.
    assert float(pair_squares(first, second, blocks=3)[2]) == pytest.approx(21)
    assert float(nuclear_norm(first, second)) == pytest.approx(10.5)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_no_invertible_matrix_does_better_than_the_balanced_pair(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second, way = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 4), (9, 4), (4, 4))
    )
    best = balanced_pair(first, second)
    least = float(pair_squares(first, second)[2])
    assert sum(float(t.square().sum()) for t in best) == pytest.approx(least)
    assert torch.allclose(best[0] @ best[1].T, first @ second.T)
    for size in (1e-2, 1.0):
        change = torch.linalg.matrix_exp(size * way)
        moved = best[0] @ change, best[1] @ torch.linalg.inv(change).T
        assert torch.allclose(moved[0] @ moved[1].T, first @ second.T)
        assert sum(float(t.square().sum()) for t in moved) > least


def test_a_matrix_with_fewer_rows_than_columns_can_be_balanced():
    first, second = tiny.noise(2, 5), 3 * tiny.noise(9, 5)
    best = balanced_pair(first, second)
    assert torch.allclose(best[0] @ best[1].T, first @ second.T, atol=1e-5)
    squares = sum(float(t.square().sum()) for t in best)
    assert squares == pytest.approx(float(pair_squares(first, second)[2]), rel=1e-5)


def parameter(model, *parts):
    names = (
        n for n, _ in model.named_parameters() if all(f".{part}." in f".{n}." for part in parts)
    )
    return model.get_parameter(next(names)).data


def balance_heads(model, layer):
    """Put the pair of least norm in place of each head's, biases as further rows."""
    q, k, v, o = (parameter(model, str(layer), name, "weight") for name in "qkvo")
    q_bias, k_bias, v_bias = (parameter(model, str(layer), name, "bias") for name in "qkv")
    for rows in torch.arange(len(q)).split(D_HEAD):
        joined = [
            torch.cat([weight[rows].T, bias[rows][None]])
            for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
        ]
        new_q, new_k = balanced_pair(joined[0], joined[1])
        new_v, new_o = balanced_pair(joined[2], o[:, rows])
        for weight, bias, new in ((q, q_bias, new_q), (k, k_bias, new_k), (v, v_bias, new_v)):
            weight[rows], bias[rows] = new[:-1].T, new[-1]
        o[:, rows] = new_o


def balance_neurons(model, layer):
    reads, writes = (parameter(model, str(layer), n, "weight") for n in ("fc_in", "fc_out"))
    size = (writes.norm(dim=0) / reads.norm(dim=1)).sqrt()
    reads *= size[:, None]
    parameter(model, str(layer), "fc_in", "bias").mul_(size)
    writes /= size


@pytest.mark.parametrize("biases", [0.0, 0.5])
def test_a_network_does_not_see_that_its_pairs_were_balanced(biases):
    model = tiny.native(act_fn="relu")
    for layer in "01":
        for name in ("q", "k", "v", "o", "fc_in", "fc_out"):
            bias = parameter(model, layer, name, "bias")
            bias.copy_(biases * tiny.noise(len(bias)))
        parameter(model, layer, "q", "weight").mul_(5)
    before, raw = model(tiny.tokens()), rescaling_share(model)
    assert raw.frame()["share_minimal"].min() > 0.005
    for layer in (0, 1):
        balance_heads(model, layer)
        balance_neurons(model, layer)
    assert torch.allclose(model(tiny.tokens()), before, atol=2e-3)
    after = rescaling_share(model)
    assert after.share < raw.share
    if not biases:
        assert after.frame()["share_minimal"].abs().max() < 1e-5
        assert after.total == pytest.approx((1 - raw.share) * raw.total, rel=1e-5)
        minimal = raw.frame()["minimal"].to_numpy()
        assert after.frame()["raw"].to_numpy() == pytest.approx(minimal, rel=1e-4)


def test_a_factor_on_queries_is_found_by_the_share():
    model = tiny.native()
    plain = rescaling_share(model).frame()
    q, k = (parameter(model, "0", name, "weight")[:D_HEAD] for name in "qk")
    a, b = float(q.square().sum()), float(k.square().sum())
    q *= 3
    k /= 3
    found = rescaling_share(model).frame()
    here = ("L0H0", "W_Q, W_K")
    assert found.loc[here, "raw"] == pytest.approx(math.sqrt(9 * a + b / 9), rel=1e-5)
    share = 1 - 2 * math.sqrt(a * b) / (9 * a + b / 9)
    assert found.loc[here, "share_balanced"] == pytest.approx(share, rel=1e-5)
    assert found["minimal"].to_numpy() == pytest.approx(plain["minimal"].to_numpy(), rel=1e-5)


def llama(**changes):
    config = transformers.LlamaConfig(**tiny.SIZE | {"num_key_value_heads": 2} | changes)
    return tiny.bridge("LlamaForCausalLM", config)


def test_rotary_planes_and_shared_keys_leave_fewer_rescalings():
    model = llama()
    raw = rescaling_share(model)
    assert "halves" in raw.notes[0]
    assert [label for label, pair in raw.frame().index if pair == "W_V, W_O"] == [
        "L0H0-1", "L0H2-3", "L1H0-1", "L1H2-3",
    ]  # fmt: skip
    before = model(tiny.tokens())
    q = parameter(model, "0", "q_proj", "weight").view(2, 2, 2, D_HEAD // 2, -1)
    k = parameter(model, "0", "k_proj", "weight").view(2, 2, D_HEAD // 2, -1)
    # Each group of keys has one number a plane (i, i + 4), and two heads of queries.
    sizes = (k.square().sum((1, 3)) / q.square().sum((1, 2, 4))).sqrt()
    q *= sizes.sqrt()[:, None, None, :, None]
    k /= sizes.sqrt()[:, None, :, None]
    after = rescaling_share(model)
    assert torch.allclose(model(tiny.tokens()), before, atol=1e-3)
    rows = [("L0H0-1", "W_Q, W_K"), ("L0H2-3", "W_Q, W_K")]
    assert (raw.frame().loc[rows, "share_minimal"] > 0.01).all()
    assert after.frame().loc[rows, "share_minimal"].abs().max() < 1e-6


def test_a_gated_layer_is_rescaled_through_its_linear_branch():
    model = llama()
    raw = rescaling_share(model).frame().xs("mlp", level="pair")
    before = model(tiny.tokens())
    up, down = (parameter(model, "0", name, "weight") for name in ("up_proj", "down_proj"))
    sizes = torch.linspace(0.2, 5, len(up))
    up *= sizes[:, None]
    down /= sizes
    assert torch.allclose(model(tiny.tokens()), before, atol=1e-3)
    found = rescaling_share(model).frame().xs("mlp", level="pair")
    assert found["raw"].iloc[0] > raw["raw"].iloc[0]
    assert found["minimal"].tolist() == pytest.approx(raw["minimal"].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("activation", "pairs"), [("gelu", 0), ("relu", 2)], ids=["gelu has none", "relu has"]
)
def test_only_relu_like_layers_have_neurons_to_rescale(activation, pairs):
    found = rescaling_share(tiny.native(act_fn=activation))
    assert sum(pair == "mlp" for _, pair in found.frame().index) == pairs
    assert bool(found.notes) == (pairs == 0)
    assert len(found.plot().axes[0].lines) == (3 if pairs else 2)


def test_gpt2_keeps_its_matrices_the_other_way_round():
    settings = tiny.GPT | {"activation_function": "relu"}
    model = tiny.bridge("GPT2LMHeadModel", transformers.GPT2Config(**settings))
    mlp = [n for n, p in model.named_parameters() if ".mlp." in n and p.dim() == 2 and ".0." in n]
    reads, writes = (model.get_parameter(name).data for name in mlp)
    assert reads.shape == (32, 128)
    expected = 2 * float((reads.norm(dim=0) * writes.norm(dim=1)).sum())
    found = rescaling_share(model).frame().loc[("L0", "mlp"), "minimal"]
    assert found == pytest.approx(math.sqrt(expected), rel=1e-5)


def test_normalised_queries_and_keys_are_left_out():
    config = transformers.Qwen3Config(**tiny.SIZE, num_key_value_heads=4, head_dim=8)
    found = rescaling_share(tiny.bridge("Qwen3ForCausalLM", config))
    assert not any(pair == "W_Q, W_K" for _, pair in found.frame().index)
    assert "normalised" in found.notes[0]


def test_kinds_of_rotary_positions():
    assert rotary_kind({"n_head": 4}) == ""
    assert rotary_kind({"rope_theta": 1e4, "partial_rotary_factor": 0.25}) == "other"
    assert rotary_kind({"positional_embedding_type": "rotary"}) == "other"
    assert rotary_kind({"rope_parameters": {"rope_theta": 1e4}}) == "halves"


def test_what_has_no_pairs_is_refused():
    with pytest.raises(sl.SatLensError, match="no weight pair"):
        rescaling_share(nn.Linear(2, 2))
    with pytest.raises(sl.SatLensError, match="do not divide"):
        pair_squares(torch.ones(2, 3), torch.ones(2, 3), blocks=2)
