"""What counts as data: token tensors, texts, or batches of a model's own arguments.

Everything that runs a model over data reads it through :func:`batches`, so all of it takes the
same forms and refuses the same mistakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

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
    decoder_tokens: Int[Tensor, "batch position"] | None = None
    decoder_real: Bool[Tensor, "batch position"] | None = None

    def run(self, model: Any, **kwargs: Any) -> Any:
        """Run the model on this batch."""
        return model(self.inputs, **{**self.kwargs, **kwargs})

    @property
    def size(self) -> int:
        """The number of sequences."""
        return int(self.inputs.shape[0])


def batches(model: Any, data: Data, batch_size: int = 8) -> Iterator[Batch]:
    """Read data batch by batch.

    Args:
        model: The model that will run; its tokenizer reads texts.
        data: A token tensor ``[batch, position]`` (cut into batches), one text or a list of texts
            (tokenised, cut to the context, padded on the right and masked), or an iterable of
            batches, each a tensor or a dict of the model's own forward arguments (``input``,
            ``attention_mask``, ...).
        batch_size: Sequences in a batch, for tokens and texts.

    Raises:
        DataError: The data is empty, or is or holds something that is none of these.

    Example:
        >>> import sat_lens as sl
        >>> [b.size for b in batches(sl.load_model("demo"), ["import os", "x = 1"], batch_size=1)]
        [1, 1]
    """
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
        DataError: The texts fill not even one window.
    """
    tokenizer = _tokenizer(model)
    bos = getattr(tokenizer, "bos_token_id", None)
    width = context - (bos is not None)
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
        whole = data[None] if data.dim() == 1 else data
        for part in whole.split(batch_size):
            yield _from_tensor(model, part)
    elif isinstance(data, str):
        yield from _from_texts(model, [data], batch_size)
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise _unreadable(data)
    else:
        yield from _from_items(model, data, batch_size)


def _from_items(model: Any, items: Iterable[Any], batch_size: int) -> Iterator[Batch]:
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            texts.append(item)
            if len(texts) == batch_size:
                yield from _from_texts(model, texts, batch_size)
                texts = []
        elif isinstance(item, Tensor):
            yield _from_tensor(model, item[None] if item.dim() == 1 else item)
        elif isinstance(item, Mapping):
            yield _from_mapping(model, item)
        else:
            raise _unreadable(item)
    if texts:
        yield from _from_texts(model, texts, batch_size)


def _from_texts(model: Any, texts: Sequence[str], batch_size: int) -> Iterator[Batch]:
    tokenizer = _tokenizer(model)
    if not all(text.strip() for text in texts):
        raise DataError("One of the texts is empty: every text needs at least one token.")
    context = int(getattr(model.cfg, "n_ctx", 0) or 0)
    rows = [tokenizer(text, verbose=False)["input_ids"][: context or None] for text in texts]
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        rows = [row if row[:1] == [bos] else [bos, *row][: context or None] for row in rows]
    for start in range(0, len(rows), batch_size):
        yield _padded(model, rows[start : start + batch_size])


def _padded(model: Any, rows: list[list[int]]) -> Batch:
    width = max(len(row) for row in rows)
    pad = getattr(_tokenizer(model), "pad_token_id", None) or 0
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=_device(model))
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    real = torch.arange(width, device=tokens.device) < lengths[:, None]
    kwargs = {} if bool(real.all()) else {"attention_mask": real.long()}
    return Batch(tokens, kwargs, tokens=tokens, real=real)


def _from_tensor(model: Any, tensor: Tensor) -> Batch:
    if tensor.numel() == 0:
        raise DataError(f"A batch of shape {list(tensor.shape)} holds nothing.")
    moved = tensor.to(_device(model))
    tokens = moved if not moved.is_floating_point() and moved.dim() == 2 else None
    return Batch(moved, {}, tokens=tokens)


def _from_mapping(model: Any, item: Mapping[str, Any]) -> Batch:
    device = _device(model)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in item.items()}
    name = next((name for name in _INPUT_NAMES if name in moved), None)
    if name is None or not isinstance(moved[name], Tensor):
        raise DataError(
            f"A batch as a dict needs the model's input under one of {', '.join(_INPUT_NAMES)}; "
            f"found the keys {', '.join(map(str, item)) or 'none'}."
        )
    inputs = moved.pop(name)
    plain = _from_tensor(model, inputs)
    decoder = moved.get("decoder_input", moved.get("decoder_input_ids"))
    return Batch(
        inputs,
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
    return tokenizer


def _device(model: Any) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _unreadable(data: object) -> DataError:
    return DataError(
        "Data is a token tensor [batch, position], a list of texts, or an iterable of batches "
        f"(tensors or dicts of the model's arguments); found {type(data).__name__}."
    )
