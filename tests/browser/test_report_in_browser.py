"""The report in a browser: what is drawn, what a reader can do, and what never happens."""

from __future__ import annotations

import math
import time

import pandas as pd
import pytest
import tiny
import torch
import transformers
from text_attacks import ATTACKS

import sat_lens as sl
from browser import chromium
from sat_lens.viz import token_strings, write_report
from sat_lens.vocabulary import visible

TEXT = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
READY = "document.documentElement.dataset.ready && document.querySelectorAll('#pair canvas').length"
DRAWN = "[...document.querySelectorAll('#pair canvas')].every(c => c.width > 100)"


class Table:
    def __init__(self, frame):
        self.table = frame

    def frame(self):
        return self.table


@pytest.fixture(scope="session")
def demo_report(tmp_path_factory):
    model = sl.load_model("demo")
    ids = model.to_tokens(TEXT)
    roles = sl.head_roles(model, [TEXT * 4] * 2, progress=False, data_name="a text")
    scales = pd.Index([0.0, 0.5, 1.0, 4.0, math.inf], name="scale")
    layers = {f"S_L{i}": [0.1 * i, 0.6, 1.0, 0.8 - 0.1 * i, 0.5] for i in range(4)}
    curve = pd.DataFrame({"loss": [8.0, 3.0, 2.5, 2.9, 3.2], **layers}, index=scales)
    path = tmp_path_factory.mktemp("demo") / "report.html"
    return write_report(
        path,
        roles=roles,
        pair=sl.run_with_saturation_cache(model, ids),
        tokens=token_strings(model, ids),
        curve=Table(curve),
    )


@pytest.fixture(scope="session")
def encoder_report(tmp_path_factory):
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=64,
    )
    model = tiny.bridge("BertForMaskedLM", config)
    torch.manual_seed(0)
    ids = torch.randint(5, 96, (1, 64))
    roles = sl.head_roles(model, torch.randint(5, 96, (2, 64)), progress=False)
    labels = roles.frame().index
    effects = pd.DataFrame({"effect": torch.randn(144).tolist()}, index=labels)
    growth = pd.DataFrame({"step": [0, 1, 10, 100], "norm": [1.0, 1.2, 2.0, 4.0]})
    return write_report(
        tmp_path_factory.mktemp("encoder") / "report.html",
        roles=roles,
        pair=sl.run_with_saturation_cache(model, ids),
        tokens=[f"word{i}" for i in ids[0].tolist()],
        sweep=Table(effects),
        growth=Table(growth),
        title="A random encoder",
    )


def opened(page, path, **window):
    page.open(path, **window)
    page.wait(READY)
    page.wait(DRAWN)
    page.settle()
    return page


