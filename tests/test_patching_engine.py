"""The engine of sweeps: which models it serves, what it computes in less time, what it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from everyday import everyday
from tiny import GPT, of_class, tokens
from torch import nn
from zoo import MAKES, case, model_of

from sat_lens.caching.prefix import computed_by
from sat_lens.patching import HeadSweep, sweep_heads
from sat_lens.patching.engine import TOKENS_AT_ONCE_CPU, aligned_unembedding, quick_gelus

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


def test_no_more_tokens_run_at_once_than_make_a_processor_fast(odd: Any) -> None:
    """The bound is on the positions of all copies: with it, on the memory of their logits."""
    ids, rows = tokens(batch=5, length=32) % ODD, []
    handle = odd.unembed.register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[:2]))
    try:
        sweep = sweep_heads(odd, ids, spread, **QUIET)
    finally:
        handle.remove()
    assert sweep.checks.route == "replay"
    assert max(shape.numel() for shape in rows) == 3 * ids.numel() <= TOKENS_AT_ONCE_CPU


def everywhere(logits: torch.Tensor) -> torch.Tensor:
    return (logits[..., 7] - logits[..., 0]).mean()


def swept(name: str, **arguments: Any) -> HeadSweep:
    (inputs, *_), kwargs = case(name).inputs()
    batch = {"input": inputs, **kwargs}
    return sweep_heads(model_of(name).eval(), batch, everywhere, **arguments, **QUIET)


@pytest.mark.parametrize("name", everyday(MAKES, "gpt2", "bert", "native", "opt"))
@pytest.mark.parametrize("direction", everyday(["noising", "denoising"], "noising"))
def test_blocks_of_any_make_are_served(name: str, direction: Any) -> None:
    fast, slow = (swept(name, direction=direction, fast=fast) for fast in (True, False))
    assert (fast.checks.route, slow.checks.route) == ("replay", "generic")
    torch.testing.assert_close(fast.item_values, slow.item_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("component", ["z", "q", "k", "v", "pattern"])
@pytest.mark.parametrize("direction", everyday(["noising", "denoising"], "denoising"))
@pytest.mark.parametrize("name", everyday(["llama", "t5"], "llama"))
def test_every_component_is_served(name: str, component: Any, direction: Any) -> None:
    arguments = {"component": component, "direction": direction, "source": "run"}
    fast, slow = (swept(name, fast=fast, **arguments) for fast in (True, False))
    assert (fast.checks.route, slow.checks.route) == ("replay", "generic")
    torch.testing.assert_close(fast.item_values, slow.item_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["local", "run"])
def test_groups_over_several_blocks_are_served(source: Any) -> None:
    across = [[f"L0H{head}", f"L1H{3 - head}"] for head in range(4)]
    within = [[f"L1H{head}", f"L1H{head + 1}"] for head in range(3)]
    groups = across + within
    fast, slow = (swept("gpt2", heads=groups, source=source, fast=fast) for fast in (True, False))
    assert (fast.checks.route, slow.checks.route) == ("replay", "generic")
    torch.testing.assert_close(fast.item_values, slow.item_values, atol=1e-5, rtol=0)


def test_blocks_that_leave_something_for_later_ones_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a skipped block would have done beside returning its output is missing above it."""
    model = model_of("gpt2").eval()
    kind, forward = type(model.blocks[0]), type(model.blocks[0]).forward
    notes: list[int] = []

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self is model.blocks[0]:
            notes.append(1)
        elif self is model.blocks[-1] and notes:
            output[..., notes.pop()] += 1
        return output

    plain = sweep_heads(model, tokens(), everywhere, **QUIET)
    monkeypatch.setattr(kind, "forward", noting)
    sweep = sweep_heads(model, tokens(), everywhere, **QUIET)
    assert (plain.checks.route, sweep.checks.route) == ("replay", "generic")
