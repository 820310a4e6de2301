"""The ``sat-lens`` command.

An error of the library becomes one line on standard error and exit status 2, without a traceback.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat_lens.cli.shared import status_of_work
from sat_lens.version import __version__

COMMANDS = ("report", "roles", "merge", "sweep", "check")
EPILOG = """heads:
  L5H1 is head 1 of layer 5, both counted from 0. In a model with several stacks the stack comes
  first: encoder.L0H1, decoder.L0H1, cross.L0H1.

examples:
  sat-lens report                          the demo model over the bundled corpus
  sat-lens report gpt2 --text notes.txt    a hub model over a text of yours
  sat-lens roles ./my-model --csv out.csv  the head-role table of a local model
  sat-lens roles --shard 2/8 --out 2.st    measure the second of eight parts of the text
  sat-lens merge 1.st 2.st --out all.st    merge such parts
  torchrun --nproc-per-node 4 -m sat_lens roles --out all.st    the same in four processes
  sat-lens sweep gpt2 --prompt "The Eiffel Tower is in" --answer " Paris" --wrong " Rome"
  sat-lens check bert-base-uncased         which attention modules can be saturated
"""
_MODEL = (
    'the bundled "demo" (default), a local directory in Hugging Face format, a GGUF file, or a hub '
    "name such as gpt2, with an optional @revision"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)

    def work() -> int:
        # ``--help`` answers at once, because a command and all that it needs is imported here.
        module, _, function = options.run.partition(":")
        status: int = getattr(importlib.import_module(f"sat_lens.cli.{module}"), function)(options)
        return status

    return status_of_work("sat-lens", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-lens",
        description="Saturate the attention of a transformer and see what its softness is for.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sat-lens {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "report", "roles:report", "write a page about a model's heads")
    _add_model(command)
    _add_data(command)
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    command.add_argument("--prompt", help="the short text whose attention the page shows")

    command = _command(commands, "roles", "roles:roles", "print the role of every head")
    _add_model(command)
    _add_data(command)
    add = command.add_argument
    add("--csv", type=Path, help="write the whole table here")
    add("--out", type=Path, help="write the result (safetensors) here")
    add("--figure", type=Path, help="write the role map (PNG, SVG, PDF) here")
    add("--shard", metavar="I/N", help="read every N-th batch only, starting with the I-th")

    command = _command(commands, "merge", "roles:merge", "merge the role statistics of shards")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of roles --out")
    command.add_argument("--out", type=Path, help="write the merged result here")

    about = "show which heads' soft attention a prediction needs"
    command = _command(commands, "sweep", "sweep:run", about)
    _add_model(command)
    add = command.add_argument
    add("--prompt", required=True, help="the text; the prediction after its last token is read")
    add("--answer", required=True, help="the right next token, with its leading space if any")
    add("--wrong", required=True, help="the wrong next token")
    add("--out", type=Path, default=Path("sweep"), help="the folder to write (default: sweep)")
    add("--direction", choices=("noising", "denoising"), default="noising")
    add("--figure-format", choices=("svg", "png"), default="svg")
    _add_quiet(command)

    about = "try which attention modules can be saturated"
    _add_model(_command(commands, "check", "check:run", about))
    return parser


def _command(commands: Any, name: str, run: str, help_text: str) -> argparse.ArgumentParser:
    """Add a command; ``run`` names its module and function."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=_MODEL)


def _add_data(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--text", type=Path, metavar="FILE", help="a text to measure on (default: the corpus)")
    add("--sequences", type=int, default=64, help="how many to measure (default: %(default)s)")
    add("--context", type=int, default=256, help="tokens in a sequence (default: %(default)s)")
    _add_quiet(command)


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="show no progress bars")
