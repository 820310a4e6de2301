"""Texts as rows of tokens, and as windows of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from sat_lens.errors import ArgumentError, DataError, ModelError
from sat_lens.models import device_of


def text_windows(
    model: Any, texts: Iterable[str], context: int, limit: int | None = None
) -> Int[Tensor, "window context"]:
    """Tokenise texts into one stream and cut it into windows of equal length.

    Each window opens with the beginning-of-sequence token where the model has one, because that is
    what models are trained on; a rest at the end that fills no window is dropped. Texts that
    together fill not even one window come back whole, as one shorter window.

    Raises:
        DataError: The texts hold no token, or ``context`` has no room for one.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.data import text_windows
        >>> text_windows(sl.load_model("demo"), ["import os, sys, re"] * 9, context=8).shape[1]
        8
    """
    tokenizer = tokenizer_of(model)
    bos = getattr(tokenizer, "bos_token_id", None)
    width = context - (bos is not None)
    if width < 1 or (limit is not None and limit < 1):
        raise DataError(
            f"Needed at least one window with room for a token; found a context of {context} and "
            f"a limit of {limit} windows."
        )
    windows: list[list[int]] = []
    rest: list[int] = []
    for text in texts:
        rest += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(rest) >= width and (limit is None or len(windows) < limit):
            windows.append(([] if bos is None else [bos]) + rest[:width])
            rest = rest[width:]
        if limit is not None and len(windows) >= limit:
            break
    if not windows and not rest:
        raise DataError("The texts hold no token, so there is nothing to measure on.")
    if not windows:
        windows = [([] if bos is None else [bos]) + rest]
    return torch.tensor(windows, device=device_of(model))


def text_row(model: Any, text: str, tokenizer: Any = None) -> list[int]:
    """Tokenise one text, with its beginning-of-sequence token where the model has one.

    Args:
        model: The model that will read it.
        text: The text.
        tokenizer: In the place of the model's own.

    Raises:
        DataError: The text is empty, or the model has no tokenizer.
    """
    if not text.strip():
        raise DataError(
            "One of the texts is empty, and every text needs at least one token. Leave empty "
            "texts out, or join texts into windows of equal length with sat_lens.data.text_windows."
        )
    tokenizer = tokenizer_of(model, tokenizer)
    check_text(tokenizer, text)
    row = list(tokenizer(text, verbose=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return row if bos is None or row[:1] == [bos] else [bos, *row]


def check_text(tokenizer: Any, text: str) -> None:
    """Raise a DataError if a text is padded with the pad token written out, as by ``decode``."""
    pad = getattr(tokenizer, "pad_token", None)
    ends = [getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos")]
    if not isinstance(pad, str) or not pad:
        return
    # One that also begins or ends texts may be there for that.
    run = pad * 2 if pad in ends else pad
    if text.startswith(run) or text.endswith(run):
        raise DataError(
            f"One of the texts is padded: it begins or ends with the pad token {pad!r} written "
            "out, which would count as text. Leave it out: "
            "tokenizer.decode(ids, skip_special_tokens=True)."
        )


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """Return the tokenizer that was given, or else the model's own.

    Raises:
        DataError: There is none, or one that knows no tokens.
    """
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise DataError(
            "The data are texts and the model has no tokenizer. Give token tensors, or a tokenizer "
            "(tokenizer= where a function takes it, else model.tokenizer = tokenizer)."
        )
    if len(tokenizer) == 0:
        raise DataError(
            "This model's tokenizer knows no tokens, as when its folder holds none. Save one there "
            "with tokenizer.save_pretrained(folder), or give token tensors."
        )
    return tokenizer


def read_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer that was given as itself or as its directory; None stays None.

    Raises:
        ArgumentError: It is neither.
        ModelError: The directory holds none.
    """
    if tokenizer is None or callable(tokenizer):
        return tokenizer
    if not isinstance(tokenizer, (str, Path)):
        raise ArgumentError(
            f"tokenizer is a tokenizer or its directory; found {type(tokenizer).__name__}."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(tokenizer), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"No tokenizer could be loaded from {tokenizer}: {error}") from error
