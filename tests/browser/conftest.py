"""Pages opened in a real browser; `make test-browser` runs these, `make test` does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import chromium


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder before they are chosen by mark."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def port() -> Iterator[str]:
    """A running browser; without one the tests fail, they are not skipped."""
    with chromium.running() as address:
        yield address


@pytest.fixture
def page(port: str) -> Iterator[chromium.Page]:
    """A tab that must end without an error and without a request beyond the page itself."""
    tab = chromium.Page(port)
    yield tab
    beyond = [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))]
    errors = list(tab.errors)
    tab.close()
    assert beyond == []
    assert errors == []


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: SAT_LENS_SCREENSHOTS, or a temporary folder."""
    folder = os.environ.get("SAT_LENS_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path
