"""What takes more than a forward pass: both runs, roles, critical scales, curves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import sat_lens as sl
from bench import by_hand
from bench.measure import Target, Way
from bench.models import bridge, forward, gpt2, tokens
from bench.sizes import CONTEXTS, QUICK, SHORT, THIRD, Tokens, rounds

SCALES = (0.0, *(2.0**k for k in range(-3, 7)), math.inf)
BYTES = 4


@pytest.mark.parametrize("size", CONTEXTS, ids=str)
def bench_paired_run(compare: Any, size: Tokens) -> None:
    """Soft and saturated residual streams, also where the first layers stay soft."""
    model, x = bridge(gpt2(THIRD)), tokens(THIRD, size)
    layers, heads = THIRD.layers, THIRD.heads

    def pair(first: int) -> Any:
        chosen = [(layer, head) for layer in range(first, layers) for head in range(heads)]
        return lambda: _paired(model, x, chosen)

    ways = [
        Way(
            f"the first {soft} of {layers} layers stay soft" if soft else "all heads saturated",
            pair(soft),
            None if soft else lambda: by_hand.paired(model, x),
            (Target("forwards", 2.05 - 0.5 * soft / layers),),
        )
        for soft in (0, layers // 2, layers - 1)
    ]
    compare("Paired run", size, forward(model, x), ways, rounds=rounds(5, size), model=model)


@pytest.mark.parametrize("size", CONTEXTS, ids=str)
def bench_role_statistics(compare: Any, size: Tokens) -> None:
    """All statistics of all heads, the critical scales among them, in one pass."""
    model, x = bridge(gpt2(THIRD)), tokens(THIRD, size)
    scores_mb = BYTES * size.prompts * THIRD.heads * size.context**2 / 2**20
    least = 0 if QUICK else 512
    peak = (Target("peak MB", 4 * scores_mb),) if size.context >= least else ()

    def roles() -> Any:
        return sl.head_roles(
            model, x, batch_size=size.prompts, min_keys=by_hand.MIN_KEYS, progress=False
        )

    ways = [
        Way(
            "roles (beside: cached patterns, no critical scales)",
            roles,
            lambda: by_hand.role_statistics(model, x),
            (Target("forwards", 1.15), *peak),
        )
    ]
    compare("Role statistics", size, forward(model, x), ways, rounds=rounds(7, size), model=model)


def bench_critical_scales(compare: Any) -> None:
    """The critical scales of all heads, which the same pass gives, beside a forward for each."""
    model, x = bridge(gpt2(THIRD)), tokens(THIRD, SHORT)
    ways = [
        Way(
            f"roles and critical scales (beside: {len(SCALES)} forwards)",
            lambda: sl.head_roles(model, x, batch_size=SHORT.prompts, progress=False),
            lambda: by_hand.critical_scales(model, x, SCALES),
            (Target("forwards", 1.15), Target("speed-up", 10)),
        )
    ]
    compare("Critical scales", SHORT, forward(model, x), ways, rounds=rounds(3), model=model)


def bench_scaling_curve(compare: Any) -> None:
    """The output at twelve inverse temperatures; the library adds similarities with a control."""
    model, x = bridge(gpt2(THIRD)), tokens(THIRD, SHORT)
    way = Way(
        f"{len(SCALES)} scales, with similarities (beside: without)",
        lambda: sl.scaling_curve(model, x, scales=SCALES, batch_size=SHORT.prompts, progress=False),
        lambda: by_hand.scaling_curve(model, x, SCALES),
    )
    compare("Scaling curve", SHORT, forward(model, x), [way], rounds=rounds(2), model=model)


def _paired(model: Any, x: torch.Tensor, heads: list[tuple[int, int]]) -> Any:
    with torch.no_grad():
        return sl.run_with_saturation_cache(
            model, x, heads=heads, names_filter=by_hand.is_resid_post
        )
