"""How large the measured models and inputs are; ``QUICK=1`` shrinks all of them to almost nothing.

The full size is GPT-2 small with a third of its layers and of its vocabulary, so that blocks and
unembedding share the work as they do in the whole model. Sweeps of short prompts use all twelve
layers: what a replay saves depends on how many layers there are.
"""

from __future__ import annotations

import dataclasses
import os

QUICK = os.environ.get("QUICK", "") not in ("", "0")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a decoder."""

    layers: int
    heads: int
    width: int
    vocab: int

    def but(self, **changes: int) -> Shape:
        """Give the same shape with some numbers changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A batch of prompts of one length."""

    prompts: int
    context: int

    def __str__(self) -> str:
        return f"{self.prompts} x {self.context}"


FULL = Shape(layers=4, heads=12, width=768, vocab=16752)
TINY = Shape(layers=4, heads=3, width=24, vocab=64)
THIRD = TINY if QUICK else FULL
BLOCKS = THIRD.but(layers=2, vocab=64 if QUICK else 1000)
WHOLE = TINY if QUICK else FULL.but(layers=12, vocab=50257)

SHORT, MIDDLE, LONG = (
    (Tokens(4, 12), Tokens(1, 16), Tokens(1, 24))
    if QUICK
    else (Tokens(4, 128), Tokens(1, 512), Tokens(1, 1024))
)
CONTEXTS = (SHORT, MIDDLE, LONG)
KERNEL_CONTEXTS = (MIDDLE, LONG) if QUICK else (MIDDLE, LONG, Tokens(1, 4096))
ONE_PROMPT = Tokens(1, 10) if QUICK else Tokens(1, 32)
MANY = Tokens(2, 16) if QUICK else Tokens(4, 512)


def rounds(full: int, size: Tokens | None = None) -> int:
    """Say how often to measure: less often what takes long, once where speed is no question."""
    if QUICK:
        return 1
    return min(full, 3) if size == LONG else full
