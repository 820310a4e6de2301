"""What the commands print, and the exit status that goes with it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

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
