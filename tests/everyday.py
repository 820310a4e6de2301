"""What runs every day: one case of each kind. `make test-all` runs the others too, marked slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def everyday(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Values of a parameter, all of them marked slow but the chosen ones."""
    values = list(values)
    assert all(choice in values for choice in chosen), "a chosen value is not among the values"
    return [value if value in chosen else further(value) for value in values]


def further(value: Any) -> Any:
    """A case beside one that runs every day; a tuple stands for several parameters."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
