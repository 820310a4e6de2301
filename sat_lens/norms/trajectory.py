"""One row of numbers for each checkpoint: its norms, and its way from those before it.

A rising cosine between checkpoints at a fixed distance in steps is no evidence that the direction
of the parameters converges: a random walk shows it as well. So rotation is given per doubling of
steps, and the straightness of the path beside that of a random walk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from sat_lens.errors import ArgumentError
from sat_lens.norms.checkpoints import Checkpoint
from sat_lens.norms.parameters import norms_of
from sat_lens.norms.sources import (
    Parameters,
    chunks,
    config_of,
    named_as_in_files,
    open_parameters,
    tied_names,
    wide,
)


class Trajectory:
    """Checkpoints of one run, opened as they are needed, at most three at a time."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self.steps = [checkpoint.step for checkpoint in checkpoints]
        self.tied: set[str] | None = None
        self._located: dict[int, Path | nn.Module] = {}
        models = [c.source for c in checkpoints if isinstance(c.source, nn.Module)]
        # Files of weights alone do not say how many heads there are; a model of the same run does.
        self._config = config_of(models[0]) if models else {}

    def located(self, index: int) -> Path | nn.Module:
        """Return a checkpoint's path or model, after a download where one is needed."""
        if index not in self._located:
            self._located[index] = self.checkpoints[index].located()
        return self._located[index]

    def row(self, index: int) -> dict[str, float]:
        """Measure a checkpoint, and its way from those before it."""
        with contextlib.ExitStack() as stack:
            now = self._open(index, stack)
            row = norms_of(now).summary()
            if index == 0:
                return row
            before = self._open(index - 1, stack)
            first = self._open(0, stack) if self.steps[0] == 0 else None
            _check_same_model(before, now)
            sums = _inner_products(now, before, first)
        row["rotation"] = sums.angle
        row["alignment"] = _cosine(sums.step_with_before, sums.step, sums.square_before)
        if first is not None:
            row["distance"] = math.sqrt(sums.moved)
            if index > 1:
                row["straightness"] = _cosine(sums.moved_with_before, sums.moved, sums.moved_before)
                row["random_walk"] = math.sqrt(self.steps[index - 1] / self.steps[index])
        return row | self._rotation_per_doubling(index, sums.angle)

    def _rotation_per_doubling(self, index: int, angle_before: float) -> dict[str, float]:
        partner = half_way(self.steps, index)
        if partner is None:
            return {}
        if partner == index - 1:
            angle = angle_before
        else:
            with contextlib.ExitStack() as stack:
                now, then = self._open(index, stack), self._open(partner, stack)
                angle = _inner_products(now, then, None).angle
        doublings = math.log2(self.steps[index] / self.steps[partner])
        return {
            "rotation_per_doubling": angle / doublings,
            "rotation_from": float(self.steps[partner]),
        }

    def _open(self, index: int, stack: contextlib.ExitStack) -> Parameters:
        source = self.located(index)
        opened = stack.enter_context(open_parameters(source, str(self.checkpoints[index])))
        if isinstance(source, nn.Module) and self._names_in_files:
            opened = named_as_in_files(source, opened, self._names_in_files)
        if not opened.config:
            opened = dataclasses.replace(opened, config=self._config)
        if self.tied is None:
            self.tied = tied_names(opened)
        return opened.without(self.tied)

    @functools.cached_property
    def _names_in_files(self) -> frozenset[str]:
        """The names of parameters in the first checkpoint that is no model in memory."""
        for index, checkpoint in enumerate(self.checkpoints):
            if not isinstance(checkpoint.source, nn.Module):
                with open_parameters(self.located(index), str(checkpoint)) as opened:
                    return frozenset(opened.shapes)
        return frozenset()


def half_way(steps: Sequence[int], index: int) -> int | None:
    """Return the checkpoint nearest to half the step, among those before it and after step 0.

    Example:
        >>> half_way([0, 16, 23, 32], 3)
        1
    """
    earlier = [i for i in range(index) if steps[i] > 0]
    return min(earlier, key=lambda i: abs(math.log2(steps[index] / steps[i]) - 1), default=None)


@dataclasses.dataclass
class _InnerProducts:
    """Sums over all parameters, for a checkpoint, the one before it, and the first.

    ``step`` leads from the one before to this one; ``moved`` from the first to this one.
    """

    square: float = 0.0
    square_before: float = 0.0
    with_before: float = 0.0
    step: float = 0.0
    step_with_before: float = 0.0
    moved: float = 0.0
    moved_before: float = 0.0
    moved_with_before: float = 0.0

    @property
    def angle(self) -> float:
        """The angle to the checkpoint before, in degrees."""
        return math.degrees(math.acos(_cosine(self.with_before, self.square, self.square_before)))


def _inner_products(
    now: Parameters, before: Parameters, first: Parameters | None
) -> _InnerProducts:
    """Sum over the tensors of two or three checkpoints side by side.

    Differences are taken before they are squared: the first steps move little, and would drown in
    the rounding of the difference of two large sums.
    """
    sums = _InnerProducts()
    for name in now.shapes:
        tensors = [source.read(name) for source in (now, before, first) if source is not None]
        for pieces in zip(*map(chunks, tensors), strict=True):
            _add(sums, *(wide(piece).cpu() for piece in pieces))
    return sums


def _add(sums: _InnerProducts, now: Tensor, before: Tensor, first: Tensor | None = None) -> None:
    step = now - before
    sums.square += float(now @ now)
    sums.square_before += float(before @ before)
    sums.with_before += float(now @ before)
    sums.step += float(step @ step)
    sums.step_with_before += float(step @ before)
    if first is not None:
        moved, moved_before = now - first, before - first
        sums.moved += float(moved @ moved)
        sums.moved_before += float(moved_before @ moved_before)
        sums.moved_with_before += float(moved @ moved_before)


def _cosine(inner: float, square: float, other_square: float) -> float:
    """Return the cosine of two vectors, NaN where one of them is zero."""
    if square * other_square == 0:
        return math.nan
    return max(-1.0, min(1.0, inner / math.sqrt(square * other_square)))


def _check_same_model(first: Parameters, other: Parameters) -> None:
    for name in first.shapes.keys() | other.shapes.keys():
        shapes = first.shapes.get(name), other.shapes.get(name)
        if shapes[0] != shapes[1]:
            a, b = ("missing" if shape is None else f"of shape {list(shape)}" for shape in shapes)
            raise ArgumentError(
                f"{first.name} and {other.name} are of different architectures: {name} is {a} in "
                f"the one and {b} in the other. Give checkpoints of one training run, saved in one "
                "way."
            )
