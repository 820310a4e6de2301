"""What the reference pages in docs/api describe: read off the pages themselves."""

import importlib
import inspect
import pathlib
import re
import types

PAGES = pathlib.Path(__file__).parents[1] / "docs" / "api"


def modules():
    """The modules that the pages show, in their order."""
    pages = sorted(PAGES.glob("*.md"))
    return [name for page in pages for name in re.findall(r"automodule:: (\S+)", page.read_text())]


def described():
    """Every function and class with a place in the reference, by its full name."""
    found = {}
    for name in modules():
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", None) or _defined_in(module):
            value = getattr(module, key)
            alias = isinstance(value, types.GenericAlias)  # a class too, to Python 3.10
            if inspect.isfunction(value) or (inspect.isclass(value) and not alias):
                found[f"{name}.{key}"] = value
    return found


def _defined_in(module):
    return [
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
    ]
