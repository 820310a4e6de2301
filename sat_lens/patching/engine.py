"""Exact values of many patches, faster than by a whole forward pass each.

One pass over the base run records what every block returned. A patched head then costs what comes
after it: blocks below return what they returned, several heads run side by side as copies in the
batch, and the patched attention module, where its output is the output projection of z, computes no
more than that. Nothing is assumed of a block but that it stands in a list of blocks and runs once.

Nothing is taken on trust either. A run from the last block without a patch has to give the base
run's logits, patches in one layer of every kind and a random twentieth of the others are computed
by whole forward passes as well, and where the two disagree, all values come from whole passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens.caching.activations import with_heads
from sat_lens.caching.prefix import block_path, computed_by
from sat_lens.errors import SatLensError, UnsupportedModelError
from sat_lens.models import unembedding
from sat_lens.patching.arguments import Entry, Item, Spot
from sat_lens.patching.result import Checks
from sat_lens.patching.runs import (
    Experiment,
    FromRun,
    Local,
    Patch,
    Record,
    local_activations,
    patched_logits,
    repeated,
)

SHARE_CHECKED = 1 / 20
# With fewer values, recording and proving cost more than they save.
LEAST_REPLAYED = 6
# Two float32 routes to the same logits differ by rounding, in proportion to the largest of them.
TOLERANCE = 1e-5
# Copies side by side pay while the matrices are small (measured, one CPU thread).
TOKENS_AT_ONCE_CPU = 512
# A bound for other devices, for the logits of so many positions may all be kept for a moment.
MOST_TOKENS_AT_ONCE = 16_384
# A larger chunk must be faster by so much, per head, to be worth its memory.
GAIN = 0.05
# Rows that start on a processor's cache line are stored faster; 16 float32 fill one.
FLOATS_A_LINE = 16

Forwards = dict[nn.Module, Callable[..., Any]]
T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one sweep computes for each of its patches.

    Attributes:
        experiment: The model and the metric.
        entries: The values to be computed.
        shape: The shape of their table, prompts apart.
        seed: Seed of the sample of values that are checked.
        progress: Whether to show a progress bar.
    """

    experiment: Experiment
    entries: list[Entry]
    shape: tuple[int, ...]
    seed: int = 0
    progress: bool = True

    def of_items(self, chosen: Collection[int]) -> Work:
        """The part of it that concerns some items."""
        entries = [entry for entry in self.entries if entry.index[0] in chosen]
        return dataclasses.replace(self, entries=entries)

    def empty(self) -> Tensor:
        """A table of NaN: one value per item, position (if any) and prompt (if kept)."""
        n_prompts = self.experiment.readout.n_prompts
        shape = self.shape if n_prompts is None else (*self.shape, n_prompts)
        return torch.full(shape, math.nan, dtype=torch.float32)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A table of values, and how they came about; what is not done is NaN.

    Attributes:
        values: ``[item, position?, prompt?]``.
        confirmed: ``[item]``: whether an item is computed exactly.
        checks: How the values were computed.
        complete: False after an interrupt.
    """

    values: Tensor
    confirmed: Tensor
    checks: Checks = dataclasses.field(default_factory=Checks)
    complete: bool = True


def evaluate(work: Work, patch: Patch, record: Record | None, name: str) -> Evaluated:
    """Compute the entries exactly: by the engine where it proves right, else by whole passes.

    ``record`` is of the run that is patched; None asks for whole passes. An interrupt ends the
    work; what is done by then is kept, and the result says that the rest is missing.
    """
    values, checks, complete = work.empty(), None, True
    bar = tqdm(total=len(work.entries), desc=name, unit="patch", disable=not work.progress)
    with torch.no_grad(), bar:
        try:
            # Whatever goes wrong here, whole forward passes will do or say better.
            with contextlib.suppress(Exception):
                checks = _by_engine(work, patch, record, values, bar)
            if checks is None:
                values.fill_(math.nan)
                bar.reset()
                for entry in work.entries:
                    (logits,) = patched_logits(work.experiment, patch, [entry.spot])
                    values[entry.index] = work.experiment.readout.value_at(logits)
                    bar.update()
        except KeyboardInterrupt:
            if bool(values.isnan().all()):
                raise
            complete = False
    confirmed = ~values.isnan().reshape(len(values), -1).all(1)
    return Evaluated(values, confirmed, checks or Checks(), complete)


def _by_engine(work: Work, patch: Patch, record: Record | None, values: Tensor, bar: Any) -> Checks:
    """Fill the table; any error means that the engine cannot serve, or is not to be trusted."""
    if record is None or len(work.entries) < LEAST_REPLAYED:
        raise UnsupportedModelError("Too little to do, or nothing recorded.")
    engine = Engine(work.experiment, patch, record, [entry.item for entry in work.entries])
    engine.prove_unpatched()
    alike, checked = _plan(engine, work)
    errors: list[float] = []
    for entries in alike:
        for chunk, found in engine.pace.chunks(entries, engine.logits, engine.depth(entries[0])):
            pairs = list(zip(chunk, found, strict=True))
            for entry, logits in pairs:
                values[entry.index] = work.experiment.readout.value_at(logits)
            errors += _check(engine, [pair for pair in pairs if pair[0].index in checked], values)
            bar.update(len(chunk))
    return Checks("replay", len(errors), max(errors))


def _check(engine: Engine, found: list[tuple[Entry, Tensor]], values: Tensor) -> list[float]:
    """Put values from whole forward passes in the place of the engine's; return the differences."""
    errors = []
    for some, whole in engine.pace.chunks(found, engine.whole_passes):
        for (entry, logits), expected in zip(some, whole, strict=True):
            engine.require_equal(logits, expected)  # a metric of small numbers shows no difference
            exact = engine.experiment.readout.value_at(expected)
            errors.append(float((exact - values[entry.index]).abs().max()))
            if not errors[-1] <= engine.tolerance:
                raise UnsupportedModelError("Whole forward passes give another value.")
            values[entry.index] = exact
    return errors


