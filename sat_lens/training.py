"""Follow norms and saturation while a model trains.

It works as a callback of the Hugging Face Trainer, as an object whose ``step`` your own loop calls,
or around a loop without callbacks, such as TransformerLens's.

When not to use it: for a run that is over. :func:`sat_lens.norm_growth` reads its checkpoints, also
the ``model_N.pt`` that TransformerLens's training loop can write. There ``model_0.pt`` is the model
after the first step, and N starts anew in each epoch, so keep a copy of the initial model and name
the steps yourself: ``norm_growth({0: initial, 1: "model_0.pt", 101: "model_100.pt"})``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from sat_lens import figures
from sat_lens._checks import check_count, check_module, check_share, is_count, is_number
from sat_lens.data import repeatable
from sat_lens.errors import ArgumentError, FileFormatError, NonFiniteError, SatLensError
from sat_lens.norms import parameter_norms, saturation_measures
from sat_lens.norms.measures import (
    import_transformer_lens,
    kept_random_state,
    lens_model,
    shares_memory,
    unwrapped,
)
from sat_lens.results import library_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SaturationTracker", "read_training_log"]

_log = logging.getLogger(__name__)

DEFAULT_BUDGET = 0.02
_KIND = "sat_lens training log"
_FORMAT = 1
# Columns that hold texts; all others hold numbers.
_TEXTS = ("problem",)


class SaturationTracker(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Logs parameter norms, and saturation on a small fixed batch, while a model trains.

    It does not change the run: training with it gives the same weights bit for bit. A Hugging Face
    model is measured through a twin that shares its memory; a TransformerLens model is measured
    itself, its own hooks included, and its mode and the random state are restored.

    Use it in one of three ways:

    - ``Trainer(..., callbacks=[tracker])``, or ``trainer.add_callback(tracker)``;
    - ``tracker.step(model, step)`` after each step of your own loop, and ``tracker.close()``;
    - ``with tracker.watching(model): train(model, config, data)`` around a loop without callbacks,
      such as TransformerLens's: each step of an optimiser of the model's parameters counts.

    Args:
        path: A file, in a folder that exists, for one JSON object a line; each line is flushed, and
            an existing log is continued. None writes no file.
        data: A small fixed batch: tokens, texts or batches (see :func:`sat_lens.data.batches`).
            About four sequences are enough. None logs norms only. With data, TransformerLens is
            imported now, so that the first step does not wait for it.
        every: Steps between logged norms; None logs at step 0, at the powers of two and, from 16
            on, half-way between them.
        measure_every: Steps between saturation measures; None measures at step 0 and at the powers
            of two.
        log: A function ``(numbers, step)`` that also receives each row:
            ``lambda row, step: wandb.log(row, step=step)``, or one that calls
            ``SummaryWriter.add_scalar`` for each number.
        budget: Share of the run's time that measuring may take. A saturation measure that would
            exceed it is postponed to the first step where it fits, and :meth:`close` says how many
            were; the first is always made, so a run of about a minute can end above its budget.
            None never postpones: for toy models, whose steps take next to no time.
        attention_mask: Which tokens of the data are padding; see :func:`sat_lens.data.batches`.
        tokenizer: A tokenizer or its directory, where data are texts and the model has none.
        batch_size: Sequences in a forward pass.

    Raises:
        ArgumentError: An interval below 1, a budget outside (0, 1], or an argument of the wrong
            type.
        FileFormatError: At the first step: the file cannot be written, or exists and is not a
            training log.

    Example:
        >>> import sat_lens as sl
        >>> tracker = sl.SaturationTracker(data=["import os, sys, re, json"], every=1)
        >>> row = tracker.step(sl.load_model("demo"), 0)
        >>> sorted(row)[:4]
        ['S', 'cos_random', 'cos_saturated', 'lean']
    """

    def __init__(
        self,
        path: str | Path | None = None,
        data: Any = None,
        *,
        every: int | None = None,
        measure_every: int | None = None,
        log: Callable[[dict[str, float], int], object] | None = None,
        budget: float | None = DEFAULT_BUDGET,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        batch_size: int = 8,
    ) -> None:
        for name, interval in (("every", every), ("measure_every", measure_every)):
            if interval is not None:
                check_count(name, interval)
        check_count("batch_size", batch_size)
        if budget is not None:
            check_share("budget", budget)
        if log is not None and not callable(log):
            raise ArgumentError(f"log is a function of a row and its step; found {log!r}.")
        if path is not None and not isinstance(path, (str, Path)):
            raise ArgumentError(f"path is the name of a file; found {path!r}.")
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._path = None if path is None else Path(path)
        self._data: Any = None if data is None else repeatable(data)
        if data is not None:
            import_transformer_lens()
        self._every = every
        self._measure_every = measure_every
        self._log = log
        self._budget = budget
        self._attention_mask = attention_mask
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._file: _Log | None = None
        self._started: float | None = None
        self._view: Any = None
        self._last_cost: float | None = None
        self._due = False
        self._n_put_off = 0

    def step(self, model: nn.Module, step: int) -> dict[str, Any] | None:
        """Measure if a measurement is due at this step; call it after every step.

        Returns:
            What was logged, or None if nothing was.

        Raises:
            ArgumentError: The model is not a module, or the step is not a whole number.
            SatLensError: The model or the data do not allow the first saturation measure. If a
                later one fails, its row says so and the run goes on.
        """
        began = time.perf_counter()
        if isinstance(step, nn.Module):
            raise ArgumentError("The model comes first: tracker.step(model, step).")
        check_module(model)
        check_count("step", step, at_least=0)
        if self._started is None:
            self._started = began
        with_norms = is_due(step, self._every, halves=True)
        is_new = is_due(step, self._measure_every, halves=False)
        self._due = self._due or is_new
        with_measures = self._data is not None and self._due and self._affordable(began)
        self._n_put_off += is_new and self._data is not None and not with_measures
        if not with_norms and not with_measures:
            return None
        return self._record(unwrapped(model), step, with_measures, began)

    def frame(self) -> pd.DataFrame:
        """Return what this object logged, one row a step; of a repeated step the last row."""
        rows = _by_step(self.rows)
        return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame()

    def plot(self, title: str | None = None) -> Figure:
        """Draw what was logged against the steps: norms, saturation and losses, a panel each.

        Raises:
            ArgumentError: Nothing was logged yet.
        """
        if not self.rows:
            raise ArgumentError("Nothing was logged yet: call tracker.step(model, step) first.")
        return figures.training_figure(self.frame(), title)

    @property
    def overhead(self) -> float:
        """The share of the time since the first step that went into measuring."""
        if self._started is None:
            return 0.0
        return self.seconds / (time.perf_counter() - self._started)

    @contextlib.contextmanager
    def watching(self, model: nn.Module, first_step: int = 0) -> Iterator[SaturationTracker]:
        """Follow a training loop that has no callbacks, by counting its optimiser's steps.

        Args:
            model: The model that the loop trains.
            first_step: The step at which the run starts.
        """
        check_module(model)
        check_count("first_step", first_step, at_least=0)
        own = {id(parameter) for parameter in model.parameters()}
        count = first_step

        def after_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
            nonlocal count
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                count += 1
                self.step(model, count)

        self.step(model, first_step)
        handle = register_optimizer_step_post_hook(after_step)
        try:
            yield self
            self._finish(model, count)
        finally:
            handle.remove()
            self.close()

    def close(self) -> None:
        """Close the file and release the model; the rows stay. Say how much was put off."""
        if self._n_put_off:
            _log.warning(
                "%d measures of saturation were put off by budget=%g; pass budget=None for short "
                "runs.",
                self._n_put_off,
                self._budget,
            )
            self._n_put_off = 0
        if self._file is not None:
            self._file.close()
            self._file = None
        self._view = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Answer the Trainer's event: measure before the first step."""
        if self._tokenizer is None:
            self._tokenizer = kwargs.get("processing_class")
        if state.is_world_process_zero:
            self.step(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Answer the Trainer's event."""
        if state.is_world_process_zero:
            self.step(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Answer the Trainer's event: log the last step, and close."""
        if state.is_world_process_zero:
            self._finish(kwargs["model"], state.global_step)
        self.close()

    def _finish(self, model: nn.Module, step: int) -> None:
        now = time.perf_counter()
        if not self.rows or self.rows[-1]["step"] != step:
            affordable = self._data is not None and self._affordable(now)
            self._record(unwrapped(model), step, affordable, now)

    def _affordable(self, now: float) -> bool:
        if self._budget is None or self._last_cost is None or self._started is None:
            return True
        return self.seconds + self._last_cost <= self._budget * (now - self._started)

    def _record(
        self, model: nn.Module, step: int, with_measures: bool, began: float
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step}
        try:
            row |= parameter_norms(model).summary()
            if with_measures:
                row |= self._measures(model)
        except NonFiniteError as error:
            row["problem"] = str(error)
        except (SatLensError, RuntimeError) as error:
            # Once it has worked, a failure (out of memory, say) must not end the run.
            worked = self._last_cost is not None if with_measures else bool(self.rows)
            if not worked:
                raise
            _log.warning("Step %d was not fully measured: %s", step, error)
            row["problem"] = str(error)
        self._write(row, model)
        self._due = self._due and not with_measures
        self.seconds += time.perf_counter() - began
        return row

    def _measures(self, model: nn.Module) -> dict[str, float]:
        with kept_random_state():
            if self._view is None or not shares_memory(self._view, model):
                self._view = lens_model(model, self._tokenizer)
            # Building the view is not timed, because later measurements find it ready.
            began = time.perf_counter()
            found = saturation_measures(
                self._view,
                self._data,
                batch_size=self._batch_size,
                attention_mask=self._attention_mask,
                tokenizer=self._tokenizer,
            )
            self._last_cost = time.perf_counter() - began
            return found

    def _write(self, row: dict[str, Any], model: nn.Module) -> None:
        self.rows.append(row)
        if self._path is not None:
            if self._file is None:
                self._file = _Log(self._path, type(model).__name__)
            self._file.write(row)
        if self._log is not None:
            numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, float)}
            self._log(numbers, row["step"])


