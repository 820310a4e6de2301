"""One row of numbers a checkpoint, with few of them in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sat_lens.norms.checkpoints import Checkpoint
from sat_lens.norms.parameters import norms_of
from sat_lens.norms.sources import (
    Parameters,
    config_of,
    named_as_in_files,
    open_parameters,
    tied_names,
)
from sat_lens.norms.trajectory import check_same_model, half_way, products


class Reader:
    """Opens checkpoints as they are needed; keeps the first, and no more than two others."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self.steps = [checkpoint.step for checkpoint in checkpoints]
        self.tied: set[str] | None = None
        self._located: dict[int, Path | nn.Module] = {}
        models = [c.source for c in checkpoints if isinstance(c.source, nn.Module)]
        # Files of weights alone do not say how many heads there are; a model of the same run does.
        self._config = config_of(models[0]) if models else {}

    def located(self, index: int) -> Path | nn.Module:
        """Give a checkpoint's path or model, after a download where one is needed."""
        if index not in self._located:
            self._located[index] = self.checkpoints[index].located()
        return self._located[index]

    def row(self, index: int) -> dict[str, float]:
        """Measure a checkpoint, and its way from those before it.

        Raises:
            ArgumentError: It is of another architecture than the one before.
            NonFiniteError: A parameter holds NaN or infinity.
            FileFormatError: It is missing, broken, or no checkpoint.
        """
        with contextlib.ExitStack() as stack:
            now = self._open(index, stack)
            row = norms_of(now).summary()
            if index == 0:
                return row
            before = self._open(index - 1, stack)
            first = self._open(0, stack) if self.steps[0] == 0 else None
            check_same_model(before, now)
            sums = products(now, before, first)
        row["rotation"] = sums.angle
        row["alignment"] = sums.alignment
        if first is not None:
            row["distance"] = math.sqrt(sums.moved)
            if index > 1:
                row["straightness"] = sums.straightness
                row["random_walk"] = math.sqrt(self.steps[index - 1] / self.steps[index])
        return row | self._rotation(index, sums.angle)

    def _rotation(self, index: int, angle_before: float) -> dict[str, float]:
        partner = half_way(self.steps, index)
        if partner is None:
            return {}
        if partner == index - 1:
            angle = angle_before
        else:
            with contextlib.ExitStack() as stack:
                angle = products(self._open(index, stack), self._open(partner, stack), None).angle
        doublings = math.log2(self.steps[index] / self.steps[partner])
        return {
            "rotation_per_doubling": angle / doublings,
            "rotation_from": float(self.steps[partner]),
        }

    def _open(self, index: int, stack: contextlib.ExitStack) -> Parameters:
        checkpoint, source = self.checkpoints[index], self.located(index)
        names = self._names_in_files if isinstance(source, nn.Module) else None
        opened = stack.enter_context(open_parameters(source, str(checkpoint)))
        if isinstance(source, nn.Module) and names:
            opened = named_as_in_files(source, opened, names)
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