@pytest.mark.parametrize("name", ["demo", "encoder"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 700])
def test_the_page_as_it_looks(name, dark, width, page, pictures, request):
    opened(page, request.getfixturevalue(f"{name}_report"), width=width, dark=dark)
    assert page.run("document.querySelectorAll('canvas').length") == 2
    assert page.run("document.documentElement.scrollWidth") <= width
    page.screenshot(pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def test_the_first_paint_comes_within_a_second(page, encoder_report):
    opened(page, encoder_report)
    paint = page.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 1000


def test_a_click_opens_a_head(page, demo_report):
    opened(page, demo_report)
    before = page.run("document.querySelector('#pair canvas').toDataURL()")
    page.click("[data-head='17']")
    page.settle()
    page.wait(DRAWN)
    assert page.run("document.getElementById('head-label').textContent") == "L2H1"
    assert page.run("document.querySelectorAll('#pair canvas').length") == 2
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(c => c.dataset.head)"
    assert page.run(pressed) == ["17"]
    page.wait(f"document.querySelector('#pair canvas').toDataURL() !== {before!r}")


def test_arrow_keys_and_enter_open_a_head(page, demo_report):
    opened(page, demo_report)
    page.run("choose(0, false)")
    page.run("document.querySelector('[data-head=\"0\"]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "Enter"):
        page.press(key)
    assert page.run("document.activeElement.dataset.head") == "9"
    assert page.run("document.getElementById('head-label').textContent") == "L1H1"
    page.press("ArrowUp")
    page.press(" ")
    assert page.run("document.getElementById('head-label').textContent") == "L0H1"
    # A single stop for the tab key, however many heads there are.
    assert page.run("document.querySelectorAll('#maps [tabindex=\"0\"]').length") == 1


def test_the_table_sorts_filters_and_opens(page, encoder_report):
    opened(page, encoder_report)
    body = "[...document.querySelectorAll('#table tbody tr')]"
    lean = f"{body}.map(row => Number(row.cells[3].textContent))"
    heading = "#table th:nth-child(4) button"
    page.click(heading)
    assert page.run(lean) == sorted(page.run(lean), reverse=True)
    assert page.run("document.querySelector('#table th[aria-sort]').ariaSort") == "descending"
    page.click(heading)
    assert page.run(lean) == sorted(page.run(lean))
    page.click("#find")
    page.write("L11H")
    rows = f"{body}.map(row => row.cells[0].textContent)"
    assert sorted(page.run(rows)) == sorted(f"L11H{head}" for head in range(12))
    assert page.run("document.getElementById('count').textContent") == "12 of 144 heads"
    first = page.run(rows)[0]
    page.click("#table tbody tr:first-child button")
    assert page.run("document.getElementById('head-label').textContent") == first


def test_the_csv_is_the_table(page, encoder_report, tmp_path):
    opened(page, encoder_report)
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#download")
    path = tmp_path / "heads.csv"
    for _ in range(100):
        if path.exists() and path.stat().st_size:
            break
        time.sleep(0.05)
    table = pd.read_csv(path, index_col="label")
    assert len(table) == 144
    assert {"role", "lean", "effect"} <= set(table.columns)


def test_the_ranked_list_opens_a_head(page, encoder_report):
    opened(page, encoder_report)
    label = page.run("document.querySelector('.ranked .link').textContent")
    page.click(".ranked .link")
    assert page.run("document.getElementById('head-label').textContent") == label


def test_the_heads_of_a_layer_stand_side_by_side(page, demo_report, pictures):
    opened(page, demo_report)
    page.click("#layer summary")
    page.wait("document.querySelectorAll('#layer canvas').length === 18")
    page.click("#layer-heads-soft h4")
    page.screenshot(pictures / "demo-layer.png")


def test_opening_heads_does_not_fill_the_memory(page, demo_report):
    opened(page, demo_report)
    page.run("document.getElementById('layer').open = true")
    page.wait("document.querySelectorAll('#layer canvas').length === 18")
    for index in range(8):
        page.run(f"choose({4 * index}, false)")
        page.settle()
    before = page.heap()
    for index in range(24):
        page.run(f"choose({(4 * index) % 32}, false)")
        page.settle()
    assert page.heap() < before + 5


def test_cross_attention_is_a_rectangle(page, tmp_path, pictures):
    model = tiny.bridge("T5ForConditionalGeneration", transformers.T5Config(**tiny.T5))
    ids, decoder = torch.arange(3, 27)[None], torch.arange(30, 43)[None]
    equal = {"input": ids, "decoder_input": ids}
    tokens = {"encoder": [f"e{i}" for i in range(24)], "decoder": [f"d{i}" for i in range(13)]}
    path = write_report(
        tmp_path / "t5.html",
        roles=sl.head_roles(model, [equal], progress=False),
        pair=sl.run_with_saturation_cache(model, ids, decoder_input=decoder),
        tokens=tokens,
    )
    opened(page, path)
    index = page.run("data.labels.indexOf('cross.L0H1')")
    page.click(f"[data-head='{index}']")
    page.wait("document.querySelectorAll('#pair .drawn').length === 2")
    assert page.run("document.querySelectorAll('#pair canvas').length") == 0
    labels = page.run(
        "[...document.querySelectorAll('#soft .drawn > text')].map(t => t.textContent)"
    )
    assert labels == [f"d{i} ({i})" for i in range(13)] + [f"e{i} ({i})" for i in range(24)]
    page.screenshot(pictures / "t5-cross.png")


def test_no_text_runs_or_vanishes(page, tmp_path):
    model = tiny.bridge("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE))
    ids = torch.arange(3, 3 + len(ATTACKS))[None]
    path = write_report(
        tmp_path / "attack.html",
        roles=sl.head_roles(model, ids, progress=False),
        pair=sl.run_with_saturation_cache(model, ids),
        tokens=ATTACKS,
        title="".join(ATTACKS),
    )
    opened(page, path)
    for index in range(8):
        page.run(f"choose({index}, false)")
    page.settle()
    assert page.run("document.title").startswith("<bos><|endoftext|></script>")
    assert page.run("document.querySelectorAll('#strip img, #strip script, #strip b').length") == 0
    strip = page.run("document.getElementById('strip').textContent").replace("\u00a0", " ")
    strip = strip.replace("\u2060", "")
    for attack in ATTACKS:
        assert visible(attack) in strip


def test_the_policy_stops_a_script_that_got_in(port, demo_report):
    tab = chromium.Page(port)
    opened(tab, demo_report)
    tab.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
        " document.body.append(s); return fetch('https://example.org').catch(() => 0); })()"
    )
    assert tab.run("window.bad") is None
    assert sum("Content Security Policy" in error for error in tab.errors) >= 2
    tab.close()
