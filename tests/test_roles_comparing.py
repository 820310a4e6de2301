"""What counts as a change between two results, and whether the uncertainty is right."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import sat_lens as sl
from sat_lens.errors import ArgumentError
from sat_lens.vocabulary import CAUTION

LENGTH = 24


@pytest.fixture(scope="module")
def model():
    return tiny.native()


def looking(model, keys, n_sequences=4, share=1.0):
    """Measure a model of which each row looks at a given key, in a share of the sequences."""

    def transform(scores):
        hot = torch.nn.functional.one_hot(keys, LENGTH) * 100.0
        chosen = torch.arange(len(scores)) < share * len(scores)
        return torch.where(chosen[:, None, None, None], hot, scores)

    tokens = tiny.tokens(n_sequences, LENGTH)
    with sl.replace_attention(model, transform):
        return sl.head_roles(model, tokens, rows="all", batch_size=n_sequences, progress=False)


def at_offset(k):
    return (torch.arange(LENGTH) + k).clamp(min=0)


@pytest.mark.parametrize(
    ("first", "other", "moved"),
    [
        (at_offset(-1), torch.zeros(LENGTH).long(), "previous, first"),
        (at_offset(-1), at_offset(-3), "previous, offset -3"),
        (at_offset(-3), at_offset(-4), "offset -3, offset -4"),
    ],
)
def test_another_target_is_a_change_though_the_lean_is_the_same(model, first, other, moved):
    table = looking(model, first).compare(looking(model, other))
    row = table.loc["L0H0"]
    assert row["change"] == pytest.approx(0, abs=1e-5)
    assert (row["changed"], row["moved"]) == (True, moved)
    assert row["role"] == row["role_other"] == "argmax"


@pytest.mark.slow
def test_a_target_in_half_of_the_sequences_is_uncertain(model):
    whole, half = looking(model, at_offset(-1)), looking(model, at_offset(-1), share=0.5)
    few, many = (looking(model, at_offset(-3), n, share=0.5) for n in (4, 64))
    assert "lean" in whole.compare(half).loc["L0H0", "moved"]
    # Both look at -3 in half of the sequences; that of four is anything between.
    assert "offset -3" not in few.compare(many).loc["L0H0", "moved"]


def test_a_role_that_changes_without_the_lean_is_a_change(model):
    def spread(n_keys):
        keep = at_offset(0)[:, None] - torch.arange(LENGTH)
        scores = torch.where((keep >= 0) & (keep < n_keys), 0.0, -100.0)
        with sl.replace_attention(model, lambda s: scores.expand_as(s).clone()):
            return sl.head_roles(model, tiny.tokens(4, LENGTH), rows="all", progress=False)

    table = spread(1).compare(spread(4))
    row = table.loc["L0H0"]
    assert (row["role"], row["role_other"]) == ("argmax", "subset")
    assert {"lean", "tv_argmax", "tv_mean"} <= set(row["moved"].split(", "))
    assert "tv_nearest" not in row["moved"]


def test_nothing_moved_between_a_result_and_itself(model):
    roles = looking(model, at_offset(-1))
    table = roles.compare(roles)
    assert not table["changed"].any()
    assert set(table["moved"]) == {""}


def test_one_sequence_shows_no_change(model):
    one, other = (looking(model, at_offset(k), n_sequences=1) for k in (-1, -3))
    assert not one.compare(other)["changed"].any()


@pytest.mark.slow
def test_the_error_is_the_spread_between_samples_of_the_data(demo):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(3, demo.cfg.d_vocab, (96, 24), generator=generator)
    parts = [sl.head_roles(demo, part, progress=False) for part in data.split(8)]
    frames = [part.frame() for part in parts]
    spread = np.array([frame["lean"] for frame in frames]).var(0, ddof=1).mean()
    claimed = (np.array([frame["lean_se"] for frame in frames]) ** 2).mean()
    assert 0.8 < (claimed / spread) ** 0.5 < 1.2
    pairs = [a.compare(b) for i, a in enumerate(parts) for b in parts[:i]]
    moved = float(np.mean([pair["moved"].str.contains("lean") for pair in pairs]))
    # Two standard errors leave 5 % to chance, and errors from eight sequences are rough.
    assert 0.02 < moved < 0.1
    # Where labels differ, the numbers behind them have the same chance, each for itself.
    assert moved < float(np.mean([pair["changed"] for pair in pairs])) < 0.2


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("errors", [-1, "two", None, True, float("nan")])
def test_errors_that_are_none(model, errors):
    roles = looking(model, at_offset(-1))
    for table in (roles.compare, roles.relative_to):
        with pytest.raises(ArgumentError, match="number of standard errors"):
            table(roles, errors=errors)
    with pytest.raises(ArgumentError, match="untrained model; found DataFrame"):
        roles.relative_to(roles.frame())


def test_labels_come_with_what_they_do_not_say(model):
    roles = looking(model, at_offset(-1))
    assert roles.notes == [CAUTION]
    text = repr(roles)
    assert "8 argmax" in text
    assert CAUTION in text
    assert "untrained" in CAUTION
    tokens = tiny.tokens(1, 9)
    pair = sl.run_with_saturation_cache(model, tokens)
    assert CAUTION in sl.viz.attention(pair, ["L0H0"], roles=roles).page
    assert CAUTION not in sl.viz.attention(pair, ["L0H0"]).page


def test_an_interrupted_result_says_so(model):
    def stream():
        yield tiny.tokens(2, LENGTH)
        raise KeyboardInterrupt

    roles = sl.head_roles(model, stream(), progress=False)
    assert [note.split(":")[0] for note in roles.notes] == [
        "The measurement was interrupted",
        "A role describes the shape of attention only",
    ]
    assert roles.notes[0] in repr(roles)
    texts = [text.get_text() for text in roles.plot().texts]
    assert any("(interrupted)" in text for text in texts)