def is_due(step: int, every: int | None, halves: bool) -> bool:
    """Whether a step is to be logged: every n-th, or on a logarithmic scale.

    Example:
        >>> [step for step in range(50) if is_due(step, None, halves=True)]
        [0, 1, 2, 4, 8, 16, 23, 32, 45]
    """
    if every is not None:
        return step % every == 0
    if step == 0:
        return True
    octave = 1 << (step.bit_length() - 1)
    return step == octave or (halves and octave >= 16 and step == round(octave * 2**0.5))


class _Log:
    """Appends lines to a file, each flushed at once; a log that exists is continued."""

    def __init__(self, path: Path, model: str) -> None:
        try:
            known = path.exists() and path.stat().st_size > 0
            if known:
                _cut_torn_line(path)
                known = path.stat().st_size > 0
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise FileFormatError(f"{path} cannot be written: {error.strerror}.") from error
        if not known:
            versions = library_versions()
            self.write({"kind": _KIND, "format": _FORMAT, "model": model, "versions": versions})

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; JSON has no NaN and no infinity, so these become null."""
        lost = [k for k, v in entry.items() if isinstance(v, float) and not math.isfinite(v)]
        self._file.write(json.dumps({**entry, **dict.fromkeys(lost)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_training_log(path: str | Path) -> pd.DataFrame:
    """Read what a :class:`SaturationTracker` wrote, even while it is still writing.

    A last line that was cut off when the run was killed is left out. Where a resumed run logged a
    step again, the later line counts.

    Returns:
        One row a step, indexed by step.

    Raises:
        ArgumentError: ``path`` is not a path.
        FileFormatError: There is no such file, it was not written by sat_lens, or a complete line
            is broken.

    Example:
        >>> from sat_lens.training import read_training_log
        >>> read_training_log("nowhere.jsonl")
        Traceback (most recent call last):
        ...
        sat_lens.errors.FileFormatError: nowhere.jsonl cannot be read: No such file or directory.
    """
    if not isinstance(path, (str, Path)):
        raise ArgumentError(f"A training log is a file, given by its path; found {path!r}.")
    header, *rows = _lines(Path(path))
    if header.get("format") != _FORMAT:
        raise FileFormatError(
            f"{path} was written by a newer sat_lens. Update sat_lens to read it."
        )
    frame = pd.DataFrame(_by_step(rows))
    if frame.empty:
        frame = pd.DataFrame({"step": pd.Series(dtype="int64")})
    numbers = frame.columns.difference(_TEXTS)
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    return frame.set_index("step")


def _by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    last = {row["step"]: row for row in rows}
    return [last[step] for step in sorted(last)]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        *whole, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}.") from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(whole, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"Line {number} of {path} is broken: {error}.") from error
        if not isinstance(entry, dict) or (entries and not _is_row(entry)):
            raise FileFormatError(f"Line {number} of {path} is not from a training log.")
        entries.append(entry)
    if not entries or entries[0].get("kind") != _KIND:
        cut_off = "holds a single line, which is cut off"
        what = cut_off if torn and not entries else "was not written by sat_lens"
        raise FileFormatError(f"{path} {what}.")
    return entries


def _is_row(entry: Mapping[str, Any]) -> bool:
    step = entry.get("step")
    return (
        is_count(step, at_least=0)
        and step < 2**63
        and all(isinstance(v, str) for k, v in entry.items() if k in _TEXTS)
        and all(v is None or is_number(v) for k, v in entry.items() if k not in _TEXTS)
    )


def _cut_torn_line(path: Path) -> None:
    """Make a log ready to be continued; refuse a file that is something else."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole or not content.startswith(b'{"kind": "sat_lens'):
        _lines(path)
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
