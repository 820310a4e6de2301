"""The ``sat-lens`` command.

``--help`` answers at once: a command imports what it needs only when it runs. An error of the
library becomes one line on standard error and exit status 2, without a traceback.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sat_lens.cli import check, roles, sweep
from sat_lens.cli.shared import EPILOG, status_of_work
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (roles.add_report, roles.add_roles, roles.add_merge, sweep.add, check.add):
        add(commands)
    return parser
