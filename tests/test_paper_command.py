"""``python -m paper`` from end to end, on the smallest models."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from matplotlib.figure import Figure

from paper import VERDICTS, Claim, Reproduction
from paper.__main__ import main, read_axis
from paper.grid import GrowthGrid
from sat_lens.errors import ArgumentError

FIGURES = ["norm-growth", "direction", "saturation", "scaling", "heads", "grid", "rescaling"]


@pytest.fixture(scope="module")
def redone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "new"
    status = main([*FIGURES, "--quick", "--quiet", "--out", str(folder)])
    assert status == 0
    return folder


@pytest.mark.slow
def test_every_figure_has_its_files_and_its_place_on_the_page(redone):
    page = (redone / "index.html").read_text()
    assert "interrupted" not in page
    assert "trial run" in page
    for name in FIGURES:
        assert f'<section id="{name}">' in page
        assert (redone / f"{name}.svg").read_text().startswith("<?xml")
        assert len(pd.read_csv(redone / f"{name}.csv")) >= 5
    named = re.findall(r'<p><span class="verdict">(.*?)</span></p>', page)
    assert len(named) >= 15
    assert set(named) <= set(VERDICTS)


@pytest.mark.slow
def test_no_number_is_missing_where_one_was_measured(redone):
    growth = pd.read_csv(redone / "norm-growth.csv")
    assert growth["step"].tolist()[:3] == [0, 1, 2]
    assert not growth[["norm", "loss", "lean", "cos_random"]].isna().any().any()
    grid = pd.read_csv(redone / "grid.csv")
    assert len(grid) == 24
    fine = grid[grid["outcome"] != "diverged"]
    assert not fine[["growth", "loss", "lean"]].isna().any().any()


@pytest.mark.slow
def test_what_balancing_removes_is_the_same_for_every_pair_together(redone):
    table = pd.read_csv(redone / "rescaling.csv")
    assert (table["minimal"] < table["raw"]).all()
    assert (1 - table["minimal"] / table["raw"]).tolist() == pytest.approx(table["share"].tolist())
    parts = table[["share_qk", "share_vo", "share_mlp"]]
    assert (parts.min(axis=1) <= table["share"]).all()
    assert (table["share"] <= parts.max(axis=1)).all()
    assert (table["share_of_model"] < table["share"]).all()


@pytest.mark.slow
def test_the_mask_makes_the_heads_that_average(redone):
    heads = pd.read_csv(redone / "heads.csv").set_index(["trained_with", "masked_by"])
    multiplied = heads.loc[("multiplied", "own mask")]
    assert (multiplied["positions"] > 5).any()
    assert (heads.loc[("multiplied", "right mask, same scores"), "positions"] < 2).all()
    assert (heads.loc[("infinite", "own mask"), "positions"] < 2).all()
    assert (heads.loc[("infinite", "own mask"), "future_soft"] == 0).all()


def test_an_interrupt_leaves_the_figures_that_were_done(monkeypatch, tmp_path, capsys):
    from paper import direction, norm_growth

    def interrupted(**_):
        raise KeyboardInterrupt

    claim = Claim("It grows.", "holds", "1 to 2")
    table = pd.DataFrame({"norm": [1, 2]})
    figure = Reproduction("norm-growth", "Growth", (claim,), table, Figure(), "")
    monkeypatch.setattr(norm_growth, "reproduce", lambda **_: figure)
    monkeypatch.setattr(direction, "reproduce", interrupted)
    status = main(["norm-growth", "direction", "--out", str(tmp_path)])
    assert status == 130
    page = (tmp_path / "index.html").read_text()
    assert "interrupted" in page
    assert "trial run" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html",
        "norm-growth.csv",
        "norm-growth.svg",
    ]
    assert "Interrupted" in capsys.readouterr().err


def test_the_grid_command_writes_table_figure_and_result(tmp_path, capsys):
    out = tmp_path / "grid"
    arguments = ["--lr", "1e-3,1e-1", "--wd", "0:1:2", "--steps", "2", "--quiet"]
    assert main(["grid", *arguments, "--optimiser", "sgd", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.csv",
        "grid.safetensors",
        "grid.svg",
        "index.html",
    ]
    table = pd.read_csv(out / "grid.csv")
    assert table["lr"].tolist() == [0.001, 0.001, 0.1, 0.1]
    assert table["wd"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert GrowthGrid.load(out / "grid.safetensors").optimiser == "sgd"
    assert "outcome" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grid", "--lr", "1e-3:1e-1"], "--lr is first:last:count"),
        (["grid", "--wd", "0:1:1"], "--wd is first:last:count"),
        (["grid", "--lr", "1:nan:3"], "'1:nan:3'"),
        (["grid", "--lr", "0,1"], "learning rate"),
        (["grid", "--momentum", "0.9"], "SGD's alone"),
        (["grid", "--out", "FILE"], "is a file"),
        (["direction", "--out", "FILE"], "is a file"),
        (["grid", "direction", "--lr", "1,2"], "--lr is an option of the figure grid alone"),
    ],
)
def test_a_mistake_is_found_before_the_work(arguments, words, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    elsewhere = [] if "--out" in given else ["--out", str(tmp_path / "new")]
    assert main([*given, *elsewhere]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_axes_run_in_equal_ratios_or_in_equal_steps_from_zero():
    assert read_axis("1:100:3", "--lr") == [1.0, 10.0, 100.0]
    assert read_axis("0:1:5", "--wd") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert read_axis("3,0,1e-2", "--wd") == [3.0, 0.0, 0.01]
    with pytest.raises(ArgumentError, match="count from 2"):
        read_axis("1:100:1000000", "--lr")
