"""The ``sat-lens`` command.

Each command has a file of its own here, with ``add`` for its arguments and ``run`` for its work.
Nothing heavy is imported before a command is chosen, so ``--help`` answers at once. An error of
the library becomes one line on standard error and exit status 2; nothing shows a traceback.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from sat_lens.cli.arguments import EPILOG
from sat_lens.cli.output import status_of_work
from sat_lens.version import __version__

COMMANDS = ("report", "roles", "merge", "sweep", "check")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    return status_of_work("sat-lens", lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-lens",
        description="Saturate the attention of a transformer and see what its softness is for.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sat-lens {__version__}")
    chosen = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"sat_lens.cli.{name}").add(chosen)
    return parser
