"""Views of notebooks as objects and as files."""

from __future__ import annotations

import html
import json
import re

import pytest
import torch
import zoo
from text_attacks import ATTACKS

import sat_lens as sl
from sat_lens import viz
from sat_lens.errors import ArgumentError, HeadSelectionError
from sat_lens.viz.page import circuitsvis_bundle
from sat_lens.viz.patterns import WORD_JOINER
from sat_lens.vocabulary import visible


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return sl.run_with_saturation_cache(zoo.model_of("llama"), torch.randint(3, 96, (1, 12)))


@pytest.fixture(scope="module")
def roles():
    torch.manual_seed(0)
    data = torch.randint(3, 96, (4, 24))
    return sl.head_roles(zoo.model_of("llama"), data, progress=False)


def data_of(view):
    return json.loads(re.search(r'id="data">(.*?)</script>', view.page)[1])


def test_a_view_is_a_frame_of_fixed_height_with_a_whole_page(pair):
    view = viz.attention(pair, "L0H1")
    shown = view._repr_html_()
    assert f'height="{view.height}"' in shown
    assert shown.count("<iframe") == 1
    page = html.unescape(re.search(r'srcdoc="(.*?)" width', shown, re.DOTALL)[1])
    assert page == view.page
    assert page.count(circuitsvis_bundle()) == 1


