"""What counts as data: token tensors, texts, or batches of a model's own arguments.

Everything that runs a model over data reads it through :func:`batches`, so all of it takes the
same forms and refuses the same mistakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sat_lens.errors import DataError

Data = Tensor | str | Iterable[Any]
_INPUT_NAMES = ("input", "input_ids", "tokens", "pixel_values", "input_values")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One forward pass: the model's arguments and what is known of its positions.

    ``tokens`` and ``real`` describe the input's positions, ``decoder_tokens`` and ``decoder_real``
    those of a decoder with an input of its own; ``real`` is False at padding. Each is None where
    the arguments do not say.
    """

    inputs: Tensor
    kwargs: dict[str, Any]
    tokens: Int[Tensor, "batch position"] | None = None
    real: Bool[Tensor, "batch position"] | None = None
    decoder_tokens: Int[Tensor, "batch decoder_position"] | None = None
    decoder_real: Bool[Tensor, "batch decoder_position"] | None = None

    def run(self, model: Any, **kwargs: Any) -> Any:
        """Run the model on this batch."""
        return model(self.inputs, **{**self.kwargs, **kwargs})

    @property
    def output_tokens(self) -> Tensor | None:
        """The tokens behind the logits: the decoder's where it has an input of its own."""
        return self.tokens if self.decoder_tokens is None else self.decoder_tokens

    @property
    def output_real(self) -> Tensor | None:
        """Which of these positions are no padding."""
        return self.real if self.decoder_tokens is None else self.decoder_real

    @property
    def size(self) -> int:
        """The number of sequences."""
        return int(self.inputs.shape[0])


