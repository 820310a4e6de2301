"""How many heads to run side by side: fixed on a CPU, elsewhere found by measuring on the way.

How many copies a device takes before it is busy, and how many fit its memory, depends on the
device, the model and the length of the prompts. So the first chunks of work are the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from sat_lens.patching.recording import BaseRun
from sat_lens.patching.runs import Patch

# Copies side by side pay while the matrices are small (measured, one CPU thread).
TOKENS_AT_ONCE_CPU = 512
# A bound for other devices, for the logits of so many positions may all be kept for a moment.
MOST_TOKENS_AT_ONCE = 16_384
# A larger chunk must be faster by so much, per head, to be worth its memory.
GAIN = 0.05

T = TypeVar("T")
R = TypeVar("R")


class Pace:
    """Cuts work into chunks, doubling their size while the time per unit of work falls.

    Args:
        size: The size of the first chunk.
        most: The largest size; ``size`` itself if nothing is to be tuned.
        device: Where the work is done; a clock has to wait for it.
        clock: Tells the time in seconds.

    Attributes:
        size: The size of the next chunk.
    """

    def __init__(
        self,
        size: int,
        most: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.size = size
        self._most = most
        self._device = device
        self._clock = clock
        self._best: tuple[float, int] | None = None

    def chunks(
        self, items: Sequence[T], work: Callable[[Sequence[T]], R], cost: float | None = None
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Do the work chunk by chunk, in smaller chunks once memory has run out.

        Args:
            items: What the work is done on.
            work: Does it on a chunk.
            cost: How much work an item is, to compare times by; None measures no times.

        Yields:
            Each chunk with its result.

        Raises:
            torch.OutOfMemoryError: A single item does not fit.
        """
        done = 0
        while done < len(items):
            chunk = items[done : done + self.size]
            try:
                begin = self._now()
                result = work(chunk)
                seconds = self._now() - begin
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                self._settle(len(chunk) // 2)
                continue
            if cost is not None and len(chunk) == self.size < self._most:
                self._learn(seconds / (len(chunk) * cost))
            done += len(chunk)
            yield chunk, result

    def _learn(self, seconds: float) -> None:
        """Go on to twice the size, or back to the best one."""
        if self._best is not None and seconds > (1 - GAIN) * self._best[0]:
            self._settle(self._best[1])
            return
        self._best = (seconds, self.size)
        self.size = min(2 * self.size, self._most)

    def _settle(self, size: int) -> None:
        self.size = self._most = size

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        return self._clock()


def pace_of(run: BaseRun, patch: Patch) -> Pace:
    """Give the pace of a replay."""
    resid = run.layers[0].resid_pre
    assert resid is not None
    # In a saturated run the smallest difference can decide which key wins, and matrices of another
    # size are rounded differently: there a head is replayed just as it is run.
    if patch.base is not None:
        return Pace(1, 1, resid.device)
    n_tokens = resid.shape[0] * resid.shape[1]
    start = max(TOKENS_AT_ONCE_CPU // n_tokens, 1)
    if resid.device.type == "cpu":
        return Pace(start, start, resid.device)
    return Pace(start, max(MOST_TOKENS_AT_ONCE // n_tokens, start), resid.device)
