"""Greedy search: how many heads can be saturated at once before the output changes.

Every number is a forward pass of the whole set; no estimate decides anything. The search is greedy,
so the set it finds can be saturated, and a larger one may exist.

When not to use it: for the effect of single heads, which :func:`sat_lens.sweep_heads` measures at a
fraction of the cost.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import check_choice, check_count, check_number
from sat_lens.attention import Limit, Transform
from sat_lens.data import Data
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.metrics import Metric
from sat_lens.models import model_name
from sat_lens.patching.arguments import Item, entries_of, name_of, provenance_of
from sat_lens.patching.engine import Work, evaluate
from sat_lens.patching.readout import check_depends
from sat_lens.patching.runs import (
    Experiment,
    Local,
    Patch,
    Record,
    make_baseline,
    patched_logits,
)
from sat_lens.results import Result, write_whole
from sat_lens.sites import Heads
from sat_lens.vocabulary import POSITIVE, QUIET, RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a file with the state of a search says that it is.
_KIND = "sat_lens search"


def saturable_heads(
    model: Any,
    inputs: Data | Mapping[str, Any],
    metric: Metric,
    tolerance: float,
    heads: Heads = None,
    direction: Literal["noising", "denoising"] = "noising",
    transform: Transform | None = None,
    *,
    candidates: int | None = 8,
    full_curve: bool = False,
    state: str | Path | None = None,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> SaturableHeads:
    """Search greedily for the heads that can be saturated, or that must stay soft.

    Noising starts from the soft model and saturates one head after the other, each time the one
    that moves the metric least from its soft value: the longest run of steps whose end is within
    the tolerance is the largest set found. Denoising is its mirror: it starts with every head of
    the model saturated and restores one after the other until the metric is within the tolerance;
    those restored are the smallest set found that must stay soft.

    Args:
        model: A TransformerLens model in evaluation mode.
        inputs: One batch of prompts, as for :func:`sat_lens.sweep_heads`.
        metric: A function of the logits that gives a scalar.
        tolerance: How far the metric may move from its soft value, either way, in its own units.
        heads: Which heads may be chosen; None is all.
        direction: ``"noising"`` or ``"denoising"``.
        transform: What stands for saturation; None is the limit of an infinite inverse temperature.
        candidates: How many heads are tried in each step: those that moved the metric least when
            last tried. None tries all that are left, which is the plain greedy search and costs
            about half the square of the number of heads in forward passes.
        full_curve: Whether to go on to the last head after the tolerance has decided.
        state: A file (JSON) in which the search is kept, and from which it goes on.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.
        progress: Whether to show a progress bar. An interrupt keeps what is done.

    Raises:
        ArgumentError: The tolerance is negative, or ``state`` belongs to another search; and as for
            :func:`sat_lens.sweep_heads`.
        FileFormatError: ``state`` cannot be read or written.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> metric = sl.metrics.logit_difference(answer=5, wrong=6)
        >>> found = sl.saturable_heads(model, "x = 1", metric, tolerance=1e3,
        ...                            heads=["L0H0", "L0H1"], progress=False)
        >>> sorted(found.heads)
        ['L0H0', 'L0H1']
    """
    check_choice("direction", direction, ("noising", "denoising"))
    check_number("tolerance, in the metric's units,", tolerance, at_least=0)
    if candidates is not None:
        check_count("candidates", candidates)
    experiment, items, batch = Experiment.of(
        "saturable_heads",
        model,
        inputs,
        metric,
        heads,
        attention_mask=attention_mask,
        tokenizer=tokenizer,
    )
    if items[0].is_group:
        raise ArgumentError("saturable_heads chooses among single heads; groups were given.")
    new = Limit() if transform is None else transform
    noising = direction == "noising"
    with torch.no_grad():
        soft = make_baseline(experiment, batch, None, items, record=noising)
        saturated = make_baseline(experiment, batch, new, items, record=not noising)
        check_depends(experiment.readout, model, batch, soft.value, saturated.value)
    start = float(soft.value)
    asked = {
        "model": model_name(model),
        "direction": direction,
        "transform": name_of(new),
        "heads": [item.label for item in items],
        "candidates": candidates,
        "soft": start,
        "saturated": float(saturated.value),
    }
    kept = _State.open(state, asked)
    patch = Patch(batch, None, Local(new)) if noising else Patch(batch, new, Local(None))
    search = _Search(experiment, patch, items, start, tolerance, candidates, kept)
    complete = True
    try:
        if not kept.known:
            search.try_single((soft if noising else saturated).record, progress)
        search.go_on(full_curve, progress)
    except KeyboardInterrupt:
        complete = False
    finally:
        kept.write()
    return SaturableHeads(
        provenance=provenance_of(model, new),
        direction=direction,
        tolerance=tolerance,
        soft=start,
        saturated=float(saturated.value),
        order=tuple(label for label, _ in kept.steps),
        values=torch.tensor([value for _, value in kept.steps], dtype=torch.float32),
        n_heads=len(items),
        complete=complete,
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SaturableHeads(Result, kind="saturable heads"):
    """The order in which heads were saturated (or restored), and the metric after each.

    Made by :func:`sat_lens.patching.saturable_heads`.

    Attributes:
        provenance: The model and the versions.
        direction: ``"noising"`` (heads were saturated) or ``"denoising"`` (restored).
        tolerance: How far the metric could move from its soft value.
        soft: The metric with no head saturated.
        saturated: The metric with every head of the model saturated.
        order: The heads in the order in which they were added.
        values: The metric after each, ``[step]``.
        n_heads: Among how many heads was chosen.
        complete: False if the search was interrupted.
    """

    direction: str
    tolerance: float
    soft: float
    saturated: float
    order: tuple[str, ...]
    values: Float[Tensor, " step"]
    n_heads: int
    complete: bool = True

    @property
    def heads(self) -> tuple[str, ...]:
        """Noising: the largest set found that can be saturated. Denoising: the smallest found that
        must stay soft; all that were restored, if the tolerance was not met."""
        within = self.frame()["within"]
        counts = within.index[within]
        if not len(counts):
            return self.order
        return self.order[: counts.max() if self.direction == "noising" else counts.min()]

    @property
    def found(self) -> bool:
        """Whether the tolerance was met."""
        return bool(self.frame()["within"].any())

    def frame(self) -> pd.DataFrame:
        """Return the curve: one row a step, indexed by the number of heads added.

        Columns: ``label`` of the head added, ``metric`` from then on, ``change`` from the soft
        value, ``within`` the tolerance.
        """
        start = self.soft if self.direction == "noising" else self.saturated
        frame = pd.DataFrame({"label": ["", *self.order], "metric": [start, *self.values.tolist()]})
        frame["change"] = frame["metric"] - self.soft
        frame["within"] = frame["change"].abs() <= self.tolerance
        return frame.rename_axis(index="n_heads")

    def plot(self, title: str | None = None) -> Figure:
        """Draw the metric against the number of heads, with the tolerance as a band."""
        done = self._done
        named = title or f"Heads {done} together: {self.provenance}"
        figure, (axes,) = figures.panels(1, named)
        band = (self.soft - self.tolerance, self.soft + self.tolerance)
        axes.axhspan(*band, color=RULE, alpha=0.4, lw=0, label="tolerance")
        axes.axhline(self.soft, color=QUIET, lw=1, label="soft model")
        axes.axvline(len(self.heads), color=POSITIVE, lw=1, ls="--")
        figures.lines(
            axes, self.frame(), {"metric": "metric"}, x=f"heads {done}", y="metric", log_x=False
        )
        return figure

    @property
    def _done(self) -> str:
        return "saturated" if self.direction == "noising" else "restored"

    def _lines(self) -> list[str]:
        listed = ", ".join(self.heads[:5]) + (", ..." if len(self.heads) > 5 else "")
        met = "" if self.found else " (the tolerance was not met)"
        return [
            f"{len(self.heads)} of {self.n_heads} heads {self._done}{met}: {listed or 'none'}",
            f"metric: soft {self.soft:.4g}, saturated {self.saturated:.4g}, tolerance "
            f"{self.tolerance:.4g}",
        ]

    def _check(self) -> None:
        if self.values.shape != (len(self.order),):
            raise ValueError(f"values have the shape {list(self.values.shape)}")


@dataclasses.dataclass(frozen=True)
class _Search:
    """A search under way; what it has found is in its state."""

    experiment: Experiment
    patch: Patch
    items: Sequence[Item]
    soft: float
    tolerance: float
    candidates: int | None
    state: _State

    def try_single(self, record: Record | None, progress: bool) -> None:
        """Measure every head by itself."""
        entries, shape = entries_of([*self.items], None, {})
        work = Work(self.experiment, entries, shape, progress=progress)
        done = evaluate(work, self.patch, record, "single heads")
        if not done.complete:
            raise KeyboardInterrupt
        labels = [item.label for item in self.items]
        self.state.known.update(zip(labels, done.values.tolist(), strict=True))

    def go_on(self, full_curve: bool, progress: bool) -> None:
        """Add heads one after the other, until the tolerance has decided or none is left."""
        by_label = {item.label: item for item in self.items}
        steps, noising = self.state.steps, self.patch.base is None
        bar = tqdm(
            total=len(by_label),
            initial=len(steps),
            desc="saturable heads" if noising else "heads that stay soft",
            unit="head",
            disable=not progress,
        )
        with bar, torch.no_grad():
            while len(steps) < len(by_label):
                restored = not noising and bool(steps) and self._is_within(steps[-1][1])
                if restored and not full_curve:
                    return
                label, value = self._best(by_label)
                if noising and not full_curve and not self._is_within(value):
                    return
                steps.append((label, value))
                self.state.write()
                bar.update()

    def _best(self, by_label: Mapping[str, Item]) -> tuple[str, float]:
        """Find the head to add next, among those that moved the metric least when last tried."""
        steps, known = self.state.steps, self.state.known
        chosen = sorted(label for label, _ in steps)
        left = [label for label in by_label if label not in chosen]
        left.sort(key=lambda label: self._distance(known[label]))
        if not steps:
            return left[0], known[left[0]]
        n_first = len(left) if self.candidates is None else self.candidates
        # Before a set of saturated heads is called the largest, every head has been tried with it.
        search_on = self.patch.base is None and self._is_within(steps[-1][1])
        tried: dict[str, float] = {}
        for i, label in enumerate(left):
            if i >= n_first and not (search_on and not any(map(self._is_within, tried.values()))):
                break
            known[label] = tried[label] = self._measure([by_label[x] for x in (*chosen, label)])
        best = min(tried, key=lambda label: self._distance(tried[label]))
        return best, tried[best]

    def _measure(self, items: list[Item]) -> float:
        selection: dict[str, list[int]] = {}
        for item in items:
            for path, heads in item.selection.items():
                selection[path] = sorted([*selection.get(path, []), *heads])
        together = Item("set", tuple(item.label for item in items), selection)
        (logits,) = patched_logits(self.experiment, self.patch, [(together, None)])
        return float(self.experiment.readout.value_at(logits))

    def _distance(self, value: float) -> float:
        return abs(value - self.soft)

    def _is_within(self, value: float) -> bool:
        return self._distance(value) <= self.tolerance


@dataclasses.dataclass
class _State:
    """What a search has found so far.

    Attributes:
        path: Its file; None keeps nothing.
        asked: What was searched for, to tell one search from another.
        steps: The heads in the order in which they were added, each with the metric from then on.
        known: The metric when a head was last tried.
    """

    path: Path | None
    asked: Mapping[str, Any]
    steps: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    known: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None, asked: Mapping[str, Any]) -> _State:
        """Read the file if there is one, and start afresh if not.

        Raises:
            ArgumentError: The file belongs to another search, or the path is none.
            FileFormatError: It cannot be read, or not be written.
        """
        if path is None:
            return cls(None, asked)
        if not isinstance(path, (str, Path)):
            raise ArgumentError(f"state is the path of a file, or None; {path!r} was given.")
        file = Path(path)
        if not file.exists():
            fresh = cls(file, asked)
            fresh.write()  # what cannot be written is better known before the work
            return fresh
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["kind"] != _KIND:
                raise KeyError("kind")
            before = dict(found["asked"])
            steps = [(str(label), float(value)) for label, value in found["steps"]]
            known = {str(label): float(value) for label, value in found["known"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise FileFormatError(f"{file} holds no search of sat_lens ({error}).") from error
        differing = [name for name in asked if not _same(asked[name], before.get(name))]
        if differing:
            raise ArgumentError(
                f"{file} belongs to another search: it differs in {', '.join(differing)}. Name "
                "another file, or remove this one."
            )
        added = {label for label, _ in steps}
        finite = all(math.isfinite(value) for _, value in (*steps, *known.items()))
        # All heads are tried before one is added.
        tried = known.keys() == set(asked["heads"]) or not (known or steps)
        if not (finite and tried and len(added) == len(steps) and added <= known.keys()):
            raise FileFormatError(
                f"The heads listed in {file} are inconsistent; the file was edited. Remove it, and "
                "search anew."
            )
        return cls(file, asked, steps, known)

    def write(self) -> None:
        """Write the file, if there is one.

        Raises:
            FileFormatError: It cannot be written.
        """
        if self.path is not None:
            found = {"asked": dict(self.asked), "steps": self.steps, "known": self.known}
            write_whole(self.path, json.dumps({"kind": _KIND, **found}, indent=1).encode())


def _same(first: Any, second: Any) -> bool:
    """Compare what was asked; values of a metric may differ by rounding between machines."""
    if isinstance(first, float) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=1e-3, abs_tol=1e-4)
    return bool(first == second)
