"""One forward pass: plain, saturated, and at every level at which attention can be reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sat_lens as sl
from bench import by_hand
from bench.measure import Step, Target, Way
from bench.models import bert, bridge, forward, gpt2, gptj, tokens
from bench.sizes import (
    BLOCKS,
    CONTEXTS,
    KERNEL_CONTEXTS,
    MANY,
    MIDDLE,
    SHORT,
    THIRD,
    Tokens,
    rounds,
)

SATURATED = {SHORT: 1.03, MIDDLE: 1.05}
NAMES = {gptj: "GPT-J", bert: "BERT"}


@pytest.mark.parametrize("size", CONTEXTS, ids=str)
def bench_saturated_forward(compare: Any, size: Tokens) -> None:
    """The saturated forward through TransformerLens's scores."""
    model, x = bridge(gpt2(THIRD)), tokens(THIRD, size)
    bound = (Target("forwards", SATURATED[size]),) if size in SATURATED else ()

    def ours(**arguments: Any) -> Step:
        return saturated(model, x, **arguments)

    def hooked(where: Any, hook: Any) -> Step:
        return forward(model, x, [(where, hook)])

    first = "blocks.0.attn.hook_attn_scores"
    compare(
        "Saturated forward",
        size,
        forward(model, x),
        [
            Way("c = 3", ours(scale=3.0), hooked(by_hand.is_scores, by_hand.scaled), bound),
            Way("limit", ours(), hooked(by_hand.is_scores, by_hand.saturated), bound),
            Way("limit, one head", ours(heads="L0H0"), hooked(first, by_hand.one_saturated), bound),
            Way(
                "nearest",
                ours(ties="nearest"),
                hooked(by_hand.is_pattern, by_hand.nearest_saturated),
            ),
        ],
        rounds=rounds(7, size),
        model=model,
    )


def bench_blocks(compare: Any) -> None:
    """Blocks with next to no unembedding beside them: the worst case for what hooks cost."""
    model, x = bridge(gpt2(BLOCKS)), tokens(BLOCKS, MANY)
    bound = (Target("forwards", 1.10),)
    ways = [
        Way("c = 3", saturated(model, x, scale=3.0), targets=bound),
        Way("limit", saturated(model, x), targets=bound),
        Way(
            "a hook that changes nothing",
            forward(model, x, [(by_hand.is_scores, by_hand.identity)]),
        ),
    ]
    compare("Blocks alone (2 layers)", MANY, forward(model, x), ways, rounds=rounds(7), model=model)


@pytest.mark.parametrize("build", NAMES, ids=NAMES.get)
def bench_softmax_level(compare: Any, build: Any) -> None:
    """Interception of the softmax. TransformerLens alone discards what a hook changes here."""
    model, x = bridge(build(THIRD)), tokens(THIRD, MIDDLE)
    assert {site.level for site in sl.attention_sites(model)} == {"softmax"}
    bound = (Target("forwards", 1.10),)
    ways = [
        Way("c = 3", saturated(model, x, scale=3.0), targets=bound),
        Way("limit", saturated(model, x), targets=bound),
    ]
    compare(
        f"Softmax level, {NAMES[build]}",
        MIDDLE,
        forward(model, x),
        ways,
        rounds=rounds(7),
        model=model,
    )


def kernel_is_served() -> bool:
    """Say whether this version saturates plain Hugging Face models inside their kernels."""
    try:
        sites = sl.attention_sites(gpt2(BLOCKS, "sdpa"))
    except sl.SatLensError:
        return False
    return {site.level for site in sites} == {"kernel"}


if kernel_is_served():

    @pytest.mark.parametrize("size", KERNEL_CONTEXTS, ids=str)
    def bench_kernel_level(compare: Any, size: Tokens) -> None:
        """A plain Hugging Face model whose attention never forms the n by n matrix."""
        model, x = gpt2(BLOCKS, "sdpa"), tokens(BLOCKS, size)
        bound = (Target("forwards", 1.02),)
        ways = [
            Way("c = 3", saturated(model, x, scale=3.0), targets=bound),
            Way("limit", saturated(model, x), targets=bound),
            Way("limit, one head", saturated(model, x, heads="L0H0")),
        ]
        compare(
            "Kernel level, plain GPT-2 (2 layers)",
            size,
            forward(model, x),
            ways,
            rounds=rounds(5, size),
        )


def saturated(model: Any, x: torch.Tensor, **arguments: Any) -> Step:
    """Say how to run a saturated forward."""
    plain = forward(model, x)

    def run() -> None:
        with sl.saturate(model, **arguments):
            plain()

    return run
