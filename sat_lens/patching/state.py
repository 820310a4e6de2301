"""A search kept in a file, so that it can go on after an interrupt."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.results import write_whole

_KIND = "sat_lens search"


@dataclasses.dataclass
class SearchState:
    """What a search has found so far.

    Attributes:
        path: Its file; None keeps nothing.
        asked: What was searched for, to tell one search from another.
        steps: The heads in the order in which they were added, each with the metric from then on.
        known: The metric when a head was last tried.
    """

    path: Path | None
    asked: Mapping[str, Any]
    steps: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    known: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None, asked: Mapping[str, Any]) -> SearchState:
        """Read the file if there is one, and start afresh if not.

        Raises:
            ArgumentError: The file belongs to another search, or the path is none.
            FileFormatError: It cannot be read, or not be written.
        """
        if path is None:
            return cls(None, asked)
        if not isinstance(path, (str, Path)):
            raise ArgumentError(f"state is the path of a file, or None; {path!r} was given.")
        file = Path(path)
        if not file.exists():
            fresh = cls(file, asked)
            fresh.write()  # what cannot be written is better known before the work
            return fresh
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["kind"] != _KIND:
                raise KeyError("kind")
            kept = dict(found["asked"])
            steps = [(str(label), float(value)) for label, value in found["steps"]]
            known = {str(label): float(value) for label, value in found["known"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise FileFormatError(f"{file} holds no search of sat_lens ({error}).") from error
        differing = [name for name in asked if not _same(asked[name], kept.get(name))]
        if differing:
            raise ArgumentError(
                f"{file} belongs to another search: it differs in {', '.join(differing)}. Name "
                "another file, or remove this one."
            )
        _check_heads(file, asked["heads"], steps, known)
        return cls(file, asked, steps, known)

    def add(self, label: str, value: float) -> None:
        """Add a head, and write the file."""
        self.steps.append((label, value))
        self.write()

    def write(self) -> None:
        """Write the file, if there is one.

        Raises:
            FileFormatError: It cannot be written.
        """
        if self.path is None:
            return
        content = {
            "kind": _KIND,
            "asked": dict(self.asked),
            "steps": self.steps,
            "known": self.known,
        }
        write_whole(self.path, json.dumps(content, indent=1).encode())


def _check_heads(
    file: Path, heads: list[str], steps: list[tuple[str, float]], known: Mapping[str, float]
) -> None:
    """Heads that were added are different ones of those asked for, and all were tried before."""
    chosen = {label for label, _ in steps}
    finite = all(math.isfinite(value) for _, value in (*steps, *known.items()))
    tried = set(known) == set(heads) if known or steps else True
    if not (finite and tried and len(chosen) == len(steps) and chosen <= set(heads)):
        raise FileFormatError(
            f"{file} is a search whose heads do not fit together, so somebody changed it. Remove "
            "it, and search anew."
        )


def _same(first: Any, second: Any) -> bool:
    """Compare what was asked; values of a metric may differ by rounding between machines."""
    if isinstance(first, float) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=1e-3, abs_tol=1e-4)
    return bool(first == second)
