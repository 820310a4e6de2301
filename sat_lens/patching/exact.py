"""Exact values of many patches: one forward pass each, or faster where that gives the same.

The fast route (:mod:`sat_lens.patching.replay`) is used only after it has reproduced the logits of
the generic one on a head of every kind of layer, and a random twentieth of its values is computed
the generic way as well. Where the two part, all values come from the generic route.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens.errors import ArgumentError
from sat_lens.patching.items import Item, Positions, resolve_positions
from sat_lens.patching.recording import BaseRun
from sat_lens.patching.replay import Replay
from sat_lens.patching.runs import Patch, Setting, patched_logits
from sat_lens.patching.side_by_side import side_by_side_logits

SHARE_CHECKED = 1 / 20
# With fewer values to measure, preparing and proving the fast route costs more than it saves.
LEAST_REPLAYED = 6
# Two float32 routes to the same logits differ by rounding, in proportion to the largest of them.
TOLERANCE = 1e-5
# So many rows use the unembedding's matrix at the full speed of the processor.
ROWS_UNEMBEDDED = 64

Route = Literal["replay", "generic"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One value to be measured: an item at one query position, or at all for None.

    ``index`` is the place of the value: (item,) or (item, position).
    """

    item: Item
    position: int | None
    index: tuple[int, ...]


@dataclasses.dataclass
class Measured:
    """Values of all tasks, and how they came about; what is not done (yet) is NaN."""

    values: Tensor
    route: Route = "generic"
    n_checked: int = 0
    max_error: float = 0.0
    complete: bool = True


class _RoutesPartError(Exception):
    """The fast route did not give what the generic route gives."""


def tasks_of(
    items: list[Item], positions: Positions, lengths: Mapping[str, int]
) -> tuple[list[Task], int | None]:
    """List what is to be measured, and the length of the axis of positions (None: no such axis).

    Args:
        items: The heads or groups.
        positions: At which positions, each by itself; None is all at once.
        lengths: How many positions each attention module has, by path.

    Raises:
        ArgumentError: A position lies outside, or a group's modules differ in length.
    """
    if positions is None:
        return [Task(item, None, (i,)) for i, item in enumerate(items)], None
    tasks: list[Task] = []
    n_positions = 0
    for i, item in enumerate(items):
        found = {lengths[path] for path in item.selection}
        if len(found) > 1:
            raise ArgumentError(
                f"The heads of {item.label} sit in sequences of {min(found)} to {max(found)} "
                "positions, so that a position means another token in each. Use positions=None, or "
                "groups within one stack."
            )
        resolved = resolve_positions(positions, found.pop())
        n_positions = max(n_positions, len(resolved))
        tasks += [Task(item, position, (i, j)) for j, position in enumerate(resolved)]
    return tasks, n_positions


def empty_values(setting: Setting, n_items: int, n_positions: int | None) -> Tensor:
    """Give a tensor of NaN: one value per item, position (if any) and prompt (if kept)."""
    shape = [n_items]
    if n_positions is not None:
        shape.append(n_positions)
    if setting.readout.per_prompt:
        shape.append(setting.readout.n_prompts)
    return torch.full(shape, math.nan)


def measure(
    setting: Setting,
    patch: Patch,
    tasks: list[Task],
    values: Tensor,
    *,
    run: BaseRun | None,
    progress: bool,
    name: str,
    seed: int = 0,
) -> Measured:
    """Measure the tasks one after the other, into ``values``.

    ``run`` is a record of the run that is patched, if the fast route may be used. An interrupt ends
    the work; what is done by then is kept, and the result says that the rest is missing.
    """
    measured = Measured(values)
    with (
        torch.no_grad(),
        tqdm(total=len(tasks), desc=name, unit="patch", disable=not progress) as bar,
    ):
        try:
            if run is not None and len(tasks) >= LEAST_REPLAYED:
                try:
                    _by_replay(setting, patch, run, tasks, measured, bar, seed)
                except (_RoutesPartError, torch.OutOfMemoryError):
                    values.fill_(math.nan)
                    measured = Measured(values)
                    bar.reset()
                else:
                    return measured
            for task in tasks:
                logits = patched_logits(setting, patch, task.item, task.position)
                values[task.index] = setting.readout.value_at(logits)
                bar.update()
        except KeyboardInterrupt:
            if bool(values.isnan().all()):
                raise
            measured.complete = False
    return measured