def _plan(engine: Engine, work: Work) -> tuple[list[list[Entry]], set[tuple[int, ...]]]:
    """Return lists of entries that can run side by side, and the indices of those to be checked.

    The lists that prove the engine come first: one from every kind of layer.
    """
    alike = [list(some) for _, some in itertools.groupby(work.entries, key=engine.key)]
    proof: dict[object, list[Entry]] = {}
    for entries in alike:
        proof.setdefault(engine.kind(entries[0]), entries[: engine.pace.size])
    proven = {entries[0].index for entries in proof.values()}
    others = [entry.index for entry in work.entries if entry.index not in proven]
    n_drawn = min(max(round(SHARE_CHECKED * len(work.entries)), 1), len(others))
    checked = proven.union(random.Random(work.seed).sample(others, n_drawn))
    early = {entry.index for entries in proof.values() for entry in entries}
    rest = [[entry for entry in entries if entry.index not in early] for entries in alike]
    return [*proof.values(), *filter(None, rest)], checked


class Engine:
    """Runs patches into a recorded run, several side by side.

    Attributes:
        pace: How many run side by side.
        tolerance: By how much its logits may differ from those of whole passes.
    """

    def __init__(
        self, experiment: Experiment, patch: Patch, record: Record, items: Sequence[Item]
    ) -> None:
        if record.logits is None or len(record.order) != len(record.outputs):
            raise UnsupportedModelError("The model's blocks do not run once each.")
        self.experiment = experiment
        self.patch = patch
        self.record = record
        self.pace = _pace_of(record, patch)
        # A suppressed token's logit is enormous and no measure of the others.
        self.tolerance = TOLERANCE * max(float(record.logits.abs().median()), 1.0)
        self._new_z = self._patched_z(items)
        self._quick = self._quick_forwards(items)

    def key(self, entry: Entry) -> object:
        """What entries have in common that can run side by side."""
        return self._start(entry.item), self._shortcut(entry.item)

    def kind(self, entry: Entry) -> object:
        """Return what layers of one make share: their modules, and how far they attend."""
        item = entry.item
        block = self.record.blocks[self.record.order[self._start(item)]]
        makes = tuple((name, type(module).__name__) for name, module in block.named_modules())
        (site, *_) = self.experiment.sites_of([item])
        attention: Any = self.experiment.model.get_submodule(site.path)
        attention = getattr(attention, "original_component", attention)
        reach = [str(getattr(attention, name, None)) for name in ("sliding_window", "is_sliding")]
        return makes, *reach, site.kind, site.level, site.n_heads, self._shortcut(item) is None

    def depth(self, entry: Entry) -> int:
        """Return the number of blocks that run for an entry."""
        return len(self.record.order) - self._start(entry.item)

    def logits(self, entries: Sequence[Entry]) -> list[Tensor]:
        """Return the logits of each entry's patch; all are of one key."""
        item = entries[0].item
        spots = [entry.spot for entry in entries]
        return self._run(spots, self._start(item), self._shortcut(item))

    def whole_passes(self, found: Sequence[tuple[Entry, Tensor]]) -> list[Tensor]:
        """Return the logits of the same patches from whole forward passes."""
        return patched_logits(self.experiment, self.patch, [entry.spot for entry, _ in found])

    def prove_unpatched(self) -> None:
        """Run the last block alone, without a patch, which has to give the base run's logits."""
        (logits,) = self._run([(Item("nothing", (), {}), None)], len(self.record.order) - 1, None)
        self.require_equal(logits[:, -1], self.record.logits)

    def require_equal(self, logits: Tensor, expected: Any) -> None:
        """Raise an UnsupportedModelError unless two routes gave the same logits, up to rounding."""
        for mine, theirs in zip(logits, expected, strict=True):
            if not torch.allclose(mine, theirs, rtol=TOLERANCE, atol=self.tolerance):
                raise UnsupportedModelError("Whole forward passes give other logits.")

    def _run(self, spots: Sequence[Spot], start: int, shortcut: str | None) -> list[Tensor]:
        """Run the blocks from ``start`` on; the module at ``shortcut`` projects patched z."""
        record, size = self.record, self.patch.batch.size
        below = record.order[:start]
        forwards: Forwards = {}
        for path, above in itertools.zip_longest(below, below[1:]):
            output = record.outputs[path]
            if above is None or block_path(path) != block_path(above):
                output = repeated(output, size, len(spots))  # a block that runs will get it
            forwards[record.blocks[path]] = _returning(output)
        skipped = {s.path for s in self.experiment.sites if block_path(s.path) in below}
        if shortcut is not None:
            module = self.experiment.model.get_submodule(shortcut)
            forwards[module] = functools.partial(self._project, shortcut, module, spots)
            skipped.add(shortcut)
        with computed_by(self._quick | forwards):
            return patched_logits(self.experiment, self.patch, spots, skipped)

    def _project(
        self, path: str, module: Any, spots: Sequence[Spot], *_args: Any, **_kwargs: Any
    ) -> Any:
        (site,) = self.experiment.sites_of([spots[0][0]])
        base, new = self.record.z[path], self._new_z[path]
        z = [with_heads(base, new, site.n_heads, item.selection[path], at) for item, at in spots]
        output = module.o(torch.cat(z) if len(z) > 1 else z[0])
        beside = self.record.beside[path]
        if beside is None:
            return output
        return (output, *repeated(beside, self.patch.batch.size, len(spots)))

    def _patched_z(self, items: Sequence[Item]) -> Mapping[str, Tensor]:
        """Return z of the patched heads, where a patch is nothing but another z."""
        source = self.patch.source
        if not isinstance(source, Local):
            return source.activations if source.component == "z" else {}
        single = [item for item in items if self._is_projected(item)]
        with contextlib.suppress(SatLensError):
            if single:
                return local_activations(self.experiment, self.patch, single, self.record.z)
        return {}

    def _is_projected(self, item: Item) -> bool:
        return not item.is_group and item.selection.keys() <= self.record.beside.keys()

    def _shortcut(self, item: Item) -> str | None:
        path = next(iter(item.selection))
        return path if self._is_projected(item) and path in self._new_z else None

    def _start(self, item: Item) -> int:
        return min(self.record.order.index(block_path(path)) for path in item.selection)

    def _quick_forwards(self, items: Sequence[Item]) -> Forwards:
        """Return forwards that take less time, or leave out positions that no one will read."""
        blocks, read = self.record.blocks, self.experiment.readout.positions
        found: Forwards = {}
        if self.patch.base is None:  # where rounding cannot decide which key wins
            found |= quick_gelus(module for block in blocks.values() for module in block.modules())
        unembed = unembedding(self.experiment.model)
        if unembed is not None:
            found |= aligned_unembedding(unembed)
        if read is None:
            return found
        # The modules of the last block after which positions no longer interact.
        last, source = self.record.order[-1], self.patch.source
        ends = [getattr(blocks[last], "mlp", None)]
        is_put_in = isinstance(source, FromRun) and source.component == "z"
        if not is_put_in or all(self._shortcut(item) for item in items):
            paths = [s.path for s in self.experiment.sites if block_path(s.path) == last]
            attention = [self.experiment.model.get_submodule(path) for path in paths]
            ends += [getattr(module, "o", None) for module in attention]
        return found | {
            module: functools.partial(_at_positions, module.forward, read)
            for module in ends
            if isinstance(module, nn.Module)
        }


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _at_positions(
    forward: Callable[..., Any], read: list[int], x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Compute a module's output at some positions, and leave it zero at the others."""
    output = forward(x[:, read], *args, **kwargs)
    first, *rest = output if isinstance(output, tuple) else (output,)
    whole = first.new_zeros(*x.shape[:2], *first.shape[2:])
    whole[:, read] = first
    return (whole, *rest) if isinstance(output, tuple) else whole


def quick_gelus(modules: Iterable[nn.Module]) -> Forwards:
    """Return GELUs computed in one step, which Hugging Face's GPT-2 computes in eight."""
    gelu = functools.partial(F.gelu, approximate="tanh")
    found = [module for module in modules if type(module).__name__ == "NewGELUActivation"]
    return {module: gelu for module in found if "forward" not in module.__dict__}


def aligned_unembedding(unembed: nn.Module) -> Forwards:
    """Return unembeddings whose rows start on cache lines: GPT-2's vocabulary has 50,257 tokens.

    At 512 positions that saves a quarter of the product's time on a CPU.
    """
    return {
        module: functools.partial(_aligned, module)
        for module in unembed.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.out_features % FLOATS_A_LINE > 0
    }


def _aligned(linear: nn.Linear, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    width = math.ceil(linear.out_features / FLOATS_A_LINE) * FLOATS_A_LINE
    y = x.new_empty(len(rows), width)[:, : linear.out_features]
    torch.mm(rows, linear.weight.T, out=y)
    # TransformerLens puts a bias of zeros where a model has none.
    if linear.bias is not None and bool(linear.bias.any()):
        y += linear.bias
    return y.unflatten(0, x.shape[:-1])


class Pace:
    """Cuts work into chunks of ``size``, doubling it while the time per unit of work falls.

    With ``most`` equal to ``size`` nothing is tuned. The clock waits for the device.
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
        """Yield each chunk with its result; once memory has run out, chunks are smaller.

        ``cost`` is how much work an item is, to compare times by; None measures no times.
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
                self.size = self._most = len(chunk) // 2
                continue
            if cost is not None and len(chunk) == self.size < self._most:
                self._learn(seconds / (len(chunk) * cost))
            done += len(chunk)
            yield chunk, result

    def _learn(self, seconds: float) -> None:
        """Go on to twice the size, or back to the best one."""
        if self._best is not None and seconds > (1 - GAIN) * self._best[0]:
            self.size = self._most = self._best[1]
            return
        self._best = (seconds, self.size)
        self.size = min(2 * self.size, self._most)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        return self._clock()


def _pace_of(record: Record, patch: Patch) -> Pace:
    outputs = (out[0] if isinstance(out, tuple) else out for out in record.outputs.values())
    resid = max(outputs, key=lambda out: out.shape[:2].numel())
    # In a saturated run the smallest difference can decide which key wins, and matrices of another
    # size are rounded differently: there a patch is run just as whole passes are.
    if patch.base is not None:
        return Pace(1, 1, resid.device)
    n_tokens = resid.shape[0] * resid.shape[1]
    start = max(TOKENS_AT_ONCE_CPU // n_tokens, 1)
    if resid.device.type == "cpu":
        return Pace(start, start, resid.device)
    return Pace(start, max(MOST_TOKENS_AT_ONCE // n_tokens, start), resid.device)
