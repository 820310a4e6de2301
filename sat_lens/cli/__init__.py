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

_HEADS = """heads:
  L5H1 is head 1 of layer 5, both counted from 0. In a model with several stacks the stack comes
  first: encoder.L0H1, decoder.L0H1, cross.L0H1.
"""
EXAMPLES = {
    "report": """
  sat-lens report                          the demo model over the bundled corpus
  sat-lens report gpt2 --text notes.txt    a hub model over a text of yours""",
    "roles": """
  sat-lens roles ./my-model --csv out.csv  the head-role table of a local model
  sat-lens roles --shard 2/8 --out 2.st    measure the second of eight parts of the text
  torchrun --nproc-per-node 4 -m sat_lens roles --out all.st    all parts in four processes""",
    "merge": """
  sat-lens merge 1.st 2.st --out all.st    merge what roles --shard measured""",
    "sweep": """
  sat-lens sweep gpt2 --prompt "The Eiffel Tower is in" --answer " Paris" --wrong " Rome\"""",
    "check": """
  sat-lens check bert-base-uncased         which attention modules can be saturated""",
}
_DEFAULT = "(default: %(default)s)"
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
        epilog=_epilog(*EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sat-lens {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "report", "roles:report", "write a page about a model's heads")
    _add_model(command)
    _add_data(command)
    add = command.add_argument
    add("--out", type=Path, default=Path("report.html"), help=f"the page to write {_DEFAULT}")
    add("--prompt", help="the short text whose attention the page shows (default: a few lines of "
        "Python, or the beginning of --text)")  # fmt: skip

    command = _command(commands, "roles", "roles:roles", "print the role of every head")
    _add_model(command)
    _add_data(command)
    add = command.add_argument
    add("--csv", type=Path, metavar="FILE", help="also write the whole table")
    add("--out", type=Path, metavar="FILE", help="also write the result, for merge")
    add("--figure", type=Path, metavar="FILE", help="also draw the role map (.png, .svg or .pdf)")
    add("--shard", metavar="I/N", help="read every N-th batch only, starting with the I-th")

    command = _command(commands, "merge", "roles:merge", "merge the role statistics of shards")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of roles --out")
    command.add_argument("--out", type=Path, metavar="FILE", help="also write the merged result")

    about = "show which heads' soft attention a prediction needs"
    command = _command(commands, "sweep", "sweep:run", about)
    _add_model(command)
    add = command.add_argument
    add("--prompt", required=True, help="the text; the prediction after its last token is read")
    add("--answer", required=True, help="the right next token, with its leading space if any")
    add("--wrong", required=True, help="the wrong next token")
    add("--out", type=Path, default=Path("sweep"), help=f"the folder to write {_DEFAULT}")
    add("--direction", choices=("noising", "denoising"), default="noising",
        help="noising saturates one head of the soft model; denoising makes one head of the "
        f"saturated model soft {_DEFAULT}")  # fmt: skip
    add("--figure-format", choices=("svg", "png"), default="svg",
        help=f"the format of the figure beside the page {_DEFAULT}")  # fmt: skip
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
        epilog=_epilog(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _epilog(*commands: str) -> str:
    heads = "" if commands == ("check",) else f"{_HEADS}\n"
    return f"{heads}examples:{''.join(EXAMPLES[name] for name in commands)}"


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=_MODEL)


def _add_data(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--text", type=Path, metavar="FILE", help="a text to measure on (default: the source of "
        "Python's standard library)")  # fmt: skip
    add("--sequences", type=int, default=64, help=f"how many sequences {_DEFAULT}")
    add("--context", type=int, default=256, help=f"tokens in a sequence {_DEFAULT}")
    _add_quiet(command)


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="show no progress bars")
