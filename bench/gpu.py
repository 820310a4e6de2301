"""The exact limit on a GPU, beside PyTorch's fused attention and eager saturation.

python -m bench.gpu docs/performance.md

Every way runs on the same inputs in one process, in rounds that interleave them. Exactness is
judged on inputs of small whole numbers, whose scores are exact and often tied, against hard
attention in float64 on some of the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.table import markdown, put_between
from sat_lens.attention import AttentionCall, Limit, transform_scores
from sat_lens.attention.fused import by_definition, by_queries
from sat_lens.attention.hard_kernel import hard_attention

BEGIN = "<!-- measured on a GPU: begin -->"
END = "<!-- measured on a GPU: end -->"
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLASH = "sdpa, flash"
LIMIT = "limit, this kernel"
AT_MOST = 1.1
ROUNDS = 11
ROWS_CHECKED = 256
HEADER = ("way", "ms", "x flash", "peak MB", "largest error, of which ties")

Way = Callable[[AttentionCall], Tensor]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One size of input."""

    context: int
    dtype: torch.dtype
    size: int = 64
    heads: int = 16
    groups: int = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one way: NaN or None where it is not to be had, ``why_not`` says why.

    ``error`` and ``error_at_ties`` are the largest differences from hard attention in float64, on
    all checked rows and on those that several keys win; None for soft attention.
    """

    way: str
    seconds: float | None = None
    peak_mb: float | None = None
    error: float | None = None
    error_at_ties: float | None = None
    why_not: str = ""


def ways() -> dict[str, Way]:
    """Give every way to attend, soft ones first."""
    backends = {
        FLASH: SDPBackend.FLASH_ATTENTION,
        "sdpa, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa, math": SDPBackend.MATH,
    }
    soft = {name: functools.partial(fused, backend=one) for name, one in backends.items()}
    return soft | {LIMIT: limit, "limit, sdpa with a large factor": large, "limit, eager": eager}


def fused(call: AttentionCall, backend: SDPBackend) -> Tensor:
    """Attend softly by one of PyTorch's kernels."""
    with sdpa_kernel([backend]):
        return call.run()


def limit(call: AttentionCall) -> Tensor:
    """Attend to the winners by the kernel under test."""
    return hard_attention(call.query, call.key, call.value, factor=call.factor, causal=True)


def large(call: AttentionCall) -> Tensor:
    """Attend by PyTorch's kernel with queries multiplied by the number that is exact on a CPU."""
    return by_queries(call, call.query.new_full((call.query.shape[1], 1, 1), torch.inf))


def eager(call: AttentionCall) -> Tensor:
    """Attend to the winners through the matrix of scores, as the library does where it must."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (call.key, call.value))
    scores = (call.query @ key.mT).float().mul_(call.factor)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    scores.masked_fill_(future, -torch.inf)
    return transform_scores(scores, Limit(), overwrite=True).softmax(-1).to(value.dtype) @ value


def inputs(setting: Setting, device: torch.device, *, whole: bool) -> AttentionCall:
    """Draw queries, keys and values; of small whole numbers, half of the keys twice, on wish."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, setting.context, setting.size) for n in (setting.heads, setting.groups)]
    query, key = (
        torch.randint(-2, 3, shape, generator=generator).float()
        if whole
        else torch.randn(shape, generator=generator)
        for shape in shapes
    )
    half = setting.context // 2
    key[:, :, half : 2 * half] = key[:, :, :half]
    value = torch.randn(shapes[1], generator=generator)
    made = [x.to(device, setting.dtype) for x in (query, key, value)]
    return AttentionCall(*made, is_causal=True, enable_gqa=setting.heads != setting.groups)