def test_displaying_asks_no_network(pair, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("circuitsvis probed the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert viz.attention(pair, "L0H1")._repr_html_()
    assert viz.tokens(["a"], torch.ones(1))._repr_html_()


def test_heads_are_named_by_their_role(pair, roles):
    frame = roles.frame()
    view = viz.attention(pair, ["L0H1", "L1H3"], roles=roles)
    names = data_of(view)["groups"][0]["names"]
    for name, label in zip(names, ["L0H1", "L1H3"], strict=True):
        role, target = frame.loc[label, ["role", "target"]]
        assert name == f"{label} {role} {target}".strip()


def test_without_a_choice_the_clearest_heads_are_shown(pair, roles):
    frame = roles.frame()
    names = data_of(viz.attention(pair, roles=roles))["groups"][0]["names"]
    assert len(names) == min(8, len(frame))
    assert len(data_of(viz.attention(pair))["groups"][0]["names"]) == 8


def test_stacks_come_in_groups_with_their_own_tokens():
    torch.manual_seed(0)
    model = zoo.model_of("t5")
    ids, decoder = torch.randint(3, 96, (1, 9)), torch.randint(3, 96, (1, 5))
    pair = sl.run_with_saturation_cache(model, ids, decoder_input=decoder)
    tokens = {"encoder": [f"e{i}" for i in range(9)], "decoder": [f"d{i}" for i in range(5)]}
    view = viz.attention(pair, ["cross.L0H1", "encoder.L1H0"], tokens=tokens)
    data = data_of(view)
    groups = {group["names"][0]: group for group in data["groups"]}
    cross = groups["cross.L0H1"]
    assert data["texts"][cross["queries"]] == tokens["decoder"]
    assert data["texts"][cross["keys"]] == tokens["encoder"]
    assert groups["encoder.L1H0"]["causal"] is False


def test_token_views_take_layer_and_head(pair):
    texts = [f"t{i}" for i in range(12)]
    changes = viz.row_changes(pair)
    assert list(changes.shape) == [12, 2, 4]
    soft, saturated = (run.cache["pattern", 1][0, 2] for run in (pair.soft, pair.saturated))
    expected = (soft - saturated).abs().sum(-1) / 2
    assert torch.allclose(changes[:, 1, 2], expected, atol=1e-6)
    props = data_of(viz.tokens(texts, changes))["props"]
    assert (props["firstDimensionName"], props["secondDimensionName"]) == ("Layer", "Head")
    assert torch.allclose(torch.tensor(props["activations"]), changes, atol=1e-4)
    assert data_of(viz.tokens(texts, changes[:, 0, 0]))["component"] == "ColoredTokens"


def test_top_tokens_are_the_largest(pair):
    values = torch.tensor([0.1, 0.9, 0.4])[:, None, None].expand(3, 1, 2)
    props = data_of(viz.top_tokens(["a", "b", "c"], values, k=2))["props"]
    assert props["topkIdxs"][0][0] == [[1, 1], [2, 2]]
    assert props["bottomkIdxs"][0][0] == [[2, 2], [0, 0]]


def test_missing_heads_count_as_zero():
    values = torch.tensor([[[float("nan"), 1.0]]])
    assert data_of(viz.tokens(["a"], values))["props"]["activations"] == [[[0.0, 1.0]]]


@pytest.mark.parametrize("attack", ATTACKS)
def test_tokens_and_titles_are_data(attack, tmp_path):
    view = viz.tokens([attack], torch.ones(1), attack)
    shown = data_of(view)["props"]["tokens"][0]
    assert shown.replace(WORD_JOINER, "") == visible(attack)
    assert html.unescape(shown) == shown
    assert view._repr_html_().count("<iframe") == 1
    path = view.save_html(tmp_path / "view.html")
    assert path.read_text("utf-8").count("<script") == view.page.count("<script")
    assert html.escape(visible(attack), quote=False).split("'")[0].split('"')[0] in view.page


@pytest.mark.slow
def test_a_figure_is_saved_as_it_is_asked_for(roles, tmp_path):
    view = viz.role_map(roles)
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for ending, start in starts.items():
        first = view.save(tmp_path / f"a.{ending}").read_bytes()
        assert first.startswith(start)
        assert first == view.save(tmp_path / f"b.{ending}").read_bytes()
    assert view.save_html(tmp_path / "view.html").stat().st_size < 400_000
    with pytest.raises(ArgumentError, match=r"\.png, \.svg, \.pdf"):
        view.save(tmp_path / "a.doc")
    assert not (tmp_path / "a.doc").exists()


def test_what_does_not_fit_is_refused(pair, types_unchecked):
    with pytest.raises(HeadSelectionError, match="L9H9"):
        viz.attention(pair, "L9H9")
    with pytest.raises(ArgumentError, match="2 tokens and values of shape"):
        viz.tokens(["a", "b"], torch.ones(3))
    with pytest.raises(ArgumentError, match=r"\[position, layer, head\]"):
        viz.top_tokens(["a"], torch.ones(1))
    with pytest.raises(ArgumentError, match="decoder"):
        viz.row_changes(pair, "decoder")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pair, roles: viz.role_map(pair), "Needed roles"),
        (lambda pair, roles: viz.attention(roles), "Needed a pair of runs"),
        (lambda pair, roles: viz.attention(pair, roles=pair), "Needed roles"),
        (lambda pair, roles: viz.attention(pair, "L0H0", tokens=7), "found one int"),
        (lambda pair, roles: viz.row_changes(roles), "Needed a pair of runs"),
        (lambda pair, roles: viz.tokens(["a"], [0.1]), "list in place of values"),
        (lambda pair, roles: viz.tokens(7, torch.ones(1)), "int in place of tokens"),
        (lambda pair, roles: viz.top_tokens(["a"], torch.ones(1, 1, 1), k=0), "k, the number"),
        (lambda pair, roles: viz.top_tokens(["a"], torch.ones(1, 1, 1), k="2"), "k, the number"),
    ],
)
def test_arguments_of_another_kind(call, words, pair, roles, types_unchecked):
    with pytest.raises(ArgumentError, match=words):
        call(pair, roles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_shown(dtype):
    model = zoo.case("llama").build().to(dtype)
    torch.manual_seed(0)
    pair = sl.run_with_saturation_cache(model, torch.randint(3, 96, (1, 12)), ties="nearest")
    group = data_of(viz.attention(pair, "L0H1"))["groups"][0]
    assert "bytes" not in group["saturated"][0], "rounding is no reason to take it for soft"
    changes = viz.row_changes(pair)
    assert bool(changes.isfinite().all())
    texts = [str(i) for i in range(12)]
    assert viz.top_tokens(texts, changes.to(dtype)).page
    assert viz.tokens(texts, changes[:, 0, 0].to(dtype)).page
