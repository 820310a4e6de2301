"""Pages: one self-contained HTML file, one copy of circuitsvis, and nothing that it could load.

Whatever comes from outside (tokens, names, titles) reaches a page as data: through an autoescaping
template, as JSON that cannot close its element, or as the words of a drawing. The
Content-Security-Policy names our scripts and styles by hash and forbids everything else, every
request above all.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup, escape

from sat_lens import figures
from sat_lens.vocabulary import HATCHED, INK, PAPER, QUIET, RULE, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What may stand in a drawing on a page, and the page's own colours in place of a figure's.
_ELEMENTS = {"svg", "g", "defs", "clipPath", "pattern", "path", "rect", "use", "text"}
_ATTRIBUTES = {
    "clip-path", "d", "fill", "fill-opacity", "font-size", "font-weight", "height", "href", "id",
    "opacity", "patternUnits", "stroke", "stroke-dasharray", "stroke-linejoin", "stroke-opacity",
    "stroke-width", "text-anchor", "transform", "viewBox", "width", "x", "y",
}  # fmt: skip
_COLORS = {INK: "currentColor", QUIET: "var(--quiet)", RULE: "var(--rule)",
           PAPER: "var(--paper)", HATCHED: "var(--quiet)"}  # fmt: skip
_NUMBER = re.compile(r"-?\d+\.\d+")
_NO_TURN = re.compile(r"rotate\(-?0 [^)]*\)")


@functools.cache
def circuitsvis_bundle() -> str:
    """Read circuitsvis's own bundle, made safe to stand inside a script element."""
    bundle = resources.files("circuitsvis") / "dist" / "cdn" / "iife.js"
    # In a string or a template literal, which is where it occurs, \/ means the same as /.
    return bundle.read_text("utf-8").replace("</script", r"<\/script")


def asset(name: str, folder: Path | None = None) -> str:
    """Read a style sheet or a script: from a folder that has one of this name, or our own."""
    return _loader(folder).get_source(jinja2.Environment(), name)[0]


def embedded_json(value: Any) -> Markup:
    """Write data as JSON that can stand in a script element of any HTML page.

    What is not ASCII is escaped, lone surrogates among it, and so are < > and &. Numbers that JSON
    does not have (NaN, infinity) become null.

    Example:
        >>> str(embedded_json({"token": "</script>"}))
        '{"token":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def inline_svg(figure: Figure, label: str) -> Markup:
    """Return a matplotlib figure as SVG to stand in a page, in the page's colours, light or dark.

    The page's policy allows no inline styles, so they become attributes; the background is left
    clear, and the colours of text and axes become those of the page. The same figure gives the same
    text. ``label`` says what the drawing shows, and differs from those of others on the page.
    """
    label = visible(label)
    drawn = figures.figure_bytes(figure, "svg", salt=label, for_page=True)
    root = ElementTree.fromstring(drawn)
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    root.attrib |= {"width": str(width), "height": str(height)}
    svg = _element(root)
    return Markup(f'<svg class="drawing" role="img" aria-label="{escape(label)}"' + svg[4:])


def render(
    template: str,
    *,
    styles: list[str],
    scripts: list[str],
    folder: Path | None = None,
    **context: Any,
) -> str:
    """Fill a template that extends ``base.html``; everything in the context is escaped.

    Templates, style sheets and scripts are looked for in ``folder`` first and then among our own.
    circuitsvis stands before the scripts. Every template reads ``title``.
    """
    style = "\n".join(asset(name, folder) for name in styles)
    own = "\n".join(asset(name, folder) for name in scripts)
    sources = [circuitsvis_bundle(), own] if scripts else []
    return _environment(folder).get_template(template).render(
        csp=content_security_policy(style, sources),
        style=Markup(style),
        scripts=[Markup(source) for source in sources],
        **context,
    )  # fmt: skip


def content_security_policy(style: str, scripts: list[str]) -> str:
    """Allow these scripts and this style, pictures inside the page, and nothing else."""
    hashes = " ".join(f"'{_digest(source)}'" for source in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _loader(folder: Path | None) -> jinja2.BaseLoader:
    own = Path(__file__).parent / "templates"
    return jinja2.FileSystemLoader([own] if folder is None else [folder, own])


@functools.cache
def _environment(folder: Path | None) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=_loader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    environment.filters["embedded_json"] = embedded_json
    return environment


def _element(element: ElementTree.Element) -> str:
    """Write one element of a drawing, and what is in it, as compact HTML."""
    tag = element.tag.rpartition("}")[2]
    if tag not in _ELEMENTS:
        return ""
    found = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    parts = [part.split(": ", 1) for part in found.pop("style", "").split("; ") if part]
    found |= dict(parts)
    if tag == "g":
        found.pop("id", None)  # a name in matplotlib; what is referred to by id is no group
    found = {name: value for name, value in found.items() if name in _ATTRIBUTES}
    inside = str(escape(element.text or "")) if tag == "text" else "".join(map(_element, element))
    if tag in ("g", "defs") and not (inside and (found or tag == "defs")):
        return inside
    written = [f' {name}="{escape(value)}"' for name, value in _attributes(found) if value]
    return f"<{tag}{''.join(written)}>{inside}</{tag}>"


def _attributes(found: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Put the page's colours in place of the figure's, and two decimals in place of many."""
    for name, value in found.items():
        if name in ("fill", "stroke"):
            yield name, _COLORS.get(value.upper(), value)
        else:
            short = " ".join(_NO_TURN.sub("", value).split()).removesuffix("px")
            yield name, _NUMBER.sub(lambda number: f"{round(float(number[0]), 2):g}", short)


def _digest(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
