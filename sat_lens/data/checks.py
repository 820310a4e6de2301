"""What tensors of tokens have to be for a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_lens.errors import DataError

TOKEN_NAMES = ("input", "input_ids", "tokens")


def reads_tokens(model: Any) -> bool:
    """Say whether a model's input are tokens, and not pixels or waves."""
    original = getattr(model, "original_model", model)
    # What is neither of TransformerLens nor of Hugging Face may read anything.
    usual = "input_ids" if hasattr(model, "hook_dict") else ""
    return getattr(original, "main_input_name", usual) == "input_ids"


def check_whole(tokens: Tensor) -> None:
    """Raise a DataError unless these are whole numbers."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DataError(
            f"Token ids are whole numbers (torch.long); found a tensor of {tokens.dtype}."
        )


def check_vocabulary(model: Any, tokens: Tensor) -> None:
    """Raise a DataError if a token is not in the model's vocabulary."""
    size = int(getattr(getattr(model, "cfg", None), "d_vocab", 0) or 0)
    low, high = int(tokens.min()), int(tokens.max())
    wrong = low if low < 0 else high
    if size > 0 and not 0 <= wrong < size:
        raise DataError(
            f"Token ids of this model lie between 0 and {size - 1}; found {wrong}. Was the data "
            "tokenised for another model?"
        )
