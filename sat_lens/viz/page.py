"""Pages: one self-contained HTML file, one copy of circuitsvis, and nothing that it could load.

Whatever comes from outside (tokens, names, titles) reaches a page as data: through an autoescaping
template, or as JSON that cannot close its element. The Content-Security-Policy names our scripts
and styles by hash and forbids everything else, every request above all.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from sat_lens.figures.marks import visible


@functools.cache
def circuitsvis_bundle() -> str:
    """Read circuitsvis's own bundle, made safe to stand inside a script element."""
    bundle = resources.files("circuitsvis") / "dist" / "cdn" / "iife.js"
    # In a string or a template literal, which is where it occurs, \/ means the same as /.
    return bundle.read_text("utf-8").replace("</script", r"<\/script")


def asset(name: str) -> str:
    """Read a style sheet or a script of our own."""
    return (resources.files("sat_lens.viz") / "templates" / name).read_text("utf-8")


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


def render(template: str, *, styles: list[str], scripts: list[str], **context: Any) -> str:
    """Fill a template with a context; everything in it that is not ours is escaped.

    Args:
        template: The name of the template.
        styles: Names of style sheets, in their order.
        scripts: Names of scripts, in their order; circuitsvis goes before them.
        **context: What the template reads.
    """
    style = "\n".join(asset(name) for name in styles)
    own = "\n".join(asset(name) for name in scripts)
    sources = [circuitsvis_bundle(), own] if scripts else []
    return (
        _environment()
        .get_template(template)
        .render(
            csp=content_security_policy(style, sources),
            style=Markup(style),
            scripts=[Markup(source) for source in sources],
            **context,
        )
    )


def content_security_policy(style: str, scripts: list[str]) -> str:
    """Allow these scripts and this style, pictures inside the page, and nothing else."""
    hashes = " ".join(f"'{_digest(source)}'" for source in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sat_lens.viz", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    environment.filters["embedded_json"] = embedded_json
    return environment


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
