"""The constraints files: what they hold, and that the check of them sees what it is there for.

These tests ask the package registry for metadata, so they are no part of the everyday ones.
"""

import re

import pytest

from tools import constraints

NEWEST = constraints.ENVIRONMENTS[0]
LINUX = constraints.PLATFORMS[0]


def text_of(environment):
    return (constraints.REPOSITORY / environment.file).read_text()


def changed(tmp_path, pattern, replacement):
    """The constraints with one line replaced."""
    text, count = re.subn(pattern, replacement, text_of(NEWEST), flags=re.MULTILINE)
    assert count == 1
    path = tmp_path / "constraints.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("environment", constraints.ENVIRONMENTS, ids=lambda found: found.file)
def test_every_line_is_a_pin_and_names_no_place(environment):
    first, *lines = text_of(environment).splitlines()
    assert "make constraints" in first
    pin = re.compile(r"[a-z0-9-]+==[\w.]+( ; [\w.'=<>!*() ]+)?")
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_a_triton_that_torch_does_not_allow_is_noticed(tmp_path):
    faulty = changed(tmp_path, r"^triton==[\d.]+", "triton==3.8.0")
    why = constraints.problem(NEWEST, faulty, "3.12", LINUX)
    assert "torch==2.13.0 depends on triton" in why
    assert "\n" not in why


def test_a_package_without_a_pin_is_noticed(tmp_path):
    faulty = changed(tmp_path, r"^einops==.*\n", "")
    assert constraints.problem(NEWEST, faulty, "3.12", LINUX).startswith("no pin for einops==")


def test_settings_of_the_machine_are_ignored(tmp_path, monkeypatch):
    """With a folder of packages in the place of the registry, nothing could be resolved."""
    for name in ("UV_FIND_LINKS", "PIP_FIND_LINKS", "UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, tmp_path.as_uri())
    monkeypatch.setenv("UV_NO_INDEX", "1")
    path = constraints.REPOSITORY / NEWEST.file
    assert constraints.problem(NEWEST, path, "3.12", LINUX) is None


def test_writing_again_changes_nothing(tmp_path):
    path = tmp_path / NEWEST.file
    path.write_text(text_of(NEWEST))
    constraints.write(NEWEST, tmp_path)
    assert path.read_text() == text_of(NEWEST)
