"""The bundled corpus: the source of Python's own standard library.

Every machine that runs Python has this text, so the project needs neither a download nor a
copy in its repository. Files are found through :mod:`sysconfig` at run time; a file belongs to
the held-out part if a hash of its path says so, which keeps the split the same across machines
and Python versions. A figure measured on this corpus should name the Python version, because
the text differs from one to the next.

When not to use it: it is code, with code's indentation and repetition. It says little about
how a model that was trained on prose behaves on prose.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sat_lens.errors import DataError

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages"})
HELD_OUT_SHARE = 0.05


def corpus_name() -> str:
    """Return the name of the corpus, with the Python version that it comes from.

    Example:
        >>> from sat_lens.demo.corpus import corpus_name
        >>> corpus_name().startswith("standard library of Python 3.")
        True
    """
    return f"standard library of Python {platform.python_version()}"


def source_files() -> list[Path]:
    """Return the source files of the standard library, in a stable order.

    Tests, idlelib, installed packages and files generated for one machine are left out.

    Raises:
        DataError: This Python has no standard library as source files (an embedded or zipped one).
    """
    root = _stdlib_root()
    files = sorted(_files_below(root))
    if not files:
        raise DataError(
            f"The bundled corpus is the standard library's source, and {root} holds no .py file. "
            "Run this with a Python that ships its library as source, or pass a text of your own."
        )
    return files


def is_held_out(relative_path: str) -> bool:
    """Whether a file, by its POSIX path below the library's root, is kept from training.

    Example:
        >>> from sat_lens.demo.corpus import is_held_out
        >>> is_held_out("bisect.py") == is_held_out("bisect.py")
        True
    """
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def training_texts() -> Iterator[str]:
    """Yield the text of every training file."""
    return _texts(held_out=False)


def held_out_texts() -> Iterator[str]:
    """Yield the text of every held-out file."""
    return _texts(held_out=True)


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files_below(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # Installed packages can be many times what is wanted: do not even look at them.
        subfolders[:] = set(subfolders) - EXCLUDED_FOLDERS
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _texts(*, held_out: bool) -> Iterator[str]:
    root = _stdlib_root()
    for path in source_files():
        if is_held_out(path.relative_to(root).as_posix()) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")
