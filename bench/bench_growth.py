"""How cost grows with context, prompts, layers and heads: seconds, and forwards, at three sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sat_lens as sl
from bench.measure import Way
from bench.models import bridge, forward, gpt2, tokens
from bench.sizes import QUICK, Shape, Tokens, rounds

SHAPE = Shape(layers=2, heads=2, width=16, vocab=64) if QUICK else Shape(2, 6, 192, 4000)
SIZE = Tokens(1, 10) if QUICK else Tokens(2, 128)
FACTORS = (1, 2) if QUICK else (1, 2, 4)

AXES: dict[str, Callable[[int], tuple[Shape, Tokens]]] = {
    "context": lambda k: (SHAPE, Tokens(SIZE.prompts, k * SIZE.context)),
    "prompts": lambda k: (SHAPE, Tokens(k * SIZE.prompts, SIZE.context)),
    "layers": lambda k: (SHAPE.but(layers=k * SHAPE.layers), SIZE),
    "heads": lambda k: (SHAPE.but(heads=k * SHAPE.heads), SIZE),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("factor", FACTORS)
def bench_growth(compare: Any, axis: str, factor: int) -> None:
    """Heads share the width, so more of them add scores and take nothing from the matrices."""
    shape, size = AXES[axis](factor)
    model, x = bridge(gpt2(shape)), tokens(shape, size)
    difference = sl.metrics.logit_difference([5] * size.prompts, [6] * size.prompts)
    of_axis = {
        "context": size.context,
        "prompts": size.prompts,
        "layers": shape.layers,
        "heads": shape.heads,
    }

    plain = forward(model, x)

    def saturated() -> None:
        with sl.saturate(model):
            plain()

    ways = [
        Way("saturated forward", saturated),
        Way("paired run", lambda: sl.run_with_saturation_cache(model, x)),
        Way("role statistics", lambda: sl.head_roles(model, x, batch_size=99, progress=False)),
        Way("sweep", lambda: sl.sweep_heads(model, x, difference, progress=False)),
    ]
    compare(f"Growth with {axis}", of_axis[axis], plain, ways, rounds=rounds(5), model=model)
