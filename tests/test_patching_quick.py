"""What replays compute in less time: the same numbers, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GPT, of_class, tokens
from torch import nn

from sat_lens.patching import sweep_heads
from sat_lens.patching.quick import aligned_unembedding, computed_by, quick_gelus

ODD = 61
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def odd() -> Any:
    """A GPT-2 whose vocabulary fills no whole number of cache lines."""
    size = GPT | {"vocab_size": ODD, "n_layer": 3}
    return of_class("GPT2LMHeadModel", "GPT2Config", **size)()


def inputs() -> torch.Tensor:
    return tokens() % ODD


def spread(logits: torch.Tensor) -> torch.Tensor:
    return (logits[..., 7] - logits[..., -1]).mean()


@pytest.mark.parametrize("bias", ["none", "zero", "some"])
def test_logits_in_aligned_rows_are_those_of_the_unembedding(bias: str) -> None:
    linear, x = nn.Linear(8, ODD, bias=bias != "none"), torch.randn(3, 5, 8)
    with torch.no_grad():
        if bias == "zero":
            linear.bias.zero_()
        expected = linear(x)
        with computed_by(aligned_unembedding(linear)):
            found = linear(x)
    assert (expected.stride(1), found.stride(1)) == (ODD, 64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert "forward" not in linear.__dict__


@pytest.mark.parametrize(
    "linear",
    [
        nn.Linear(8, 64),
        nn.Linear(8, ODD, dtype=torch.float64),
        type("Other", (nn.Linear,), {})(8, ODD),
    ],
    ids=["aligned already", "another precision", "another class"],
)
def test_what_is_not_understood_is_left_alone(linear: nn.Module) -> None:
    assert not aligned_unembedding(linear)
    linear.__dict__["forward"] = linear.forward
    assert not aligned_unembedding(linear)


def test_a_replay_leaves_the_modules_as_they_were(odd: Any) -> None:
    assert len(quick_gelus(odd.modules())) == 3
    assert len(aligned_unembedding(odd.unembed)) == 1
    fast = sweep_heads(odd, inputs(), spread, **QUIET)
    slow = sweep_heads(odd, inputs(), spread, fast=False, **QUIET)
    assert (fast.checks.route, slow.checks.route) == ("replay", "generic")
    torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0)
    assert not [module for module in odd.modules() if "forward" in module.__dict__]


def test_an_error_in_the_middle_leaves_them_so_too(odd: Any) -> None:
    forwards = {**quick_gelus(odd.modules()), **aligned_unembedding(odd.unembed)}
    with pytest.raises(ZeroDivisionError), computed_by(forwards):
        raise ZeroDivisionError
    assert not [module for module in odd.modules() if "forward" in module.__dict__]


def test_a_metric_that_wants_rows_without_gaps_gets_whole_passes(odd: Any) -> None:
    def flat(logits: torch.Tensor) -> torch.Tensor:
        return logits.view(-1)[7 :: logits.shape[-1]].mean()

    fast = sweep_heads(odd, inputs(), flat, **QUIET)
    slow = sweep_heads(odd, inputs(), flat, fast=False, **QUIET)
    assert fast.checks.route == "generic"
    assert fast.values.equal(slow.values)


def test_no_more_logits_are_held_at_once_than_make_the_unembedding_fast(odd: Any) -> None:
    """Four heads of 32 tokens are replayed side by side, and unembedded two by two."""
    ids, rows = tokens(batch=1, length=32) % ODD, []
    handle = odd.unembed.register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[:2]))
    try:
        sweep = sweep_heads(odd, ids, spread, **QUIET)
    finally:
        handle.remove()
    assert sweep.checks.route == "replay"
    assert max(shape.numel() for shape in rows) == 64
