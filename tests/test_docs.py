"""The documentation tells the truth: its examples print what they say, and no page is left out."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import sys

import pytest
import torch
from everyday import everyday

import sat_lens as sl

REPOSITORY = pathlib.Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted([REPOSITORY / "README.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A comment with an arrow behind a print is what it prints.
CLAIM = re.compile(r"^\s*print\(.*\)  # -> (.*)$")


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def examples(path):
    """The Python blocks of a page, each with the blank lines that stand for what is before it."""
    text = path.read_text()
    return [
        "\n" * text[: match.start(2)].count("\n") + match[2]
        for match in BLOCK.finditer(text)
        if not match[1]
    ]


def shown_by(source, path, namespace):
    """Run a block; give what each line printed."""
    printed = {}

    def record(*values, **options):
        text = io.StringIO()
        print(*values, **{**options, "file": text})
        line = sys._getframe(1).f_lineno
        printed[line] = printed.get(line, "") + text.getvalue()

    namespace["print"] = record
    exec(compile(source, str(path), "exec"), namespace)
    return {line: " ".join(text.split()) for line, text in printed.items()}


@pytest.mark.filterwarnings("ignore:A hook on attn.hook_attn_scores")
@pytest.mark.parametrize(
    "path",
    everyday([page for page in PAGES if examples(page)], REPOSITORY / "README.md"),
    ids=name_of,
)
def test_examples_print_what_they_say(path, demo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    load = sl.models.load_model
    monkeypatch.setattr(
        "sat_lens.models.load_model",
        lambda name="demo", **options: load(name, **options) if options else demo,
    )
    # What a page takes for granted: a model, a prompt, and something to measure.
    namespace = {
        "model": demo,
        "tokens": demo.to_tokens("class Point:\n    def __init__(self, x, y):\n        self."),
        "metric": sl.metrics.logit_difference(answer=90, wrong=91),
    }
    for source in examples(path):
        with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
            shown = shown_by(source, path, namespace)
        lines = dict(enumerate(source.splitlines(), start=1))
        assert source.count("# -> ") == sum(map(bool, map(CLAIM.match, source.splitlines())))
        claims = {
            number: match[1] for number, line in lines.items() if (match := CLAIM.match(line))
        }
        assert {number: shown.get(number) for number in claims} == claims


def test_a_wrong_claim_would_be_noticed():
    block = "print(1 + 1)  # -> 3\nfor i in range(2):\n    print(i, 'x')  # -> 0 x 1 x\n"
    assert shown_by(block, "page", {}) == {1: "2", 3: "0 x 1 x"}
    assert [bool(CLAIM.match(line)) for line in block.splitlines()] == [True, False, True]


PITFALLS = sorted((DOCS / "pitfalls").glob("[!i]*.md"))


@pytest.mark.parametrize("page", PITFALLS, ids=name_of)
def test_a_pitfall_says_what_is_seen_why_and_what_to_do(page):
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    assert parts[1::2] == ["Symptom", "Cause", "Wrong", "Right"]
    # Wrong and right are both shown in code, and each claims something that is checked.
    assert all("# -> " in part and "```python" in part for part in parts[6::2])
    index = (DOCS / "pitfalls" / "index.md").read_text()
    assert f"({page.name})" in index
    assert f"\n{page.stem}\n" in index


def test_every_recipe_is_shown():
    shown = re.findall(r"literalinclude} \.\./hooks/(.*)\.py", (DOCS / "recipes.md").read_text())
    assert sorted(shown) == sorted(path.stem for path in (REPOSITORY / "hooks").glob("*.py"))


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("[!i]*.md")), ids=name_of)
def test_a_page_of_docstrings_says_where_they_are_read(page):
    text = page.read_text()
    modules = re.findall(r"automodule:: (\S+)", text)
    assert f"`python -m pydoc {modules[0]}`" in text.partition("```{eval-rst}")[0]
