"""``sat-lens sweep``: saturate head after head, and write what that does to an answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sat_lens.cli.arguments import add_command, add_model, add_quiet
from sat_lens.cli.checks import check_folder
from sat_lens.cli.output import status_of
from sat_lens.errors import ArgumentError

SHOWN_HEADS = 10


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    command = add_command(
        chosen, "sweep", run, "say which heads' soft attention a prediction needs"
    )
    add_model(command)
    add = command.add_argument
    add("--prompt", required=True, help="the text; the prediction after its last token is read")
    add("--answer", required=True, help="the right next token, with its leading space if any")
    add("--wrong", required=True, help="the wrong next token")
    add("--out", type=Path, default=Path("sweep"), help="the folder to write (default: sweep)")
    add("--direction", choices=("noising", "denoising"), default="noising")
    add("--figure-format", choices=("svg", "png"), default="svg")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    """Saturate head after head, and write what that does to a logit difference."""
    check_folder(options.out)
    if not options.prompt.strip():
        raise ArgumentError("--prompt holds no text to predict the next token of.")
    from sat_lens.cli._sweep import COLUMNS, run_sweep

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
    print(table[COLUMNS].to_string(float_format="{:.3f}".format))
    print(f"\nThe page is {files.page}, the table {files.table}, the figure {files.figure}")
    return status_of(result.complete)
