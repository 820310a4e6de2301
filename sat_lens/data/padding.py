"""Which positions are padding: as a mask says, as a model pads texts, or as the tokens show.

A run of the pad token at an end of a row is padding, but for the token next to the text where the
pad token is also the one that begins or ends texts. What cannot be told is an error that asks for
``attention_mask=``.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sat_lens._checks import is_lens_model
from sat_lens.errors import DataError
from sat_lens.models import wrapped_model

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASKS = ("attention_mask", "one_zero_attention_mask")
_DECODER_TOKENS = ("decoder_input", "decoder_input_ids")


def as_mask(mask: Any) -> Bool[Tensor, "batch position"] | None:
    """Return a mask of positions as bools; None for masks of other shapes, which mask pairs."""
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def checked_mask(
    mask: Any, tokens: Int[Tensor, "batch position"]
) -> Bool[Tensor, "batch position"]:
    """Return what a user gave as ``attention_mask=`` as bools, on the device of the tokens.

    Raises:
        DataError: It is no mask of these tokens, or leaves nothing of a row.
    """
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape != list(tokens.shape):
        raise DataError(
            f"attention_mask is a tensor of the shape of the tokens, {list(tokens.shape)}: 1 at "
            f"text, 0 at padding. Found {shape}."
        )
    kept: Tensor = mask.to(tokens.device).bool()
    if not bool(kept.any(1).all()):
        raise DataError("One of the sequences holds no token, or masks all that it holds.")
    return kept


def mask_arguments(
    model: Any, name: str, mask: Bool[Tensor, "batch position"]
) -> dict[str, Tensor]:
    """Return a mask as an argument of the model's forward pass, with the positions that it implies.

    A decoder's mask is left out where the model does not take it.
    """
    taken = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    names = (name,) if name.startswith("decoder") else _MASKS
    chosen = next((each for each in names if each in taken), name if takes_any else "")
    return ({chosen: mask.long()} if chosen else {}) | _position_ids(model, name, mask)


def _position_ids(model: Any, name: str, mask: Bool[Tensor, "batch position"]) -> dict[str, Tensor]:
    """Return positions that count no padding, for a plain model that would count it on the left.

    TransformerLens derives them by itself, and so does ``generate`` of transformers.
    """
    generates = getattr(model, "can_generate", None)
    if name != "attention_mask" or is_lens_model(model) or bool(mask[:, 0].all()):
        return {}
    if not callable(generates) or not generates():
        return {}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def with_masks(
    model: Any,
    inputs: Any,
    arguments: Mapping[str, Any],
    tokenizer: Any,
    inferred: Counter[str],
) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """Add to a call the masks that it leaves out and its tokens show.

    Args:
        model: The model that is called.
        inputs: Its main input.
        arguments: The other arguments of its forward pass.
        tokenizer: In the place of the model's own.
        inferred: Where what was taken for padding is counted.

    Returns:
        All arguments; then False at padding of the input, and of a decoder's own input.

    Raises:
        DataError: It cannot be told what is padding.
    """
    given = next((arguments[name] for name in _MASKS if arguments.get(name) is not None), None)
    of_decoder = arguments.get("decoder_attention_mask")
    called, masks = dict(arguments), {"attention_mask": given, "decoder_attention_mask": of_decoder}
    tokens = {
        "attention_mask": inputs,
        "decoder_attention_mask": next(
            (arguments[name] for name in _DECODER_TOKENS if name in arguments), None
        ),
    }
    # With a cached beginning, a mask is longer than the tokens.
    cached = any(name.startswith("past_k") for name in arguments)
    for name, mask in masks.items():
        if mask is not None or cached:
            continue
        in_decoder = name.startswith("decoder")
        shown = padding_shown(model, tokens[name], tokenizer, decoder=in_decoder)
        if shown is not None:
            masks[name] = shown
            inferred.update(amount_of(shown))
            called |= mask_arguments(model, name, shown)
    of_input, of_decoder = map(as_mask, masks.values())
    if of_input is not None and not cached:
        called = _position_ids(model, "attention_mask", of_input) | called
    return called, of_input, of_decoder


def amount_of(mask: Bool[Tensor, "batch position"]) -> dict[str, int]:
    """Return how many rows a mask has, how many of them are padded, and with how much."""
    padding = ~mask
    return {
        "rows": len(mask),
        "padded": int(padding.any(1).sum()),
        "positions": int(padding.sum()),
    }


def say_padding(inferred: Counter[str]) -> None:
    """Warn of what was taken for padding, if anything was; Python shows equal warnings once."""
    if inferred["padded"]:
        warnings.warn(
            f"{inferred['padded']} of {inferred['rows']} sequences begin or end in a run of the "
            f"pad token, which was taken for padding ({inferred['positions']} positions in all). "
            "If that is wrong, pass attention_mask=.",
            stacklevel=2,
        )


def padding_shown(
    model: Any, tokens: Any, tokenizer: Any = None, *, decoder: bool = False
) -> Bool[Tensor, "batch position"] | None:
    """Return False where rows of tokens are padded, by the pad token of the model's tokenizer.

    Args:
        model: The model that will read the tokens.
        tokens: ``[batch, position]``; anything else is not padded.
        tokenizer: In the place of the model's own.
        decoder: Whether a decoder with an input of its own reads them.

    Returns:
        None if nothing is padded, or there is no pad token.

    Raises:
        DataError: It cannot be told what is padding.
    """
    known = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    pad = getattr(known, "pad_token_id", None)
    is_tokens = isinstance(tokens, Tensor) and tokens.dtype in WHOLE and tokens.dim() == 2
    if not isinstance(pad, int) or not is_tokens or tokens.shape[1] < 2:
        return None
    config = getattr(wrapped_model(model), "config", None)
    begins = getattr(config, "decoder_start_token_id", None) if decoder else None
    return unpadded(
        tokens,
        pad,
        begins=pad in (begins, getattr(known, "bos_token_id", None)),
        ends=pad == getattr(known, "eos_token_id", None),
    )


def unpadded(
    tokens: Int[Tensor, "batch position"], pad: int, *, begins: bool, ends: bool
) -> Bool[Tensor, "batch position"] | None:
    """Return False at padding on one side of the rows; None if nothing is padded.

    Args:
        tokens: At least two positions.
        pad: The pad token.
        begins: Whether the pad token also begins texts (BOS). The last of a run at the beginning is
            then BOS, as in TransformerLens's ``get_attention_mask``.
        ends: Whether the pad token also ends texts (EOS). If all rows end in it, the first of each
            run is EOS. Where it also stands between texts, as in text that was packed into windows,
            single ones at the ends of rows are no padding.

    Raises:
        DataError: It cannot be told what is padding.

    Example:
        >>> import torch
        >>> unpadded(torch.tensor([[0, 0, 0, 5], [0, 5, 6, 7]]), 0, begins=True, ends=True)
        tensor([[False, False,  True,  True],
                [ True,  True,  True,  True]])
    """
    is_pad = tokens == pad
    if not bool(is_pad[:, [0, -1]].any()):
        return None
    length = tokens.shape[1]
    before = is_pad.long().cumprod(1).sum(1)
    after = is_pad.flip(1).long().cumprod(1).sum(1)
    if bool((before == length).any()):
        raise _doubt("a row holds the pad token alone")
    (least, most), (least_after, most_after) = (
        (int(runs.min()), int(runs.max())) for runs in (before, after)
    )
    between = (begins or ends) and bool((is_pad.sum(1) > before + after).any())
    if between and most <= 1 + begins and most_after <= 1:
        return None
    if begins and least == 0 < most:
        raise _doubt("the pad token is also BOS, and only some rows begin with it")
    if ends and least_after > 1:
        raise _doubt("the pad token is also EOS, and every row ends in several of it")
    before, after = before - int(begins and most > 0), after - int(ends and least_after)
    if not bool((before + after).any()):
        return None
    if bool(before.any()) and bool(after.any()):
        raise _doubt("rows begin in runs of the pad token, and rows end in them")
    places = torch.arange(length, device=tokens.device)
    return (places >= before[:, None]) & (places < length - after[:, None])


def _doubt(why: str) -> DataError:
    return DataError(
        f"It cannot be told which tokens are padding: {why}. Pass attention_mask= (in a dict, the "
        "key attention_mask, or decoder_attention_mask for a decoder): 1 at text, 0 at padding, "
        "torch.ones_like(tokens) if nothing is padded."
    )


def padded_by(
    model: Any, texts: list[str], arguments: Mapping[str, Any]
) -> Bool[Tensor, "batch position"]:
    """Return False where a model pads the shorter ones of several texts."""
    named = {name: arguments[name] for name in ("prepend_bos",) if name in arguments}
    lengths = torch.tensor([model.to_tokens(text, **named).shape[-1] for text in texts])[:, None]
    places = torch.arange(int(lengths.max()))
    side = arguments.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    return places.flip(0) < lengths if side == "left" else places < lengths
