"""``sat-lens report``, ``roles`` and ``merge``: the roles of heads, as a page and as tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor

from sat_lens import models
from sat_lens.caching import run_with_saturation_cache
from sat_lens.cli.shared import check_file, status_of
from sat_lens.data import text_windows
from sat_lens.demo.corpus import corpus_name, held_out_texts
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.figures.drawing import figure_bytes, figure_format
from sat_lens.results import write_csv, write_whole
from sat_lens.roles import HeadRoles, head_roles
from sat_lens.spectrum import scaling_curve
from sat_lens.viz import token_strings, write_report
from sat_lens.vocabulary import CAUTION, counted

PROMPT = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, """
SHOWN_TOKENS = 64
CURVE_SEQUENCES = 8
_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


def report(options: argparse.Namespace) -> int:
    """Measure a model and write the page about it."""
    check_file(options.out)
    if options.prompt is not None and not options.prompt.strip():
        raise ArgumentError("--prompt holds no text to show the attention of.")
    model, windows, name = _model_and_windows(options)
    progress = not options.quiet
    roles = head_roles(model, windows, data_name=name, progress=progress)
    curve = scaling_curve(model, windows[:CURVE_SEQUENCES], data_name=name, progress=progress)
    shown = _shown_tokens(options, model, windows)
    pair = run_with_saturation_cache(model, shown, names_filter=lambda n: n.endswith("pattern"))
    strings = token_strings(model, shown)
    write_report(options.out, roles=roles, pair=pair, tokens=strings, curve=curve)
    print(_short_table(roles.frame()))
    print(f"\nThe report is in {options.out.resolve()}")
    return status_of(roles.complete and curve.complete)


def roles(options: argparse.Namespace) -> int:
    """Measure the role of every head; print and write the table."""
    for path in (options.csv, options.out, options.figure):
        check_file(path)
    kind = figure_format(options.figure) if options.figure else ""
    shard = _read_shard(options.shard)
    with _processes() as is_first:
        model, windows, name = _model_and_windows(options)
        progress = not options.quiet and is_first
        found = head_roles(model, windows, shard=shard, data_name=name, progress=progress)
        if not is_first:
            return 0
        if options.csv:
            write_csv(options.csv, found.frame())
        if options.out:
            found.save(options.out)
        if options.figure:
            write_whole(options.figure, figure_bytes(found.plot(), kind))
        print(_short_table(found.frame()))
        return status_of(found.complete)


def merge(options: argparse.Namespace) -> int:
    """Merge the files of shards; leave out broken ones, and name these and incomplete ones."""
    check_file(options.out)
    parts, whole = [], True
    for path in options.files:
        try:
            part = HeadRoles.load(path)
        except FileFormatError as error:
            print(f"sat-lens: left out: {error}", file=sys.stderr)
            whole = False
            continue
        if not part.complete:
            print(f"sat-lens: {path} is part of a shard: it was interrupted", file=sys.stderr)
            whole = False
        parts.append(part)
    if not parts:
        raise FileFormatError(
            "Needed at least one result to merge; none of these files is one that sat-lens roles "
            "--out wrote."
        )
    merged = HeadRoles.merge(parts)
    if options.out:
        merged.save(options.out)
    print(_short_table(merged.frame()))
    counts = counted(len(parts), "file"), counted(merged.n_sequences, "sequence")
    print("\n{} merged, {} in all".format(*counts))
    return 0 if whole else 1


def _short_table(frame: pd.DataFrame) -> str:
    """Return the columns of a table of roles that fit a terminal, and what to know of them."""
    shown = frame[["role", "target", "lean", "tv_argmax", "tv_mean", "tv_nearest", "agreement"]]
    return f"{shown.to_string(float_format='{:.2f}'.format)}\n\n{CAUTION}"


def _model_and_windows(options: argparse.Namespace) -> tuple[Any, Tensor, str]:
    """Load the model, cut the chosen text into windows, and return both with the text's name."""
    if options.sequences < 1 or options.context < 2:
        raise ArgumentError("--sequences must be at least 1 and --context at least 2.")
    texts: Iterable[str] = held_out_texts() if options.text is None else [_read(options.text)]
    model = models.load_model(options.model, progress=not options.quiet)
    context = min(options.context, models.context_length(model) or options.context)
    windows = text_windows(model, texts, context, options.sequences)
    name = corpus_name() if options.text is None else options.text.name
    length = windows.shape[1]
    if length < context:
        name = f"{name} (the whole of it, {length} tokens: less than the {context} of a sequence)"
    return model, windows, name


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArgumentError(f"The text file {path} cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise ArgumentError(f"The text file {path} holds no text.")
    return text


def _shown_tokens(options: argparse.Namespace, model: Any, windows: Tensor) -> Tensor:
    """Choose the short text whose patterns the page shows."""
    if options.prompt is None and options.text is not None:
        return windows[:1, :SHOWN_TOKENS]
    tokens: Tensor = model.to_tokens(options.prompt or PROMPT)
    return tokens[:, :SHOWN_TOKENS]


def _read_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _SHARD.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentError(
            f"A shard is written i/n with i from 1 to n, such as 2/8; {text!r} was given."
        )
    return int(match[1]), int(match[2])


@contextlib.contextmanager
def _processes() -> Iterator[bool]:
    """Join the other processes that torchrun started; each then reads its share of the data.

    Yields:
        Whether this is the process that prints and writes.
    """
    rank, count = _rank_and_count()
    if count == 1:
        yield True
        return
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"The {count} processes cannot find each other ({error}). Start them with torchrun."
        ) from error
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def _rank_and_count() -> tuple[int, int]:
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 1
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if all(value.isascii() and value.isdigit() for value in found.values()):
        rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
        if rank < count:
            return rank, count
    raise ArgumentError(
        "Several processes need RANK and WORLD_SIZE as torchrun sets them, with RANK below "
        f"WORLD_SIZE; found {found}. Start with torchrun, or unset both."
    )