def rows_of(setting: Setting, device: torch.device, rounds: int = ROUNDS) -> list[Row]:
    """Measure every way at one size."""
    timed, exact = (inputs(setting, device, whole=whole) for whole in (False, True))
    found = {name: _first_look(name, way, timed, exact) for name, way in ways().items()}
    able = {name: way for name, way in ways().items() if not found[name].why_not}
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for i in range(rounds):
        for name in _rotated(list(able), i):
            seconds[name].append(_seconds(lambda way=able[name]: way(timed), device))
    for name, values in seconds.items():
        found[name] = dataclasses.replace(found[name], seconds=statistics.median(values))
    return list(found.values())


def _first_look(name: str, way: Way, timed: AttentionCall, exact: AttentionCall) -> Row:
    """Try a way once: is it there, how much memory does it take, how far is it from the limit?"""
    try:
        peak = _peak_mb(lambda: way(timed), timed.query.device)
        errors = _errors(way(exact), exact) if name.startswith("limit") else (None, None)
    except torch.OutOfMemoryError:
        return Row(name, why_not="out of memory")
    except RuntimeError as error:
        return Row(name, why_not=str(error).splitlines()[0])
    return Row(name, None, peak, *errors)


def _errors(found: Tensor, call: AttentionCall) -> tuple[float, float]:
    """Compare some rows of the first head with the definition."""
    n = call.query.shape[2]
    rows = torch.linspace(0, n - 1, min(n, ROWS_CHECKED)).long().to(found.device)
    query, key, value = (x[:, :1].double() for x in (call.query, call.key, call.value))
    visible = torch.arange(n, device=rows.device) <= rows[:, None]
    expected = by_definition(query[:, :, rows], key, value, visible)
    scores = (query[:, :, rows] @ key.mT).masked_fill(~visible, -torch.inf)
    tied = (scores == scores.amax(-1, keepdim=True)).sum(-1) > 1
    apart = (found[:, :1, rows].double() - expected).abs().nan_to_num(torch.inf).amax(-1)
    return float(apart.max()), float(apart[tied].max()) if bool(tied.any()) else 0.0


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - start


def _peak_mb(run: Callable[[], Any], device: torch.device) -> float | None:
    """Measure what a call takes beside its inputs, and compile what it needs."""
    if device.type != "cuda":
        run()
        return None
    run()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    _wait_for(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tables(settings: list[Setting], device: torch.device, rounds: int = ROUNDS) -> Iterator[str]:
    """Write a table for each size, the device's name first."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    yield f"{name}; torch {torch.__version__}. Medians of {rounds} rounds."
    for setting in settings:
        rows = rows_of(setting, device, rounds)
        flash = next(row.seconds for row in rows if row.way == FLASH)
        title = (
            f"{setting.context} tokens, {str(setting.dtype).removeprefix('torch.')}, "
            f"{setting.heads} heads of {setting.size}, {setting.groups} of keys"
        )
        yield f"### {title}\n\n{markdown(HEADER, [_cells(row, flash) for row in rows])}"


def _cells(row: Row, flash: float | None) -> list[str]:
    if row.seconds is None:
        return [row.way, row.why_not, "", "", ""]
    ratio = row.seconds / flash if flash else None
    judged = row.way == LIMIT and ratio is not None
    verdict = ("" if not judged else ", met" if ratio <= AT_MOST else ", missed") if ratio else ""
    return [
        row.way,
        f"{1000 * row.seconds:.3g}",
        "" if ratio is None else f"{ratio:.2f}{verdict}",
        "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
        "" if row.error is None else f"{row.error:.1e}, {row.error_at_ties:.1e}",
    ]


def main() -> None:
    """Measure on the first GPU, and put the tables into a page."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    if not torch.cuda.is_available():
        raise SystemExit(
            "Needed a GPU, and PyTorch finds none here. `make test-kernels` tries the same code on "
            "small inputs in Triton's interpreter, which says nothing about speed."
        )
    settings = [Setting(n, dtype) for dtype in DTYPES for n in CONTEXTS]
    settings += [Setting(4096, torch.bfloat16, size=128), Setting(4096, torch.bfloat16, groups=4)]
    made = "\n\n".join(tables(settings, torch.device("cuda")))
    put_between(page, BEGIN, END, made)


if __name__ == "__main__":
    main()
