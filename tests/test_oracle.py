"""The oracle is worth something: right by hand on small rows, and it notices wrong heads."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
import zoo

import sat_lens as sl

LOW = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("scores", "c", "row"),
    [
        ([math.log(2), 0.0], 1, [2 / 3, 1 / 3]),
        ([math.log(2), 0.0], 2, [4 / 5, 1 / 5]),
        ([math.log(2), 0.0, LOW], 0, [1 / 2, 1 / 2, 0]),
        ([3.0, 1.0, 3.0, -math.inf], math.inf, [1 / 2, 0, 1 / 2, 0]),
        ([LOW, -math.inf, -10_000.0], 2, [0, 0, 0]),
        ([5e4, 5e4 - 1, 0.0], 1, [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0]),
    ],
)
def test_rows_by_hand(scores, c, row):
    found = oracle.rescaled_rows(torch.tensor(scores), c)
    torch.testing.assert_close(found, torch.tensor(row, dtype=torch.float64))


def test_gradients_are_finite_beside_masked_keys():
    scores = torch.tensor([1.0, 0.0, -math.inf, LOW], requires_grad=True)
    oracle.rescaled_rows(scores, 3)[0].backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert scores.grad[0] > 0


@pytest.mark.parametrize("name", ["llama", "xglm", "led", "longt5_local"])
def test_heads_and_modules_are_told_apart(name):
    case, model = zoo.case(name), zoo.model_of(name)
    args, kwargs = case.inputs()
    paths = [site.path for site in sl.attention_sites(model)]
    outputs = []
    with torch.no_grad():
        soft = model(*args, **kwargs)
        for path in paths:
            for head in range(case.n_heads):
                with oracle.rescaled_softmax(model, {path: [head]}, math.inf, case.n_heads):
                    outputs.append(model(*args, **kwargs))
        with oracle.rescaled_softmax(model, {path: [] for path in paths}, 3, case.n_heads):
            outputs.append(model(*args, **kwargs))
        after = model(*args, **kwargs)
    assert torch.equal(outputs.pop(), soft)
    assert torch.equal(after, soft)
    together = torch.stack([soft, *outputs]).flatten(1)
    distances = torch.cdist(together, together).fill_diagonal_(1)
    assert distances.min() > 1e-3


def test_a_module_without_softmax_is_noticed():
    model = zoo.model_of("llama")
    with (
        pytest.raises(AssertionError, match="no softmax"),
        oracle.rescaled_softmax(model, {"blocks.0.mlp": [0]}, 2, tiny.N_HEADS),
    ):
        model(tiny.tokens())
