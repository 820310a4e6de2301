"""Links lead somewhere, and command lines that a page shows are understood."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest

from sat_lens import cli

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
COMMANDED = [*PAGES, REPOSITORY / "hooks" / "README.md", REPOSITORY / "tutorials" / "README.md"]
LINKED = [
    *COMMANDED,
    *(REPOSITORY / "tutorials").glob("*.py"),
    *(REPOSITORY / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_broken(page, link):
    target, _, anchor = link.partition("#")
    place = (page.parent / target).resolve() if target else page
    if not place.is_relative_to(REPOSITORY) or not place.exists():
        return True
    return bool(anchor) and anchor not in anchors(place)


@pytest.mark.parametrize("page", sorted(LINKED), ids=name_of)
def test_relative_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if not re.match(r"\w+:", link)]
    assert [link for link in links if is_broken(page, link)] == []


def test_a_broken_link_would_be_noticed():
    readme = REPOSITORY / "README.md"
    assert not is_broken(readme, "hooks/README.md#hook-recipes")
    for link in ("hooks/nothing.md", "hooks/README.md#nothing", "#nothing", "../elsewhere.md"):
        assert is_broken(readme, link)


def commands(page):
    """The command lines of a page: in code spans and in blocks that are not Python."""
    text = page.read_text()
    blocks = re.findall(r"^```(?!python)\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shown = re.findall(r"`([^`\n]+)`", text) + "".join(blocks).splitlines()
    lines = [line.split("#")[0].strip() for line in shown]
    return [line for line in lines if re.match(r"(sat-lens|make|python|pip) [-.\w]", line)]


def targets():
    return set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", [page for page in COMMANDED if commands(page)], ids=name_of)
def test_commands_are_understood(page, capsys):
    for line in commands(page):
        program, *arguments = shlex.split(line)
        if program == "sat-lens":
            assert understood(arguments), f"{line}: {capsys.readouterr().err}"
        elif program == "make":
            assert arguments[0] in targets(), line
        elif program == "python":
            assert arguments[0] == "-m" or (REPOSITORY / arguments[0]).is_file(), line
        else:
            assert set(re.findall(r"\[(.*)\]", line)) <= extras(), line


def understood(arguments):
    """Say whether the command line knows what is meant; of all options only --help is obeyed."""
    try:
        cli._parser().parse_args(arguments)
    except SystemExit as end:
        return end.code == 0
    return True


def extras():
    text = (REPOSITORY / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def test_the_readme_shows_the_commands_that_matter():
    shown = commands(REPOSITORY / "README.md")
    assert {"make report", "make test", "sat-lens report gpt2", "sat-lens --help"} <= set(shown)
    assert not understood(["roles", "--no-such-option"])
