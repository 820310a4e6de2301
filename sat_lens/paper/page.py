"""The page that lists figures with their verdicts, and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat_lens.paper.claims import Reproduction
from sat_lens.results import library_versions, write_csv, write_whole
from sat_lens.viz.page import render

PAGE = "index.html"


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
    """Write one page, self-contained, of all figures given; it replaces an earlier one.

    Args:
        folder: Where it goes.
        figures: The figures, in the order of the page.
        complete: False says on the page that figures are missing.
        quick: True says on the page that its verdicts are those of a trial.

    Raises:
        FileFormatError: It cannot be written.
    """
    page = render(
        "paper.html",
        styles=["base.css", "paper.css"],
        scripts=[],
        title="Effects of parameter norm growth, redone",
        complete=complete and all(figure.complete for figure in figures),
        quick=quick,
        versions=", ".join(f"{name} {version}" for name, version in library_versions().items()),
        figures=[_shown(figure) for figure in figures],
    )
    write_whole(folder / PAGE, page.encode())
    return folder / PAGE


def _shown(figure: Reproduction) -> dict[str, Any]:
    return {
        "name": figure.name,
        "title": figure.title,
        "note": figure.note,
        "picture": f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}",
        "claims": [
            {
                "text": claim.text,
                "verdict": claim.verdict,
                "why": claim.why,
                "kind": claim.verdict.split()[-1],
            }
            for claim in figure.claims
        ],
    }
