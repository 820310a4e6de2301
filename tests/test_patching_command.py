"""``sat-lens sweep``: what it prints, and its table, figure and page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from everyday import everyday

import sat_lens as sl
from sat_lens import cli
from sat_lens.patching import HeadSweep, sweep_heads

PROMPT = "x = '<b>&' if range(1"


@pytest.mark.parametrize(
    ("direction", "kind"),
    everyday([("noising", "png"), ("denoising", "svg")], ("denoising", "svg")),
)
def test_the_command_writes_what_a_sweep_gives(
    demo: Any, tmp_path: Path, capsys: Any, direction: Any, kind: str
) -> None:
    out = tmp_path / "out"
    given = ["--prompt", PROMPT, "--answer", ")", "--wrong", ","]
    options = ["--direction", direction, "--figure-format", kind, "--quiet", "--out", str(out)]
    assert cli.main(["sweep", "demo", *given, *options]) == 0

    answer, wrong = (demo.tokenizer.encode(text)[-1] for text in (")", ","))
    metric = sl.metrics.logit_difference(answer, wrong)
    expected = sweep_heads(demo, PROMPT, metric, direction=direction, progress=False).frame()
    table = pd.read_csv(out / "sweep.csv", index_col=0)
    assert table.index.tolist() == expected.index.tolist()
    assert table["effect"].tolist() == pytest.approx(expected["effect"].tolist(), abs=1e-5)
    assert (table["random_spread"] > 0).all()
    assert HeadSweep.load(out / "sweep.safetensors").frame()["effect"].tolist() == pytest.approx(
        expected["effect"].tolist(), abs=1e-5
    )

    start = {"png": b"\x89PNG", "svg": b"<?xml"}[kind]
    assert (out / f"sweep.{kind}").read_bytes().startswith(start)
    page = (out / "sweep.html").read_text()
    assert page.count("<svg") == 1
    assert PROMPT in html.unescape(page)
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    largest = expected["effect"].abs().idxmax()
    assert f"<th>{largest}</th>" in page
    shown = capsys.readouterr().out
    assert shown.splitlines()[2].split()[0] == largest
    assert str(out / "sweep.html") in shown
