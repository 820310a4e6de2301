"""The report as a file: its data parsed back, its size, its safety."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import transformers
import zoo
from everyday import everyday
from report_page import POSITIONS, Table, measured, read, saturated_pattern, soft_pattern
from text_attacks import ATTACKS

import sat_lens as sl
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.results import Provenance
from sat_lens.viz import write_report
from sat_lens.viz.page import asset, circuitsvis_bundle
from sat_lens.viz.patterns import encode_saturated, encode_soft, patterns_of
from sat_lens.viz.report import clearest
from sat_lens.vocabulary import ROLE_COLORS, visible


@pytest.fixture(scope="module")
def llama():
    return measured()


@pytest.fixture(scope="module")
def harmless(llama, tmp_path_factory):
    roles, pair = llama
    return read(write_report(tmp_path_factory.mktemp("h") / "a.html", roles=roles, pair=pair))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale", "ties"),
    [
        ("llama", math.inf, "exact"),
        ("llama", math.inf, "nearest"),
        ("llama", 3.0, "exact"),
        ("bert", math.inf, "exact"),
        ("bert", math.inf, "nearest"),
        ("bert", 0.0, "exact"),
        ("t5", math.inf, "exact"),
    ],
)
def test_every_pattern_comes_back(name, scale, ties, tmp_path):
    roles, pair = measured(name, scale, ties)
    data = read(write_report(tmp_path / "r.html", roles=roles, pair=pair)).data
    patterns = patterns_of(pair)
    assert len(patterns) == len(data["sites"])
    for site, expected in zip(data["sites"], patterns, strict=True):
        shape = tuple(expected.soft.shape[1:])
        assert (len(data["texts"][site["queries"]]), len(data["texts"][site["keys"]])) == shape
        assert site["causal"] == expected.causal
        for head in range(expected.site.n_heads):
            soft = soft_pattern(site["soft"][head], site["causal"], *shape)
            saturated = saturated_pattern(site["saturated"][head], site["causal"], *shape)
            assert float((soft - expected.soft[head]).abs().max()) <= 0.5 / 255 + 1e-6
            near = 0.5 / 255 + 1e-6 if "bytes" in site["saturated"][head] else 1e-3
            assert float((saturated - expected.saturated[head]).abs().max()) <= near
    labels = [label for p in patterns for label in p.site.labels]
    for label, where in zip(data["labels"], data["where"], strict=True):
        assert patterns[where[0]].site.label(where[1]) == label
    assert sorted(labels) == sorted(data["labels"])


@pytest.mark.slow
@pytest.mark.parametrize("name", everyday(["llama", "t5"], "t5"))
def test_every_cell_of_the_map_opens_its_own_head(name, tmp_path):
    roles, pair = measured(name)
    page = read(write_report(tmp_path / "r.html", roles=roles, pair=pair))
    cells = [a for _, a in page.elements if "data-head" in a]
    labels = [page.data["labels"][int(cell["data-head"])] for cell in cells]
    assert [cell["aria-label"].split(":")[0] for cell in cells] == labels
    assert sorted(labels) == sorted(roles.frame().index)
    for cell, label in zip(cells, labels, strict=True):
        assert roles.frame().loc[label, "head"] == int(cell["data-column"])


@pytest.mark.slow
def test_an_encoder_is_not_masked_and_a_decoder_is():
    assert [p.causal for p in patterns_of(measured("llama")[1])] == [True, True]
    assert [p.causal for p in patterns_of(measured("bert")[1])] == [False, False]
    stacks = {p.site.stack: p.causal for p in patterns_of(measured("t5")[1])}
    assert stacks == {"encoder": False, "decoder": True, "cross": False}


@pytest.mark.slow
def test_the_table_comes_back(llama, tmp_path):
    roles, pair = llama
    page = read(write_report(tmp_path / "r.html", roles=roles, pair=pair))
    frame = roles.frame()
    columns = pd.DataFrame(page.data["columns"], index=page.data["labels"])
    assert list(columns.index) == list(frame.index)
    assert list(columns["role"]) == list(frame["role"])
    for name in frame.select_dtypes("number").columns:
        expected = frame[name].to_numpy(dtype=float)
        found = columns[name].to_numpy(dtype=float)
        assert np.allclose(found, expected, rtol=1e-4, equal_nan=True), name
    rows = list(csv.DictReader(io.StringIO(json.loads(page.scripts["csv"]))))
    assert [row["label"] for row in rows] == list(frame.index)
    assert float(rows[0]["lean"]) == frame["lean"].iloc[0]


def test_the_page_is_the_same_each_time(llama, tmp_path):
    roles, pair = llama
    first = write_report(tmp_path / "a.html", roles=roles, pair=pair).read_bytes()
    assert first == write_report(tmp_path / "b.html", roles=roles, pair=pair).read_bytes()


@pytest.mark.slow
def test_the_policy_names_exactly_the_scripts_of_the_page(llama, tmp_path):
    roles, pair = llama
    page = read(write_report(tmp_path / "r.html", roles=roles, pair=pair))
    policy = next(a["content"] for t, a in page.elements if "Policy" in a.get("http-equiv", ""))
    ours = [text for key, text in page.scripts.items() if key not in ("data", "csv")]
    for text in ours:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == 3
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = (tmp_path / "r.html").read_text("utf-8")
    assert text.count(circuitsvis_bundle()) == 1


@pytest.mark.slow
def test_nothing_on_the_page_loads_or_carries_a_handler(llama, tmp_path):
    roles, pair = llama
    page = read(write_report(tmp_path / "r.html", roles=roles, pair=pair))
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "form", "base")
        assert "src" not in attributes
        assert "style" not in attributes, "inline styles are forbidden by the policy"
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes:
            assert attributes["href"].startswith(("#", "data:,"))


@pytest.mark.slow
@pytest.mark.parametrize("attack", everyday(ATTACKS, *ATTACKS[::4]))
def test_texts_are_data_everywhere(attack, llama, harmless, tmp_path):
    roles, pair = llama
    named = dataclasses.replace(roles, provenance=Provenance(attack, attack))
    tokens = [attack] * POSITIONS
    page = read(
        write_report(
            tmp_path / "b.html", roles=named, pair=pair, tokens=tokens, title=attack or " "
        )
    )
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert page.data["texts"] == [[visible(attack)] * POSITIONS]
    assert page.title == visible(attack or " ")
    if attack:
        assert visible(attack) in "".join(page.texts)


@pytest.mark.slow
def test_a_model_of_12_by_12_with_64_tokens_stays_small(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=64,
    )
    model = tiny.bridge("BertForMaskedLM", config)
    ids = torch.randint(5, 96, (1, 64))
    roles = sl.head_roles(model, ids, progress=False)
    labels = roles.frame().index
    sweep = Table(pd.DataFrame({"effect": [0.1] * 144, "random_effect": [0.0] * 144}, index=labels))
    for ties in ("exact", "nearest"):
        pair = sl.run_with_saturation_cache(model, ids, ties=ties)
        tokens = [f" word{i}" for i in range(64)]
        path = write_report(tmp_path / "r.html", roles=roles, pair=pair, tokens=tokens, sweep=sweep)
        assert path.stat().st_size <= 2_500_000


@pytest.mark.slow
def test_sections_appear_with_their_results(llama, tmp_path):
    roles, pair = llama
    labels = roles.frame().index
    scales = pd.Index([0.0, 1.0, math.inf], name="scale")
    results = {
        "curve": Table(
            pd.DataFrame({"loss": [4.0, 2.0, 3.0], "S_L0": [0.0, 1, 0.5]}, index=scales)
        ),
        "sweep": Table(pd.DataFrame({"effect": [1.0, math.nan]}, index=labels[:2])),
        "growth": Table(pd.DataFrame({"step": [0, 1, 10], "norm": [1.0, 2.0, 3.0]})),
    }
    headings = {
        "curve": "loss (nats per token)",
        "sweep": "Effect of saturating each head",
        "growth": "Growth through training",
    }
    for name, result in results.items():
        path = write_report(tmp_path / "r.html", roles=roles, pair=pair, **{name: result})
        text = "".join(read(path).texts)
        assert {other for other, words in headings.items() if words in text} == {name}


def test_a_sweep_over_positions_gives_each_head_its_largest_effect(llama, tmp_path):
    roles, pair = llama
    labels = list(roles.frame().index)
    effects = pd.DataFrame(
        {"effect": [0.1, -0.4, 0.2], "random_effect": [math.nan] * 3},
        index=[labels[0], labels[0], labels[1]],
    )
    path = write_report(tmp_path / "r.html", roles=roles, pair=pair, sweep=Table(effects))
    columns = read(path).data["columns"]
    assert columns["effect"][:3] == [-0.4, 0.2, None]
    assert len(columns["effect"]) == len(labels)
    assert "random_effect" not in columns
    words = "".join(read(path).texts)
    assert "Of 2 positions each head shows the effect that is largest in absolute value." in words
    with pytest.raises(ArgumentError, match="no finite effect"):
        write_report(path, roles=roles, pair=pair, sweep=Table(effects.assign(effect=math.nan)))


@pytest.mark.slow
def test_a_random_control_is_its_mean_and_its_spread(llama, tmp_path):
    roles, pair = llama
    effects = pd.DataFrame(
        {"effect": [1.0, 2.0], "random_effect": [0.3, -0.3], "random_spread": [0.4, 0.4]},
        index=roles.frame().index[:2],
    )
    path = write_report(tmp_path / "r.html", roles=roles, pair=pair, sweep=Table(effects))
    assert "move the metric by 0.5 (root mean square)" in "".join(read(path).texts)


def test_results_of_models_of_another_shape_are_refused(llama, tmp_path):
    roles, pair = llama
    path = tmp_path / "r.html"
    other_roles, other_pair = measured("t5")
    with pytest.raises(ArgumentError, match="pair and the roles are of different models"):
        write_report(path, roles=roles, pair=other_pair)
    with pytest.raises(ArgumentError, match="different models"):
        write_report(path, roles=other_roles, pair=pair)
    metric = sl.metrics.logit_difference(7, 9)
    ids = tiny.tokens(1)

    def swept(model):
        return sl.sweep_heads(model, ids, metric, heads="L0H1", progress=False)

    assert write_report(path, roles=roles, pair=pair, sweep=swept(zoo.model_of("llama")))
    wide = tiny.bridge(
        "LlamaForCausalLM", transformers.LlamaConfig(**{**tiny.SIZE, "num_attention_heads": 8})
    )
    with pytest.raises(ArgumentError, match="sweep and the roles are of different models"):
        write_report(path, roles=roles, pair=pair, sweep=swept(wide))


@pytest.mark.slow
def test_other_names_of_a_model_are_noted_on_the_page(llama, tmp_path):
    roles, pair = llama

    def words_for(roles_name, pair_name):
        path = write_report(
            tmp_path / "r.html",
            roles=dataclasses.replace(roles, provenance=Provenance(roles_name)),
            pair=dataclasses.replace(pair, provenance=dataclasses.replace(
                pair.provenance, model=pair_name)),
        )  # fmt: skip
        return "".join(read(path).texts)

    note = "measured on a model called one<b>, the patterns on one called other"
    assert note in words_for("one<b>", "some/other")
    for same in ("external", "one", "owner/one", "/a/path/to/one"):
        assert "on one called" not in words_for("one", same)


@pytest.mark.slow
def test_heads_without_a_counted_row_are_grey_and_named(tmp_path):
    model, ids = zoo.model_of("t5"), tiny.tokens(1, 12)
    short = {"decoder_input": tiny.tokens(1, 5)}
    roles = sl.head_roles(model, [{"input": ids, **short}], min_keys=8, progress=False)
    frame = roles.frame()
    assert (frame["role"] == "").tolist() == (frame["stack"] == "decoder").tolist()
    pair = sl.run_with_saturation_cache(model, ids, **short)
    page = read(write_report(tmp_path / "r.html", roles=roles, pair=pair))
    assert "no row counted" in "".join(page.texts)
    cells = {a["aria-label"].split(":")[0]: a for _, a in page.elements if "data-head" in a}
    for label, role in frame["role"].items():
        assert ("r-none" in cells[label]["class"]) == (role == "")
        assert ("no row" in cells[label]["aria-label"]) == (role == "")
    ranged = [text for text in page.texts if text in frame.index]
    assert ranged == list(frame.index[frame["role"] != ""])


@pytest.mark.slow
def test_the_clearest_head_is_opened(llama, tmp_path):
    roles, pair = llama
    data = read(write_report(tmp_path / "r.html", roles=roles, pair=pair)).data
    assert data["start"] == clearest(roles.frame())
    flat = pd.DataFrame({"role": ["mean"] * 2, "target": [""] * 2, "agreement": [0.5, 0.9]})
    assert clearest(flat) == 1


@pytest.mark.slow
def test_the_style_has_the_colours_of_the_figures():
    style = asset("base.css")
    for role, color in ROLE_COLORS.items():
        assert re.search(rf"--{role}: {color};", style, re.IGNORECASE)


@pytest.mark.slow
def test_uniform_rows_are_kept_as_bits_and_finite_scales_as_bytes():
    uniform = torch.full((16, 16), 1 / 16)
    assert set(encode_saturated(uniform, causal=False)) == {"bits"}
    assert set(encode_saturated(torch.eye(16), causal=False)) == {"keys"}
    assert set(encode_saturated(torch.rand(16, 16).softmax(-1), causal=False)) == {"bytes"}
    full, half = (len(encode_soft(torch.eye(64), causal)) for causal in (False, True))
    assert half < 0.52 * full


def test_what_does_not_fit_is_refused(llama, tmp_path, types_unchecked):
    roles, pair = llama
    path = tmp_path / "r.html"
    model = zoo.model_of("llama")
    with pytest.raises(ArgumentError, match=f"Needed {POSITIONS} tokens"):
        write_report(path, roles=roles, pair=pair, tokens=["a"])
    with pytest.raises(ArgumentError, match="one string"):
        write_report(path, roles=roles, pair=pair, tokens="a" * POSITIONS)
    with pytest.raises(ArgumentError, match="tokens of the stack ''"):
        write_report(path, roles=roles, pair=pair, tokens={"encoder": ["a"] * POSITIONS})
    two = sl.run_with_saturation_cache(model, torch.randint(3, 96, (2, 8)))
    with pytest.raises(ArgumentError, match="batch of 2"):
        write_report(path, roles=roles, pair=two)
    none = sl.run_with_saturation_cache(
        model, torch.randint(3, 96, (1, 8)), names_filter=lambda name: "resid" in name
    )
    with pytest.raises(ArgumentError, match="hold no attention pattern"):
        write_report(path, roles=roles, pair=none)
    with pytest.raises(ArgumentError, match="Needed roles"):
        write_report(path, roles=pair, pair=pair)
    with pytest.raises(ArgumentError, match="Needed a pair"):
        write_report(path, roles=roles, pair=roles)
    for name in ("curve", "sweep", "growth"):
        for wrong in ("text", Table(None), Table(pd.DataFrame())):
            with pytest.raises(ArgumentError, match=f"{name} must be a result with a frame"):
                write_report(path, roles=roles, pair=pair, **{name: wrong})
    with pytest.raises(ArgumentError, match="'effect'"):
        write_report(path, roles=roles, pair=pair, sweep=Table(pd.DataFrame({"a": [1]})))
    with pytest.raises(FileFormatError, match="cannot be written"):
        write_report(tmp_path / "no" / "r.html", roles=roles, pair=pair)
    assert list(tmp_path.iterdir()) == []
