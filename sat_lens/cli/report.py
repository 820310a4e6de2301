"""``sat-lens report``: measure a model and write the page about it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.cli.arguments import add_command, add_data, add_model, add_quiet
from sat_lens.cli.checks import check_file
from sat_lens.cli.output import short_table, status_of
from sat_lens.cli.windows import model_and_windows
from sat_lens.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, """
SHOWN_TOKENS = 64
CURVE_SEQUENCES = 8


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    command = add_command(chosen, "report", run, "write a page about a model's heads")
    add_model(command)
    add_data(command)
    add_quiet(command)
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    command.add_argument("--prompt", help="the short text whose attention the page shows")


def run(options: argparse.Namespace) -> int:
    """Measure a model and write the page about it."""
    check_file(options.out)
    if options.prompt is not None and not options.prompt.strip():
        raise ArgumentError("--prompt holds no text to show the attention of.")
    from sat_lens.caching import run_with_saturation_cache
    from sat_lens.roles import head_roles
    from sat_lens.spectrum import scaling_curve
    from sat_lens.viz import token_strings, write_report

    model, windows, name = model_and_windows(options)
    progress = not options.quiet
    roles = head_roles(model, windows, data_name=name, progress=progress)
    curve = scaling_curve(model, windows[:CURVE_SEQUENCES], data_name=name, progress=progress)
    shown = _shown_tokens(options, model, windows)
    pair = run_with_saturation_cache(model, shown, names_filter=lambda n: n.endswith("pattern"))
    strings = token_strings(model, shown)
    write_report(options.out, roles=roles, pair=pair, tokens=strings, curve=curve)
    print(short_table(roles.frame()))
    print(f"\nThe report is in {options.out.resolve()}")
    return status_of(roles.complete and curve.complete)


def _shown_tokens(options: argparse.Namespace, model: Any, windows: Tensor) -> Tensor:
    """Choose the short text whose patterns the page shows."""
    if options.prompt is None and options.text is not None:
        return windows[:1, :SHOWN_TOKENS]
    tokens: Tensor = model.to_tokens(options.prompt or PROMPT)
    return tokens[:, :SHOWN_TOKENS]
