"""Read data of every form batch by batch."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sat_lens._checks import check_count, is_count
from sat_lens.data.batch import Batch
from sat_lens.data.padding import (
    WHOLE,
    amount_of,
    checked_mask,
    mask_arguments,
    padded_by,
    padding_shown,
    say_padding,
    with_masks,
)
from sat_lens.data.texts import check_text, read_tokenizer, text_row, tokenizer_of
from sat_lens.errors import DataError
from sat_lens.models import (
    context_length,
    device_of,
    main_input_name,
    vocabulary_size,
    wrapped_model,
)

_log = logging.getLogger(__name__)

Data = Tensor | str | Iterable[Any]
TOKEN_NAMES = ("input", "input_ids", "tokens")
INPUT_NAMES = (*TOKEN_NAMES, "pixel_values", "input_values")
# The label of what no loss counts.
IGNORED = -100
_OF_SEQUENCES = (
    "attention_mask",
    "decoder_input",
    "decoder_input_ids",
    "decoder_attention_mask",
)


def batches(
    model: Any,
    data: Data,
    batch_size: int = 8,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> Iterator[Batch]:
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
        attention_mask: Which tokens of a token tensor are no padding (1) and which are (0). None
            takes for padding what rows begin or end with of the tokenizer's pad token, on one side,
            and says so in a warning.
        tokenizer: A tokenizer or its directory, in the place of the model's own.

    A text or a row of tokens that is longer than the model's context is cut at its end; how many
    were cut, and how many tokens went, is logged as a warning when the data has been read. Batches
    and token tensors are not cut; that they are longer than the context is logged once.

    Raises:
        DataError: The data is empty, or is or holds something that is none of these, or a token
            is not in the model's vocabulary; or it cannot be told what is padding.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.data import batches
        >>> [b.size for b in batches(sl.load_model("demo"), ["import os", "x = 1"], batch_size=1)]
        [1, 1]
    """
    check_count("batch_size", batch_size, error=DataError)
    reading = _Reading(model, read_tokenizer(tokenizer), batch_size)
    count, context = 0, context_length(model)
    try:
        for batch in _read(reading, data, attention_mask):
            count += 1
            length = 0 if batch.tokens is None else batch.tokens.shape[1]
            if 0 < context < length:
                _log.warning(
                    "Sequences of %d tokens are longer than the model's context of %d. Models with "
                    "a table of positions fail beyond it; others attend at distances that they "
                    "were never trained on. Pass tokens[:, :%d], or shorter sequences.",
                    length,
                    context,
                    context,
                )
                context = 0  # said once
            yield batch
    finally:
        say_padding(reading.inferred)
        _say_cuts(reading.cuts)
    if count == 0:
        raise DataError("The data is empty: at least one sequence is needed.")


