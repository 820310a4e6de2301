"""What commands share, here and in `paper`: checks of paths, and exit statuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from sat_lens.errors import ArgumentError, SatLensError

INTERRUPTED = 130


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


def _discard_output() -> None:
    """Keep Python from complaining when it flushes at its end what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
