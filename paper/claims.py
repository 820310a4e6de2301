"""What a figure of the paper claims, what became of each claim, and the page that says so."""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
from matplotlib.figure import Figure

from sat_lens.errors import ArgumentError
from sat_lens.figures import figure_bytes
from sat_lens.results import library_versions, write_csv, write_whole
from sat_lens.viz.page import render

Verdict = Literal["holds", "holds with a correction", "does not hold here"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
PAGE = "index.html"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim, in a sentence, and its verdict.

    Attributes:
        text: What is claimed, and by whom where that is not the paper.
        verdict: "holds", "holds with a correction" or "does not hold here"; ``why`` says what the
            correction is, and where "here" is.
        why: The measured numbers, and the rule that turns them into the verdict.

    Raises:
        ArgumentError: The verdict is none of the three, or a text is empty.

    Example:
        >>> from paper import Claim
        >>> Claim("Norms grow.", "holds", "38.2 at the start, 70.2 at the end.").verdict
        'holds'
    """

    text: str
    verdict: Verdict
    why: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ArgumentError(
                f"A verdict is one of {', '.join(map(repr, VERDICTS))}; found {self.verdict!r}."
            )
        if not self.text.strip() or not self.why.strip():
            raise ArgumentError("A claim needs its text, and the numbers that its verdict is from.")


@dataclasses.dataclass(frozen=True, eq=False)
class Reproduction:
    """One figure of the paper redone: the numbers, the picture and the verdicts.

    Attributes:
        name: What the command line calls it, such as "norm-growth".
        title: What is drawn, in one line.
        claims: The claims that the numbers decide.
        frame: The numbers behind the figure.
        figure: The figure.
        note: What it was measured on, and what it does not show.
        complete: Whether the run went to its end; if not, these are the numbers until then.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    frame: pd.DataFrame
    figure: Figure
    note: str
    complete: bool = True

    @functools.cached_property
    def svg(self) -> bytes:
        """The figure as SVG, drawn once for its file and its page."""
        return figure_bytes(self.figure, "svg")


def verdict(holds: bool, corrected: bool = False) -> Verdict:
    """Return the verdict on a claim, given whether it holds as it stands or once corrected.

    Example:
        >>> from paper import verdict
        >>> verdict(True), verdict(False, corrected=True), verdict(False)
        ('holds', 'holds with a correction', 'does not hold here')
    """
    if holds:
        return "holds"
    return "holds with a correction" if corrected else "does not hold here"


def number(value: float) -> str:
    """Format a measured number, which may be undefined.

    Example:
        >>> number(0.12345), number(float("nan"))
        ('0.123', 'undefined')
    """
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def write_reproduction(folder: Path, figure: Reproduction) -> None:
    """Write ``<name>.svg`` and ``<name>.csv``.

    Raises:
        FileFormatError: A file cannot be written.
    """
    write_whole(folder / f"{figure.name}.svg", figure.svg)
    write_csv(folder / f"{figure.name}.csv", figure.frame)


def write_page(
    folder: Path, figures: Sequence[Reproduction], *, complete: bool = True, quick: bool = False
) -> Path:
    """Write one self-contained page of all figures given and return its path.

    Args:
        folder: Where it goes.
        figures: The figures, in the order of the page.
        complete: Whether all figures are there; if not, the page says so.
        quick: Whether this is a trial run; if so, the page says that its verdicts mean nothing.

    Raises:
        FileFormatError: It cannot be written.
    """
    page = render(
        "page.html",
        styles=["base.css", "page.css"],
        scripts=[],
        folder=Path(__file__).parent,
        title="Effects of parameter norm growth, redone",
        complete=complete and all(figure.complete for figure in figures),
        quick=quick,
        versions=", ".join(f"{name} {version}" for name, version in library_versions().items()),
        figures=[
            {"shown": figure, "picture": base64.b64encode(figure.svg).decode()}
            for figure in figures
        ],
    )
    write_whole(folder / PAGE, page.encode())
    return folder / PAGE
