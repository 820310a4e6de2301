"""The figures by name; a figure's module is imported when the figure is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator

from sat_lens.errors import ArgumentError
from sat_lens.paper.claims import Reproduction

FIGURES = {
    "norm-growth": "sat_lens.paper.norm_growth",
    "direction": "sat_lens.paper.direction",
    "saturation": "sat_lens.paper.saturation",
    "scaling": "sat_lens.paper.scaling",
    "heads": "sat_lens.paper.heads",
    "grid": "sat_lens.paper.grids",
    "rescaling": "sat_lens.paper.rescaling",
    "threshold": "sat_lens.paper.threshold",
    "narrowing": "sat_lens.paper.narrowing",
}


def reproductions(
    names: Iterable[str], *, quick: bool = False, seed: int = 0, progress: bool = True
) -> Iterator[Reproduction]:
    """Redo figures one after the other; those on the language model share one training run.

    Args:
        names: Names in ``FIGURES``.
        quick: Smaller models and fewer steps: within a minute, to see that everything runs.
        seed: Seed of models and data.
        progress: Whether to show progress bars.

    Raises:
        ArgumentError: There is no figure of that name.

    Example:
        >>> next(reproductions(["nothing"]))
        Traceback (most recent call last):
        ...
        sat_lens.errors.ArgumentError: There is no figure 'nothing'; there are norm-growth, ...
    """
    for name in names:
        if name not in FIGURES:
            raise ArgumentError(f"There is no figure {name!r}; there are {', '.join(FIGURES)}.")
        module = importlib.import_module(FIGURES[name])
        yield module.reproduce(quick=quick, seed=seed, progress=progress)
