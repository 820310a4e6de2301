"""What a figure of the paper claims, and what became of each claim when it was measured anew."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from typing import Literal, get_args

import pandas as pd
from matplotlib.figure import Figure

from sat_lens.errors import ArgumentError

Verdict = Literal["holds", "holds with a correction", "does not hold here"]
VERDICTS: tuple[str, ...] = get_args(Verdict)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim, in a sentence, and its verdict.

    Attributes:
        text: What is claimed, and by whom where that is not the paper.
        verdict: One of "holds", "holds with a correction" and "does not hold here"; the words
            "here" and "correction" are explained by ``why``.
        why: The measured numbers, and the rule that turns them into the verdict.

    Raises:
        ArgumentError: The verdict is none of the three, or a text is empty.

    Example:
        >>> from sat_lens.paper import Claim
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
        title: What is drawn, in a line.
        claims: The claims that the numbers decide.
        frame: The numbers behind the figure.
        figure: The figure.
        note: What it was measured on, and what it does not show.
        complete: False if the run was interrupted: what was measured until then is here.
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
        drawn = io.BytesIO()
        self.figure.savefig(drawn, format="svg", metadata={"Date": None})
        return drawn.getvalue()


def verdict(holds: bool, corrected: bool = False) -> Verdict:
    """Choose the verdict: the claim as it stands first, then its corrected form.

    Example:
        >>> from sat_lens.paper import verdict
        >>> verdict(True), verdict(False, corrected=True), verdict(False)
        ('holds', 'holds with a correction', 'does not hold here')
    """
    if holds:
        return "holds"
    return "holds with a correction" if corrected else "does not hold here"


def number(value: float) -> str:
    """Write a measured number, also one that is not defined.

    Example:
        >>> number(0.12345), number(float("nan"))
        ('0.123', 'undefined')
    """
    return f"{value:.3f}" if math.isfinite(value) else "undefined"
