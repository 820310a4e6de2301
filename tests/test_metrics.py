"""Metrics: each against its definition, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sat_lens as sl
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.metrics import read_metric

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(2, 7))


def refusal(*words, kind=ArgumentError):
    assert issubclass(kind, sl.SatLensError)
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def noise(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_tokens(shape, seed=1):
    batch, length, vocab = shape
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@given(SHAPES, st.data())
def test_logit_difference_reads_one_position(shape, data):
    batch, length, vocab = shape
    logits = noise(shape)
    token = st.integers(0, vocab - 1)
    answers = data.draw(st.lists(token, min_size=batch, max_size=batch))
    wrongs = data.draw(st.lists(token, min_size=batch, max_size=batch))
    position = data.draw(st.integers(-length, length - 1))
    metric = sl.metrics.logit_difference(answers, wrongs, position)
    expected = [
        float(logits[i, position, answer] - logits[i, position, wrong])
        for i, (answer, wrong) in enumerate(zip(answers, wrongs, strict=True))
    ]
    assert metric.per_prompt(logits).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(metric(logits)) == pytest.approx(sum(expected) / batch, abs=1e-6)
    assert metric.positions == [position]
    swapped = sl.metrics.logit_difference(wrongs, answers, position)
    assert float(swapped(logits)) == pytest.approx(-float(metric(logits)), abs=1e-6)


def test_one_answer_serves_all_prompts():
    logits = noise((3, 2, 5))
    one = sl.metrics.logit_difference(1, 4)
    each = sl.metrics.logit_difference(torch.tensor([1, 1, 1]), [4, 4, 4])
    assert torch.equal(one.per_prompt(logits), each.per_prompt(logits))


def test_the_loss_is_the_models_own(demo):
    tokens = demo.to_tokens("def area(width, height):\n    return width * height")
    with torch.no_grad():
        logits, loss = demo(tokens), demo(tokens, return_type="loss")
    assert float(sl.metrics.next_token_loss(tokens)(logits)) == pytest.approx(float(loss), abs=1e-5)


@given(SHAPES, st.data())
def test_padding_counts_nothing_in_the_loss(shape, data):
    batch, length, _ = shape
    tokens, logits = draw_tokens(shape), noise(shape)
    lengths = data.draw(st.lists(st.integers(2, length), min_size=batch, max_size=batch))
    left = data.draw(st.booleans())
    places = torch.arange(length).flip(0) if left else torch.arange(length)
    mask = (places < torch.tensor(lengths)[:, None]).long()
    found = sl.metrics.next_token_loss(tokens, mask).per_prompt(logits)
    for i, n in enumerate(lengths):
        keep = slice(length - n, None) if left else slice(n)
        alone = sl.metrics.next_token_loss(tokens[i : i + 1, keep])(logits[i : i + 1, keep])
        assert float(found[i]) == pytest.approx(float(alone), abs=1e-5)


def test_the_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary():
    loss = sl.metrics.next_token_loss(torch.zeros(2, 3, dtype=torch.long))
    assert float(loss(torch.zeros(2, 3, 50))) == pytest.approx(math.log(50), abs=1e-5)


@given(SHAPES, st.data())
def test_kl_is_a_divergence(shape, data):
    soft, changed = noise(shape), noise(shape, seed=1)
    at = data.draw(st.none() | st.lists(st.integers(-shape[1], shape[1] - 1), min_size=1))
    metric = sl.metrics.kl_to_soft(soft, at)
    assert float(metric(soft)) == pytest.approx(0, abs=1e-6)
    assert float(metric(soft + noise((shape[0], shape[1], 1)))) == pytest.approx(0, abs=1e-5)
    read = list(range(shape[1])) if at is None else at
    p, q = (torch.distributions.Categorical(logits=x[:, read]) for x in (soft, changed))
    expected = torch.distributions.kl_divergence(p, q).mean(1)
    torch.testing.assert_close(metric.per_prompt(changed), expected, rtol=1e-4, atol=1e-5)
    assert float(metric(changed)) >= 0
    assert metric.positions == at


@given(SHAPES, st.data())
def test_padding_counts_nothing_in_the_divergence(shape, data):
    batch, length, _ = shape
    soft, changed = noise(shape), noise(shape, seed=1)
    lengths = data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    found = sl.metrics.kl_to_soft(soft, attention_mask=mask).per_prompt(changed)
    for i, n in enumerate(lengths):
        alone = sl.metrics.kl_to_soft(soft[i : i + 1, :n])(changed[i : i + 1, :n])
        assert float(found[i]) == pytest.approx(float(alone), abs=1e-5)


def test_masks_that_do_not_fit():
    soft = noise((2, 3, 5))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with refusal("padded at every position"):
        sl.metrics.kl_to_soft(soft, positions=[-1], attention_mask=mask)
    with refusal("mask has shape \\[2, 2\\]", "\\[2, 3\\]"):
        sl.metrics.kl_to_soft(soft, attention_mask=mask[:, :2])
    with refusal("mask has shape \\[2, 2\\]", "\\[2, 3\\]"):
        sl.metrics.next_token_loss(torch.zeros(2, 3, dtype=torch.long), mask[:, :2])


@settings(max_examples=30)
@given(SHAPES)
def test_the_value_is_the_mean_over_prompts_and_has_a_gradient(shape):
    tokens = draw_tokens(shape)
    for metric in (
        sl.metrics.logit_difference(0, 1),
        sl.metrics.next_token_loss(tokens),
        sl.metrics.kl_to_soft(noise(shape, seed=2)),
    ):
        logits = noise(shape).requires_grad_()
        value = metric(logits)
        assert value.shape == ()
        torch.testing.assert_close(value, metric.per_prompt(logits).mean())
        value.backward()
        assert logits.grad.isfinite().all()
        assert float(read_metric(metric, logits)) == pytest.approx(value.item())


@pytest.mark.parametrize(("answer", "wrong"), [([1, 2], [3]), ([], []), (1, [2, 3])])
def test_answers_come_in_pairs(answer, wrong):
    with refusal("right", "wrong", "found"):
        sl.metrics.logit_difference(answer, wrong)


@pytest.mark.parametrize("wrong", ["yes", ["yes", "no"], [None], 1.5, True, torch.ones(2)])
@pytest.mark.usefixtures("types_unchecked")
def test_answers_are_token_ids(wrong):
    with refusal("token ids", "to_single_token"):
        sl.metrics.logit_difference(wrong, [0, 1])
    with refusal("token ids"):
        sl.metrics.logit_difference(1, wrong)


@pytest.mark.parametrize("position", [1.0, "end", None])
@pytest.mark.usefixtures("types_unchecked")
def test_a_position_is_a_whole_number(position):
    with refusal("position", "found"):
        sl.metrics.logit_difference(1, 0, position)


def test_logits_that_do_not_fit_the_answers():
    logits = noise((3, 4, 5))
    with refusal("each of 3 prompts", "found 2"):
        sl.metrics.logit_difference([1, 2], [0, 0])(logits)
    with refusal("position 4", "have 4"):
        sl.metrics.logit_difference(1, 0, position=4)(logits)
    for wrong in (5, -1):
        with refusal("token ids between 0 and 4"):
            sl.metrics.logit_difference(1, wrong)(logits)


def test_logits_of_other_shapes():
    with refusal("tokens of shape \\[1, 3\\]", "\\[1, 4, 5\\]"):
        sl.metrics.next_token_loss(torch.zeros(1, 3, dtype=torch.long))(noise((1, 4, 5)))
    with refusal("\\[1, 3, 5\\]", "\\[2, 3, 5\\]"):
        sl.metrics.kl_to_soft(noise((1, 3, 5)))(noise((2, 3, 5)))


@pytest.mark.parametrize("mask", [[1, 0, 0], [1, 0, 1], [0, 0, 0], None])
def test_a_prompt_without_a_next_token(mask):
    rows = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert sl.metrics.next_token_loss(torch.zeros_like(rows), rows).non_padding is not None
    with refusal("fewer than two tokens", "Leave it out"):
        if mask is None:
            sl.metrics.next_token_loss(torch.tensor([[1]]))
        else:
            mask = torch.cat([rows, torch.tensor([mask])])
            sl.metrics.next_token_loss(torch.zeros_like(mask), mask)


@pytest.mark.parametrize("value", [2.5, 2, torch.tensor(2.5), torch.tensor([[2.0]])])
def test_a_metric_gives_one_number(value):
    assert read_metric(lambda _logits: value, None) == float(value)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (torch.zeros(3), ArgumentError, ["scalar", "shape \\[3\\]", "mean over prompts"]),
        ("high", ArgumentError, ["scalar", "str"]),
        (None, ArgumentError, ["scalar", "NoneType"]),
        (True, ArgumentError, ["scalar", "bool"]),
        (math.nan, NonFiniteError, ["nan", "divides"]),
        (torch.tensor(math.inf), NonFiniteError, ["inf"]),
    ],
)
def test_what_is_no_number(value, kind, words):
    with refusal(*words, kind=kind):
        read_metric(lambda _logits: value, None)


@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_function():
    with refusal("function of the logits", "'loss'"):
        read_metric("loss", None)


def test_a_metric_that_gives_a_vector_is_named_without_its_address():
    def last(logits):
        return logits[:, -1]

    with pytest.raises(ArgumentError, match=r"; last gave shape \[1, 3\]. Pick the logit"):
        read_metric(last, torch.zeros(1, 2, 3))
