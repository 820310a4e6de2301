"""What all results share: where they came from, and how they are kept in files.

A result file is a safetensors file: its tensors hold the numbers, one entry of its header holds
the rest as JSON. Reading one runs no code. A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import numbers
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sat_lens.errors import FileFormatError
from sat_lens.version import __version__

_HEADER = "sat_lens"
_DIGEST = "sha256"
_FORMAT = 1
_RISKY = ("=", "+", "-", "@", "\t", "\r")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a result was measured on: the model, the data, the intervention, the versions."""

    model: str
    data: str = ""
    scale: str = ""
    ties: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: library_versions())

    def __str__(self) -> str:
        parts = [self.model, self.data, f"c = {self.scale}" if self.scale else ""]
        return ", ".join(part for part in parts if part)


def library_versions() -> dict[str, str]:
    """Give the versions of everything that can change a number."""
    versions = {"python": platform.python_version(), "sat_lens": __version__}
    for package in ("torch", "transformer-lens", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_result(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a result of some kind; ``meta`` must be plain JSON data.

    Raises:
        FileFormatError: The file cannot be written.
    """
    # Copies: safetensors refuses tensors that share their memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # As it will be read: JSON knows no tuples, and a file may change on its way.
    header = json.loads(json.dumps({"kind": kind, "format": _FORMAT, "meta": meta}))
    header[_DIGEST] = _digest(header, copies)
    write_whole(path, save(copies, metadata={_HEADER: json.dumps(header)}))


def read_result(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a result of some kind.

    Raises:
        FileFormatError: There is no such file, it is broken or foreign, holds another kind of
            result, or was written by a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError as error:
        raise FileFormatError(f"There is no file {path}.") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is broken or no safetensors file ({error}). Measure again, or take a copy."
        ) from error
    if not isinstance(header, dict) or not isinstance(header.get("meta"), dict):
        raise FileFormatError(f"{path} was not written by sat_lens.")
    if header.get("kind") != kind:
        raise FileFormatError(f"{path} holds {header.get('kind')!r}, and {kind!r} was needed.")
    if header.get("format") != _FORMAT:
        raise FileFormatError(
            f"{path} was written by a newer sat_lens. Update sat_lens to read it."
        )
    digest = header.pop(_DIGEST, None)
    if digest is not None and digest != _digest(header, tensors):
        raise FileFormatError(
            f"{path} is broken: it does not hold what was written. Measure again, or take a copy."
        )
    return tensors, header["meta"]


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash all that a file holds; safetensors itself does not see a bit that changed."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def read_entries(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong while a result is made of a file's entries into one error.

    Raises:
        FileFormatError: An entry is missing, or is not what it has to be.

    Example:
        >>> from sat_lens.results import read_entries
        >>> with read_entries("r.safetensors"):
        ...     {}["values"]
        Traceback (most recent call last):
        sat_lens.errors.FileFormatError: r.safetensors lacks or garbles an entry: 'values'.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error


def write_csv(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a table as CSV in which no cell can be taken for a formula by a spreadsheet.

    Raises:
        FileFormatError: The file cannot be written.
    """
    write_whole(path, csv_text(frame).encode())


def csv_text(frame: pd.DataFrame) -> str:
    """Give a table as CSV; cells that start like a formula and are no numbers get a quote mark.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.results import csv_text
        >>> csv_text(pd.DataFrame({"a": ["=1+1", -2.0]}))
        "a\\r\\n'=1+1\\r\\n-2.0\\r\\n"
    """
    table = frame.reset_index() if any(frame.index.names) else frame
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([_safe_cell(name) for name in table.columns])
    writer.writerows([_safe_cell(cell) for cell in row] for row in table.itertuples(index=False))
    return buffer.getvalue()


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all.

    Raises:
        FileFormatError: The file cannot be written.
    """
    target = _file_path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.exists() and not target.is_file():
            # Devices and pipes are written to; a file must not take their place.
            target.write_bytes(content)
            return
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError as error:
        raise FileFormatError(f"{target} cannot be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _file_path(path: str | Path) -> Path:
    try:
        target = Path(path)
    except TypeError as error:
        raise FileFormatError(f"A file needs a path; {path!r} was given.") from error
    if not target.name or "\0" in str(target):
        raise FileFormatError(f"{str(path)!r} names no file to write.")
    return target


def as_grid(values: Tensor, layers: int, heads: int, places: list[tuple[int, int]]) -> Tensor:
    """Put one value per head into a tensor ``[layer, head, ...]``, NaN where there is no head."""
    grid = torch.full((layers, heads, *values.shape[1:]), float("nan"), dtype=values.dtype)
    for value, (layer, head) in zip(values, places, strict=True):
        grid[layer, head] = value
    return grid


def _safe_cell(cell: object) -> object:
    if cell is None or isinstance(cell, numbers.Number):
        return cell
    text = str(cell)
    return f"'{text}" if text.startswith(_RISKY) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
