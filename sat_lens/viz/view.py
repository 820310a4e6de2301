"""What every view is: a page in a frame of fixed height, and a file.

A view is a page of its own, so a notebook can neither shrink it nor be disturbed by it. Every
frame carries circuitsvis (1.3 MB), because frames cannot share it.
"""

from __future__ import annotations

import dataclasses
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.errors import ArgumentError
from sat_lens.results import write_whole
from sat_lens.viz.page import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class View:
    """A view that displays itself in a notebook.

    Example:
        >>> from sat_lens.viz import View
        >>> View("A title", "<!doctype html><p>text</p>", 100)._repr_html_()[:7]
        '<iframe'
    """

    title: str
    page: str = dataclasses.field(repr=False)
    height: int

    def save_html(self, path: str | Path) -> Path:
        """Write the view as one HTML file that opens without a network."""
        write_whole(path, self.page.encode("utf-8", "backslashreplace"))
        return Path(path)

    def _repr_html_(self) -> str:
        source = html.escape(self.page.encode("utf-8", "backslashreplace").decode())
        title = html.escape(self.title.encode("utf-8", "backslashreplace").decode())
        return (
            f'<iframe title="{title}" srcdoc="{source}" width="100%" height="{self.height}" '
            f'style="border:0;min-height:{self.height}px" sandbox="allow-scripts"></iframe>'
        )


@dataclasses.dataclass(frozen=True)
class FigureView(View):
    """A view of a matplotlib figure, which ``save`` also writes for a paper."""

    figure: Figure = dataclasses.field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the figure as PNG, SVG or PDF, by the ending of the path.

        Raises:
            ArgumentError: The path ends otherwise.
        """
        ending = Path(path).suffix.lower()
        if ending not in _FORMATS:
            raise ArgumentError(
                f"A figure is saved as {', '.join(_FORMATS)}; found {Path(path).name!r}."
            )
        write_whole(path, drawn(self.figure, ending[1:]))
        return Path(path)


def component_view(title: str, note: str, data: dict[str, Any], *, height: int) -> View:
    """Show circuitsvis components, described by ``data`` as the view's script reads it."""
    page = render(
        "view.html",
        styles=["base.css", "patterns.css", "view.css"],
        scripts=["patterns.js", "heads.js", "view.js"],
        title=title,
        note=note,
        picture="",
        data=data,
    )
    return View(title, page, height)


def drawn(figure: Figure, ending: str) -> bytes:
    """Draw a figure; the same figure gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending, {})
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "sat_lens"}):
        figure.savefig(buffer, format=ending, dpi=200, metadata=date)
    return buffer.getvalue()