def batches(model: Any, data: Data, batch_size: int = 8) -> Iterator[Batch]:
    """Read data batch by batch.

    Args:
        model: The model that will run; its tokenizer reads texts.
        data: A token tensor ``[batch, position]`` (cut into batches), one text or a list of texts
            (tokenised, cut to the context, padded on the right and masked), an iterable of
            batches, each a tensor or a dict of the model's own forward arguments (``input``,
            ``attention_mask``, ...), or a Hugging Face dataset, streamed or not, with a column
            ``text`` or ``input_ids``: an item that is a dict with a text is a text, one whose
            ``input_ids`` are a list is a sequence of tokens.
        batch_size: Sequences in a batch, for texts and for tokens that come without batches.

    Raises:
        DataError: The data is empty, or is or holds something that is none of these, or a token
            is not in the model's vocabulary.

    Example:
        >>> import sat_lens as sl
        >>> [b.size for b in batches(sl.load_model("demo"), ["import os", "x = 1"], batch_size=1)]
        [1, 1]
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; found {batch_size}.")
    count = 0
    for batch in _read(model, data, batch_size):
        count += 1
        yield batch
    if count == 0:
        raise DataError("The data is empty: at least one sequence is needed.")


def text_windows(
    model: Any, texts: Iterable[str], context: int, limit: int | None = None
) -> Int[Tensor, "window context"]:
    """Tokenise texts into one stream and cut it into windows of equal length.

    Each window opens with the beginning-of-sequence token where the model has one, because that is
    what models are trained on; a rest at the end that fills no window is dropped.

    Raises:
        DataError: The texts fill not even one window, or ``context`` has no room for a token.

    Example:
        >>> import sat_lens as sl
        >>> text_windows(sl.load_model("demo"), ["import os, sys, re"] * 9, context=8).shape[1]
        8
    """
    tokenizer = _tokenizer(model)
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
    if not windows:
        raise DataError(
            f"The text gives {len(rest)} tokens, and one window needs {width}. Give a longer text "
            "or a smaller context."
        )
    return torch.tensor(windows, device=_device(model))


def _read(model: Any, data: Data, batch_size: int) -> Iterator[Batch]:
    if isinstance(data, Tensor):
        for part in _sequences(data).split(batch_size):
            yield _from_tensor(model, part)
    elif isinstance(data, str):
        yield _padded(model, [_text_row(model, data)])
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unreadable(data)
    else:
        yield from _from_items(model, data, batch_size)


def _from_items(model: Any, items: Iterable[Any], batch_size: int) -> Iterator[Batch]:
    rows: list[list[int]] = []
    for item in items:
        row = _row(model, item)
        if row is not None:
            rows.append(row)
        if rows and (row is None or len(rows) == batch_size):
            yield _padded(model, rows)
            rows = []
        if isinstance(item, Tensor):
            yield _from_tensor(model, _sequences(item))
        elif row is None and isinstance(item, Mapping):
            yield _from_mapping(model, item)
        elif row is None:
            raise _unreadable(item)
    if rows:
        yield _padded(model, rows)


def _row(model: Any, item: Any) -> list[int] | None:
    """Read one sequence without padding: a text or a row of a data set; None if it is neither."""
    if isinstance(item, str):
        return _text_row(model, item)
    if not isinstance(item, Mapping):
        return None
    if isinstance(item.get("text"), str):
        return _text_row(model, item["text"])
    ids, mask = item.get("input_ids"), item.get("attention_mask")
    if not _is_list_of_ints(ids):
        return None
    if not _is_list_of_ints(mask):
        return list(ids)
    if len(mask) != len(ids):
        raise DataError(f"Needed one mask entry per token; found {len(mask)} for {len(ids)}.")
    return [token for token, real in zip(ids, mask, strict=True) if real]


def _text_row(model: Any, text: str) -> list[int]:
    if not text.strip():
        raise DataError(
            "One of the texts is empty, and every text needs at least one token. Leave empty "
            "texts out, or join texts into windows of equal length with sat_lens.data.text_windows."
        )
    tokenizer = _tokenizer(model)
    row = list(tokenizer(text, verbose=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return row if bos is None or row[:1] == [bos] else [bos, *row]


def _is_list_of_ints(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(entry, int) for entry in value)


def _padded(model: Any, rows: list[list[int]]) -> Batch:
    context = int(getattr(model.cfg, "n_ctx", 0) or 0)
    rows = [row[: context or None] for row in rows]
    if not all(rows):
        raise DataError("One of the sequences holds no token, or masks all that it holds.")
    width = max(len(row) for row in rows)
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None) or 0
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=_device(model))
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    real = torch.arange(width, device=tokens.device) < lengths[:, None]
    kwargs = {} if bool(real.all()) else {"attention_mask": real.long()}
    _check_vocabulary(model, tokens)
    return Batch(tokens, kwargs, tokens=tokens, real=real)


def _from_tensor(model: Any, tensor: Tensor) -> Batch:
    if tensor.numel() == 0:
        raise DataError(f"A batch of shape {list(tensor.shape)} holds nothing.")
    moved = tensor.to(_device(model))
    tokens = moved if not moved.is_floating_point() and moved.dim() == 2 else None
    if tokens is not None:
        _check_vocabulary(model, tokens)
    return Batch(moved, {}, tokens=tokens)


def _sequences(tensor: Tensor) -> Tensor:
    """Let one sequence be a batch of one."""
    return tensor[None] if tensor.dim() < 2 else tensor


def _check_vocabulary(model: Any, tokens: Tensor) -> None:
    size = int(getattr(model.cfg, "d_vocab", 0) or 0)
    low, high = int(tokens.min()), int(tokens.max())
    wrong = low if low < 0 else high
    if size > 0 and not 0 <= wrong < size:
        raise DataError(
            f"Token ids of this model lie between 0 and {size - 1}; found {wrong}. Was the data "
            "tokenised for another model?"
        )


def _from_mapping(model: Any, item: Mapping[str, Any]) -> Batch:
    device = _device(model)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in item.items()}
    name = next((name for name in _INPUT_NAMES if name in moved), None)
    if name is None or not isinstance(moved[name], Tensor):
        raise DataError(
            f"A batch as a dict needs the model's input under one of {', '.join(_INPUT_NAMES)}; "
            f"found the keys {', '.join(map(str, item)) or 'none'}."
        )
    plain = _from_tensor(model, _sequences(moved.pop(name)))
    mask = moved.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 1:
        moved["attention_mask"] = mask[None]
    decoder = moved.get("decoder_input", moved.get("decoder_input_ids"))
    return Batch(
        plain.inputs,
        moved,
        tokens=plain.tokens,
        real=_as_mask(moved.get("attention_mask")),
        decoder_tokens=decoder,
        decoder_real=_as_mask(moved.get("decoder_attention_mask")),
    )


def _as_mask(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DataError("This model has no tokenizer, so it reads token tensors and not texts.")
    if len(tokenizer) == 0:
        raise DataError(
            "This model's tokenizer knows no tokens, as when its folder holds none. Save one there "
            "with tokenizer.save_pretrained(folder), or give token tensors."
        )
    return tokenizer


def _device(model: Any) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _unreadable(data: object) -> DataError:
    return DataError(
        "Data is a token tensor [batch, position], a list of texts, an iterable of batches "
        "(tensors or dicts of the model's arguments) or a data set with a column text or "
        f"input_ids; found {type(data).__name__}."
    )
