"""Exact values, estimates, or both: one way to fill in the values of a patch."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from sat_lens.patching.estimates import Screened, estimate, screen
from sat_lens.patching.exact import Measured, Task, empty_values, measure
from sat_lens.patching.recording import BaseRun
from sat_lens.patching.result import Checks
from sat_lens.patching.runs import Patch, Setting

Method = Literal["exact", "attribution", "screen"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured, and how, for each of the patches of one sweep."""

    setting: Setting
    tasks: list[Task]
    n_items: int
    n_positions: int | None
    method: Method
    confirm: float
    seed: int
    progress: bool

    def run(
        self,
        patch: Patch,
        base: Tensor,
        record: BaseRun | None,
        name: str,
        like: Screened | None = None,
    ) -> Screened:
        """Measure all tasks.

        Args:
            patch: What is patched into what.
            base: The metric of the run that is patched.
            record: A record of that run, if the fast route may be used.
            name: What the progress bar shows.
            like: For a screen, another one, whose items are confirmed here too.
        """
        values = empty_values(self.setting, self.n_items, self.n_positions)
        tasks = self.tasks
        if self.method != "exact":
            estimate(self.setting, patch, tasks, base, values)
            if self.method == "attribution":
                unconfirmed = torch.zeros(self.n_items, dtype=torch.bool)
                return Screened(Measured(values), unconfirmed, Checks("estimate"))
            if like is None:
                return screen(
                    self.setting,
                    patch,
                    tasks,
                    values,
                    base,
                    confirm=self.confirm,
                    run=record,
                    seed=self.seed,
                    progress=self.progress,
                )
            tasks = [task for task in tasks if like.confirmed[task.index[0]]]
        measured = measure(
            self.setting,
            patch,
            tasks,
            values,
            run=record,
            progress=self.progress,
            name=name,
            seed=self.seed,
        )
        confirmed = ~values.isnan().reshape(self.n_items, -1).all(1)
        checks = Checks(measured.route, measured.n_checked, measured.max_error)
        return Screened(measured, confirmed, checks)
