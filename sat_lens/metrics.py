"""Metrics of logits that say which positions they read.

A metric is any function ``metric(logits) -> scalar``, as in TransformerLens. Those here also keep
one value per prompt (``.per_prompt``) and carry ``.positions``, the query positions that they
read; whoever runs many forward passes can then leave the logits of all others out.

When not to use it: with a metric of your own there is nothing to import from here; pass the
function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sat_lens.errors import ArgumentError, NonFiniteError


@dataclasses.dataclass(frozen=True, eq=False)
class LogitDifference:
    """The logit of the right answer minus that of the wrong one, at one position."""

    answer: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    position: int = -1

    @property
    def positions(self) -> list[int]:
        """The query positions that are read."""
        return [self.position]

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        """Give one value per prompt, in nats."""
        at = logits[:, self.position]
        answer, wrong = (t.to(at.device).expand(len(at)) for t in (self.answer, self.wrong))
        return (at.gather(1, answer[:, None]) - at.gather(1, wrong[:, None])).squeeze(1)

    def __call__(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, ""]:
        """Give the mean over prompts."""
        return self.per_prompt(logits).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class NextTokenLoss:
    """The mean cross-entropy of the next token, in nats; padding counts nothing."""

    tokens: Int[Tensor, "batch position"]
    real: Tensor | None = None

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        """Give the mean over the positions of each prompt."""
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            self.tokens[:, 1:].flatten().to(logits.device),
            reduction="none",
        ).view(self.tokens.shape[0], -1)
        real = self._real(losses)
        return (losses * real).sum(1) / real.sum(1)

    def __call__(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, ""]:
        """Give the mean over prompts, each weighing the same."""
        return self.per_prompt(logits).mean()

    def _real(self, losses: Tensor) -> Tensor:
        if self.real is None:
            return torch.ones_like(losses)
        both = self.real[:, 1:] & self.real[:, :-1]
        return both.to(losses)


@dataclasses.dataclass(frozen=True, eq=False)
class KLToSoft:
    """The divergence KL(soft || changed) of the next-token distribution, in nats."""

    soft_logits: Float[Tensor, "batch position vocab"]
    positions: Sequence[int] | None = None

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        """Give the mean over the positions of each prompt."""
        at = slice(None) if self.positions is None else list(self.positions)
        soft = self.soft_logits[:, at].to(logits.device).float().log_softmax(-1)
        changed = logits[:, at].float().log_softmax(-1)
        return (soft.exp() * (soft - changed)).sum(-1).mean(1)

    def __call__(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, ""]:
        """Give the mean over prompts."""
        return self.per_prompt(logits).mean()


def logit_difference(
    answer: int | Sequence[int] | Tensor, wrong: int | Sequence[int] | Tensor, position: int = -1
) -> LogitDifference:
    """Make the metric "logit of the answer minus logit of the wrong answer".

    Args:
        answer: Token id of the right answer, one or one per prompt.
        wrong: Token id of the wrong answer, likewise.
        position: The query position that is read.

    Raises:
        ArgumentError: The two have different lengths.

    Example:
        >>> metric = logit_difference(answer=1, wrong=0)
        >>> float(metric(torch.tensor([[[0.5, 2.0]]])))
        1.5
    """
    first, second = (torch.as_tensor(t).reshape(-1) for t in (answer, wrong))
    if len(first) != len(second):
        raise ArgumentError(
            f"Needed as many wrong answers as right ones; found {len(second)} and {len(first)}."
        )
    return LogitDifference(first, second, position)


def next_token_loss(
    tokens: Int[Tensor, "batch position"], attention_mask: Tensor | None = None
) -> NextTokenLoss:
    """Make the metric "mean next-token loss on these tokens".

    Example:
        >>> round(float(next_token_loss(torch.tensor([[0, 1]]))(torch.zeros(1, 2, 4))), 4)
        1.3863
    """
    return NextTokenLoss(tokens, None if attention_mask is None else attention_mask.bool())


def kl_to_soft(
    soft_logits: Float[Tensor, "batch position vocab"], positions: Sequence[int] | None = None
) -> KLToSoft:
    """Make the metric "divergence from these soft logits", at all positions or the given ones.

    Example:
        >>> logits = torch.tensor([[[1.0, 2.0]]])
        >>> float(kl_to_soft(logits)(logits))
        0.0
    """
    return KLToSoft(soft_logits.detach(), positions)


def metric_value(metric: Callable[[Any], Any], logits: Any) -> float:
    """Call a metric and check that it gives one finite number.

    Raises:
        ArgumentError: It gives something else than one number.
        NonFiniteError: The number is NaN or infinite.
    """
    value = metric(logits)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ArgumentError(
                f"A metric must give a scalar; {metric!r} gave shape {list(value.shape)}. Take its "
                "mean over prompts."
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"A metric must give a scalar; {metric!r} gave {type(value).__name__}.")
    if not math.isfinite(value):
        raise NonFiniteError(f"The metric {metric!r} gave {value}. Check what it divides by.")
    return float(value)
