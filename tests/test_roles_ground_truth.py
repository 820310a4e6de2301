"""Roles of models whose heads are known: constructed by hand, or trained on a known task."""

import math

import pytest
import torch

import sat_lens as sl
from sat_lens import tasks
from sat_lens.tasks import train_on
from tests.constructed import (
    N_CTX,
    UNIFORM,
    constructed,
    last_few_table,
    offset_table,
    one_key_table,
    tokens,
)

CAUSAL_HEADS = [
    # (name, table, role, target, median m)
    ("previous", offset_table(-1), "argmax", "previous", 1),
    ("self", offset_table(0), "argmax", "self", 1),
    ("far", offset_table(-3), "argmax", "offset -3", 1),
    ("first", one_key_table(0), "argmax", "first", 1),
    ("three", last_few_table(3), "subset", "", 3),
    ("all", UNIFORM, "mean", "", None),
]


@pytest.fixture(scope="module")
def known():
    return constructed([[table for _, table, *_ in CAUSAL_HEADS]], causal=True)


@pytest.fixture(scope="module")
def frame(known):
    return sl.head_roles(known, tokens(), rows="all", progress=False).frame()


@pytest.mark.parametrize("place", range(len(CAUSAL_HEADS)), ids=[h[0] for h in CAUSAL_HEADS])
def test_role_and_target_of_a_known_head(frame, place):
    _, _, role, target, m = CAUSAL_HEADS[place]
    row = frame.iloc[place]
    assert (row["role"], row["target"]) == (role, target)
    if m is not None:
        assert row["median_m"] == m
        assert row["tv_nearest"] == pytest.approx(0, abs=1e-6)
    assert row["saturable_nearest"]


def test_numbers_of_known_heads_follow_from_counting(frame):
    keys = torch.arange(8, N_CTX + 1).double()
    argmax_to_mean = float((1 - 1 / keys).mean())
    assert frame.loc["L0H0", "tv_mean"] == pytest.approx(argmax_to_mean, abs=1e-5)
    assert frame.loc["L0H5", "tv_argmax"] == pytest.approx(argmax_to_mean, abs=1e-5)
    assert frame.loc["L0H4", "tv_argmax"] == pytest.approx(2 / 3, abs=1e-5)
    assert frame.loc["L0H4", "n_eff_share"] == pytest.approx(float((3 / keys).mean()), abs=1e-5)
    assert frame.loc["L0H3", "sink_mass"] == pytest.approx(1, abs=1e-6)
    assert frame["n_rows"].tolist() == [6 * len(keys)] * 6


def test_saturating_an_already_saturated_model_changes_nothing(known):
    with torch.no_grad():
        soft, soft_cache = known.run_with_cache(tokens())
        with sl.saturate(known):
            hard, hard_cache = known.run_with_cache(tokens())
    assert torch.equal(soft_cache["pattern", 0], hard_cache["pattern", 0])
    assert torch.equal(soft, hard)


def test_a_constructed_model_has_saturated_patterns_exactly_where_it_was_told(known):
    with torch.no_grad(), sl.saturate(known):
        _, cache = known.run_with_cache(tokens())
    causal = torch.ones(N_CTX, N_CTX).tril()
    for head, (_, table, *_) in enumerate(CAUSAL_HEADS):
        visible = table.masked_fill(causal == 0, -1)
        wanted = (visible == visible.amax(-1, keepdim=True)).float()
        wanted = wanted / wanted.sum(-1, keepdim=True)
        assert torch.equal(cache["pattern", 0][0, head], wanted)


def test_critical_scales_of_a_head_with_a_known_gap():
    # One key leads n - 1 others by a gap of 1: 1 / (1 + (n - 1) exp(-c)) >= .9 at the limit.
    model = constructed([[one_key_table(0)]], causal=False, sharpness=1.0)
    row = sl.head_roles(model, tokens(), rows="all", progress=False).frame().loc["L0H0"]
    assert row["c_hi"] == pytest.approx(math.log(9 * (N_CTX - 1)), rel=2 ** (1 / 16) - 1)
    # Off uniform by .1: the leading key has 1/n + .1.
    lead = 1 / N_CTX + 0.1
    c_lo = math.log(lead * (N_CTX - 1) / (1 - lead))
    assert row["c_lo"] == pytest.approx(c_lo, rel=2 ** (1 / 16) - 1)


def acts_at_position_zero():
    """Second layer, second head: copies position 1 to position 0, and is uniform elsewhere."""
    table = torch.zeros(N_CTX, N_CTX)
    table[0, 1] = 1
    return constructed([[UNIFORM, UNIFORM], [UNIFORM, table]], causal=False)


def test_a_head_that_acts_at_one_position_is_labelled_by_that_position():
    model = acts_at_position_zero()
    data = tokens()

    def metric(logits):
        return logits[:, 0, 0].sum()

    over_all = sl.head_roles(model, data, progress=False).frame().loc["L1H1"]
    weighted = sl.head_roles(model, data, metric=metric, progress=False).frame().loc["L1H1"]
    restricted = sl.head_roles(model, data, query_positions=[0], progress=False).frame().loc["L1H1"]
    assert (over_all["role"], over_all["target"]) == ("mean", "")
    assert (weighted["role"], weighted["target"]) == ("argmax", "next")
    assert (restricted["role"], restricted["target"]) == ("argmax", "next")


@pytest.fixture(scope="module")
def previous_token_model():
    return train_on(tasks.previous_token(512), steps=250)


@pytest.mark.slow
def test_a_previous_token_model_has_a_head_for_it(previous_token_model):
    model = previous_token_model
    test = tasks.previous_token(64, seed=9)
    frame = sl.head_roles(model, test.tokens, progress=False).frame()
    found = frame[(frame["role"] == "argmax") & (frame["target"] == "previous")]
    assert len(found) >= 1
    with torch.no_grad(), sl.saturate(model):
        assert test.accuracy(model(test.tokens)) > 0.9


@pytest.mark.slow
def test_an_induction_model_has_a_head_for_it():
    model = train_on(tasks.induction(512), n_layers=2, steps=500)
    test = tasks.induction(64, seed=9)
    frame = sl.head_roles(model, test.tokens, query_positions=range(16, 30), progress=False).frame()
    with torch.no_grad():
        assert test.accuracy(model(test.tokens)) > 0.95
    assert frame["induction"].max() > 0.7
    assert "induction" in set(frame["target"])


@pytest.mark.slow
def test_an_untrained_model_labels_every_head_mean_and_says_that_nothing_was_learned(
    previous_token_model,
):
    untrained = train_on(tasks.previous_token(64), steps=1, learning_rate=0.0)
    again = train_on(tasks.previous_token(64), steps=1, learning_rate=0.0)
    data = tasks.previous_token(64, seed=9).tokens
    models = untrained, again, previous_token_model
    before, same, after = (sl.head_roles(model, data, progress=False) for model in models)
    assert set(before.frame()["role"]) == {"mean"}
    assert not same.relative_to(before)["learned"].any()
    learned = after.relative_to(before)
    assert learned["learned"].any()
    assert set(learned["role_initial"]) == {"mean"}
