"""The figures of "Effects of Parameter Norm Growth During Transformer Training", redone and judged.

Merrill et al. 2021, arXiv 2010.09697. Each figure is redone on a small model that is trained for
it, and each of its claims gets a verdict by a rule that stands beside the numbers. This package
belongs to the repository, not to the installed library: run it from a checkout with
``python -m paper``, see ``docs/paper.md``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator

from paper.claims import VERDICTS, Claim, Reproduction, Verdict, verdict
from sat_lens.errors import ArgumentError

__all__ = [
    "FIGURES",
    "VERDICTS",
    "Claim",
    "Reproduction",
    "Verdict",
    "reproductions",
    "verdict",
]

# The module of each figure; it is imported when the figure is asked for.
FIGURES = {
    "norm-growth": "paper.norm_growth",
    "direction": "paper.direction",
    "saturation": "paper.saturation",
    "scaling": "paper.scaling",
    "heads": "paper.heads",
    "grid": "paper.grid",
    "rescaling": "paper.rescaling",
    "threshold": "paper.threshold",
    "narrowing": "paper.narrowing",
}


def reproductions(
    names: Iterable[str], *, quick: bool = False, seed: int = 0, progress: bool = True
) -> Iterator[Reproduction]:
    """Redo figures one after the other; those on the language model share one training run.

    Args:
        names: Names in ``FIGURES``.
        quick: Whether to train smaller models for fewer steps, within a minute: a trial run.
        seed: Seed of models and data.
        progress: Whether to show progress bars.

    Raises:
        ArgumentError: There is no figure of that name.

    Example:
        >>> from paper import reproductions
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
