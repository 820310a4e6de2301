"""What all results share: where they came from, how they are shown, merged and kept in files.

A result is a frozen dataclass below :class:`Result`. Its file is a safetensors file: the tensors
hold the numbers, one entry of the header holds all else as JSON. What a field has to be is read
from its type annotation, so reading a file runs no code and makes no type that it names itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import json
import numbers
import os
import platform
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jaxtyping
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sat_lens._checks import is_integer, is_number, shown
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADER = "sat_lens"
_FORMAT = 2
_TENSOR = "$tensor"
_RISKY = ("=", "+", "-", "@", "\t", "\r")
INCOMPLETE = "The measurement was interrupted: these are the numbers of what was read."

_KINDS: dict[str, type[Result]] = {}
# Rooms are imported when a file asks for them, and not with this module.
_HOMES = {
    "head roles": "sat_lens.roles",
    "head sweep": "sat_lens.patching",
    "homogeneity curve": "sat_lens.norms",
    "narrowing": "sat_lens.norms",
    "norm growth": "sat_lens.norms",
    "parameter norms": "sat_lens.norms",
    "rescaling share": "sat_lens.norms",
    "saturable heads": "sat_lens.patching",
    "scaling curve": "sat_lens.spectrum",
    "temperature gradient": "sat_lens.temperature",
    "tuned temperature": "sat_lens.temperature",
}
_Own = TypeVar("_Own", bound="Result")


def library_versions() -> dict[str, str]:
    """Return the versions of everything that can change a number."""
    versions = {"python": platform.python_version(), "sat_lens": __version__}
    for package in ("torch", "transformer-lens", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a result was measured on: the model, the data, the intervention, the versions."""

    model: str
    data: str = ""
    scale: str = ""
    ties: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=library_versions)

    def __str__(self) -> str:
        parts = [self.model, self.data, f"c = {self.scale}" if self.scale else ""]
        return ", ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Base of all results: frozen dataclasses that name their kind.

    ``class HeadRoles(Result, kind="head roles")``. A subclass adds its fields, :meth:`frame` and
    :meth:`plot`; what is shown beside its name (:meth:`_lines`); what a file's entries must satisfy
    beyond their types (:meth:`_check`); and the fields that add up over parts of the data, if any.
    """

    provenance: Provenance
    _kind: ClassVar[str]
    _summed: ClassVar[tuple[str, ...]] = ()
    _remedies: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, *, kind: str) -> None:
        cls._kind = kind
        _KINDS[kind] = cls

    def frame(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        """Return the numbers as a table."""
        raise NotImplementedError

    def plot(self, *args: Any, **kwargs: Any) -> Figure:
        """Draw the result."""
        raise NotImplementedError

    @property
    def notes(self) -> Sequence[str]:
        """What a reader must know before trusting the numbers, in sentences; often nothing."""
        return () if getattr(self, "complete", True) else (INCOMPLETE,)

    def __repr__(self) -> str:
        """A few lines: what was measured on what, the main numbers, the notes."""
        first = f"{self._kind.capitalize()} of {self.provenance}"
        return "\n".join([first, *self._lines(), *self.notes])

    def _lines(self) -> list[str]:
        """The main numbers in words: baselines, and what is largest."""
        return []

    def _check(self) -> None:
        """Raise a ValueError or a LookupError if fields read from a file are inconsistent."""

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header.

        Raises:
            FileFormatError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        write_result(path, self._kind, tensors, {**_encoded(self, "", tensors)})

    @classmethod
    def load(cls: type[_Own], path: str | Path) -> _Own:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileFormatError: The file is missing, broken, foreign, or holds something else.
        """
        tensors, meta = read_result(path, cls._kind)
        try:
            result: _Own = _dataclass_of(cls, meta, tensors, "")
            result._check()
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error
        return result

    @classmethod
    def merge(cls: type[_Own], parts: Sequence[_Own]) -> _Own:
        """Add up results of disjoint parts of the data.

        Raises:
            ArgumentError: There are no parts, one is no such result or comes twice, they were made
                with different settings or on different models, or such results do not add up.
        """
        for part in parts:
            if not isinstance(part, cls):
                raise ArgumentError(
                    f"Needed results to merge, such as {cls.__name__}.load gives; found "
                    f"{type(part).__name__}."
                )
        if not parts:
            raise ArgumentError("Needed at least one result to merge, and none was given.")
        if not cls._summed:
            raise ArgumentError(f"Results of kind {cls._kind!r} do not add up over data.")
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in (n for n in fields if n not in (*cls._summed, "provenance", "complete")):
            mine, *theirs = (getattr(part, name) for part in parts)
            others = [value for value in theirs if not _same(mine, value)]
            if others:
                remedy = cls._remedies.get(name, "Measure all parts alike.")
                raise ArgumentError(
                    f"Only results of one model and one setting can be merged; {name} differs "
                    f"({shown(mine)} and {shown(others[0])}). {remedy}"
                )
        sums = [{name: getattr(part, name) for name in cls._summed} for part in parts]
        for i, j in itertools.combinations(range(len(parts)), 2):
            # Different data do not give the same sums to the last bit.
            if _same(sums[i], sums[j]):
                raise ArgumentError(
                    f"Parts {i + 1} and {j + 1} are the same, and each may be merged once only."
                )
        merged = functools.reduce(_sum, sums)
        if "complete" in fields:
            merged["complete"] = all(getattr(part, "complete", True) for part in parts)
        return dataclasses.replace(parts[0], **merged)


