"""Notebook views in a browser, each in the frame in which a notebook shows it."""

from __future__ import annotations

import pytest
import torch
import zoo

import sat_lens as sl
from sat_lens import viz


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return sl.run_with_saturation_cache(zoo.model_of("llama"), torch.randint(3, 96, (1, 12)))


def test_attention_shows_soft_beside_saturated_and_follows_a_click(page, pair, tmp_path, pictures):
    path = viz.attention(pair, ["L0H0", "L0H1", "L1H2"]).save_html(tmp_path / "view.html")
    page.open(path, width=1200, height=900)
    page.wait("document.querySelectorAll('canvas').length === 8")
    page.click("#group-0-soft > div > div:nth-of-type(1) > div:nth-child(3) canvas")
    names = "[...document.querySelectorAll('h2')].map(h => h.textContent)"
    page.wait(f"{names}.every(name => name === 'L1H2')")
    page.screenshot(pictures / "view-attention.png")


def test_token_views_show_markup_as_text(page, pair, tmp_path, pictures):
    tokens = ["<bos>", "<b>", "&amp;", *[f"t{i}" for i in range(9)]]
    changes = viz.row_changes(pair)
    for name, view in {
        "tokens": viz.tokens(tokens, changes[:, 0, 0]),
        "top": viz.top_tokens(tokens, changes),
    }.items():
        page.open(view.save_html(tmp_path / "view.html"), width=900, height=600)
        page.wait("document.getElementById('view').textContent.includes('<\u2060bos>')")
        assert page.run("document.querySelectorAll('#view b').length") == 0
        assert "&lt;" not in page.run("document.getElementById('view').textContent")
        page.screenshot(pictures / f"view-{name}.png")
    columns = "[...document.querySelectorAll('#view thead tr:last-child th')].length"
    assert page.run(columns) > changes.shape[2]


def test_a_frame_in_a_notebook_runs_its_view(page, pair, tmp_path, pictures):
    view = viz.attention(pair, ["L0H0", "L0H1"])
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><body>{view._repr_html_()}", "utf-8")
    page.open(notebook, width=1200, height=900)
    page.settle()
    box = page.run("document.querySelector('iframe').getBoundingClientRect().height")
    assert box == view.height
    page.screenshot(pictures / "view-in-a-frame.png", whole=False)
