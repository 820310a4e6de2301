"""How Sphinx builds the documentation; `make docs` calls it.

Its source folder is the whole repository, so that pages, notebooks and recipes stay where readers
of the repository find them, and a link between them leads to the same place there and here.
"""

import functools
import importlib
import os
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)
os.environ["HF_HUB_OFFLINE"] = "1"

project = "sat_lens"
author = "The sat_lens maintainers"
release = importlib.import_module("sat_lens.version").__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/**.md",
    "hooks/README.md",
    "tutorials/*.md",
    "tutorials/*.ipynb",
]
exclude_patterns = [".*", "bench", "build", "sat_lens", "tests", "*.egg-info"]

# Notebooks are shown with the outputs that they were stored with; `make notebooks` runs them.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "sat_lens"
html_extra_path = ["_root"]
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_show_sphinx = False


def _find(name: str) -> Any:
    """Give the object of a dotted name, or None; names of the surface are found as in Python."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Lead a reference to where its object is described, by whatever name it was called.

    An object that exists and has no place in the reference is shown without a link; a name that
    leads nowhere stays a warning.
    """
    name, module = node.get("reftarget", ""), node.get("py:module") or "sat_lens"
    if node.get("refdomain") != "py":
        return None
    if "refexplicit" not in node:  # a type in a signature, such as Tensor
        return contnode
    candidates = [name, f"{module}.{name}", f"{module}.{node.get('py:class')}.{name}"]
    found = next((f for f in map(_find, candidates) if f is not None), None)
    if found is None:
        return None
    python = env.get_domain("py")
    own = next((known for known in _names(python) if _find(known) is found), None)
    if own is None:
        return contnode
    return python.resolve_any_xref(env, node["refdoc"], app.builder, own, node, contnode)[0][1]


@functools.cache
def _names(python: Any) -> list[str]:
    """Give all names that have a place in the reference."""
    return [*python.modules, *python.objects]


def as_prose(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Read a docstring as it is meant: a bar is a norm's, a colon in a sentence a colon.

    Types stand in signatures only; what napoleon takes for one is the start of the sentence.
    """
    for i in reversed(range(len(lines))):
        field, _, start = lines[i].partition(": ")
        if field in (":type", ":rtype"):
            del lines[i]
            first = next((j for j, line in enumerate(lines) if line.startswith(":returns: ")), 0)
            label = ":returns: " if field == ":rtype" else ""
            lines[first] = f"{label}{start}: {lines[first].removeprefix(label)}"
    for i, line in enumerate(lines):
        texts = line.split("``")
        texts[::2] = [text.replace("|", r"\|") for text in texts[::2]]
        lines[i] = "``".join(texts)


def formula(self: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers show without a script or a network."""
    try:
        shown = tex2mathml(node.astext(), as_block=node.tagname == "math_block")
    except MathError as error:
        logger.warning("%s is no formula: %s", node.astext(), error, location=node)
        raise SkipNode from error
    self.body.append(shown)
    raise SkipNode


def setup(app: Any) -> None:
    """Register what is defined above."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", as_prose, priority=600)  # after napoleon's
