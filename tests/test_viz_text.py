"""Tokens as texts: nothing vanishes, nothing is markup."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from everyday import everyday
from hypothesis import given
from hypothesis import strategies as st
from text_attacks import ATTACKS

import sat_lens as sl
from sat_lens import figures
from sat_lens.errors import ArgumentError
from sat_lens.viz.page import (
    circuitsvis_bundle,
    content_security_policy,
    embedded_json,
    inline_svg,
)
from sat_lens.viz.patterns import WORD_JOINER, inert, token_strings
from sat_lens.vocabulary import INK, LINES, PAPER, QUIET, RULE, visible

ANY_TEXT = st.text(st.characters(codec=None, categories=None))


@given(ANY_TEXT)
def test_every_character_shows(text):
    seen = visible(text)
    assert seen.strip()
    seen.encode("utf-8")
    hidden = {"Cc", "Cs", "Cn", "Zl", "Zp"}
    assert not any(unicodedata.category(character) in hidden for character in seen)


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_ordinary_text_stays_as_it_is(text):
    assert visible(f" {text}") == f" {text}"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\n", "⏎"),
        ("\n    ", "⏎␣␣␣␣"),
        ("\n       ", "⏎␣\u00d77"),
        ("\t", "⇥"),
        ("", "⟨empty⟩"),
        ("\udc80", "⟨U+DC80⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("a\u200db", "a\u200db"),
        ("\u200d", "⟨U+200D⟩"),
        (" def", " def"),
    ],
)
def test_what_would_vanish_is_named(text, seen):
    assert visible(text) == seen


@given(st.recursive(ANY_TEXT | st.floats() | st.integers(), st.lists, max_leaves=8))
def test_json_cannot_close_its_element(value):
    text = str(embedded_json({"value": value}))
    assert text.isascii()
    assert not set("<>&") & set(text)
    json.loads(text)


@given(ANY_TEXT)
def test_json_gives_the_text_back(text):
    assert json.loads(str(embedded_json([text]))) == [text]


class Counting(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("attack", ATTACKS)
def test_tokens_that_circuitsvis_inserts_as_html_hold_no_markup(attack):
    (token,) = inert([attack])
    parser = Counting()
    parser.feed(f"<p>{token}</p>")
    parser.close()
    assert parser.tags == ["p"]
    # The same string is also shown as text, in tooltips: both show what the token is.
    assert parser.text == token
    assert token.replace(WORD_JOINER, "") == visible(attack)


@given(ANY_TEXT)
def test_no_text_begins_a_tag_or_a_reference(text):
    (token,) = inert([text])
    assert not re.search(r"[<&](?!\u2060)", token)
    assert html.unescape(token) == token


def test_the_bundle_cannot_close_its_element():
    assert "</script" not in circuitsvis_bundle().lower()
    assert "\r" not in circuitsvis_bundle()


def test_the_policy_allows_two_scripts_and_no_request():
    policy = content_security_policy("a{}", ["one", "two"])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert policy.split("script-src")[1].split(";")[0].count("sha256-") == 2


def test_tokens_of_the_demo_read_as_text():
    model = sl.load_model("demo")
    text = "def f(x):\n    return 'é\U0001f680'"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_strings(model, ids)
    assert len(pieces) == len(ids)
    assert all(pieces)
    assert not any("Ġ" in piece or "Ċ" in piece for piece in pieces)
    assert pieces[0] == "def"


class FakeTokenizer:
    pieces = ("▁def", "<0x0A>", "##ing", "", "âĢ")
    texts = ("def", "\n", "##ing", "", "�")

    def convert_ids_to_tokens(self, token):
        return self.pieces[token] or "<empty>"

    def decode(self, ids):
        return self.texts[ids[0]]


def test_pieces_of_other_tokenizers_keep_what_they_are():
    model = type("Model", (), {"tokenizer": FakeTokenizer()})()
    assert token_strings(model, range(5)) == [" def", "\n", "##ing", "<empty>", "âĢ"]
    assert token_strings(type("Model", (), {})(), [7]) == ["7"]


@pytest.mark.parametrize("tokens", ["def", None, 3, [1.5], ["def"], torch.tensor([0.5])])
def test_what_is_no_token_id(tokens, types_unchecked):
    with pytest.raises(ArgumentError, match="token ids"):
        token_strings(sl.load_model("demo"), tokens)


class Drawing(HTMLParser):
    """The elements, attributes and words of an SVG in a page."""

    def __init__(self, svg):
        super().__init__(convert_charrefs=True)
        self.elements, self.words = [], []
        self.feed(svg)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def drawing_of(name):
    column = name.encode("utf-8", "backslashreplace").decode()  # pandas takes no lone surrogates
    frame = pd.DataFrame({"step": [1, 10, 100], column: [1.0, 2.0, 4.0]})
    return inline_svg(figures.growth_figure(frame, name, columns=[column], log_y=False), name)


@pytest.fixture(scope="module")
def harmless():
    svg = drawing_of("norm")
    assert svg == drawing_of("norm"), "the same figure gives the same text"
    return Drawing(svg).elements


@pytest.mark.parametrize("attack", everyday(ATTACKS, *ATTACKS[2::8]))
def test_words_of_a_drawing_are_data(attack, harmless):
    drawn = Drawing(drawing_of(attack))
    assert {tag for tag, _ in drawn.elements} == {tag for tag, _ in harmless}
    assert {a for _, found in drawn.elements for a in found} <= {
        a for _, found in harmless for a in found
    }
    assert drawn.elements[0][1]["aria-label"] == visible(attack)
    assert "".join(visible(attack).split()) in "".join("".join(drawn.words).split())


def test_a_drawing_has_the_inks_of_its_page_and_no_styles(harmless):
    elements = harmless
    colors = {found.get(name) for _, found in elements for name in ("fill", "stroke")}
    assert {"currentColor", "var(--quiet)", "var(--rule)"} <= colors
    assert not {color.lower() for color in (INK, QUIET, RULE, PAPER)} & colors
    assert LINES[0].lower() in colors
    assert not any("style" in found for _, found in elements)
    defined = {found["id"] for _, found in elements if "id" in found}
    used = {found["href"] for _, found in elements if "href" in found}
    used |= {found["clip-path"][4:-1] for _, found in elements if "clip-path" in found}
    assert {name.removeprefix("#") for name in used} <= defined
