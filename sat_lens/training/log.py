"""A log of one JSON object a line, readable at any time, even after the run was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sat_lens._checks import is_count, is_number
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.results import library_versions

KIND = "sat_lens training log"
_FORMAT = 1
# Columns that hold texts; all others hold numbers.
_TEXTS = ("problem",)


class TrainingLog:
    """Appends lines to a file, each flushed at once; a log that exists is continued."""

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        try:
            known = path.exists() and path.stat().st_size > 0
            if known:
                _cut_torn_line(path)
                known = path.stat().st_size > 0
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise FileFormatError(f"{path} cannot be written: {error.strerror}.") from error
        if not known:
            versions = library_versions()
            self.write({"kind": KIND, "format": _FORMAT, "model": model, "versions": versions})

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become null, because JSON has neither."""
        plain = {name: _plain(value) for name, value in entry.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_training_log(path: str | Path) -> pd.DataFrame:
    """Read what a :class:`SaturationTracker` wrote, even while it is still writing.

    A last line that was cut off when the run was killed is left out. Where a resumed run logged a
    step again, the later line counts.

    Returns:
        One row a step, indexed by step.

    Raises:
        ArgumentError: ``path`` is not a path.
        FileFormatError: There is no such file, it was not written by sat_lens, or a complete line
            is broken.

    Example:
        >>> from sat_lens.training import read_training_log
        >>> read_training_log("nowhere.jsonl")
        Traceback (most recent call last):
        ...
        sat_lens.errors.FileFormatError: nowhere.jsonl cannot be read: No such file or directory.
    """
    if not isinstance(path, (str, Path)):
        raise ArgumentError(f"A training log is a file, given by its path; found {path!r}.")
    header, *rows = _lines(Path(path))
    if header.get("format") != _FORMAT:
        raise FileFormatError(
            f"{path} was written by a newer sat_lens. Update sat_lens to read it."
        )
    by_step = {row["step"]: row for row in rows}
    frame = pd.DataFrame([by_step[step] for step in sorted(by_step)])
    if frame.empty:
        frame = pd.DataFrame({"step": pd.Series(dtype="int64")})
    numbers = frame.columns.difference(_TEXTS)
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    return frame.set_index("step")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        *whole, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}.") from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(whole, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"Line {number} of {path} is broken: {error}.") from error
        if not isinstance(entry, dict) or (entries and not _is_row(entry)):
            raise FileFormatError(f"Line {number} of {path} is not from a training log.")
        entries.append(entry)
    if not entries or entries[0].get("kind") != KIND:
        cut_off = "holds a single line, which is cut off"
        what = cut_off if torn and not entries else "was not written by sat_lens"
        raise FileFormatError(f"{path} {what}.")
    return entries


def _is_row(entry: Mapping[str, Any]) -> bool:
    step = entry.get("step")
    return (
        is_count(step, at_least=0)
        and step < 2**63
        and all(isinstance(v, str) for k, v in entry.items() if k in _TEXTS)
        and all(v is None or is_number(v) for k, v in entry.items() if k not in _TEXTS)
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """Make a log ready to be continued; refuse a file that is something else."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole or not content.startswith(b'{"kind": "sat_lens'):
        _lines(path)
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
