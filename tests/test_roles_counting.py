"""Models that count, trained in seconds: what saturation leaves of them, and in how many states."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import sat_lens as sl
from sat_lens import tasks
from sat_lens.attention import Limit, Uniform
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.tasks import distinct_states, train_on


def accuracy(model, task, transform=None):
    with torch.no_grad():
        if transform is None:
            return task.accuracy(model(task.tokens))
        with sl.replace_attention(model, transform):
            return task.accuracy(model(task.tokens))


def accuracies(model, task):
    return [accuracy(model, task, t) for t in (None, Limit(), Limit("nearest"), Uniform())]


def states(model, task, scale):
    with sl.saturate(model, scale=scale):
        return distinct_states(model, task.tokens)


def widest_row(model, task):
    """Give the largest difference of two scores in one row."""
    widths = []

    def look(scores):
        hidden = scores == -math.inf
        highest = scores.amax(-1)
        widths.append(float((highest - scores.masked_fill(hidden, math.inf).amin(-1)).max()))
        return scores

    with torch.no_grad(), sl.replace_attention(model, look):
        model(task.tokens)
    return max(widths)


@pytest.fixture(scope="module")
def majority():
    return train_on(tasks.majority(1024, 48), steps=500), tasks.majority(64, 48, seed=9)


@pytest.fixture(scope="module")
def dyck():
    return train_on(tasks.dyck_depth(512), steps=250, positions=True), tasks.dyck_depth(64, seed=9)


@pytest.fixture(scope="module")
def an_bn():
    return train_on(tasks.an_bn(1024), steps=600), tasks.an_bn(128, seed=9)


@pytest.mark.slow
def test_exact_saturation_breaks_a_majority_and_uniform_attention_keeps_it(majority):
    soft, exact, nearest, uniform = accuracies(*majority)
    assert soft > 0.98
    assert exact < 0.7
    assert min(nearest, uniform) > 0.9


@pytest.mark.slow
def test_a_tolerance_of_the_rows_range_of_scores_keeps_a_majority_and_a_tenth_of_it_does_not(
    majority,
):
    width = widest_row(*majority)
    assert 0.1 < width < 2
    assert accuracy(*majority, Limit(width)) == accuracy(*majority, Uniform()) > 0.9
    assert accuracy(*majority, Limit(width / 10)) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["majority", "dyck"])
def test_a_counting_model_has_a_mean_head(name, request):
    model, task = request.getfixturevalue(name)
    frame = sl.head_roles(model, task.tokens, progress=False).frame()
    assert set(frame["role"]) == {"mean"}


@pytest.mark.slow
def test_a_saturated_majority_takes_two_states_and_a_uniform_one_takes_the_counts(majority):
    model, task = majority
    last_token_and_lead = {
        (int(row[-1]), int((row == 2).sum() - (row == 1).sum())) for row in task.tokens
    }
    # Without ties a saturated row shows one token: one of two, times the current token.
    assert int(states(model, task, math.inf)[-1]) <= 4
    assert int(states(model, task, 0)[-1]) == len(last_token_and_lead)


@pytest.mark.slow
def test_dyck_depth_needs_more_than_one_key_a_row(dyck):
    soft, exact, nearest, uniform = accuracies(*dyck)
    assert soft > 0.97
    assert exact < 0.6
    assert min(nearest, uniform) > exact + 0.2


@pytest.mark.slow
def test_a_saturated_dyck_model_takes_few_states_early_on(dyck):
    model, task = dyck
    saturated, soft = states(model, task, math.inf), distinct_states(model, task.tokens)
    prefixes = [len(task.tokens[:, : i + 1].unique(dim=0)) for i in range(task.tokens.shape[1])]
    assert all(n <= most for n, most in zip(soft.tolist(), prefixes, strict=True))
    assert int(saturated[10]) <= 6
    assert int(soft[10]) > 30
    assert bool((saturated[1:] <= soft[1:]).all())


@pytest.mark.slow
def test_no_saturated_pattern_counts_as_far_as_an_bn_needs(an_bn):
    model, task = an_bn
    soft, *saturated = accuracies(model, task)
    guess = float(1 - task.answers[task.counted].float().mean())
    assert soft > 0.95
    assert saturated[0] < guess + 0.05
    # Even uniform attention, which keeps the counts, is off by one where one is what is asked for.
    assert max(saturated) < 0.85


@pytest.mark.slow
def test_a_saturated_an_bn_model_takes_a_handful_of_states(an_bn):
    model, task = an_bn
    assert int(states(model, task, math.inf).max()) <= 16
    assert int(states(model, task, 0)[-1]) > 40
    assert int(distinct_states(model, task.tokens)[-1]) > 40


@pytest.mark.slow
def test_no_saturated_pattern_counts_the_current_token():
    model = train_on(tasks.token_count(1024), n_layers=2, steps=400)
    soft, *saturated = accuracies(model, tasks.token_count(64, seed=9))
    assert soft > 0.9
    assert max(saturated) < 0.5


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("majority", lambda row: 1 + (row.count(2) > row.count(1)) - (row.count(2) < row.count(1))),
        ("token_count", lambda row: row.count(row[-1])),
        ("dyck_depth", lambda row: row.count(1) - row.count(2)),
        ("an_bn", lambda row: row.count(1) == row.count(2)),
        ("previous_token", lambda row: row[-2]),
    ],
)
def test_every_answer_follows_from_the_tokens_before_it(name, answer):
    task = getattr(tasks, name)(16, 24, seed=3)
    assert torch.equal(task.tokens, getattr(tasks, name)(16, 24, seed=3).tokens)
    assert not torch.equal(task.tokens, getattr(tasks, name)(16, 24, seed=4).tokens)
    for tokens, answers, counted in zip(
        task.tokens.tolist(), task.answers.tolist(), task.counted.tolist(), strict=True
    ):
        for i in range(1, 24):
            if counted[i]:
                assert answers[i] == answer(tokens[: i + 1])
    assert task.counted.any()
    assert int(task.answers[task.counted].max()) < task.n_answers
    assert int(task.tokens.max()) < task.n_tokens


def test_states_are_those_after_the_last_layer():
    model = tiny.native(n_layers=11)
    tokens = tiny.tokens(5, 6)
    assert int(distinct_states(model, tokens)[-1]) == 5
    model.add_hook("blocks.10.hook_resid_post", lambda x, hook: torch.zeros_like(x))
    assert distinct_states(model, tokens).tolist() == [1] * 6
    model.reset_hooks()
    with pytest.raises(UnsupportedModelError, match="residual stream after a block"):
        distinct_states(torch.nn.Linear(2, 2), tokens)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tasks.majority(0), "n_sequences .* at least 1; found 0"),
        (lambda: tasks.majority(4, 1), "length .* at least 2; found 1"),
        (lambda: tasks.token_count(4, 2.5), r"length .* found 2\.5"),
        (lambda: tasks.dyck_depth(4, 8, deepest=0), "deepest .* found 0"),
        (lambda: tasks.an_bn(4, 5), "length .* at least 6; found 5"),
        (lambda: tasks.previous_token("four"), "n_sequences .* found 'four'"),
        (lambda: tasks.induction(4, 4), "length .* at least 5; found 4"),
        (lambda: train_on(tasks.majority(4), steps=0), "steps .* found 0"),
        (lambda: train_on(tasks.majority(4), n_heads=0), "n_heads .* found 0"),
        (lambda: train_on(tasks.majority(4), n_heads=5), "must divide d_model = 32; found 5"),
    ],
)
def test_sizes_that_are_none(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
