"""Sweeps over heads beside TransformerLens's own loop, for metrics of both kinds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import sat_lens as sl
from bench import by_hand
from bench.measure import Step, Target, Way
from bench.models import bridge, forward, gpt2, tokens
from bench.sizes import ONE_PROMPT, QUICK, SHORT, THIRD, WHOLE, Shape, Tokens, rounds
from bench.table import CACHED

ANSWER, WRONG = 5, 6
# One in so many heads of each layer goes through TransformerLens's loop; all cost the same.
PART = 3 if QUICK else 6


@pytest.mark.parametrize(
    ("shape", "size", "last", "whole"),
    [(WHOLE, ONE_PROMPT, 4.0, 2.0), (THIRD, SHORT, 2.5, 1.4)],
    ids=["one prompt", "many prompts"],
)
def bench_sweep(compare: Any, shape: Shape, size: Tokens, last: float, whole: float) -> None:
    """Every head: read at the last position, read everywhere, estimated, screened."""
    model, x = bridge(gpt2(shape)), tokens(shape, size)
    difference = sl.metrics.logit_difference([ANSWER] * size.prompts, [WRONG] * size.prompts)
    loss = sl.metrics.next_token_loss(x)
    some = [(i, j) for i in range(shape.layers) for j in range(0, shape.heads, PART)]
    # The saturated run that fills the loop's cache costs as much as a head, however many follow.
    share = (len(some) + 1) / (shape.layers * shape.heads + 1)

    loops = {
        metric: functools.partial(by_hand.sweep, model, x, metric, some)
        for metric in (difference, loss)
    }

    def swept(name: str, metric: Any, least: float | None, **arguments: Any) -> Way:
        bounds = () if least is None else (Target("speed-up", least), Target("cached", 1.5))
        return Way(
            name,
            lambda: sl.sweep_heads(model, x, metric, progress=False, **arguments),
            loops[metric],
            bounds,
            share,
        )

    ways = [
        Way(CACHED, cached(model, x)),
        swept("local, last position", difference, last),
        swept("z of the other run, last position", difference, last, source="run"),
        swept("local, loss", loss, whole),
        swept("attribution (approximate)", difference, None, method="attribution"),
        swept("screen", difference, None, method="screen"),
    ]
    section = f"Sweep over {shape.layers} x {shape.heads} heads"
    compare(section, size, forward(model, x), ways, rounds=rounds(2), warm=False, model=model)


def cached(model: Any, x: torch.Tensor) -> Step:
    """Say how to run a forward pass that keeps every activation."""

    def run() -> None:
        with torch.no_grad():
            model.run_with_cache(x)

    return run
