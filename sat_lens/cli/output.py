"""What the commands print, and the exit status that goes with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from sat_lens.errors import SatLensError
from sat_lens.vocabulary import CAUTION

if TYPE_CHECKING:
    import pandas as pd

INTERRUPTED = 130


def short_table(frame: pd.DataFrame) -> str:
    """Give the columns of a table of roles that fit a terminal, and what to know of them."""
    shown = frame[["role", "target", "lean", "tv_argmax", "tv_mean", "tv_nearest", "agreement"]]
    return f"{shown.to_string(float_format='{:.2f}'.format)}\n\n{CAUTION}"


def status_of(complete: bool) -> int:
    """Give the exit status of a measurement, and say so where it was interrupted."""
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
        # Whoever read the output has left, and has no use for the rest.
        _discard_output()
        return 0
    except OSError as error:
        if error.filename is None:
            _discard_output()
        print(f"{program}: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    return status


def _discard_output() -> None:
    """Keep Python from complaining when it flushes at its end what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
