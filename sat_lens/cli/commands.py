"""What the commands of ``sat-lens`` do. What they need is imported when they run."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.errors import ArgumentError, FileFormatError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sat_lens.roles import HeadRoles

PROMPT = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, """
SHOWN_TOKENS = 64
CURVE_SEQUENCES = 8
INTERRUPTED = 130
FIGURES = (".png", ".svg", ".pdf")
SHOWN_HEADS = 10


def report(options: argparse.Namespace) -> int:
    """Measure a model and write the page about it."""
    from sat_lens.caching import run_with_saturation_cache
    from sat_lens.roles import head_roles
    from sat_lens.spectrum import scaling_curve
    from sat_lens.viz import token_strings, write_report

    _check_target(options.out)
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
    return _status(roles.complete and curve.complete)


def _shown_tokens(options: argparse.Namespace, model: Any, windows: Tensor) -> Tensor:
    """Choose the short text whose patterns the page shows."""
    if options.prompt is None and options.text is not None:
        return windows[:1, :SHOWN_TOKENS]
    tokens: Tensor = model.to_tokens(options.prompt or PROMPT)
    return tokens[:, :SHOWN_TOKENS]


def roles(options: argparse.Namespace) -> int:
    """Measure the role of every head; print and write the table."""
    from sat_lens.roles import head_roles

    for path in (options.csv, options.out, options.figure):
        _check_target(path)
    if options.figure and options.figure.suffix.lower() not in FIGURES:
        raise ArgumentError(
            f"A figure is one of {', '.join(FIGURES)}; found {options.figure.name}."
        )
    shard = _shard(options.shard)
    model, windows, name = _model_and_windows(options)
    with _processes():
        progress = not options.quiet and _is_first_process()
        roles = head_roles(model, windows, shard=shard, data_name=name, progress=progress)
        return _write_roles(roles, options) if _is_first_process() else 0


def _write_roles(roles: HeadRoles, options: argparse.Namespace) -> int:
    from sat_lens.results import write_csv, write_whole

    if options.csv:
        write_csv(options.csv, roles.frame())
    if options.out:
        roles.save(options.out)
    if options.figure:
        drawn = io.BytesIO()
        roles.plot().savefig(drawn, dpi=150, format=options.figure.suffix[1:].lower())
        write_whole(options.figure, drawn.getvalue())
    print(_short_table(roles.frame()))
    return _status(roles.complete)


def _status(complete: bool) -> int:
    if complete:
        return 0
    print("Interrupted: these are the numbers of what was read.", file=sys.stderr)
    return INTERRUPTED


def merge(options: argparse.Namespace) -> int:
    """Merge the files of shards; one that is broken is left out and named."""
    from sat_lens.roles import HeadRoles, merge

    _check_target(options.out)
    parts, broken = [], 0
    for path in options.files:
        try:
            parts.append(HeadRoles.load(path))
        except FileFormatError as error:
            print(f"sat-lens: left out: {error}", file=sys.stderr)
            broken += 1
    merged = merge(parts)
    if options.out:
        merged.save(options.out)
    print(_short_table(merged.frame()))
    print(f"\n{len(parts)} files merged, {merged.n_sequences} sequences in all")
    return 1 if broken else 0


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """Join the other processes where torchrun started several; each then reads its share."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ArgumentError(f"A shard is written i/n, such as 2/8; {text!r} was given.")
    return int(index), int(count)


def check(options: argparse.Namespace) -> int:
    """Try every attention module, and print what came of it."""
    from sat_lens.models import load_model
    from sat_lens.verify import verify_sites

    verdicts = verify_sites(load_model(options.model))
    for verdict in verdicts:
        print(verdict)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _model_and_windows(options: argparse.Namespace) -> tuple[Any, Tensor, str]:
    """Load the model, cut the chosen text into windows, and say what the text is called."""
    from sat_lens.data import text_windows
    from sat_lens.demo.corpus import corpus_name, held_out_texts
    from sat_lens.models import load_model

    if options.sequences < 1 or options.context < 2:
        raise ArgumentError("--sequences must be at least 1 and --context at least 2.")
    texts: Iterable[str] = held_out_texts() if options.text is None else [_read(options.text)]
    model = load_model(options.model)
    context = min(options.context, int(getattr(model.cfg, "n_ctx", 0) or options.context))
    windows = text_windows(model, texts, context, options.sequences)
    return model, windows, corpus_name() if options.text is None else options.text.name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArgumentError(f"The text file {path} cannot be read: {error.strerror}.") from error


def _check_target(path: Path | None) -> None:
    """Find out before the work, and not after it, that its result cannot be written."""
    if path is None:
        return
    if not path.resolve().parent.is_dir():
        raise ArgumentError(f"There is no folder {path.resolve().parent} to write {path.name} in.")
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder; name the file to write.")


def _short_table(frame: pd.DataFrame) -> str:
    shown = frame[["role", "target", "lean", "tv_argmax", "tv_mean", "tv_nearest", "agreement"]]
    return shown.to_string(float_format="{:.2f}".format)


def sweep(options: argparse.Namespace) -> int:
    """Saturate head after head, and write what that does to a logit difference."""
    from sat_lens.patching.command import run_sweep

    result, files = run_sweep(
        options.model,
        options.prompt,
        options.answer,
        options.wrong,
        options.out,
        direction=options.direction,
        figure_format=options.figure_format,
        progress=not options.quiet,
    )
    table = result.frame().sort_values("effect", key=abs, ascending=False).head(SHOWN_HEADS)
    print(table[["effect", "normalised", "random_effect"]].to_string(float_format="{:.3f}".format))
    print(f"\nThe page is {files.page}, the table {files.table}, the figure {files.figure}")
    return _status(result.complete)
