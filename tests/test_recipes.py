"""The recipes in hooks/ run as they are shown, and show what they say."""

from __future__ import annotations

import pathlib
import runpy
import sys

import pytest
import torch

FOLDER = pathlib.Path(__file__).parents[1] / "hooks"
FILES = sorted(FOLDER.glob("*.py"))


def run(monkeypatch, name, *arguments):
    """Call a recipe's ``main`` as its script would, and leave torch as it was."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with torch.enable_grad():
        return runpy.run_path(str(FOLDER / name))["main"]()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_recipe_runs_is_short_and_is_listed(path, monkeypatch, capsys):
    found = run(monkeypatch, path.name)
    assert isinstance(found, dict)
    assert found
    assert capsys.readouterr().out.strip()
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"Run it:  python hooks/{path.name}" in text
    assert text.count("# --- the part to paste ---") == 1
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


def test_the_table_names_no_recipe_that_is_not_there():
    rows = (FOLDER / "README.md").read_text().split("| --- | --- |\n")[1].splitlines()
    assert {row.split("`")[1] for row in rows} == {path.name for path in FILES}


@pytest.mark.parametrize("heads", [[], ["--heads", "L0H0", "L1H2"]])
def test_saturate_heads(monkeypatch, capsys, heads):
    found = run(monkeypatch, "saturate_heads.py", *heads)
    assert found["hooks_equal_block"] < 1e-5
    assert found["largest_change"] > 1e-3
    assert found["kl"] > 0
    share = found["winning_share"]
    assert share == pytest.approx(1) if not heads else 0 < share < 1
    assert {"soft:", "saturated:"} <= set(capsys.readouterr().out.split())


def test_saturate_heads_at_a_scale_of_one_changes_nothing(monkeypatch):
    found = run(monkeypatch, "saturate_heads.py", "--scale", "1")
    assert found["largest_change"] < 1e-4
    assert found["kl"] < 1e-6


@pytest.mark.parametrize("heads", [[], ["--heads", "L0H0", "L1H2"]])
def test_cache_pair(monkeypatch, capsys, heads):
    found = run(monkeypatch, "cache_pair.py", *heads)
    assert found["layers"] == 4
    assert found["largest_move"] > 1e-3
    assert found["s_last"] < 1
    # Equal keys share a row, so a saturated row's maximum is 1 over a whole number.
    shares = 1 / found["hardest_row"]
    assert heads or shares == pytest.approx(round(shares))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("S", "cos_random", "blocks.3.hook_resid_post"))
