"""The Triton kernel for the limit against the definition, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sat_lens.attention import AttentionCall, limit_is_exact, limit_kernel, rescaled_attention
from sat_lens.attention.hard_kernel import Blocks, hard_attention
from sat_lens.errors import UnsupportedModelError

SMALL = Blocks(32, 32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N = 70


def inputs(device, dtype=torch.float32, size=64, n_queries=N, groups=2, seed=0):
    """Small whole numbers, half of the keys twice: exact scores, and ties in most rows."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (2, 4, n_queries, size), generator=generator)
    key = torch.randint(-2, 3, (2, groups, N, size), generator=generator)
    key[:, :, N // 2 :] = key[:, :, : N // 2]
    value = torch.randn(2, groups, N, size, generator=generator)
    return [x.to(device, dtype) for x in (query, key, value)]


def by_definition(query, key, value, visible=None, bias=0.0):
    """Average the values of the winners; also say how many keys win each row."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5 + bias
    seen = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible
    scores = scores.masked_fill(~seen, -math.inf)
    best = scores.amax(-1, keepdim=True)
    wins = ((scores == best) & seen).double()
    count = wins.sum(-1, keepdim=True).clamp(min=1)
    return wins @ value.double() / count, wins.sum(-1)


def agrees(found, expected):
    """Up to the rounding of the result: two units in its last place."""
    tolerance = 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def causal(device, n_queries=N):
    return torch.ones(n_queries, N, dtype=torch.bool, device=device).tril()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_winner_shares_and_nobody_else(device, dtype, size, groups):
    query, key, value = inputs(device, dtype, size, groups=groups)
    expected, n_winners = by_definition(query, key, value, causal(device))
    assert (n_winners > 1).double().mean() > 0.2
    found = hard_attention(query, key, value, factor=size**-0.5, causal=True, blocks=SMALL)
    assert found.dtype == dtype
    agrees(found, expected)


@pytest.mark.parametrize("size", [8, 24, 80])
def test_sizes_that_are_no_power_of_two(device, size):
    query, key, value = inputs(device, size=size)
    wider = torch.cat([value, value], -1)
    found = hard_attention(query, key, wider, factor=size**-0.5, blocks=SMALL)
    agrees(found, by_definition(query, key, wider)[0])


def test_padding_hides_keys_and_a_row_without_keys_is_zero(device):
    query, key, value = inputs(device)
    first = torch.tensor([0, 40], device=device)[:, None, None, None]
    visible = torch.arange(N, device=device) >= first
    found = hard_attention(
        query, key, value, factor=0.125, causal=True, visible=visible, blocks=SMALL
    )
    agrees(found, by_definition(query, key, value, visible & causal(device))[0])
    assert not found[1, :, :40].any()
    assert found[1, :, 40:].any()


def test_a_bias_is_added_and_masks_where_it_is_lowest(device):
    query, key, value = inputs(device)
    bias = -torch.arange(N, device=device).float().expand(4, N, N) / 8
    masked = bias.masked_fill(~causal(device), torch.finfo(torch.float32).min)
    found = hard_attention(query, key, value, factor=0.125, bias=masked, blocks=SMALL)
    agrees(found, by_definition(query, key, value, causal(device), bias)[0])


@pytest.mark.parametrize("blocks", [Blocks(16, 64), Blocks(64, 16), Blocks(128, 128)], ids=str)
def test_how_the_work_is_cut_does_not_matter(device, blocks):
    query, key, value = inputs(device)
    one, other = (
        hard_attention(query, key, value, factor=0.125, causal=True, blocks=cut)
        for cut in (SMALL, blocks)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_views_need_no_copies(device):
    query, key, value = inputs(device)
    packed = torch.stack([query, query], 3).flatten(2, 3)[:, :, ::2]
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    expected = hard_attention(query, key, value, factor=0.125, blocks=SMALL)
    for view in (packed, turned):
        assert not view.is_contiguous()
        assert hard_attention(view, key, value, factor=0.125, blocks=SMALL).equal(expected)


def test_a_gradient_is_refused(device):
    query, key, value = inputs(device)
    with pytest.raises(UnsupportedModelError, match="no gradients"):
        hard_attention(query, key, value.requires_grad_(), factor=0.125)


# As the level `kernel` uses it.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_test_holds(device, dtype):
    assert limit_is_exact(device, dtype)


def test_heads_in_the_limit_go_through_it_and_others_do_not(device):
    call = AttentionCall(*inputs(device, groups=4), is_causal=True)
    c = torch.tensor([1.0, math.inf, 3.0, math.inf])
    found = rescaled_attention(call, c)
    hard = limit_kernel(device)(call)
    assert found[:, 1].equal(hard[:, 1])
    assert found[:, 3].equal(hard[:, 3])
    torch.testing.assert_close(found[:, 0], call.run()[:, 0])
    sharper = AttentionCall(3 * call.query, call.key, call.value, is_causal=True).run()
    torch.testing.assert_close(found[:, 2], sharper[:, 2])


def test_rows_without_a_visible_key_are_left_to_the_model(device):
    query, key, value = inputs(device, groups=4)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, N, N, device=device)
    mask[1, :, :5] = lowest
    call = AttentionCall(query, key, value, attn_mask=mask)
    found = limit_kernel(device)(call)
    torch.testing.assert_close(found[1, :, :5], call.run()[1, :, :5])
    agrees(found[:, :, 5:], by_definition(query, key, value)[0][:, :, 5:])
