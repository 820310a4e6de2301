"""``sat-lens merge``: put the role statistics of shards together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sat_lens.cli.arguments import add_command
from sat_lens.cli.checks import check_file
from sat_lens.cli.output import short_table
from sat_lens.errors import FileFormatError


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    command = add_command(chosen, "merge", run, "merge the role statistics of shards")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of roles --out")
    command.add_argument("--out", type=Path, help="write the merged result here")


def run(options: argparse.Namespace) -> int:
    """Merge the files of shards; one that is broken is left out, and it or part of one is named."""
    check_file(options.out)
    from sat_lens.roles import HeadRoles, merge

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
    merged = merge(parts)
    if options.out:
        merged.save(options.out)
    print(short_table(merged.frame()))
    print(f"\n{len(parts)} files merged, {merged.n_sequences} sequences in all")
    return 0 if whole else 1
