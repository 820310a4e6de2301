"""Arguments that several commands share, and the text under every ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPILOG = """heads:
  L5H1 is head 1 of layer 5, both counted from 0. In a model with several stacks the stack comes
  first: encoder.L0H1, decoder.L0H1, cross.L0H1.

examples:
  sat-lens report                          the demo model over the bundled corpus
  sat-lens report gpt2 --text notes.txt    a hub model over a text of yours
  sat-lens roles ./my-model --csv out.csv  the head-role table of a local model
  sat-lens roles --shard 2/8 --out 2.st    measure the second of eight parts of the text
  sat-lens merge 1.st 2.st --out all.st    put such parts together
  torchrun --nproc-per-node 4 -m sat_lens roles --out all.st    the same in four processes
  sat-lens sweep gpt2 --prompt "The Eiffel Tower is in" --answer " Paris" --wrong " Rome"
  sat-lens check bert-base-uncased         which attention modules can be saturated
"""
_MODEL = (
    'the bundled "demo" (default), a local directory in Hugging Face format, or a hub name such as '
    "gpt2, with an optional @revision"
)


def add_command(
    chosen: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    """Add a command of that name, which ``run`` does."""
    command: argparse.ArgumentParser = chosen.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the model, by name."""
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=_MODEL)


def add_data(command: argparse.ArgumentParser) -> None:
    """Add the text to measure on, and how much of it."""
    add = command.add_argument
    add("--text", type=Path, metavar="FILE", help="a text to measure on (default: the corpus)")
    add("--sequences", type=int, default=64, help="how many to measure (default: %(default)s)")
    add("--context", type=int, default=256, help="tokens in a sequence (default: %(default)s)")


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add the wish for silence."""
    command.add_argument("--quiet", action="store_true", help="show no progress bars")
