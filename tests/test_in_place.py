"""Saturation works in the scores' own memory where nobody can tell, and nowhere else."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import sat_lens as sl
from sat_lens.attention import Limit, Scale, Uniform, transform_scores
from sat_lens.errors import ArgumentError

BLOCKWISE = [Limit(), Limit(0.5), Limit("nearest"), Scale(0.0), Scale(2.5), Scale(1e38), Uniform()]
LOWEST = torch.finfo(torch.float32).min
NAME = "blocks.1.attn.hook_attn_scores"


def masked_scores(mask: float, shape: tuple[int, ...] = (2, 3, 300, 300)) -> Tensor:
    """Causal scores with ties and two rows without a key, of more than one block."""
    generator = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(*shape, generator=generator)).round(decimals=1)
    scores.masked_fill_(torch.ones(shape[-2:]).triu(1).bool(), mask)
    scores[0, :, :2] = mask
    return scores


@pytest.mark.parametrize("transform", BLOCKWISE, ids=repr)
@pytest.mark.parametrize("mask", [LOWEST, -math.inf, -1e30, LOWEST / 16])
def test_block_by_block_is_as_whole_tensors_to_the_bit(transform: Any, mask: float) -> None:
    scores = masked_scores(mask)
    # Scores that need a gradient go the other way.
    expected = transform_scores(scores.clone().requires_grad_(), transform).detach()
    before = scores.clone()
    assert torch.equal(transform_scores(scores, transform), expected)
    assert torch.equal(scores, before)
    found = transform_scores(scores, transform, overwrite=True)
    assert found is scores
    assert torch.equal(found, expected)


@pytest.mark.parametrize("heads", [None, "L1H2"])
@pytest.mark.parametrize("scale", [math.inf, 3.0])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scores_that_a_hook_of_somebody_else_keeps_stay_as_they_were(
    name: str, scale: float, heads: Any
) -> None:
    model, kept = zoo.model_of(name), []

    def keep(scores: Tensor, hook: Any) -> None:
        kept.append((scores, scores.clone()))

    with torch.no_grad():
        with sl.saturate(model, heads, scale):
            expected = model(tiny.tokens())
        with model.hooks(fwd_hooks=[(NAME, keep)]), sl.saturate(model, heads, scale):
            found = model(tiny.tokens())
    ((scores, copy),) = kept
    assert torch.equal(scores, copy)
    assert torch.equal(found, expected)


def test_gradients_and_a_block_without_them_see_the_same_logits() -> None:
    model = zoo.model_of("gpt2")
    with sl.saturate(model, scale=3.0):
        with_graph = model(tiny.tokens())
        with torch.no_grad():
            without = model(tiny.tokens())
    assert with_graph.requires_grad
    assert torch.equal(with_graph.detach(), without)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_two_threads_inside_one_block_on_one_model(name: str) -> None:
    model, results = zoo.model_of(name), []
    start = threading.Barrier(2)

    def work() -> None:
        start.wait(timeout=60)
        with torch.no_grad():
            results.extend(model(tiny.tokens()) for _ in range(20))

    with sl.saturate(model), torch.no_grad():
        expected = model(tiny.tokens())
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert len(results) == 40
    assert all(torch.equal(found, expected) for found in results)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (lambda m: sl.saturate(m, scale=lambda layer: 1.0), "other arguments"),
        (lambda m: sl.saturate(m, scale=math.nan), "nan"),
        (lambda m: sl.saturate(m, scale=torch.tensor(math.nan)), "nan"),
        (lambda m: sl.saturate(m, ties=math.nan), "nan"),
        (lambda m: sl.replace_attention(m, Limit), "instance"),
        (lambda m: sl.replace_attention(m, None), "function from scores to scores"),
    ],
)
def test_arguments_that_are_nearly_right(block: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words), block(zoo.model_of("llama")):
        pytest.fail("the block was entered")
