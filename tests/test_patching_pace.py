"""How many heads run side by side: chosen by the clock, and by the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import GPT, of_class, tokens

import sat_lens as sl
from sat_lens.patching import sweep_heads
from sat_lens.patching.engine import Engine, Pace

CPU = torch.device("cpu")


class Device:
    """A device that needs ``fixed`` seconds a call and ``each`` per item, and holds ``room``."""

    def __init__(self, fixed: float, each: float, room: int = 10**6) -> None:
        self.fixed, self.each, self.room = fixed, each, room
        self.now = self.seen = 0.0
        self.sizes: list[int] = []

    def clock(self) -> float:
        return self.now

    def work(self, chunk: Sequence[int]) -> int:
        self.sizes.append(len(chunk))
        self.now += self.fixed + self.each * len(chunk)
        if len(chunk) > self.room:
            raise torch.OutOfMemoryError("too much")
        return sum(chunk)


def paced(device: Device, n_items: int, size: int = 1, most: int = 64) -> tuple[Pace, list[int]]:
    pace = Pace(size, most, CPU, device.clock)
    done: list[int] = []
    for chunk, total in pace.chunks(range(n_items), device.work, 1.0):
        assert total == sum(chunk)
        done += chunk
    return pace, done


def test_size_doubles_while_items_become_cheaper() -> None:
    device = Device(fixed=1.0, each=0.0)
    pace, done = paced(device, 200)
    assert done == list(range(200))
    assert device.sizes == [1, 2, 4, 8, 16, 32, 64, 64, 9]
    assert pace.size == 64


def test_size_goes_back_to_the_best_where_doubling_gains_nothing() -> None:
    device = Device(fixed=1.0, each=1.0)
    # Seconds per item: 2, 1.5, 1.25, 1.125, 1.0625, 1.03: the last step gains less than 5%.
    pace, done = paced(device, 200)
    assert done == list(range(200))
    assert device.sizes[:7] == [1, 2, 4, 8, 16, 32, 16]
    assert set(device.sizes[7:-1]) == {16}
    assert pace.size == 16


def test_a_busy_device_is_given_no_more() -> None:
    device = Device(fixed=0.0, each=1.0)
    assert paced(device, 20, size=4)[0].size == 4
    assert device.sizes == [4, 8, 4, 4]


def test_memory_that_runs_out_halves_the_size_for_good() -> None:
    device = Device(fixed=1.0, each=0.0, room=10)
    pace, done = paced(device, 60)
    assert done == list(range(60))
    assert device.sizes == [1, 2, 4, 8, 16, *[8] * 5, 5]
    assert pace.size == 8


def test_an_item_that_does_not_fit_is_not_tried_for_ever() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        paced(Device(1.0, 0.0, room=0), 4, size=4)


def test_depth_is_taken_out_of_the_times() -> None:
    """Four layers below cost four times as much; that must not look like a gain by doubling."""
    device = Device(fixed=0.0, each=4.0)
    pace = Pace(2, 64, CPU, device.clock)
    list(pace.chunks(range(2), device.work, 4.0))
    device.each = 1.0
    list(pace.chunks(range(8), device.work, 1.0))
    assert pace.size == 2


def test_without_a_cost_nothing_is_learnt() -> None:
    device = Device(fixed=1.0, each=0.0)
    pace = Pace(2, 64, CPU, device.clock)
    list(pace.chunks(range(8), device.work))
    assert device.sizes == [2, 2, 2, 2]


def test_the_clock_waits_for_a_device_that_works_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is told to do takes no time until somebody waits for it."""
    device = Device(fixed=1.0, each=1.0)

    def synchronize(_device: torch.device) -> None:
        device.seen = device.now

    monkeypatch.setattr(
        torch, "get_device_module", lambda _: SimpleNamespace(synchronize=synchronize)
    )
    pace = Pace(1, 64, torch.device("cuda"), lambda: device.seen)
    list(pace.chunks(range(100), device.work, 1.0))
    assert pace.size == 16


@pytest.fixture(scope="module")
def model() -> Any:
    return of_class("GPT2LMHeadModel", "GPT2Config", **GPT | {"n_layer": 3})()


def limited(replayed: Callable[..., Any], room: int) -> Callable[..., Any]:
    def logits(self: Engine, entries: Any) -> Any:
        if len(entries) > room:
            raise torch.OutOfMemoryError("too much")
        return replayed(self, entries)

    return logits


@pytest.mark.parametrize("room", [1, 3, 0])
def test_a_sweep_gives_the_same_values_with_little_memory(
    model: Any, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = sl.metrics.logit_difference(7, 9)
    whole = sweep_heads(model, tokens(), metric, progress=False)
    assert whole.checks.route == "replay"
    # The CPU would begin with 25 heads side by side, more than a layer has.
    monkeypatch.setattr(Engine, "logits", limited(Engine.logits, room))
    small = sweep_heads(model, tokens(), metric, progress=False)
    assert small.checks.route == ("replay" if room else "generic")
    torch.testing.assert_close(small.values, whole.values, atol=1e-5, rtol=0)
