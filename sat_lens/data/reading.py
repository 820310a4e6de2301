"""Read data of every form batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sat_lens._checks import check_count, is_count
from sat_lens.data.batch import Batch, as_mask
from sat_lens.data.texts import text_row
from sat_lens.errors import DataError
from sat_lens.models import context_length, device_of, main_input_name, vocabulary_size

_log = logging.getLogger(__name__)

Data = Tensor | str | Iterable[Any]
TOKEN_NAMES = ("input", "input_ids", "tokens")
INPUT_NAMES = (*TOKEN_NAMES, "pixel_values", "input_values")
_OF_SEQUENCES = (
    "attention_mask",
    "decoder_input",
    "decoder_input_ids",
    "decoder_attention_mask",
)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def batches(model: Any, data: Data, batch_size: int = 8) -> Iterator[Batch]:
    """Read data batch by batch.

    Args:
        model: The model that will run; its tokenizer reads texts.
        data: A token tensor ``[batch, position]`` (cut into batches), one text or a list of texts
            (tokenised, cut to the context, padded on the right and masked), an iterable of
            batches, each a tensor or a dict of the model's own forward arguments (``input``,
            ``attention_mask``, ...), or a Hugging Face dataset, streamed or not, with a column
            ``text``, ``tokens`` or ``input_ids``: an item that is a dict with a text is a text, one
            whose tokens are a list, or a one-dimensional tensor with nothing beside it but a mask,
            is a sequence of tokens. Lists of these are read one by one.
        batch_size: Sequences in a batch, for texts and for tokens that come without batches.

    A text or a row of tokens that is longer than the model's context is cut at its end; how many
    were cut, and how many tokens went, is logged as a warning when the data has been read.

    Raises:
        DataError: The data is empty, or is or holds something that is none of these, or a token
            is not in the model's vocabulary.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.data import batches
        >>> [b.size for b in batches(sl.load_model("demo"), ["import os", "x = 1"], batch_size=1)]
        [1, 1]
    """
    check_count("batch_size", batch_size, error=DataError)
    count, cuts = 0, list[int]()
    try:
        for batch in _read(model, data, batch_size, cuts):
            count += 1
            yield batch
    finally:
        if cuts:
            _log.warning(
                "%d of the texts were longer than the model's context and were cut at their end "
                "(%d tokens in all). sat_lens.data.text_windows keeps all of a text.",
                len(cuts),
                sum(cuts),
            )
    if count == 0:
        raise DataError("The data is empty: at least one sequence is needed.")


def read_batch(model: Any, inputs: Data | Mapping[str, Any], name: str = "inputs") -> Batch:
    """Read what is to be run as one batch: a batch alone, or data that fit into one.

    Args:
        model: The model that will run.
        inputs: Data as for :func:`batches`, or one dict of the model's own arguments.
        name: What messages call it.

    Raises:
        DataError: It is empty, or more than one batch.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.data import read_batch
        >>> read_batch(sl.load_model("demo"), ["import os", "x = 1"]).size
        2
    """
    data: Any = [inputs] if isinstance(inputs, Mapping) else inputs
    if isinstance(data, Tensor) and data.numel() == 0:
        raise DataError(f"{name} holds nothing: its shape is {list(data.shape)}.")
    size = len(data) if isinstance(data, (list, tuple, Tensor)) else 1
    found = list(batches(model, data, batch_size=max(size, 1)))
    if len(found) != 1:
        raise DataError(
            f"Needed one batch of prompts, and {name} holds {len(found)}. Put them into one tensor "
            "or dict, or take one after the other."
        )
    return found[0]


def batch_sizes(data: Any, batch_size: int) -> list[int] | None:
    """Return the sizes of the batches that :func:`sat_lens.data.batches` will make of data.

    Returns:
        None where only reading would tell, as for an iterator or a data set.

    Example:
        >>> from sat_lens.data import batch_sizes
        >>> batch_sizes(["import os", "x = 1", "y = 2"], batch_size=2)
        [2, 1]
    """
    if not is_count(batch_size):
        return None
    if isinstance(data, str):
        return [1]
    if isinstance(data, Tensor):
        count = 1 if data.dim() < 2 else len(data)
    elif isinstance(data, Sequence) and all(isinstance(item, str) for item in data):
        count = len(data)
    elif isinstance(data, Sequence) and all(isinstance(item, Tensor) for item in data):
        return [1 if item.dim() < 2 else len(item) for item in data]
    else:
        return None
    starts = range(0, count, batch_size)
    return [min(batch_size, count - start) for start in starts]


def repeatable(data: Data) -> Data:
    """Return data that can be read several times, from what may be an iterator.

    Raises:
        DataError: It is no data; see :func:`batches`.

    Example:
        >>> from sat_lens.data import repeatable
        >>> repeatable(text for text in ["import os", "x = 1"])
        ['import os', 'x = 1']
    """
    if isinstance(data, (Tensor, str)):
        return data
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unreadable(data)
    return list(data)


def _read(model: Any, data: Data, batch_size: int, cuts: list[int]) -> Iterator[Batch]:
    """Read batches; how many tokens were cut off each sequence that was too long goes to cuts."""
    if isinstance(data, Tensor):
        for part in _sequences(data).split(batch_size):
            yield _from_tensor(model, part)
    elif isinstance(data, str):
        yield from _from_items(model, [data], batch_size, cuts)
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unreadable(data)
    else:
        yield from _from_items(model, data, batch_size, cuts)


def _from_items(
    model: Any, items: Iterable[Any], batch_size: int, cuts: list[int]
) -> Iterator[Batch]:
    context = context_length(model)
    rows: list[list[int]] = []
    for item in items:
        found = _rows(model, item)
        for row in found or ():
            if 0 < context < len(row):
                cuts.append(len(row) - context)
            rows.append(row[:context] if context > 0 else row)
            if len(rows) == batch_size:
                yield _padded(model, rows)
                rows = []
        if found is not None:
            continue
        if rows:
            yield _padded(model, rows)
            rows = []
        if isinstance(item, Tensor):
            yield _from_tensor(model, _sequences(item))
        elif isinstance(item, Mapping):
            yield _from_mapping(model, item)
        else:
            raise _unreadable(item)
    if rows:
        yield _padded(model, rows)


def _rows(model: Any, item: Any) -> list[list[int]] | None:
    """Read sequences without padding: texts or rows of a data set; None if it is neither."""
    if isinstance(item, str):
        return [text_row(model, item)]
    if not isinstance(item, Mapping):
        return None
    texts = item.get("text")
    if isinstance(texts, str):
        return [text_row(model, texts)]
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return [text_row(model, text) for text in texts]
    name = next((name for name in TOKEN_NAMES if name in item), "")
    ids, mask = item.get(name), item.get("attention_mask")
    if item.keys() <= {name, "attention_mask"}:
        ids, mask = _as_list(ids), _as_list(mask)
    if _is_list_of_ints(ids):
        return [_unpadded(ids, mask)]
    if not isinstance(ids, list) or not all(map(_is_list_of_ints, ids)):
        return None
    masks = mask if isinstance(mask, list) and len(mask) == len(ids) else [None] * len(ids)
    return [_unpadded(*pair) for pair in zip(ids, masks, strict=True)]


def _as_list(value: Any) -> Any:
    """Turn one sequence of whole numbers into a list; what is anything else stays what it is."""
    is_one = isinstance(value, Tensor) and value.dim() == 1 and value.dtype in _WHOLE
    return value.tolist() if is_one else value


def _is_list_of_ints(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(entry, int) for entry in value)


def _unpadded(ids: list[int], mask: Any) -> list[int]:
    if not _is_list_of_ints(mask):
        return list(ids)
    if len(mask) != len(ids):
        raise DataError(f"Needed one mask entry per token; found {len(mask)} for {len(ids)}.")
    return [token for token, kept in zip(ids, mask, strict=True) if kept]


def _padded(model: Any, rows: list[list[int]]) -> Batch:
    if not all(rows):
        raise DataError("One of the sequences holds no token, or masks all that it holds.")
    width = max(len(row) for row in rows)
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None) or 0
    tokens = torch.tensor(
        [row + [pad] * (width - len(row)) for row in rows], device=device_of(model)
    )
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    mask = torch.arange(width, device=tokens.device) < lengths[:, None]
    kwargs = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    _check_vocabulary(model, tokens)
    return Batch(tokens, kwargs, tokens=tokens, non_padding=mask)


def _from_tensor(model: Any, tensor: Tensor, name: str = "input") -> Batch:
    if tensor.numel() == 0:
        raise DataError(f"A batch of shape {list(tensor.shape)} holds nothing.")
    if name in TOKEN_NAMES and main_input_name(model) == "input_ids":
        _check_whole(tensor)
    moved = tensor.to(device_of(model))
    tokens = moved if not moved.is_floating_point() and moved.dim() == 2 else None
    if tokens is not None:
        _check_vocabulary(model, tokens)
    return Batch(moved, {}, tokens=tokens)


def _sequences(tensor: Tensor) -> Tensor:
    """Take one sequence for a batch of one."""
    return tensor[None] if tensor.dim() < 2 else tensor


def _from_mapping(model: Any, item: Mapping[str, Any]) -> Batch:
    device = device_of(model)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in item.items()}
    names = dict.fromkeys((*INPUT_NAMES, main_input_name(model) or "input"))
    name = next((name for name in names if name in moved), None)
    if name is None or not isinstance(moved[name], Tensor):
        kind = "" if name is None else f", and {name} is a {type(moved[name]).__name__}"
        raise DataError(
            f"A batch as a dict needs the model's input as a tensor under one of "
            f"{', '.join(names)}; found the keys "
            f"{', '.join(map(str, item)) or 'none'}{kind}."
        )
    plain = _from_tensor(model, _sequences(moved.pop(name)), name)
    for other in _OF_SEQUENCES:
        if isinstance(moved.get(other), Tensor):
            moved[other] = _sequences(moved[other])
    decoder = moved.get("decoder_input", moved.get("decoder_input_ids"))
    if isinstance(decoder, Tensor):
        _check_whole(decoder)
    return Batch(
        plain.inputs,
        moved,
        tokens=plain.tokens,
        non_padding=as_mask(moved.get("attention_mask", moved.get("one_zero_attention_mask"))),
        decoder_tokens=decoder,
        decoder_non_padding=as_mask(moved.get("decoder_attention_mask")),
    )


def _unreadable(data: object) -> DataError:
    alone = (
        " A batch goes into a list: [batch]; of several data sets choose one, data['train'] say."
        if isinstance(data, Mapping)
        else ""
    )
    return DataError(
        "Data is a token tensor [batch, position], a list of texts, an iterable of batches "
        "(tensors or dicts of the model's arguments) or a data set with a column text, tokens or "
        f"input_ids; found {type(data).__name__}.{alone}"
    )


def _check_whole(tokens: Tensor) -> None:
    """Raise a DataError unless these are whole numbers."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DataError(
            f"Token ids are whole numbers (torch.long); found a tensor of {tokens.dtype}."
        )


def _check_vocabulary(model: Any, tokens: Tensor) -> None:
    """Raise a DataError if a token is not in the model's vocabulary."""
    size = vocabulary_size(model)
    low, high = int(tokens.min()), int(tokens.max())
    wrong = low if low < 0 else high
    if size > 0 and not 0 <= wrong < size:
        raise DataError(
            f"Token ids of this model lie between 0 and {size - 1}; found {wrong}. Was the data "
            "tokenised for another model?"
        )
