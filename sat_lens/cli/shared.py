"""What several commands share: arguments, the data to measure on, files, and exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.errors import ArgumentError, SatLensError

if TYPE_CHECKING:
    from torch import Tensor

INTERRUPTED = 130
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
    'the bundled "demo" (default), a local directory in Hugging Face format, or a hub name such as '
    "gpt2, with an optional @revision"
)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    """Add a command that ``run`` carries out."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the name of the model."""
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=_MODEL)


def add_data(command: argparse.ArgumentParser) -> None:
    """Add the text to measure on, and how much of it."""
    add = command.add_argument
    add("--text", type=Path, metavar="FILE", help="a text to measure on (default: the corpus)")
    add("--sequences", type=int, default=64, help="how many to measure (default: %(default)s)")
    add("--context", type=int, default=256, help="tokens in a sequence (default: %(default)s)")


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add ``--quiet``."""
    command.add_argument("--quiet", action="store_true", help="show no progress bars")


def model_and_windows(options: argparse.Namespace) -> tuple[Any, Tensor, str]:
    """Load the model, cut the chosen text into windows, and return both with the text's name."""
    from sat_lens.data import text_windows
    from sat_lens.demo.corpus import corpus_name, held_out_texts
    from sat_lens.models import context_length, load_model

    if options.sequences < 1 or options.context < 2:
        raise ArgumentError("--sequences must be at least 1 and --context at least 2.")
    texts: Iterable[str] = held_out_texts() if options.text is None else [_read(options.text)]
    model = load_model(options.model)
    context = min(options.context, context_length(model) or options.context)
    windows = text_windows(model, texts, context, options.sequences)
    return model, windows, corpus_name() if options.text is None else options.text.name


def check_file(path: Path | None) -> None:
    """Raise an ArgumentError, before any work, if a file could not be written."""
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ArgumentError(f"There is no folder {folder} to write {path.name} in.")
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder; name the file to write.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ArgumentError(f"{path} cannot be written: no permission. Choose another place.")


def check_folder(path: Path) -> None:
    """Raise an ArgumentError, before any work, if a folder could neither be written nor made."""
    nearest = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise ArgumentError(f"{nearest} is a file; name a folder to write in.")
    if not os.access(nearest, os.W_OK):
        raise ArgumentError(f"{path} cannot be written: no permission. Choose another place.")


def status_of(complete: bool) -> int:
    """Return the exit status of a measurement, and say so if it was interrupted."""
    if complete:
        return 0
    print("Interrupted: these are the numbers of what was read.", file=sys.stderr)
    return INTERRUPTED


def status_of_work(program: str, work: Callable[[], int]) -> int:
    """Return a command's exit status; what goes wrong becomes one line on standard error."""
    try:
        status = work()
        sys.stdout.flush()
    except SatLensError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone, and needs no more of it.
        _discard_output()
        return 0
    except OSError as error:
        if error.filename is None:
            _discard_output()
        print(f"{program}: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    return status


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArgumentError(f"The text file {path} cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise ArgumentError(f"The text file {path} holds no text.")
    return text


def _discard_output() -> None:
    """Keep Python from complaining when it flushes at its end what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