def _by_replay(
    setting: Setting,
    patch: Patch,
    run: BaseRun,
    tasks: list[Task],
    measured: Measured,
    bar: Any,
    seed: int,
) -> None:
    with _falling_back():
        replay = Replay.of(setting, patch, [task.item for task in tasks], run)
    if replay is None:
        raise _RoutesPartError
    measured.route = "replay"
    layers = [list(some) for _, some in itertools.groupby(tasks, key=lambda task: task.item.layer)]
    proof = _one_of_each_kind(replay, layers)
    proven = {some[0].index for some in proof}
    others = [task.index for task in tasks if task.index not in proven]
    n_drawn = min(max(round(SHARE_CHECKED * len(tasks)), 1), len(others))
    checked = proven.union(random.Random(seed).sample(others, n_drawn))
    done = {task.index for some in proof for task in some}
    rest = [[task for task in layer if task.index not in done] for layer in layers]
    for some in (proof, rest):
        _store(setting, patch, replay, some, checked, measured, bar)


def _store(
    setting: Setting,
    patch: Patch,
    replay: Replay,
    layers: list[list[Task]],
    checked: set[tuple[int, ...]],
    measured: Measured,
    bar: Any,
) -> None:
    """Replay layer by layer, and unembed so many rows at once as that takes to be fast, not more.

    Logits are large: those of a whole layer of heads can take more memory than all else together.
    """
    waiting: list[tuple[Task, Tensor]] = []

    def unembed(count: int) -> None:
        if not count:
            return
        tasks, streams = zip(*waiting[:count], strict=True)
        del waiting[:count]
        with _falling_back():
            found = replay.logits(torch.cat(streams))
            for task, logits in zip(tasks, found, strict=True):
                measured.values[task.index] = setting.readout.value_at(logits)
        to_check = [(t, x) for t, x in zip(tasks, found, strict=True) if t.index in checked]
        _check(setting, patch, replay, to_check, measured)
        bar.update(len(tasks))

    def streams_of(chunk: Sequence[Task]) -> Tensor:
        with _falling_back():
            return replay.streams([(task.item, task.position) for task in chunk])

    try:
        for of_layer in filter(None, layers):
            depth = replay.depth(of_layer[0].item)
            for chunk, found in replay.pace.chunks(of_layer, streams_of, depth):
                streams = found.split(patch.batch.size)
                waiting += zip(chunk, streams, strict=True)
                enough = math.ceil(ROWS_UNEMBEDDED / streams[0].shape[:2].numel())
                while len(waiting) >= enough:
                    unembed(enough if found.device.type == "cpu" else len(waiting))
    except KeyboardInterrupt:
        unembed(len(waiting))
        raise
    unembed(len(waiting))


@contextlib.contextmanager
def _falling_back() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # fewer heads side by side may still fit
        raise
    except Exception as error:  # whatever it is, whole forward passes will do or say better
        raise _RoutesPartError from error


def _check(
    setting: Setting,
    patch: Patch,
    replay: Replay,
    replayed: list[tuple[Task, Tensor]],
    measured: Measured,
) -> None:
    """Compute tasks by whole forward passes, and put the results in the place of the replay's.

    The logits are compared, not only the metric: a metric of small numbers shows no difference.
    """
    tolerance = TOLERANCE * max(replay.scale, 1.0)
    at_once = replay.pace.chunks(
        replayed, lambda some: _whole(setting, patch, [task for task, _ in some])
    )
    for some, whole in at_once:
        for (task, logits), expected in zip(some, whole, strict=True):
            exact = setting.readout.value_at(expected)
            error = float((exact - measured.values[task.index]).abs().max())
            same = all(
                torch.allclose(mine, theirs, rtol=TOLERANCE, atol=tolerance)
                for mine, theirs in zip(logits, expected, strict=True)
            )
            if not (same and error <= tolerance):
                raise _RoutesPartError
            measured.values[task.index] = exact
            measured.n_checked += 1
            measured.max_error = max(measured.max_error, error)


def _whole(setting: Setting, patch: Patch, tasks: list[Task]) -> list[Tensor]:
    with _falling_back():
        if len(tasks) > 1:
            return side_by_side_logits(setting, patch, [(t.item, t.position) for t in tasks])
        return [patched_logits(setting, patch, tasks[0].item, tasks[0].position)]


def _one_of_each_kind(replay: Replay, layers: list[list[Task]]) -> list[list[Task]]:
    """The first tasks of every kind of layer: their replay runs through all the layers above."""
    first: dict[object, list[Task]] = {}
    for tasks in layers:
        first.setdefault(replay.kind(tasks[0].item), tasks[: replay.pace.size])
    return list(first.values())
