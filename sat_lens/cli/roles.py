"""``sat-lens roles``: measure the role of every head; print and write the table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens import figures
from sat_lens.cli.arguments import add_command, add_data, add_model, add_quiet
from sat_lens.cli.checks import check_file, read_shard
from sat_lens.cli.output import short_table, status_of
from sat_lens.cli.processes import processes
from sat_lens.cli.windows import model_and_windows
from sat_lens.errors import ArgumentError

if TYPE_CHECKING:
    from sat_lens.roles import HeadRoles

FIGURES = (".png", ".svg", ".pdf")


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    command = add_command(chosen, "roles", run, "print the role of every head")
    add_model(command)
    add_data(command)
    add_quiet(command)
    command.add_argument("--csv", type=Path, help="write the whole table here")
    command.add_argument("--out", type=Path, help="write the result (safetensors) here")
    command.add_argument("--figure", type=Path, help="write the role map (PNG, SVG, PDF) here")
    command.add_argument(
        "--shard", metavar="I/N", help="read every N-th batch only, starting with the I-th"
    )


def run(options: argparse.Namespace) -> int:
    """Measure the role of every head; print and write the table."""
    for path in (options.csv, options.out, options.figure):
        check_file(path)
    if options.figure and options.figure.suffix.lower() not in FIGURES:
        raise ArgumentError(
            f"A figure is one of {', '.join(FIGURES)}; found {options.figure.name}."
        )
    shard = read_shard(options.shard)
    with processes() as is_first:
        from sat_lens.roles import head_roles

        model, windows, name = model_and_windows(options)
        progress = not options.quiet and is_first
        roles = head_roles(model, windows, shard=shard, data_name=name, progress=progress)
        return _write(roles, options) if is_first else 0


def _write(roles: HeadRoles, options: argparse.Namespace) -> int:
    from sat_lens.results import write_csv, write_whole

    if options.csv:
        write_csv(options.csv, roles.frame())
    if options.out:
        roles.save(options.out)
    if options.figure:
        drawn = figures.figure_bytes(roles.plot(), options.figure.suffix[1:].lower())
        write_whole(options.figure, drawn)
    print(short_table(roles.frame()))
    return status_of(roles.complete)
