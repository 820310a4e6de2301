"""Orders of axes in which models keep their scores: told apart, viewed as heads, and put back."""

from __future__ import annotations

import pytest
import torch

from sat_lens.errors import UnsupportedModelError
from sat_lens.sites.probe import Call, heads_seen
from sat_lens.sites.site import as_heads, from_heads, heads_in, layout_of

# shape, number of heads that the configuration claims, layout, and where head 1, query 2 of the
# first prompt is (its first block)
LAYOUTS = [
    ((2, 4, 5, 6), 4, "b h q k", (0, 1, 2)),
    ((2, 4, 5, 6), None, "b h q k", (0, 1, 2)),
    ((2, 8, 5, 6), 4, "b h q k", (0, 1, 2)),
    ((2, 8, 4, 4), 4, "b h q k", (0, 1, 2)),
    ((2, 8, 4, 9), 4, "b q h k", (0, 2, 1)),
    ((8, 5, 6), 4, "(b h) q k", (1, 2)),
    ((2, 3, 4, 5, 6), 4, "b block h q k", (0, 0, 1, 2)),
    ((2, 2, 3, 5, 6), 6, "b group h q k", (0, 0, 1, 2)),
]


@pytest.mark.parametrize(("shape", "hint", "layout", "place"), LAYOUTS)
def test_a_head_is_found_and_put_back(shape, hint, layout, place):
    assert layout_of(shape, hint) == layout
    n_heads = heads_in(shape, layout, hint)
    scores = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    heads = as_heads(scores, layout, n_heads)
    assert heads.dim() == 4
    assert heads.shape[1] == n_heads
    assert torch.equal(heads[0, 1, 2], scores[place])
    assert torch.equal(from_heads(heads, layout, like=scores), scores)


@pytest.mark.parametrize("shape", [(7, 5, 6), (2, 3, 5, 5, 6), (8, 5), (2, 2, 4, 5, 5, 6)])
def test_heads_that_cannot_be_told_apart(shape):
    assert layout_of(shape, 4) is None


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 5, 4, 6), "b h q k"),
        ((2, 4, 5, 6), "b q h k"),
        ((7, 5, 6), "(b h) q k"),
        ((8, 5, 6), "b h q k"),
        ((2, 3, 5, 5, 6), "b block h q k"),
    ],
)
def test_another_shape_than_the_one_found_before(shape, layout):
    with pytest.raises(UnsupportedModelError, match=r"4 heads.*look at it again"):
        as_heads(torch.zeros(shape), layout, n_heads=4)


# the softmaxes of one run on eight positions, and the reason to refuse it
RUNS = [
    ([(1, 4, 3, 3), (1, 4, 5, 5)], ""),
    ([(1, 4, 8, 8)], ""),
    ([(1, 4, 8, 8), (1, 4, 8, 8)], "2 attention softmaxes ran in one call"),
    ([(1, 4, 3, 8), (1, 4, 5, 8)], "2 attention softmaxes ran in one call"),
    ([(1, 4, 3, 3), (1, 2, 5, 5)], "heads cannot be told apart"),
    ([], "no attention softmax"),
]


@pytest.mark.parametrize(("shapes", "why_not"), RUNS)
def test_several_softmaxes_are_one_attention_only_if_they_share_out_the_positions(shapes, why_not):
    call = Call(positions=8, events=[("softmax", torch.zeros(shape)) for shape in shapes])
    found, layout, n_heads = heads_seen([call], hint=4)
    assert why_not in found
    assert (layout, n_heads) == (("", 0) if why_not else ("b h q k", 4))
