"""One forward pass: the model's arguments, and what is known of their positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sat_lens.models import placeholder_tokens


@dataclasses.dataclass(frozen=True)
class Batch:
    """One forward pass: the model's arguments and what is known of its positions.

    ``tokens`` and ``non_padding`` describe the input's positions, ``decoder_tokens`` and
    ``decoder_non_padding`` those of a decoder with an input of its own. A mask is False at padding.
    Each is None where the arguments do not say.
    """

    inputs: Tensor
    kwargs: dict[str, Any]
    tokens: Int[Tensor, "batch position"] | None = None
    non_padding: Bool[Tensor, "batch position"] | None = None
    decoder_tokens: Int[Tensor, "batch decoder_position"] | None = None
    decoder_non_padding: Bool[Tensor, "batch decoder_position"] | None = None

    def run(self, model: Any, **kwargs: Any) -> Any:
        """Run the model on this batch."""
        return model(self.inputs, **{**self.kwargs, **kwargs})

    @property
    def output_tokens(self) -> Tensor | None:
        """The tokens behind the logits: the decoder's where it has an input of its own."""
        return self.tokens if self.decoder_tokens is None else self.decoder_tokens

    @property
    def output_non_padding(self) -> Tensor | None:
        """Which of these positions are no padding."""
        return self.non_padding if self.decoder_tokens is None else self.decoder_non_padding

    def with_output_tokens(self, tokens: Int[Tensor, "batch position"]) -> Batch:
        """The same batch with other tokens behind the logits."""
        if self.decoder_tokens is None:
            return dataclasses.replace(self, inputs=tokens, tokens=tokens)
        name = "decoder_input" if "decoder_input" in self.kwargs else "decoder_input_ids"
        return dataclasses.replace(
            self, kwargs={**self.kwargs, name: tokens}, decoder_tokens=tokens
        )

    @property
    def size(self) -> int:
        """The number of sequences."""
        return int(self.inputs.shape[0])


_PROBE_TOKENS = 16


def predicts_next(model: Any, batch: Batch) -> bool:
    """Whether the model's logits predict the next token, so that a next-token loss has a meaning.

    Logits that depend on later tokens have seen what they would predict (a masked language model).
    Two runs are compared before the middle of each text that differ in the tokens from there on; a
    few tokens of one sequence are enough, where the batch is made of tokens alone. Tokens in whose
    place the model puts images or sounds are left as they are.

    Example:
        >>> import torch
        >>> from sat_lens.data import Batch, predicts_next
        >>> import sat_lens as sl
        >>> model, tokens = sl.load_model("demo"), torch.tensor([[0, 5, 6, 7]])
        >>> predicts_next(model, Batch(tokens, {}, tokens=tokens))
        True
    """
    batch = _start_of(batch)
    tokens = batch.output_tokens
    if tokens is None or tokens.shape[1] < 2:
        return False
    mask = batch.output_non_padding
    text = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device)
    later = text.cumsum(1) > text.sum(1, keepdim=True) // 2
    earlier = text & ~later
    changed = torch.where(tokens > 0, tokens - 1, 1)
    other = torch.where(text & later, changed, tokens)
    fixed = torch.tensor(placeholder_tokens(model), dtype=tokens.dtype, device=tokens.device)
    other = torch.where(torch.isin(tokens, fixed) | torch.isin(other, fixed), tokens, other)
    if torch.equal(tokens, other) or not bool(earlier.any()):
        return False
    with torch.no_grad():
        runs = [batch.with_output_tokens(each).run(model) for each in (tokens, other)]
    if not all(isinstance(run, Tensor) and run.shape[:2] == tokens.shape for run in runs):
        return False
    first, second = (run[earlier.to(run.device)] for run in runs)
    # A mixture of experts rounds a token differently beside other tokens.
    tolerance = min(64 * torch.finfo(first.dtype).eps, 0.05)
    size = first.nan_to_num(0.0, 0.0, 0.0).abs().max()
    # NaN, and the -inf of tokens that a model never gives, differ from themselves.
    return bool((first - second).nan_to_num().abs().max() <= tolerance * size)


def _start_of(batch: Batch) -> Batch:
    """Return the first tokens of the first sequence; the batch itself where it cannot be cut."""
    named = batch.kwargs.keys()
    if batch.tokens is None or named - {"attention_mask"} or (named and batch.non_padding is None):
        return batch
    if batch.non_padding is not None and not bool(batch.non_padding[0, :_PROBE_TOKENS].all()):
        return batch
    tokens = batch.tokens[:1, :_PROBE_TOKENS]
    return Batch(tokens, {}, tokens=tokens)