def read_batch(
    model: Any,
    inputs: Data | Mapping[str, Any],
    name: str = "inputs",
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> Batch:
    """Read what is to be run as one batch: a batch alone, or data that fit into one.

    Args:
        model: The model that will run.
        inputs: Data as for :func:`batches`, or one dict of the model's own arguments.
        name: What messages call it.
        attention_mask, tokenizer: As for :func:`batches`.

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
    reading: dict[str, Any] = {"attention_mask": attention_mask, "tokenizer": tokenizer}
    found = list(batches(model, data, batch_size=max(size, 1), **reading))
    if len(found) != 1:
        raise DataError(
            f"Needed one batch of prompts, and {name} holds {len(found)}. Put them into one tensor "
            "or dict, or take one after the other."
        )
    return found[0]


def read_call(
    model: Any, inputs: Any, arguments: Mapping[str, Any], tokenizer: Any = None
) -> tuple[Any, dict[str, Any], Tensor | None, Tensor | None]:
    """Read one call of a model, as it will be made: what is refused in data is refused here.

    Texts are left to the model, unless there is another tokenizer.

    Args:
        model: A TransformerLens model.
        inputs: Its main input.
        arguments: The other arguments of its forward pass.
        tokenizer: In the place of the model's own.

    Returns:
        The input and the other arguments; then False at padding of the input, and of what the
        logits are of. None stands for no padding.

    Raises:
        DataError: The model cannot read the input, or it cannot be told what is padding.
    """
    if _are_texts(inputs) and tokenizer is not None:
        texts = [inputs] if isinstance(inputs, str) else inputs
        (batch,) = batches(model, texts, len(texts), tokenizer=tokenizer)
        inputs, arguments = batch.inputs, {**batch.kwargs, **arguments}
    check_input(model, inputs, arguments)
    if _are_texts(inputs):
        # The model itself cuts them, without a word.
        _say_cuts(_beyond_context(model, [inputs] if isinstance(inputs, str) else inputs))
    inferred: Counter[str] = Counter()
    rows = _sequences(inputs) if isinstance(inputs, Tensor) else inputs
    arguments, mask, of_decoder = with_masks(
        model, rows, arguments, read_tokenizer(tokenizer), inferred
    )
    say_padding(inferred)
    if mask is None and isinstance(inputs, list) and len(inputs) > 1:
        mask = padded_by(model, inputs, arguments)
    has_decoder = {"decoder_input", "decoder_input_ids"} & arguments.keys()
    return inputs, arguments, mask, of_decoder if has_decoder else mask


def _beyond_context(model: Any, texts: list[str]) -> list[int]:
    """Count the tokens of each text that is longer than the model's context, beyond it."""
    context = context_length(model)
    # No token stands for less than a byte.
    long = [text for text in texts if 0 < context <= len(text.encode())]
    beyond = (len(text_row(model, text)) - context for text in long)
    return [count for count in beyond if count > 0]


def _say_cuts(cuts: list[int]) -> None:
    if cuts:
        _log.warning(
            "%d of the texts were longer than the model's context and were cut at their end "
            "(%d tokens in all). sat_lens.data.text_windows keeps all of a text.",
            len(cuts),
            sum(cuts),
        )


def check_input(model: Any, inputs: Any, arguments: Mapping[str, Any]) -> None:
    """Raise a DataError unless a model can read its main input: texts or a tensor."""
    if _are_texts(inputs):
        for text in [inputs] if isinstance(inputs, str) else inputs:
            check_text(tokenizer_of(model), text)
        return
    if not isinstance(inputs, Tensor):
        raise _unreadable(inputs)
    _check_not_empty(inputs)
    # Three dimensions are embeddings, and an inner layer takes what is no token.
    if inputs.dim() < 3 and arguments.get("start_at_layer") is None:
        _check_tokens(model, inputs)


def _are_texts(inputs: Any) -> bool:
    if isinstance(inputs, list) and inputs:
        return all(isinstance(text, str) for text in inputs)
    return isinstance(inputs, str)


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


@dataclasses.dataclass(frozen=True)
class _Reading:
    """How data are read, and what has to be said of it in the end.

    Attributes:
        cuts: How many tokens were cut off each sequence that was too long.
        inferred: What was taken for padding, counted.
    """

    model: Any
    tokenizer: Any
    batch_size: int
    cuts: list[int] = dataclasses.field(default_factory=list)
    inferred: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A sequence of tokens; ``bare`` if nothing said whether there is padding in it."""

    tokens: list[int]
    bare: bool = False


def _read(reading: _Reading, data: Data, mask: Tensor | None) -> Iterator[Batch]:
    if isinstance(data, Tensor):
        tensor = _sequences(data)
        _check_not_empty(tensor)
        # All rows together show what is padding, whatever the batches are.
        shown = _shown(reading, tensor) if mask is None else checked_mask(mask, tensor)
        for start in range(0, len(tensor), reading.batch_size):
            rows = slice(start, start + reading.batch_size)
            yield _from_tensor(reading, tensor[rows], None if shown is None else shown[rows])
        return
    if mask is not None:
        raise DataError(
            "attention_mask= is for a token tensor. Texts are padded and masked here; of a batch "
            f"give a dict with the key attention_mask. Found {type(data).__name__}."
        )
    if isinstance(data, str):
        yield from _from_items(reading, [data])
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unreadable(data)
    else:
        yield from _from_items(reading, data)


def _from_items(reading: _Reading, items: Iterable[Any]) -> Iterator[Batch]:
    context = context_length(reading.model)
    rows: list[_Row] = []
    for item in items:
        found = _rows(reading, item)
        for row in found or ():
            too_long = len(row.tokens) - context if context > 0 else 0
            if too_long > 0:
                reading.cuts.append(too_long)
                row = dataclasses.replace(row, tokens=row.tokens[:context])
            rows.append(row)
            if len(rows) == reading.batch_size:
                yield _padded(reading, rows)
                rows = []
        if found is not None:
            continue
        if rows:
            yield _padded(reading, rows)
            rows = []
        if isinstance(item, Tensor):
            tensor = _sequences(item)
            _check_not_empty(tensor)
            yield _from_tensor(reading, tensor, _shown(reading, tensor))
        elif isinstance(item, Mapping):
            yield _from_mapping(reading, item)
        else:
            raise _unreadable(item)
    if rows:
        yield _padded(reading, rows)


def _rows(reading: _Reading, item: Any) -> list[_Row] | None:
    """Read sequences without padding: texts or rows of a data set; None if it is neither."""

    def of_text(text: str) -> _Row:
        return _Row(text_row(reading.model, text, reading.tokenizer))

    if isinstance(item, str):
        return [of_text(item)]
    if not isinstance(item, Mapping):
        return None
    texts = item.get("text")
    if isinstance(texts, str):
        return [of_text(texts)]
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return [of_text(text) for text in texts]
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
    is_one = isinstance(value, Tensor) and value.dim() == 1 and value.dtype in WHOLE
    return value.tolist() if is_one else value


def _is_list_of_ints(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(entry, int) for entry in value)


def _unpadded(ids: list[int], mask: Any) -> _Row:
    if not _is_list_of_ints(mask):
        return _Row(list(ids), bare=True)
    if len(mask) != len(ids):
        raise DataError(f"Needed one mask entry per token; found {len(mask)} for {len(ids)}.")
    return _Row([token for token, kept in zip(ids, mask, strict=True) if kept])


def _padded(reading: _Reading, rows: list[_Row]) -> Batch:
    if not all(row.tokens for row in rows):
        raise DataError("One of the sequences holds no token, or masks all that it holds.")
    model = reading.model
    width = max(len(row.tokens) for row in rows)
    pad = getattr(reading.tokenizer or getattr(model, "tokenizer", None), "pad_token_id", None) or 0
    tokens = torch.tensor(
        [row.tokens + [pad] * (width - len(row.tokens)) for row in rows], device=device_of(model)
    )
    lengths = torch.tensor([len(row.tokens) for row in rows], device=tokens.device)
    mask = torch.arange(width, device=tokens.device) < lengths[:, None]
    for length in {len(row.tokens) for row in rows if row.bare}:
        # Rows that were padded together have one length.
        together = [i for i, row in enumerate(rows) if row.bare and len(row.tokens) == length]
        shown = _shown(reading, tokens[together, :length])
        if shown is not None:
            mask[together, :length] = shown
    _check_vocabulary(model, tokens)
    kwargs = {} if bool(mask.all()) else mask_arguments(model, "attention_mask", mask)
    return Batch(tokens, kwargs, tokens=tokens, non_padding=mask)


def _shown(reading: _Reading, tensor: Tensor) -> Tensor | None:
    """Return False where tokens are seen to be padding, and count it."""
    mask = padding_shown(reading.model, tensor, reading.tokenizer)
    if mask is not None:
        reading.inferred.update(amount_of(mask))
    return mask


def _from_tensor(
    reading: _Reading, tensor: Tensor, mask: Tensor | None = None, name: str = "input"
) -> Batch:
    model = reading.model
    if name in TOKEN_NAMES:
        _check_tokens(model, tensor)
    moved = tensor.to(device_of(model))
    is_tokens = not moved.is_floating_point() and moved.dim() == 2
    kept = None if mask is None else mask.to(moved.device)
    kwargs = {} if kept is None else mask_arguments(model, "attention_mask", kept)
    return Batch(moved, kwargs, tokens=moved if is_tokens else None, non_padding=kept)


def _sequences(tensor: Tensor) -> Tensor:
    """Take one sequence for a batch of one."""
    return tensor[None] if tensor.dim() < 2 else tensor


def _from_mapping(reading: _Reading, item: Mapping[str, Any]) -> Batch:
    model, device = reading.model, device_of(reading.model)
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
    inputs = _sequences(moved.pop(name))
    _check_not_empty(inputs)
    plain = _from_tensor(reading, inputs, name=name)
    for other in _OF_SEQUENCES:
        if isinstance(moved.get(other), Tensor):
            moved[other] = _sequences(moved[other])
    moved = _without_labels(model, moved)
    decoder = moved.get("decoder_input", moved.get("decoder_input_ids"))
    if isinstance(decoder, Tensor):
        _check_whole(decoder)
    moved, of_input, of_decoder = with_masks(
        model, plain.tokens, moved, reading.tokenizer, reading.inferred
    )
    return Batch(
        plain.inputs,
        moved,
        tokens=plain.tokens,
        non_padding=of_input,
        decoder_tokens=decoder,
        decoder_non_padding=of_decoder,
    )


def _without_labels(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave out the labels, of which a model would compute a loss of its own.

    A decoder that is given no input reads them, one position later, as it does in training.
    """
    rest = {name: value for name, value in arguments.items() if name != "labels"}
    labels = arguments.get("labels")
    shifted = getattr(wrapped_model(model), "prepare_decoder_input_ids_from_labels", None)
    has_input = {"decoder_input", "decoder_input_ids"} & rest.keys()
    if not isinstance(labels, Tensor) or shifted is None or has_input:
        return rest
    labels = _sequences(labels)
    rest["decoder_input_ids"] = shifted(labels=labels)
    known = torch.nn.functional.pad(labels[:, :-1] != IGNORED, (1, 0), value=True)
    return rest if bool(known.all()) else {"decoder_attention_mask": known.long(), **rest}


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


def _check_not_empty(tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise DataError(f"A batch of shape {list(tensor.shape)} holds nothing.")


def _check_tokens(model: Any, tensor: Tensor) -> None:
    """Raise a DataError unless a model can read this tensor as its main input."""
    if main_input_name(model) == "input_ids":
        _check_whole(tensor)
    if not tensor.is_floating_point() and tensor.dim() <= 2:
        _check_vocabulary(model, tensor)


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
