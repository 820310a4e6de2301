"""Tokens as texts that a person can read."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sat_lens.figures.marks import visible

Tokens = Sequence[str] | Mapping[str, Sequence[str]]


def token_strings(model: Any, tokens: Tensor | Iterable[int]) -> list[str]:
    """Read token ids as texts, one each, in which nothing is missing.

    Byte-level pieces read as the text that they stand for; a piece that is no text by itself (part
    of a character, an empty one) keeps the name that the tokenizer gives it. A model without a
    tokenizer gets the ids as texts.

    Args:
        model: A TransformerLens model.
        tokens: Ids, as a tensor ``[position]`` or ``[1, position]``, or a list.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> token_strings(model, model.tokenizer("def f():")["input_ids"])[:3]
        ['<bos>', 'def', ' f']
    """
    ids = [int(i) for i in (tokens.flatten() if isinstance(tokens, Tensor) else tokens)]
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(i) for i in ids]
    return [_token_string(tokenizer, i) for i in ids]


def _token_string(tokenizer: Any, token: int) -> str:
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("▁"):
        # SentencePiece: decoding a single piece drops the space in front of it.
        return piece.replace("▁", " ")
    text = str(tokenizer.decode([token]))
    return piece if text == "" or "�" in text else text


def shown(tokens: Iterable[str]) -> list[str]:
    """Make tokens visible for a page; see :func:`sat_lens.figures.marks.visible`."""
    return [visible(str(token)) for token in tokens]


def escaped(tokens: Iterable[str]) -> list[str]:
    """Escape visible tokens for those circuitsvis components that insert them as HTML.

    ``ColoredTokens``, ``TextNeuronActivations`` and ``TopkTokens`` do; the attention components
    draw their labels on a canvas and must get them as they are.

    Example:
        >>> escaped(["<bos>"])
        ['&lt;bos&gt;']
    """
    return [html.escape(token) for token in shown(tokens)]
