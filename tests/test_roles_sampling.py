"""What is drawn of a sequence depends on its content alone, so that shards merge to one pass."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sat_lens as sl
from sat_lens.data import Batch, batches
from sat_lens.roles import merge
from sat_lens.roles.positions import (
    BatchReader,
    content_seeds,
    drawn_order,
    resampling_weights,
)
from sat_lens.sites import AttentionSite

SEQUENCES = st.lists(
    st.lists(st.integers(3, 90), min_size=1, max_size=9), min_size=2, max_size=5, unique_by=tuple
)
NUMBERS = ["tv_argmax", "tv_mean", "tv_nearest", "m_share", "lean", "lean_se", "n_eff_share"]
COUNTS = ["n_rows", "median_m", "modal_offset", "modal_share", "agreement"]


@pytest.fixture(scope="module")
def model():
    return tiny.native()


def ragged(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 40, (count,), generator=generator)
    return [
        {"input_ids": torch.randint(3, 90, (int(n),), generator=generator).tolist()}
        for n in lengths
    ]


def measured(model, data, **kwargs):
    return sl.head_roles(model, data, rows=6, progress=False, **kwargs)


def check_same(first, second):
    one, other = first.frame(), second.frame()
    for name in NUMBERS:
        assert one[name].tolist() == pytest.approx(other[name].tolist(), rel=1e-5, abs=1e-6), name
    for name in COUNTS:
        assert one[name].tolist() == pytest.approx(other[name].tolist(), nan_ok=True), name
    for name in ("c_lo", "c_hi"):
        assert one[name].tolist() == pytest.approx(other[name].tolist(), rel=2 ** (1 / 16) - 1)


@pytest.mark.slow
@settings(max_examples=8)
@given(order=st.permutations(range(6)), cut=st.integers(1, 5), batch_size=st.integers(1, 4))
def test_texts_of_many_lengths_merge_to_one_pass_however_they_are_cut(
    model, order, cut, batch_size
):
    data = ragged(6)
    mixed = [data[i] for i in order]
    parts = [measured(model, part, batch_size=batch_size) for part in (mixed[:cut], mixed[cut:])]
    check_same(merge(parts), measured(model, data))


def test_the_sample_depends_on_the_sequence(model):
    sequence, other = ragged(2)
    (short,) = batches(model, [sequence])
    (both,) = batches(model, [sequence, {"input_ids": [*other["input_ids"], *[7] * 9]}])
    site = AttentionSite("blocks.0.attn", "", 0, "self", 1, "scores")
    samples = []
    for batch in (short, both):
        reader = BatchReader(batch, torch.tensor([-1]), None, 6, None)
        size, length = batch.inputs.shape
        samples.append(reader.positions(site, torch.zeros(size, 1, length, length)).sample)
    assert samples[0][0].tolist() == samples[1][0].tolist()
    assert samples[1][0].tolist() != samples[1][1].tolist()


@given(SEQUENCES, st.integers(0, 4), st.integers(0, 4))
def test_draws_depend_on_content_alone(rows, left, right):
    alone = [content_seeds(Batch(torch.tensor([row]), {}))[0] for row in rows]
    assert len(set(alone)) == len(rows)
    width = max(map(len, rows))
    padded = [[1] * left + row + [2] * (width - len(row) + right) for row in rows]
    real = [
        [False] * left + [True] * len(row) + [False] * (width - len(row) + right) for row in rows
    ]
    real = torch.tensor(real)
    assert content_seeds(Batch(torch.tensor(padded), {}, non_padding=real)) == alone
    assert content_seeds(Batch(torch.tensor(padded).int(), {}, non_padding=real)) == alone
    weights = resampling_weights(alone)
    assert torch.equal(weights, torch.cat([resampling_weights([seed]) for seed in alone]))
    assert bool((weights[:, 0] == 1).all())
    order = drawn_order(alone, real)
    for row, seed, drawn, kept in zip(rows, alone, order, real, strict=True):
        assert torch.equal(drawn[kept], drawn_order([seed], torch.ones(1, len(row)).bool())[0])
        assert bool((drawn[~kept] > 1).all())


def test_a_decoders_tokens_are_content_too():
    tokens, decoder = tiny.tokens(1, 9), tiny.tokens(2, 4, seed=1)
    seeds = [
        content_seeds(Batch(tokens, {}, decoder_tokens=part))[0]
        for part in (*decoder[:, None], None)
    ]
    assert len(set(seeds)) == 3


def test_resamples_are_poisson():
    drawn = resampling_weights(range(4000), 8)[:, 1:]
    assert float(drawn.mean()) == pytest.approx(1, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1, abs=0.04)


def test_layers_on_several_devices_have_positions_of_their_own(monkeypatch):
    # Tensors on the device "meta" stand for those on a second one; they hold no numbers to draw.
    drawn = "sat_lens.roles.positions.drawn_order"
    monkeypatch.setattr(drawn, lambda _seeds, real: torch.zeros(real.shape, device=real.device))
    tokens = tiny.tokens(2, 9)
    batch = Batch(tokens, {}, tokens=tokens, non_padding=torch.ones(2, 9).bool())
    reader = BatchReader(batch, torch.tensor([5, 6]), None, 4, None)
    site = AttentionSite("blocks.0.attn", "", 0, "self", 3, "scores")
    for device in ("cpu", "meta", "cpu"):
        found = reader.positions(site, torch.empty(2, 3, 9, 9, device=device))
        for part in (found.weight, found.first, found.special, found.tokens, found.sample):
            assert str(part.device) == device
