"""What can be found out before a model is loaded, and must not be found out after the work."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sat_lens.errors import ArgumentError

_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


def check_file(path: Path | None) -> None:
    """Refuse a file that could not be written.

    Raises:
        ArgumentError: Its folder is missing or cannot be written, or it is a folder itself.
    """
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
    """Refuse a folder that could neither be written nor made.

    Raises:
        ArgumentError: A file is in its place, or it lies where nothing can be written.
    """
    nearest = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise ArgumentError(f"{nearest} is a file; name a folder to write in.")
    if not os.access(nearest, os.W_OK):
        raise ArgumentError(f"{path} cannot be written: no permission. Choose another place.")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ArgumentError: It cannot be read, or holds nothing.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArgumentError(f"The text file {path} cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise ArgumentError(f"The text file {path} holds no text.")
    return text


def read_shard(text: str | None) -> tuple[int, int] | None:
    """Read a share of the data, such as ``2/8``.

    Raises:
        ArgumentError: It is written otherwise, or there is no such share.

    Example:
        >>> read_shard("2/8")
        (2, 8)
    """
    if text is None:
        return None
    match = _SHARD.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentError(
            f"A shard is written i/n with i from 1 to n, such as 2/8; {text!r} was given."
        )
    return int(match[1]), int(match[2])
