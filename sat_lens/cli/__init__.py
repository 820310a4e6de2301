"""The ``sat-lens`` command.

Nothing heavy is imported before a command is chosen, so ``--help`` answers at once. An error of
the library becomes one line on standard error and exit status 2; nothing shows a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat_lens.cli import commands
from sat_lens.errors import SatLensError
from sat_lens.version import __version__

EXAMPLES = """examples:
  sat-lens report                          the demo model over the bundled corpus
  sat-lens report gpt2 --text notes.txt    a hub model over a text of yours
  sat-lens roles ./my-model --csv out.csv  the head-role table of a local model
  sat-lens roles --shard 2/8 --out 2.st    measure the second of eight parts of the text
  sat-lens merge 1.st 2.st --out all.st    put such parts together
  torchrun --nproc-per-node 4 -m sat_lens roles --out all.st    the same in four processes
  sat-lens sweep gpt2 --prompt "The Eiffel Tower is in" --answer " Paris" --wrong " Rome"
  sat-lens check bert-base-uncased         which attention modules can be saturated
"""
MODEL_HELP = (
    'the bundled "demo" (default), a local directory in Hugging Face format, or a hub name such as '
    "gpt2, with an optional @revision"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except SatLensError as error:
        print(f"sat-lens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sat-lens: interrupted", file=sys.stderr)
        return commands.INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; without this Python complains when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-lens",
        description="Saturate the attention of a transformer and see what its softness is for.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sat-lens {__version__}")
    chosen = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_report, _add_roles, _add_merge, _add_sweep, _add_check):
        add(chosen)
    return parser


def _add_report(chosen: Any) -> None:
    command = _command(chosen, "report", commands.report, "write a page about a model's heads")
    _add_model_and_data(command)
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    command.add_argument("--prompt", help="the short text whose attention the page shows")


def _add_roles(chosen: Any) -> None:
    command = _command(chosen, "roles", commands.roles, "print the role of every head")
    _add_model_and_data(command)
    command.add_argument("--csv", type=Path, help="write the whole table here")
    command.add_argument("--out", type=Path, help="write the result (safetensors) here")
    command.add_argument("--figure", type=Path, help="write the role map (PNG, SVG, PDF) here")
    command.add_argument(
        "--shard", metavar="I/N", help="read every N-th batch only, starting with the I-th"
    )


def _add_merge(chosen: Any) -> None:
    command = _command(chosen, "merge", commands.merge, "merge the role statistics of shards")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of roles --out")
    command.add_argument("--out", type=Path, help="write the merged result here")


def _add_sweep(chosen: Any) -> None:
    command = _command(
        chosen, "sweep", commands.sweep, "say which heads' soft attention a prediction needs"
    )
    add = command.add_argument
    add("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)
    add("--prompt", required=True, help="the text; the prediction after its last token is read")
    add("--answer", required=True, help="the right next token, with its leading space if any")
    add("--wrong", required=True, help="the wrong next token")
    add("--out", type=Path, default=Path("sweep"), help="the folder to write (default: sweep)")
    add("--direction", choices=("noising", "denoising"), default="noising")
    add("--figure-format", choices=("svg", "png"), default="svg")
    add("--quiet", action="store_true", help="show no progress bars")


def _add_check(chosen: Any) -> None:
    command = _command(
        chosen, "check", commands.check, "say which attention modules can be saturated, by trying"
    )
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)


def _command(chosen: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = chosen.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_model_and_data(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)
    add("--text", type=Path, metavar="FILE", help="a text to measure on (default: the corpus)")
    add("--sequences", type=int, default=64, help="how many to measure (default: %(default)s)")
    add("--context", type=int, default=256, help="tokens in a sequence (default: %(default)s)")
    add("--quiet", action="store_true", help="show no progress bars")
