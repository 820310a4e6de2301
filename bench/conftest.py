"""The frame of the suite: one thread, time or memory, and the machine in the record."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import dataclasses
import gc
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from bench.measure import (
    PLAIN,
    Rounds,
    Step,
    Way,
    peaks_mb,
    pin_allocator,
    quartiles,
    steps_of,
    timed_rows,
)
from bench.models import forget_patterns

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice of what is measured."""
    parser.addoption("--memory", action="store_true", help="measure peak memory in place of time")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the allocator before anything large is freed."""
    if config.getoption("--memory"):
        pin_allocator()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Measures some ways beside a plain forward, and records rows of the table."""

    memory: bool
    benchmark: Any

    def __call__(
        self,
        section: str,
        setting: object,
        plain: Step,
        ways: Sequence[Way],
        *,
        rounds: int,
        model: Any = None,
        clock: Callable[[], float] = time.process_time,
        warm: bool = True,
    ) -> None:
        """Measure time, or memory, as the command asks.

        Args:
            section: Which part of the table the rows are of.
            setting: The size of the input, or what else tells these rows from others.
            plain: A plain forward of the same model, or what else is 1.
            ways: The rows.
            rounds: How often each is timed.
            model: The bridge whose leftovers do not count as memory.
            clock: What to take times from.
            warm: Whether to run everything once before it is measured.
        """
        steps = steps_of(plain, ways)
        info = self.benchmark.extra_info
        info |= {"section": section, "setting": str(setting)}
        for step in steps.values() if warm else ():
            step()
        if self.memory:
            peaks: list[dict[str, float] | None] = []
            with collected_quickly():
                self.benchmark.pedantic(
                    lambda: peaks.append(peaks_mb(steps, lambda: forget_patterns(model))), rounds=1
                )
            info["peaks_mb"] = peaks[0]
            return
        timed = Rounds(steps, clock)
        with collected_quickly():
            self.benchmark.pedantic(timed, rounds=rounds)
        info["plain_seconds"] = quartiles(timed.times[PLAIN])
        info["rows"] = timed_rows(timed, ways)


@contextlib.contextmanager
def collected_quickly() -> Iterator[None]:
    """Spare the garbage collector, which runs before each step, all that is there already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Comparison:
    """Measure ways to do something beside a plain forward."""
    return Comparison(request.config.getoption("--memory"), benchmark)


@pytest.fixture
def compare_time(request: pytest.FixtureRequest, benchmark: Any) -> Comparison:
    """Measure time alone."""
    if request.config.getoption("--memory"):
        pytest.skip("processes of its own, whose memory is not seen here")
    return Comparison(False, benchmark)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Name the versions that matter and the load, and not the machine's owner."""
    for private in ("node", "python_compiler", "python_build", "release"):
        machine_info.pop(private, None)
    machine_info["cores"] = len(os.sched_getaffinity(0))
    machine_info["threads"] = torch.get_num_threads()
    machine_info["load"] = os.getloadavg()[0]
    machine_info["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformer-lens", "transformers", "sat-lens")
    }
