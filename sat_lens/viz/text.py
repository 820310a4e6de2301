"""Tokens as texts that a person can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sat_lens.errors import ArgumentError
from sat_lens.figures.marks import visible

WORD_JOINER = "\u2060"
Tokens = Sequence[str] | Mapping[str, Sequence[str]]


def token_strings(model: Any, tokens: Tensor | Iterable[int]) -> list[str]:
    """Read token ids as texts, one each, in which nothing is missing.

    Byte-level pieces read as the text that they stand for; a piece that is no text by itself (part
    of a character, an empty one) keeps the name that the tokenizer gives it. A model without a
    tokenizer gets the ids as texts.

    Args:
        model: A TransformerLens model.
        tokens: Ids, as a tensor ``[position]`` or ``[1, position]``, or a list.

    Raises:
        ArgumentError: These are no ids.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.viz import token_strings
        >>> model = sl.load_model("demo")
        >>> token_strings(model, model.tokenizer("def f():")["input_ids"])[:3]
        ['<bos>', 'def', ' f']
    """
    ids = _ids_of(tokens)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(i) for i in ids]
    return [_token_string(tokenizer, i) for i in ids]


def _ids_of(tokens: Tensor | Iterable[int]) -> list[int]:
    values = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    if isinstance(values, Iterable) and not isinstance(values, str):
        ids = list(values)
        if all(isinstance(i, int) or (isinstance(i, Tensor) and i.numel() == 1) for i in ids):
            return [int(i) for i in ids]
    raise ArgumentError(
        "Needed token ids, such as model.to_tokens(text) or the input_ids of a tokenizer gives; "
        f"found {type(tokens).__name__}."
    )


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


def inert(tokens: Iterable[str]) -> list[str]:
    """Make visible tokens harmless for those circuitsvis components that insert them as HTML.

    ``ColoredTokens``, ``TextNeuronActivations`` and ``TopkTokens`` do, and show the same string as
    text in their tooltips, where an escape would be read as it is. So < and & are followed by an
    invisible word joiner instead: no tag and no character reference can begin with that, and both
    places show the same. The attention components draw on a canvas and get tokens as they are.

    Example:
        >>> from sat_lens.viz.text import inert
        >>> inert(["<bos>"])
        ['<\u2060bos>']
    """
    return [re.sub("[<&]", rf"\g<0>{WORD_JOINER}", token) for token in shown(tokens)]