def load(path: str | Path) -> Result:
    """Read any result that was saved.

    Raises:
        FileFormatError: The file is missing, broken or foreign, or holds no known kind of result.

    Example:
        >>> import sat_lens as sl
        >>> model, texts = sl.load_model("demo"), ["import os, sys"]
        >>> sl.scaling_curve(model, texts, scales=[0.0, 1.0], progress=False).save("curve.st")
        >>> list(sl.load("curve.st").frame().index)
        [0.0, 1.0]
    """
    kind = _read(path)[1]["kind"]
    if kind not in _KINDS and kind in _HOMES:
        importlib.import_module(_HOMES[kind])
    if kind not in _KINDS:
        raise FileFormatError(
            f"{path} holds {kind!r}, a kind of result that is not known here. Update sat_lens, or "
            "import the module that made it."
        )
    return _KINDS[kind].load(path)


def write_result(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a result's file from its parts; ``meta`` must be plain JSON data.

    Raises:
        FileFormatError: The file cannot be written.
    """
    # Copies: safetensors refuses tensors that share their memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = json.dumps({"kind": kind, "format": _FORMAT, "meta": meta})
    write_whole(path, save(copies, metadata={_HEADER: header}))


def read_result(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the parts of a result's file.

    Raises:
        FileFormatError: There is no such file, it is broken or foreign, holds another kind of
            result, or was written by another version.
    """
    tensors, header = _read(path)
    if header["kind"] != kind:
        raise FileFormatError(f"{path} holds {header['kind']!r}, and {kind!r} was needed.")
    return tensors, header["meta"]


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if Path(path).is_dir():
            raise FileFormatError(f"{path} is a folder; name the file in it that .save() wrote.")
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError as error:
        raise FileFormatError(f"There is no file {path}.") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is broken or no safetensors file ({error}). Measure again, or give a file "
            "that .save() wrote."
        ) from error
    known = isinstance(header, dict) and isinstance(header.get("kind"), str)
    if not known or not isinstance(header.get("meta"), dict):
        raise FileFormatError(
            f"{path} was not written by sat_lens. Model weights are read by load_model(folder)."
        )
    if header.get("format") == 1:
        raise FileFormatError(f"{path} was written by an older sat_lens. Measure again.")
    if header.get("format") != _FORMAT:
        raise FileFormatError(
            f"{path} was written by a newer sat_lens. Update sat_lens to read it."
        )
    return tensors, header


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a value into JSON data; its tensors go to ``tensors`` under paths of names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        at = f"{name}/" if name else ""
        return {str(k): _encoded(v, f"{at}{k}", tensors) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return [_encoded(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_number(value):
        return int(value) if is_integer(value) else float(value)
    # An argument of the model that no file can hold: what it was is kept in words.
    return repr(value)


def _decoded(hint: Any, value: Any, tensors: Mapping[str, Tensor], name: str) -> Any:
    """Turn JSON data into what the type annotation of a field says.

    Raises:
        LookupError, TypeError, ValueError: It is something else.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)

    def inner(of: Any, found: Any, key: object) -> Any:
        return _decoded(of, found, tensors, f"{name}/{key}")

    if hint is Any:
        if isinstance(value, list):
            return [inner(Any, v, i) for i, v in enumerate(value)]
        if isinstance(value, dict) and value.keys() != {_TENSOR}:
            return {k: inner(Any, v, k) for k, v in value.items()}
        return tensors[value[_TENSOR]] if isinstance(value, dict) else value
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            with contextlib.suppress(LookupError, TypeError, ValueError):
                return _decoded(choice, value, tensors, name)
    elif origin is typing.Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif _is_tensor(hint):
        if isinstance(value, dict) and isinstance(tensors[value[_TENSOR]], hint):
            return tensors[value[_TENSOR]]
    elif dataclasses.is_dataclass(hint):
        return _dataclass_of(typing.cast("type[Any]", hint), value, tensors, name)
    elif origin is tuple and arguments[-1] is not ... and isinstance(value, list):
        return tuple(
            inner(of, v, i) for i, (of, v) in enumerate(zip(arguments, value, strict=True))
        )
    elif origin in (tuple, list, frozenset) and isinstance(value, list):
        return origin(inner(arguments[0], v, i) for i, v in enumerate(value))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {k: inner(arguments[1], v, k) for k, v in value.items()}
    elif hint is float and is_number(value):
        return float(value)
    elif hint in (bool, int, str, type(None)) and type(value) is hint:
        return value
    needed = getattr(hint, "__name__", hint)
    raise TypeError(f"{name} must be {needed}; found {shown(value)}, a {type(value).__name__!r}")


def _dataclass_of(cls: type[Any], value: Any, tensors: Mapping[str, Tensor], name: str) -> Any:
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a {cls.__name__}; found a {type(value).__name__!r}")
    if value.keys() != set(fields):
        raise ValueError(f"{', '.join(sorted(value.keys() ^ set(fields)))}, missing or unknown")
    hints, at = typing.get_type_hints(cls), f"{name}/" if name else ""
    return cls(**{f: _decoded(hints[f], value[f], tensors, f"{at}{f}") for f in fields})


def _is_tensor(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, (Tensor, jaxtyping.AbstractArray))


def _same(first: Any, second: Any) -> bool:
    """Whether two values are equal, tensors and all."""
    mine: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    # As text: NaN equals itself there.
    words = [json.dumps(_encoded(*of)) for of in ((first, "", mine), (second, "", theirs))]
    return words[0] == words[1] and all(torch.equal(mine[n], theirs[n]) for n in mine)


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        return {key: _sum(first[key], second[key]) for key in first}
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        sums = {name: _sum(getattr(first, name), getattr(second, name)) for name in names}
        return dataclasses.replace(first, **sums)
    return first + second


def column_frame(
    columns: Mapping[str, Tensor], index: str, values: Sequence[float]
) -> pd.DataFrame:
    """Return columns as a table over steps or factors."""
    lists = {name: column.tolist() for name, column in columns.items()}
    return pd.DataFrame(lists, index=pd.Index(values, name=index))


def check_columns(columns: Mapping[str, Tensor], length: int) -> None:
    """Raise a ValueError unless every column has one length."""
    for name, column in columns.items():
        if column.shape != (length,):
            raise ValueError(f"{name} has the shape {list(column.shape)} and not [{length}]")


def largest(values: pd.Series, count: int = 5) -> str:
    """Return the values of largest magnitude with their labels, for a line of text.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.results import largest
        >>> largest(pd.Series({"L0H0": 0.25, "L0H1": -1.5, "L0H2": float("nan")}))
        'L0H1 -1.5, L0H0 0.25'
    """
    kept = values.dropna()
    order = (-kept.abs()).argsort(kind="stable")[:count]
    return ", ".join(f"{label} {value:.3g}" for label, value in kept.iloc[order].items())


def csv_text(frame: pd.DataFrame) -> str:
    """Return a table as CSV; a cell that a spreadsheet would take for a formula gets a quote mark.

    Example:
        >>> import pandas as pd
        >>> from sat_lens.results import csv_text
        >>> csv_text(pd.DataFrame({"a": ["=1+1", -2.0]}))
        "a\\r\\n'=1+1\\r\\n-2.0\\r\\n"
    """
    table = frame.reset_index() if any(frame.index.names) else frame
    safe = pd.DataFrame(
        {i: [_safe_cell(c) for c in column] for i, (_, column) in enumerate(table.items())},
        dtype=object,
    )
    header = [_safe_cell(name) for name in table.columns]
    return str(safe.to_csv(index=False, header=header, na_rep="nan", lineterminator="\r\n"))


def write_csv(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a table as CSV, as :func:`csv_text` gives it.

    Raises:
        FileFormatError: The file cannot be written.
    """
    write_whole(path, csv_text(frame).encode())


def _safe_cell(cell: object) -> object:
    if cell is None or isinstance(cell, numbers.Number):
        return "" if cell is None else cell
    text = str(cell)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(_RISKY) else text
    return text


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all.

    Raises:
        FileFormatError: The file cannot be written.
    """
    try:
        target = Path(path)
    except TypeError as error:
        raise FileFormatError(f"A file needs a path; {path!r} was given.") from error
    if not target.name or "\0" in str(target):
        raise FileFormatError(f"{str(path)!r} names no file to write.")
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
