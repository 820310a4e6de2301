"""The ``sat-lens`` command.

Each command has a file of its own here, with ``add`` for its arguments and ``run`` for its work.
Nothing heavy is imported before a command is chosen, so ``--help`` answers at once. An error of
the library becomes one line on standard error and exit status 2; nothing shows a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from sat_lens.cli.arguments import EPILOG
from sat_lens.cli.output import INTERRUPTED
from sat_lens.errors import SatLensError
from sat_lens.version import __version__

COMMANDS = ("report", "roles", "merge", "sweep", "check", "grid", "reproduce")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except SatLensError as error:
        print(f"sat-lens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sat-lens: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left, and has no use for the rest.
        _discard_output()
        return 0
    except OSError as error:
        if error.filename is None:
            _discard_output()
        print(f"sat-lens: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    return status


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


def _discard_output() -> None:
    """Keep Python from complaining when it flushes at its end what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
