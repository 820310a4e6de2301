"""Time and memory of several ways to do something, so that a noisy machine spoils neither.

All ways run in one process and on one thread, interleaved in rounds whose order rotates; what
counts is the process's CPU time, and a ratio is taken within a round. Memory is the peak of the
resident set above where it stood, with freed blocks given back to the system. That slows allocation
down, and works only if nothing large was freed before, so memory has a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Step = Callable[[], object]

PLAIN = "plain"
BY_HAND = " by hand"
_MMAP_THRESHOLD = -3
_PINNED = 256 * 1024
_PROCESS = Path("/proc/self")


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on one of a row's numbers; :mod:`table` knows the kinds and says if it is met."""

    kind: str
    bound: float


@dataclasses.dataclass(frozen=True)
class Way:
    """One row of the table: what the library does, and how it is done with TransformerLens alone.

    ``hand_share`` is the part of the work that ``by_hand`` does, where all of it takes too long.
    """

    name: str
    run: Step
    by_hand: Step | None = None
    targets: tuple[Target, ...] = ()
    hand_share: float = 1.0


def steps_of(plain: Step, ways: Sequence[Way]) -> dict[str, Step]:
    """List what is run in a round, by name; the plain forward is the first."""
    steps = {PLAIN: plain}
    for way in ways:
        steps[way.name] = way.run
        if way.by_hand is not None and way.by_hand not in steps.values():
            steps[way.name + BY_HAND] = way.by_hand
    return steps


def hand_names(steps: Mapping[str, Step], ways: Sequence[Way]) -> dict[str, str]:
    """Say for each way under which name its counterpart is run; ways may share one."""
    names = {step: name for name, step in steps.items()}
    return {way.name: names[way.by_hand] for way in ways if way.by_hand is not None}


class Rounds:
    """Runs every step once per call, each call starting one step later; keeps the CPU times."""

    def __init__(self, steps: Mapping[str, Step], clock: Callable[[], float]) -> None:
        self.steps = steps
        self.clock = clock
        self.times: dict[str, list[float]] = {name: [] for name in steps}

    def __call__(self) -> None:
        """Run one round."""
        names = list(self.steps)
        first = len(self.times[PLAIN]) % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            start = self.clock()
            self.steps[name]()
            self.times[name].append(self.clock() - start)

    def ratios(self, name: str, to: str = PLAIN, factor: float = 1.0) -> list[float]:
        """Divide a step's times by another's, round by round."""
        pairs = zip(self.times[name], self.times[to], strict=True)
        return [factor * mine / other for mine, other in pairs]

    def more(self, name: str) -> list[float]:
        """Subtract the plain forward's times from a step's, round by round."""
        pairs = zip(self.times[name], self.times[PLAIN], strict=True)
        return [mine - plain for mine, plain in pairs]


def quartiles(values: Sequence[float]) -> list[float]:
    """Give the median and the quartiles; of one value, itself three times."""
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def timed_rows(rounds: Rounds, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Say of each way how its time compares with a plain forward and with the way by hand."""
    rows = []
    by_hand = hand_names(rounds.steps, ways)
    for way in ways:
        row: dict[str, Any] = {
            "name": way.name,
            "seconds": quartiles(rounds.times[way.name]),
            "seconds_more": quartiles(rounds.more(way.name)),
            "forwards": quartiles(rounds.ratios(way.name)),
            "targets": [dataclasses.asdict(target) for target in way.targets],
        }
        if way.name in by_hand:
            hand, all_of_it = by_hand[way.name], 1 / way.hand_share
            row["by_hand"] = hand
            row["hand_forwards"] = quartiles(rounds.ratios(hand, factor=all_of_it))
            row["speed-up"] = quartiles(rounds.ratios(hand, way.name, all_of_it))
        rows.append(row)
    return rows


def peaks_mb(steps: Mapping[str, Step], before_each: Step) -> dict[str, float] | None:
    """Measure the peak memory of every step in MB; None where the system does not tell it.

    Call :func:`pin_allocator` when the process begins.
    """
    try:
        _reset_peak()
    except OSError:
        return None
    found = {}
    steps[PLAIN]()
    for name, step in steps.items():
        before_each()
        gc.collect()
        _reset_peak()
        before = _status_mb("VmRSS")
        step()
        found[name] = _status_mb("VmHWM") - before
    return found


def pin_allocator() -> None:
    """Have every large block returned to the system when it is freed, where there is a way."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _PINNED)


def _reset_peak() -> None:
    (_PROCESS / "clear_refs").write_text("5")


def _status_mb(field: str) -> float:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"the system does not tell {field}")
